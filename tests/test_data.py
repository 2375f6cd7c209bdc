"""`--data`: what a list of parts means, and that everything else is refused with the entry and the key named."""

import pytest

from sensors.adapters import kitti_raw
from sensors.adapters.base import open_source
from sensors.clips import clips_of
from sensors.data import open_data
from sensors.errors import UsageError
from sensors.store.writer import write_log

LOG = "kitti_raw/2011_09_26_drive_0001_sync"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the store `s` of one log of four sweeps."""
    root = tmp_path_factory.mktemp("data")
    (root / "raw").mkdir()
    write_log(root / "s", next(open_source(kitti_raw.write_sample(root / "raw"))))
    return root


def parts(folder, text):
    (folder / "d.yaml").write_text(text)
    return open_data(folder / "d.yaml")


def test_a_store_is_all_of_its_logs(folder):
    (part,) = open_data(folder / "s")
    assert (part.log.id, part.from_ns, part.to_ns, part.weight) == (LOG, None, None, 1.0)


def test_entries_name_logs_ranges_and_weights(folder):
    first, second, third = parts(
        folder, f"- {{store: s, log: {LOG}, from_frame: 1, to_frame: 3}}\n- {{store: s, weight: 0.5, every_s: 0.2}}\n- {{store: s, to_frame: 4}}\n"
    )
    stamps = first.log.sweep_stamps_ns["velodyne"]
    assert (first.from_ns, first.to_ns) == (stamps[1], stamps[3]) and second.from_ns is None
    assert (second.weight, second.every_s) == (0.5, 0.2) and (first.weight, first.every_s) == (1.0, None)
    assert third.to_ns == stamps[3] + 1
    (part,) = parts(folder, f"- {{store: s, from_ns: {stamps[0]}, to_ns: {stamps[2]}}}")
    assert (part.from_ns, part.to_ns) == (stamps[0], stamps[2])


def test_no_frame_of_a_clip_leaves_the_range(folder):
    (part,) = parts(folder, "- {store: s, from_frame: 1, to_frame: 4}")
    clips = clips_of(part.log, past=2, future=1, rate_hz=10, every_s=0.1, from_ns=part.from_ns, to_ns=part.to_ns)
    assert [[frame.sweep_index for frame in (*clip.past, *clip.future)] for clip in clips] == [[1, 2, 3]]


@pytest.mark.parametrize("text, named", [
    ("", "no list"), ("a: 1", "no list"), ("[]", "no list"), ("- 3", "entry 1"), ("- {store: s, lg: x}", "did you mean log"),
    ("- {log: x}", "store is"), ("- {store: 3}", "store is"), ("- {store: s, from_frame: 1.5}", "from_frame is 1.5"),
    ("- {store: s, from_frame: no}", "from_frame is False"), ("- {store: s, from_frame: '1'}", "from_frame is '1'"),
    ("- {store: s, from_ns: -1}", "from_ns"), ("- {store: s, from_frame: 1, from_ns: 1}", "both"), ("- {store: s, log: 7}", "quote it"),
    ("- {store: s, from_frame: 3, to_frame: 3}", "empty"), ("- {store: s, to_frame: 9}", "beyond the 4 sweeps"),
    ("- {store: s, weight: .nan}", "weight is nan"), ("- {store: s, weight: 0}", "weight is 0"), ("- {store: s, weight: true}", "weight is True"),
    ("- {store: s, every_s: 0}", "every_s is 0"),
    ("- {store: s, log: a/b}", "not in"), ("- {store: absent}", "not a store"), ("- &a {store: s}\n- *a", "alias"), ("- &a [*a]", "alias"),
    ("- {store: s, store: s}", "twice"), ("- {<<: {store: s}}", "merge"), ("- !!python/object/apply:os.system [x]", "not YAML"),
    ("[" * 3000, "not YAML"), ("- {store: s}\n---\n- {store: s}", "not YAML"), ("- \t{", "not YAML"), ("- !!int ''", "not YAML"),
    ("- {? [a] : 1}", "not YAML"), ("\x00", "not YAML"),
])  # fmt: skip
def test_what_is_no_list_of_parts_is_refused_in_one_line(folder, text, named):
    with pytest.raises(UsageError, match=named) as caught:
        parts(folder, text)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_refused(folder):
    with pytest.raises(UsageError, match=r"absent\.yaml"):
        open_data(folder / "absent.yaml")
    (folder / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        open_data(folder / "b.yaml")
