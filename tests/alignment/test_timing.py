"""What stamps and poses say about a log: each defect planted, and named in one line."""

import dataclasses
import json

import numpy as np
import pytest

from sensors.alignment.timing import GAP_STEPS, timing
from sensors.clips import clips_of
from sensors.records import Camera, Trajectory
from tests.alignment.conftest import PERIOD_NS, START_NS, make_log, trajectory_of

COUNT = 60
STAMPS = START_NS + PERIOD_NS * np.arange(COUNT, dtype=np.int64)


def log_with(camera_ns=STAMPS + 7_000_000, sweeps=STAMPS, poses="true", speed=None, **changes):
    log = make_log(COUNT)
    camera = Camera("front", np.eye(4), np.diag((100.0, 100, 1)) + np.array([[0, 0, 50], [0, 0, 50], [0, 0, 0]]), 100, 100)
    poses = trajectory_of(log) if isinstance(poses, str) else poses
    measured = (STAMPS, np.full(COUNT, 9.0)) if speed is None else speed
    return dataclasses.replace(
        log, cameras={"front": camera}, image_stamps_ns={"front": camera_ns}, sweep_stamps_ns={"top": sweeps}, poses=poses,
        measured_speed=measured, **changes,
    )  # fmt: skip


def test_a_log_in_order_has_nothing_to_say():
    report = timing(log_with())
    assert report.ok and report.warnings == ()
    lidar, camera = report.sensors
    assert (lidar.name, lidar.count, lidar.missing, lidar.gaps_total) == ("top", COUNT, 0, 0)
    assert lidar.rate_hz == pytest.approx(10) and lidar.median_step_s == lidar.max_step_s == pytest.approx(0.1) and lidar.skew_median_ms is None
    assert camera.skew_median_ms == camera.skew_max_ms == pytest.approx(7) and camera.unmatched == 0
    assert report.poses.covered_share == 1 and report.duration_s == pytest.approx(5.907)
    # the way is the sum of chords of 0.9 m
    assert report.poses.distance_m == pytest.approx(0.9 * (COUNT - 1), rel=1e-3)
    assert np.allclose(report.poses.speed_mps, 9.0, rtol=1e-3) and np.abs(report.poses.speed_error_mps).max() < 0.02
    json.dumps(report.as_json(), allow_nan=False)


@pytest.mark.parametrize("speed", [0.0, 9.0])
def test_noise_of_poses_is_no_speed_and_no_way(speed):
    rng = np.random.default_rng(0)
    stamps = START_NS + 10_000_000 * np.arange(590, dtype=np.int64)
    poses = np.tile(np.eye(4), (len(stamps), 1, 1))
    poses[:, 0, 3] = speed * (stamps - stamps[0]) / 1e9
    poses[:, :2, 3] += rng.normal(0, 0.01, (len(stamps), 2))
    report = timing(log_with(poses=Trajectory(stamps, poses), speed=(STAMPS, np.full(COUNT, speed))))
    assert report.poses.distance_m == pytest.approx(speed * 5.9, abs=0.3)
    assert np.abs(report.poses.speed_mps - speed).max() < 0.15 and not any("measured" in line for line in report.warnings)


def test_a_log_too_short_for_a_clip_is_not_in_order():
    short = log_with(sweeps=STAMPS[:18])
    assert not clips_of(short) and any("1.7 s of sweeps; clips of 1.8 s are cut" in line for line in timing(short).warnings)
    assert clips_of(log_with(sweeps=STAMPS[:19])) and timing(log_with(sweeps=STAMPS[:19], camera_ns=STAMPS[:19])).ok


def test_missing_items_are_gaps():
    kept = np.delete(STAMPS, [20, 21, 22, 40])
    report = timing(log_with(sweeps=kept))
    lidar = report.sensors[0]
    assert lidar.gaps_total == 2 and lidar.missing == 4
    assert [(gap.from_ns, round(gap.seconds, 3)) for gap in lidar.gaps] == [(int(STAMPS[19]), 0.4), (int(STAMPS[39]), 0.2)]
    assert any("top: 2 gaps, about 4 items missing" in line and "0.40 s" in line for line in report.warnings)
    assert 1 < GAP_STEPS < 2


@pytest.mark.parametrize("seconds", [18, -18, 19, 37, -37])
def test_a_clock_that_differs_by_leap_seconds_is_named(seconds):
    report = timing(log_with(camera_ns=STAMPS + 37 * 10**9 + seconds * 10**9 + 20_000_000, sweeps=STAMPS + 37 * 10**9, poses=None))
    assert any(f"{seconds:+d} s" in line and "front" in line for line in report.warnings)


@pytest.mark.parametrize("offset_ns", [2 * 10**9, 17_400_000_000, 25 * 10**9])
def test_other_offsets_are_not_called_leap_seconds(offset_ns):
    report = timing(log_with(camera_ns=STAMPS + offset_ns))
    assert not any("clock" in line for line in report.warnings)
    assert any("sweeps have no item" in line for line in report.warnings)


def test_poses_slower_than_the_car_are_flagged_with_how_much():
    slow = log_with(speed=(STAMPS, np.full(COUNT, 9.6)))
    report = timing(slow)
    assert np.median(report.poses.speed_error_mps) == pytest.approx(-0.6, abs=0.02)
    assert any("-0.6" in line and "refined" in line for line in report.warnings)


def test_a_trajectory_that_jumps_is_flagged():
    good = trajectory_of(make_log(COUNT))
    poses = good.world_from_ego.copy()
    poses[30:, 0, 3] += 8.0
    report = timing(log_with(poses=Trajectory(good.stamps_ns, poses, "gnss"), speed=(STAMPS[:0], np.zeros(0))))
    assert any("jumps" in line for line in report.warnings)
    poses = poses.copy()
    poses[30:, 0, 3] += 100.0
    report = timing(log_with(poses=Trajectory(good.stamps_ns, poses, "gnss"), speed=(STAMPS[:0], np.zeros(0))))
    assert any("faster than a car" in line for line in report.warnings)


def test_poses_that_end_early_or_are_absent_are_told():
    good = trajectory_of(make_log(COUNT))
    half = Trajectory(good.stamps_ns[:30], good.world_from_ego[:30], "log")
    report = timing(log_with(poses=half))
    assert report.poses.covered_share == pytest.approx(31 / 60) and any("48% of the sweeps" in line for line in report.warnings)
    assert any("no poses" in line for line in timing(log_with(poses=None)).warnings)
    apart = Trajectory(good.stamps_ns[[0, 1, 2, 30, 59]], good.world_from_ego[[0, 1, 2, 30, 59]], "log")
    assert any("2.90 s apart" in line for line in timing(log_with(poses=apart)).warnings)


def test_odd_rates_assumed_stamps_and_empty_sensors_are_told():
    report = timing(log_with(camera_ns=STAMPS[::3], stamps="assumed"))
    assert any(line.startswith("front: 3.33 Hz") for line in report.warnings) and any("assumed" in line for line in report.warnings)
    assert any(line == "front: no items" for line in timing(log_with(camera_ns=STAMPS[:0])).warnings)
    empty = timing(log_with(sweeps=STAMPS[:0], camera_ns=STAMPS[:0], poses=None))
    assert any("no LiDAR sweeps" in line for line in empty.warnings) and empty.duration_s == 0
    one = timing(log_with(sweeps=STAMPS[:1], camera_ns=STAMPS[:1]))
    assert one.sensors[0].rate_hz is None and one.sensors[0].gaps == ()


def test_a_lidar_too_slow_for_clips_is_told_with_the_rate_that_gives_some():
    slow = START_NS + np.arange(COUNT, dtype=np.int64) * 10**9 // 2
    log = log_with(sweeps=slow, camera_ns=slow, poses=None)
    log = dataclasses.replace(
        log, lidars={"top": dataclasses.replace(log.lidars["top"], rate_hz=2.0)}, poses=Trajectory(slow, np.tile(np.eye(4), (COUNT, 1, 1)))
    )
    (line,) = (line for line in timing(log).warnings if line.startswith("top: "))
    assert "2.00 sweeps a second" in line and line.endswith("--set model.rate_hz=2")
    assert not clips_of(log) and clips_of(log, rate_hz=2.0)


@pytest.mark.parametrize("rate_hz", [2.5, 4.0, 4.4, 4.6, 4.9, 5.0, 10.0])
def test_it_is_told_of_just_the_rates_that_give_no_clips(rate_hz):
    stamps = START_NS + np.round(np.arange(COUNT) * 1e9 / rate_hz).astype(np.int64)
    log = log_with(sweeps=stamps, camera_ns=stamps, poses=Trajectory(stamps, np.tile(np.eye(4), (COUNT, 1, 1))))
    log = dataclasses.replace(log, lidars={"top": dataclasses.replace(log.lidars["top"], rate_hz=rate_hz)})
    assert any("too few for clips" in line for line in timing(log).warnings) == (not clips_of(log))


@pytest.mark.parametrize(("every", "words"), [(1, ""), (10, "up to 1.00 s apart; no clips across steps of more than 0.5 s; most are, so")])
def test_poses_of_a_satellite_a_second_give_no_clips_and_are_told(every, words):
    log = make_log(41)
    poses = trajectory_of(log)
    sparse = dataclasses.replace(log, poses=Trajectory(poses.stamps_ns[::every], poses.world_from_ego[::every], "gnss"))
    found = [line for line in timing(sparse).warnings if "apart" in line]
    assert len(found) == bool(words) and all(words in line for line in found)


def test_warnings_are_single_lines():
    for log in (log_with(sweeps=np.delete(STAMPS, 9), poses=None), log_with(speed=(STAMPS, np.full(COUNT, 5.0)), camera_ns=STAMPS[:2])):
        assert timing(log).warnings and all("\n" not in line for line in timing(log).warnings)


def test_the_known_defect_of_drive_0005_is_found_and_drive_0001_is_clean(drive_0001, drive_0005):
    assert timing(drive_0001).ok
    report = timing(drive_0005)
    assert len(report.warnings) == 1 and "their speed differs" in report.warnings[0]
    assert -0.7 < report.poses.speed_error_mps[:11].min() < -0.3
