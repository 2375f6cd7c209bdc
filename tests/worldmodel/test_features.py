"""Latents per frame as Parquet: what a row says is so, and what was changed is noticed."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import worldmodel
from sensors.clips import clips_of
from sensors.data import Part
from sensors.errors import UsageError, WmError
from sensors.files import check_folder, commit_folder
from sensors.rays import history_of
from worldmodel.batches import clouds_of, joined, past_clouds
from worldmodel.export import features
from worldmodel.export.verify import export, verify
from worldmodel.tools.cli import main


@pytest.fixture(scope="module")
def handed(run, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "features"
    return folder, export(run, "features", folder, parts[:2])


@pytest.fixture(scope="module")
def table(handed):
    return pq.read_table(handed[0] / "features")


@pytest.fixture
def write(run, parts):
    """A function that writes features without reading them back."""
    trained = worldmodel.load(run)
    return lambda folder, data: features.export(trained, folder, {"licence": "CC0-1.0"}, None, data)


def map_of(row):
    return np.frombuffer(row["map"], "<f2").reshape(row["shape"])


def edited(folder, to, change, name="first"):
    """A copy in which a file's table was changed and the manifest agrees with it."""
    manifest = check_folder(folder)
    content = {entry["path"]: (folder / entry["path"]).read_bytes() for entry in manifest["files"]}
    path = to.parent / "changed.parquet"
    pq.write_table(change(pq.read_table(folder / manifest[name])), path)
    content[manifest[name]] = path.read_bytes()
    commit_folder(to, content, {k: v for k, v in manifest.items() if k not in ("files", "digest")})
    return to


def test_every_frame_with_a_full_past_has_a_row(handed, table, parts, run):
    m = worldmodel.load(run).config.model
    for part in parts[:2]:
        stamps = part.log.sweep_stamps_ns[part.log.reference_lidar]
        wanted = [s for s in stamps if s - stamps[0] >= (m.past - 1) / m.rate_hz * 1e9 - 1e6]
        assert [r["stamp_ns"] for r in table.to_pylist() if r["log"] == part.log.id] == wanted and len(wanted) >= 2
    folder, report = handed
    assert report["passed"] and report["unit"] == "frames" and report["loaded"] == report["tensors"] == report["expected"] == len(table)
    first, _, of = report["encoder_tensors"].partition(" of ")
    assert first == of and main(["verify", str(folder)]) == 0
    data = check_folder(folder)["data"]
    assert [row["log"] for row in data] == [p.log.id for p in parts[:2]] and [row["digest"] for row in data] == [p.digest for p in parts[:2]]


def test_a_row_is_what_the_encoder_says_and_where(table, parts, run):
    trained = worldmodel.load(run)
    clip = clips_of(parts[0].log)[0]
    row = next(r for r in table.to_pylist() if f"{r['log']}@{r['stamp_ns']}" == clip.id)
    points = clouds_of(joined(past_clouds(clip, history_of(clip), trained.config), trained.config), trained.config.encoder).points
    with torch.no_grad():
        whole = trained.model.encoder(clouds_of([points.numpy()], trained.config.encoder))[0].numpy()
    channels, height, width = whole.shape
    assert row["points"] == len(points) and row["shape"] == [channels, height // 4, width // 4]
    by_hand = whole.reshape(channels, height // 4, 4, width // 4, 4).mean((2, 4))
    np.testing.assert_allclose(map_of(row), by_hand, atol=2e-3, rtol=1e-3)

    np.testing.assert_allclose(np.reshape(row["world_from_ego"], (4, 4)), clip.past[-1].world_from_ego)
    lidar = parts[0].log.lidars[parts[0].log.reference_lidar]
    np.testing.assert_allclose(np.reshape(row["ego_from_map"], (4, 4)), lidar.ego_from_lidar, atol=1e-12)
    low, cell = (row["low_x"], row["low_y"]), row["cell_m"]
    fine = cell / 4
    at = np.floor((points[:, :2].numpy() - low) / fine).astype(int)
    ok = (
        ((at >= 0) & (at < (width, height))).all(1)
        & (points[:, 2].numpy() >= trained.config.encoder.low[2])
        & (points[:, 2].numpy() < trained.config.encoder.high[2])
    )
    cells = np.unique(at[ok][:, 1] * width + at[ok][:, 0])
    seen = whole.reshape(channels, -1)[:, cells]
    np.testing.assert_allclose(row["summary"], np.concatenate((seen.mean(1), seen.max(1))), atol=1e-4)


def test_a_cell_of_the_map_is_where_its_coordinates_say(run):
    """A post in an empty street: what it changes in the map lies around its place."""
    trained = worldmodel.load(run)
    encoder, layout = trained.model.encoder, features.layout_of(trained.model.encoder, trained.config)
    for x, y in ((18.0, -3.0), (-9.0, 15.0)):
        post = torch.tensor([[x + 0.1 * i, y, -1.5 + 0.1 * i, 0.5, 0.0] for i in range(20)])
        with torch.no_grad():
            changed, empty = (
                features.pooled_and_summary(c, encoder(clouds_of([c.numpy()], trained.config.encoder)), layout)[0] for c in (post, post[:0])
            )
        line, column = np.unravel_index(np.abs(changed - empty).sum(0).argmax(), changed.shape[1:])
        middle = layout["low"][0] + (column + 0.5) * layout["cell_m"], layout["low"][1] + (line + 0.5) * layout["cell_m"]
        assert np.abs(np.subtract(middle, (x, y))).max() <= layout["cell_m"], (middle, x, y)


def test_maps_that_do_not_divide_and_empty_clouds():
    bev = torch.arange(2 * 5 * 6, dtype=torch.float32).view(1, 2, 5, 6)
    layout = {"cell_before_m": 1.0, "low": [0.0, 0.0, -1.0], "high": [6.0, 5.0, 1.0]}
    pooled, summary = features.pooled_and_summary(torch.tensor([[5.5, 4.5, 0.0], [0.5, 0.5, 5.0]]), bev, layout)
    assert pooled.shape == (2, 2, 2) and pooled[0, 1, 1] == bev[0, 0, 4, 4:].mean() and summary.tolist() == [29.0, 59.0, 29.0, 59.0]
    _, summary = features.pooled_and_summary(torch.zeros(0, 3), bev, layout)
    assert summary.tolist() == [0, 0, 0, 0]


def test_ranges_are_kept_and_said_once(write, parts, tmp_path):
    stamps = parts[0].log.sweep_stamps_ns[parts[0].log.reference_lidar]
    half = Part(parts[0].log, int(stamps[2]), int(stamps[-1]), 1.0, parts[0].digest)
    write(tmp_path / "half", [half, half])
    found = pq.read_table(tmp_path / "half" / "features")["stamp_ns"].to_pylist()
    assert found and len(set(found)) == len(found) and min(found) >= stamps[2] + 8e8 - 1e6 and max(found) < stamps[-1]
    other = Part(parts[0].log, None, None, 1.0, "another")
    with pytest.raises(UsageError, match="twice, with different content"):
        write(tmp_path / "twice", [parts[0], other])
    with pytest.raises(UsageError, match="none of 1 logs has a frame"):
        write(tmp_path / "none", [Part(parts[0].log, int(stamps[-2]), None)])
    assert not list(tmp_path.glob("none*")) and not list(tmp_path.glob("tmp-*"))


def test_without_data_there_is_nothing_to_say(run, tmp_path, capsys):
    assert main(["export", str(run), "--to", "features", "-o", str(tmp_path / "out")]) == 2
    assert "--data D" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_strictest_licence_of_run_and_data_binds(write, parts, tmp_path):
    import dataclasses

    bound = Part(dataclasses.replace(parts[0].log, licence="CC BY-NC-SA 4.0"), digest=parts[0].digest)
    assert write(tmp_path / "out", [bound])["licence"] == "CC BY-NC-SA 4.0"


@pytest.mark.parametrize("column, change, kind", [
    ("summary", lambda v: [[x + 1e-3 for x in row] for row in v], "difference"),
    ("map", lambda v: [bytes(reversed(row)) for row in v], "difference"),
    ("map", lambda v: [np.roll(np.frombuffer(row, "<f2"), 1).tobytes() for row in v], "difference"),
    ("summary", lambda v: [[float("nan")] * len(v[0]), *v[1:]], "loaded"),
    (None, lambda t: t.slice(0, len(t) - 1), "tensors"),
    (None, lambda t: t.drop_columns(["world_from_ego"]), "mismatched"),
    (None, lambda t: t.replace_schema_metadata({}), None),
])  # fmt: skip
def test_changed_rows_are_noticed(handed, tmp_path, monkeypatch, column, change, kind):
    import pyarrow as pa

    sound = {"loaded": 1, "tensors": 1, "missing": [], "unexpected": [], "mismatched": [], "difference": 0.0}
    monkeypatch.setattr(features.standalone_folder, "prove", lambda folder: dict(sound))  # test_handover.py has that part

    def of(table):
        if column is None:
            return change(table)
        at = table.schema.get_field_index(column)
        return table.set_column(at, table.schema.field(at), pa.array(change(table[column].to_pylist()), table.schema.field(at).type))

    folder = edited(handed[0], tmp_path / "edited", of)
    if kind == "mismatched":
        with pytest.raises(WmError, match="the row that the sample belongs to"):
            verify(folder)
        return
    report = verify(folder)
    assert report["passed"] == (kind is None)
    if kind == "difference":
        assert report["difference"] > 1e-5
    elif kind:
        assert report[kind] == report["expected"] - 1


def test_a_file_that_is_no_parquet_and_a_manifest_that_lies(handed, tmp_path):
    folder, _ = handed
    manifest = check_folder(folder)
    content = {entry["path"]: (folder / entry["path"]).read_bytes() for entry in manifest["files"]}
    about = {k: v for k, v in manifest.items() if k not in ("files", "digest")}
    commit_folder(tmp_path / "cut", content | {manifest["first"]: content[manifest["first"]][:-100]}, about)
    with pytest.raises(WmError, match="not readable as Parquet"):
        verify(tmp_path / "cut")
    for number, layout in enumerate([None, {}, {**manifest["map"], "shape": [1 << 19] * 3}, {**manifest["map"], "low": ["a", 0, 0]}]):
        commit_folder(tmp_path / str(number), content, {**about, "map": layout})
        with pytest.raises(WmError, match="does not say what the maps are"):
            verify(tmp_path / str(number))


def test_an_encoder_of_ones_own_leaves_its_latents_without_its_code(run, parts, tmp_path):
    import dataclasses
    import types

    trained = worldmodel.load(run)
    config = dataclasses.replace(trained.config, encoder=dataclasses.replace(trained.config.encoder, build="my_pkg.my_mod:build"))
    mine = types.SimpleNamespace(run=trained.run, config=config, model=trained.model)
    features.export(mine, tmp_path / "mine", {"licence": "CC0-1.0"}, None, parts[:1])
    assert not (tmp_path / "mine" / "encoder.py").exists()
    report = verify(tmp_path / "mine")
    assert report["passed"] and report["loaded"] > 0 and "encoder_tensors" not in report
