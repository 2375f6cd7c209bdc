"""A look at payloads: what is broken is counted, what is thin is told, and bad poses are measured."""

import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from sensors.alignment.survey import pair_indices, spread, survey
from sensors.geometry import from_rotation_translation
from tests.alignment.conftest import make_log, trajectory_of
from worldmodel.config import load_config


def with_poses(log, speed_error=0.0):
    return dataclasses.replace(log, poses=trajectory_of(log, lambda t: from_rotation_translation(np.eye(3), (speed_error * t, 0, 0))))


def test_true_poses_have_nothing_to_correct_and_slow_ones_are_measured():
    log = make_log(13)
    good, slow = survey(with_poses(log)), survey(with_poses(log, -0.35))
    assert len(good.pairs) == len(slow.pairs) == 4 and all(pair.registered for pair in good.pairs + slow.pairs)
    assert max(pair.moved_m for pair in good.pairs) < 0.03 and good.warnings == ()
    for pair in slow.pairs:
        assert pair.moved_m == pytest.approx(0.35e-9 * (pair.to_ns - pair.from_ns), abs=0.03)
    assert all(pair.registered_m < pair.median_m for pair in slow.pairs)
    assert any("0.35 m" in line and "refined" in line for line in slow.warnings)


@pytest.mark.parametrize("rolling", [False, True])
def test_poses_that_jump_across_the_earth_are_told_and_not_registered(rolling):
    """With times in the sweeps, the one within which the poses jump is torn apart, too."""
    log = make_log(25, rolling=rolling)
    jump_s = (log.sweep_stamps_ns["top"][12] - log.sweep_stamps_ns["top"][0]) / 1e9 - 0.001
    far = lambda t: from_rotation_translation(np.eye(3), (6e6 * (t < jump_s), 0, 0))  # noqa: E731
    found = survey(dataclasses.replace(log, poses=trajectory_of(log, far)))
    jumped = [pair for pair in found.pairs if not pair.registered]
    assert 0 < len(jumped) < len(found.pairs) == 6 and all(pair.median_m > 1e5 for pair in jumped)
    (line,) = (line for line in found.warnings if "jumps" in line)
    assert f"{len(jumped)} of 6" in line and "odometry" in line and not any("cannot be registered" in line for line in found.warnings)


def test_unreadable_and_thin_sweeps_are_told():
    log = make_log(6, broken=(2,))
    whole = log.read_sweep

    def thin(lidar, index):
        sweep = whole(lidar, index)
        front = sweep.points[:, 0] > 8 if index == 4 else np.ones(len(sweep.points), bool)
        return dataclasses.replace(sweep, points=sweep.points[front], intensity=sweep.intensity[front])

    found = survey(dataclasses.replace(log, read_sweep=thin))
    samples = found.sweeps["top"]
    assert samples.unreadable == 1 and len(samples.stamps_ns) == len(samples.points) == 5
    assert any("1 of 6 sampled sweeps cannot be read; the first: " in line for line in found.warnings)
    assert any("less than half the usual points" in line for line in found.warnings)
    assert any("less of the surroundings" in line for line in found.warnings)
    assert found.pairs == ()
    assert found.as_json()["sweeps"]["top"]["unreadable"] == 1


@pytest.mark.parametrize(("roll_deg", "pitch_deg", "words"), [(0, 0, None), (180, 0, "180 degrees"), (0, 30, "30 degrees"), (0, 5, None)])
def test_a_lidar_that_is_not_mounted_upright_is_told(roll_deg, pitch_deg, words):
    log = make_log(3)
    lidar = log.lidars["top"]
    turn = Rotation.from_euler("xyz", (roll_deg, pitch_deg, 0), degrees=True).as_matrix()
    tilted = dataclasses.replace(lidar, ego_from_lidar=lidar.ego_from_lidar @ from_rotation_translation(turn, (0, 0, 0)))
    found = survey(dataclasses.replace(log, lidars={"top": tilted})).warnings
    assert found == () if words is None else len(found) == 1 and words in found[0]


def test_of_a_lidar_that_no_frame_is_built_on_nothing_is_asked():
    log = make_log(3)
    turn = Rotation.from_euler("y", 30, degrees=True).as_matrix()
    side = dataclasses.replace(log.lidars["top"], name="side", ego_from_lidar=from_rotation_translation(turn, (0, 0, 0)))
    stamps = log.sweep_stamps_ns["top"]
    both = dataclasses.replace(log, lidars={**log.lidars, "side": side}, sweep_stamps_ns={"top": stamps, "side": stamps[:1]},
                               read_sweep=lambda lidar, index: dataclasses.replace(log.read_sweep("top", index), lidar=lidar))  # fmt: skip
    assert both.reference_lidar == "top" and survey(both).warnings == ()


def test_a_lidar_higher_than_the_encoder_looks_is_told_with_what_to_set():
    log = make_log(3)

    def lifted(lidar, index):
        sweep = log.read_sweep(lidar, index)
        return dataclasses.replace(sweep, points=sweep.points - np.float32([0, 0, 2]))

    found = survey(dataclasses.replace(log, read_sweep=lifted))
    assert found.as_json()["sweeps"]["top"]["ground_m"] == pytest.approx(-3.7, abs=0.1)
    (line,) = found.warnings
    assert "3.7 m below" in line
    bounds = load_config("default", line.partition("--set ")[2].split()).encoder
    assert bounds.low[2] < -4 and bounds.high[2] - bounds.low[2] == 6


def test_points_in_the_vehicles_frame_are_told():
    log = make_log(3)

    def lifted(lidar, index):
        sweep = log.read_sweep(lidar, index)
        return dataclasses.replace(sweep, points=sweep.points + np.float32([0, 0, 1.7]))

    (line,) = survey(dataclasses.replace(log, read_sweep=lifted)).warnings
    assert "0.0 m in its frame" in line and "in the vehicle's frame" in line


def test_what_points_carry_is_reported():
    assert survey(make_log(2, rolling=True)).sweeps["top"].time_per_point
    assert not survey(make_log(2)).sweeps["top"].time_per_point
    nothing = survey(make_log(2, broken=(0, 1))).sweeps["top"]
    assert nothing.unreadable == 2 and not (nothing.time_per_point or nothing.rings or nothing.deskewed)


def test_samples_are_spread_and_pairs_lie_a_second_apart():
    assert spread(0, 5).tolist() == [] and spread(3, 5).tolist() == [0, 1, 2] and spread(101, 3).tolist() == [0, 50, 100]
    log = with_poses(make_log(60))
    pairs = pair_indices(log)
    assert len(pairs) == 6 and all(9 <= b - a <= 10 for a, b in pairs) and pairs[0][0] == 0 and pairs[-1][1] == 59
    assert pair_indices(make_log(60)) == [] and pair_indices(with_poses(make_log(5))) == []
