"""Search by latent distance: the exact answer is the exact one, the approximate one nearly, and what was planted is found."""

import importlib.util
import itertools
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from sensors.errors import UsageError
from sensors.files import check_folder, commit_folder
from worldmodel import similar
from worldmodel.export.verify import export
from worldmodel.tools.cli import main

SECOND = 1_000_000_000


def moments(vectors, log, stamps_s):
    names = tuple(f"made/{i:03d}" for i in range(int(max(log)) + 1))
    stamps, vectors = (np.asarray(stamps_s) * SECOND).astype(np.int64), similar.standardised(np.asarray(vectors, np.float32))
    return similar.Moments(names, np.asarray(log), stamps, vectors, (), np.zeros(len(log), int), "0" * 64)


@pytest.fixture(scope="module")
def many():
    """4000 frames in 100 logs, clustered as latents of drives are."""
    rng = np.random.default_rng(3)
    log = np.repeat(np.arange(100), 40)
    street = rng.normal(size=(12, 32))
    walk = np.cumsum(rng.normal(size=(100, 40, 32)) * 0.1, 1) + street[rng.integers(12, size=100)][:, None]
    return moments(walk.reshape(-1, 32), log, np.tile(np.arange(40) * 0.5, 100))


def by_hand(m, at, count):
    """The same rule, one pair at a time."""
    order = sorted(range(len(m.log)), key=lambda i: (np.sqrt(np.mean((m.vectors[i] - m.vectors[at]) ** 2)), m.log[i], m.stamps_ns[i]))
    hits = []
    for i in order:
        if all(m.log[i] != m.log[j] or abs(m.stamps_ns[i] - m.stamps_ns[j]) >= 2 * SECOND for j in (at, *hits)):
            hits.append(i)
    return hits[:count]


@pytest.mark.parametrize("at", [0, 39, 2017, 3999])
def test_exact_is_brute_force(many, at):
    hits = similar.nearest(many, at, 25)
    assert [hit.at for hit in hits] == by_hand(many, at, 25)
    assert all(a.distance <= b.distance for a, b in itertools.pairwise(hits))
    assert hits[0].distance == pytest.approx(np.sqrt(np.mean((many.vectors[hits[0].at] - many.vectors[at]) ** 2)), rel=1e-5)


def test_neighbours_in_time_are_one_moment(many):
    hits = similar.nearest(many, 100, 500)
    for of_log in range(100):
        stamps = sorted(int(many.stamps_ns[hit.at]) for hit in hits if many.log[hit.at] == of_log) + (
            [int(many.stamps_ns[100])] if of_log == many.log[100] else []
        )
        assert (np.diff(sorted(stamps)) >= 2 * SECOND).all()


def test_a_dimension_that_never_changes_counts_nothing():
    m = moments([[0, 5, 1], [1, 5, 1.5], [2, 5, 90]], [0, 1, 2], [0, 0, 0])
    assert np.isfinite(m.vectors).all() and (m.vectors[:, 1] == 0).all() and [h.at for h in similar.nearest(m, 0, 9)] == [1, 2]


@pytest.mark.skipif(not importlib.util.find_spec("usearch"), reason="usearch (extra `search`) is not installed")
def test_approximate_finds_nearly_all(many, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    index = similar.approximate_index(many)
    asked = range(0, 4000, 100)
    found = [len({h.at for h in similar.nearest(many, at, 10)} & {h.at for h in similar.nearest(many, at, 10, index)}) / 10 for at in asked]
    assert np.mean(found) > 0.9
    (kept,) = tmp_path.rglob("*.usearch")
    before = kept.stat().st_mtime_ns
    again = similar.approximate_index(many)
    assert kept.stat().st_mtime_ns == before and [h.at for h in similar.nearest(many, 7, 10, again)] == [
        h.at for h in similar.nearest(many, 7, 10, index)
    ]
    few = moments(many.vectors[:50], many.log[:50], many.stamps_ns[:50] / SECOND)
    assert similar.nearest(few, 3, 40, similar.approximate_index(few)) == similar.nearest(few, 3, 40), "asks on until every moment was seen"


def test_without_the_extra_the_error_names_it(many, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "usearch", None)
    with pytest.raises(UsageError, match=r"driving-worldmodel\[search\]"):
        similar.approximate_index(many)


@pytest.fixture(scope="module")
def folder(run, parts, tmp_path_factory):
    """Features of the simulated streets, one of them a second time under another name."""
    root = tmp_path_factory.mktemp("similar")
    assert export(run, "features", root / "once", parts)["passed"]
    manifest = check_folder(root / "once")
    content = {entry["path"]: (root / "once" / entry["path"]).read_bytes() for entry in manifest["files"]}
    table = pq.read_table(root / "once" / manifest["first"])
    import pyarrow as pa

    renamed = table.set_column(0, "log", pa.array(["made/again"] * len(table)))
    pq.write_table(renamed, root / "again.parquet")
    content["features/00099-made@again.parquet"] = (root / "again.parquet").read_bytes()
    commit_folder(root / "twice", content, {k: v for k, v in manifest.items() if k not in ("files", "digest")})
    return root / "twice"


def test_a_planted_duplicate_is_found_first(folder, parts, capsys):
    log = parts[0].log.id
    stamp = int(parts[0].log.sweep_stamps_ns[parts[0].log.reference_lidar][-2])
    assert main(["similar", str(folder), "--clip", f"{log}@{stamp}", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows"][0] == {"rank": 1, "clip": f"made/again@{stamp}", "distance": 0.0}
    assert all(row["distance"] > 0 for row in said["rows"][1:]) and not [row for row in said["rows"] if row["clip"].startswith(log)]
    assert main(["similar", str(folder), "--clip", f"made/again@{stamp}", "--count", "1"]) == 0
    assert f"{log}@{stamp}" in capsys.readouterr().out


def test_the_page_shows_each_moment_and_fetches_nothing(folder, parts, store, tmp_path, capsys):
    stamp = int(parts[0].log.sweep_stamps_ns[parts[0].log.reference_lidar][-1])
    words = ["similar", str(folder), "--clip", f"{parts[0].log.id}@{stamp}", "--count", "3", "--data", str(store), "-o", str(tmp_path / "page.html")]
    assert main(words) == 0 and "made/again" in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/png") == 4 and not re.search("https?:|src=.(?!data:image/png)", text)
    assert text.count("(latent)</figcaption>") == 1, "only the log that is not in --data"
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


def test_what_is_not_there_is_named(folder, run, tmp_path, parts):
    moments = similar.read(folder)
    log, stamp = parts[0].log.id, int(moments.stamps_ns[0])
    with pytest.raises(UsageError, match=rf"the nearest is {log}@{stamp}"):
        moments.find(f"{log}@{stamp + 5}")
    for clip in ("made/never@5", "no", f"{log}@-5", f"{log}@x", f"{log}@{'9' * 40}", "@"):
        with pytest.raises(UsageError, match="give LOG@STAMP_NS with one of the 6 logs"):
            moments.find(clip)
    export(run, "torch", tmp_path / "torch", parts)
    with pytest.raises(UsageError, match="give one of `wm export --to features`"):
        similar.read(tmp_path / "torch")
    assert main(["similar", str(folder), "--clip", "x", "--data", "y"]) == 2
    assert main(["similar", str(folder), "--clip", f"{log}@{stamp}", "--count", "0"]) == 2


def test_a_flipped_bit_in_a_page_is_refused(folder, tmp_path, parts):
    from sensors.errors import WmError
    from sensors.files import entries_of

    manifest = check_folder(folder)
    name = manifest["first"]
    data = bytearray((folder / name).read_bytes())
    metadata = pq.ParquetFile(folder / name).metadata.row_group(0)
    column = next(metadata.column(i) for i in range(metadata.num_columns) if metadata.column(i).path_in_schema.startswith("summary"))
    data[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 9] ^= 8
    for entry in entries_of(manifest, "manifest"):
        (tmp_path / entry.path).parent.mkdir(exist_ok=True)
        (tmp_path / entry.path).write_bytes(bytes(data) if entry.path == name else (folder / entry.path).read_bytes())
    (tmp_path / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    with pytest.raises(WmError, match="not features as they were written"):
        similar.read(tmp_path)
