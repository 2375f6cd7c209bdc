"""Point files that are cut off, of another width or full of nonsense, and names that lead astray."""

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sensors.formats.payloads import locate_beneath, read_beneath
from sensors.formats.points import MAX_RANGE_M, MIN_RANGE_M, read_bin, usable
from sensors.records import RecordError


def refused(call, *arguments):
    with pytest.raises(RecordError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_bin_file_is_read_as_it_was_written(tmp_path):
    table = np.random.default_rng(0).normal(size=(50, 5)).astype("<f4")
    (tmp_path / "a.bin").write_bytes(table.tobytes())
    assert np.array_equal(read_bin(tmp_path, "a.bin", 5), table)


@pytest.mark.parametrize(("size", "said"), [(0, "empty"), (7, "not a multiple of 16"), (16 * 10 + 7, "not a multiple of 16"), (20 * 5 + 4, "of 16")])
def test_a_bin_file_that_cannot_be_whole_is_refused(tmp_path, size, said):
    (tmp_path / "a.bin").write_bytes(bytes(size))
    assert said in refused(read_bin, tmp_path, "a.bin", 4)


def test_a_file_of_32_gib_is_refused_by_its_size(tmp_path):
    (tmp_path / "a.bin").touch()
    os.truncate(tmp_path / "a.bin", 32 << 30)  # sparse: it takes no room
    assert "more than" in refused(read_bin, tmp_path, "a.bin", 4)


def test_nonsense_among_points_is_dropped_and_counted():
    points = np.array(
        [[1, 2, 3], [np.nan, 0, 0], [0, np.inf, 0], [1e38, 0, 0], [0, 0, 0], [1e-42, 0, 0], [0, -1e6, 0], [0, 0, 999], [0, 0.5, 0]], np.float32
    )
    keep, counts = usable(points, "top")
    assert keep.tolist() == [True, False, False, False, False, False, False, True, True]
    assert counts == {"top: points not finite, dropped": 2, "top: points without return, dropped": 2, "top: points beyond 1000 m, dropped": 2}
    assert usable(np.zeros((0, 3), np.float32), "top") == (pytest.approx(np.zeros(0, bool)), {})


@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 30), st.just(3)), elements=st.floats(width=32)))
def test_what_is_kept_has_a_range_and_what_is_not_is_counted(points):
    keep, counts = usable(points, "top")
    kept = points[keep].astype(np.float64)
    assert np.isfinite(kept).all() and (np.abs(kept).max(axis=1) <= MAX_RANGE_M).all()
    assert (np.abs(kept).max(axis=1) >= np.float32(MIN_RANGE_M)).all()
    assert len(kept) + sum(counts.values()) == len(points)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "a\0b", "C:\\x", "C:/x", "file:///etc/passwd", "http://a/b", "..", "\\\\host\\x", ""]
)
def test_a_name_that_is_not_relative_is_not_opened(tmp_path, name):
    refused(locate_beneath, tmp_path, name)
    refused(read_beneath, tmp_path, name, 100)


def test_a_name_with_control_characters_is_shown_escaped(tmp_path):
    assert "\x1b" not in refused(read_beneath, tmp_path, "a\x1b[31m\r\nb", 100)


def test_links_are_followed_inside_the_root_only(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "a", outside):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"data")
    (root / "inside").symlink_to("a/file")
    (root / "out").symlink_to(outside / "file")
    (root / "folder").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    assert read_beneath(root, "inside", 10) == b"data" and locate_beneath(root, "inside") == Path(os.path.realpath(root / "a" / "file"))
    for name in ("out", "folder/file", "folder/absent", "loop"):
        refused(read_beneath, root, name, 10)
    (tmp_path / "alias").symlink_to(root)
    assert read_beneath(tmp_path / "alias", "a/file", 10) == b"data"  # the root itself may be a link


def test_a_disk_that_fails_while_it_is_read_costs_that_file_by_name(tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(bytes(32))

    class Failing(io.BytesIO):
        def read(self, *size):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fails(descriptor, mode):
        os.close(descriptor)
        return Failing()

    monkeypatch.setattr(os, "fdopen", fails)
    assert "a.bin: Input/output error" in refused(read_beneath, tmp_path, "a.bin", 100)


def test_only_regular_files_are_read_and_nothing_blocks(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "folder/", "absent"):
        refused(read_beneath, tmp_path, name, 10)
    (tmp_path / "big").write_bytes(bytes(11))
    assert "more than 10" in refused(read_beneath, tmp_path, "big", 10)
