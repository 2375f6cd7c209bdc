"""KITTI's text files: all nine digits of a stamp, whatever the line ends and the time zone; lines that are none are counted."""

import os
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensors.formats import kitti
from sensors.records import RecordError

NOON_NS = 1_317_038_400_000_000_000  # 2011-09-26 12:00 UTC


@given(st.lists(st.integers(0, 4_102_444_799_999_999_999), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_stamps_keep_their_nine_digits(stamps, end, final):
    start = datetime(1970, 1, 1, tzinfo=UTC)
    lines = [f"{start + timedelta(seconds=s // 10**9):%Y-%m-%d %H:%M:%S}.{s % 10**9:09d}" for s in stamps]
    assert kitti.read_stamps(end.join(lines) + (end if final else "")) == stamps


def test_blank_and_impossible_lines_keep_their_place():
    text = (
        "2011-09-26 12:00:00.5\n\n2011-13-26 12:00:00.0\n2011-09-26 12:00\nNaT\n1969-12-31 23:59:59.0\n 2011-09-26 12:00:01 \n2011-09-26 12:00:61.0"
    )
    assert kitti.read_stamps(text) == [NOON_NS + 500_000_000, None, None, None, None, None, NOON_NS + 10**9, None]


def test_the_time_zone_of_the_process_changes_nothing(monkeypatch):
    try:
        for zone in ("Asia/Kolkata", "America/New_York"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            assert kitti.read_stamps("2011-11-06 01:30:00.000000001") == [1_320_543_000_000_000_001]  # the clocks go back in New York
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()
    assert "TZ" not in os.environ


def test_calibration_is_keys_with_numbers():
    values = kitti.read_calibration("calib_time: 09-Jan-2012 13:57:47\nR: 0 -1 0 0 0 -1 1 0 0\r\nT: 1 2 3\nno colon 4\nempty:\n", "calib.txt")
    assert sorted(values) == ["R", "T"]
    transform = kitti.rigid(values, "calib.txt")
    assert (transform @ (5, 0, 0, 1)).tolist() == [1, 2, 8, 1]


@pytest.mark.parametrize("text", ["", "\0\0\0", "R 1 2 3", "R: a b c", "calib_time: today"])
def test_a_file_without_numbers_is_no_calibration(text):
    with pytest.raises(RecordError, match=r"calib\.txt"):
        kitti.read_calibration(text, "calib.txt")


@pytest.mark.parametrize("values", [{}, {"T": np.zeros(2)}, {"T": np.array([1, np.nan, 3])}, {"T": np.array([1, np.inf, 3])}])
def test_a_value_absent_short_or_not_finite_is_named(values):
    with pytest.raises(RecordError, match=r"calib.txt: T is .* expected 3 finite ones"):
        kitti.matrix(values, "T", (3,), "calib.txt")


def packet(*start, count=30):
    return " ".join(map(str, [*start, *[0] * count][:count]))


def test_packets_need_thirty_fields_and_a_place_on_earth():
    whole = kitti.read_packet(packet(49.0, 8.4, 112, 0.1, 0.2, 0.3, 0, 0, 9.5))
    assert (whole.latitude_deg, whole.yaw_rad, whole.forward_mps) == (49.0, 0.3, 9.5)
    assert np.isnan(kitti.read_packet(packet(49.0, 8.4, 112, 0, 0, 0, "nan", "nan", "nan")).forward_mps)
    assert kitti.read_packet(packet(0, 8.4, 112)) is not None and kitti.read_packet(packet(0.5, 0, 112)) is not None  # Africa
    for text in (
        "",
        packet(0, 0, 112),
        packet("-0.0", "0.0000000", 112),
        packet(49, count=29),
        packet(49, count=31),
        packet("nan", 8),
        packet(49, "inf"),
        packet(95, 8),
        packet("x", 8),
        packet(49, 8, 1e9),
    ):
        assert kitti.read_packet(text) is None


def test_poses_are_east_north_up_from_the_first_packet():
    metre = 1 / 111_319.49079327358  # degrees of latitude, 6378137 m * pi / 180
    east = metre / np.cos(np.radians(49))
    places = [
        (49.0, 8.4, 100.0, 0, 0, 0),
        (49.0, 8.4 + 3 * east, 101.0, 0, 0, np.pi / 2),
        (49.0 + 2 * metre, 8.4, 100.0, 0.1, 0, 0),
        (49.0, 8.4, 100, 0, 0.1, 0),
    ]
    poses = kitti.poses_of_packets([kitti.Packet(*place, forward_mps=0.0) for place in places])
    np.testing.assert_allclose(poses[:, :3, 3], [[0, 0, 0], [3, 0, 1], [0, 2, 0], [0, 0, 0]], atol=1e-5)
    np.testing.assert_allclose(poses[1, :3, 0], [0, 1, 0], atol=1e-12)  # yaw of a quarter turn: ahead is north
    assert poses[2, 2, 1] == pytest.approx(np.sin(0.1)) and poses[3, 2, 0] == pytest.approx(
        -np.sin(0.1)
    )  # roll lifts the left, pitch lowers the nose


def test_labels_that_are_no_boxes_are_counted():
    line = "{} 3 Car 0 0 -1.5 10 20 30 40 {} 1.6 3.9 1.0 1.7 20.0 -1.57"
    text = "\n".join([
        line.format(0, 1.5), "0 -1 DontCare -1 -1 -10 0 0 1 1 -1000 -1000 -1000 -10 -1 -1 -1", "", line.format(1, 0), line.format(2, "nan"),
        line.format("x", 1.5), line.format(-1, 1.5), "4 3 Car", line.format(5, 1.5) + " 0.99",
    ])  # fmt: skip
    boxes, regions, unreadable = kitti.read_tracking_labels(text)
    assert [box.frame for box in boxes] == [0, 5] and (regions, unreadable) == (1, 5)
    assert boxes[0] == kitti.TrackedBox(0, "3", "Car", (3.9, 1.6, 1.5), (1.0, 1.7, 20.0), -1.57)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=80))
def test_any_text_is_read_or_refused_in_one_line(text):
    assert all(stamp is None or stamp >= 0 for stamp in kitti.read_stamps(text))
    assert kitti.read_packet(text) is None
    assert kitti.read_tracking_labels(text)[0] == []
    try:
        assert kitti.read_calibration(text, "calib.txt")
    except RecordError as error:
        assert "\n" not in str(error)
