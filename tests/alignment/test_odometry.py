"""Poses from sweeps: right on a scene whose truth is known, and on a real drive against its inertial unit."""

import dataclasses

import numpy as np
import pytest

from sensors.alignment.odometry import START_SWEEPS, odometry, refined, register
from sensors.geometry import from_rotation_translation, inverse, pose_at, rotation_z, transform_points
from sensors.kernels.directions import View
from sensors.kernels.registration import Planes, thinned
from sensors.records import RecordError, Trajectory
from sensors.simulator.log import simulate
from tests.alignment.conftest import make_log, relative_errors, trajectory_of, true_poses


def drifting(seconds):
    """Half a metre per second along the way, a tenth across, and a turn: worse than any GNSS on a clear day."""
    return from_rotation_translation(rotation_z(0.004 * seconds)[:3, :3], (-0.5 * seconds, 0.1 * seconds, 0))


@pytest.mark.parametrize("rolling", [False, True])
def test_odometry_keeps_the_speed_from_the_first_sweep_on(rolling):
    """9 m/s, started without being told: every step within 0.15 m of the true 0.9 m, also where points carry times."""
    log = make_log(START_SWEEPS + 2, rolling=rolling)
    found = odometry(log)
    assert found.source == "odometry" and np.array_equal(found.stamps_ns, log.sweep_stamps_ns["top"])
    assert relative_errors(found.world_from_ego, true_poses(log)).max() < 0.15
    assert np.allclose(found.world_from_ego[0], np.eye(4), atol=1e-9)


@pytest.mark.parametrize("at", [0.5, -0.5])
def test_odometry_holds_wherever_in_its_sweep_a_stamp_lies(at):
    """The same drive, stamped when a sweep begins (0.5 of a period earlier) or ends: each step within 0.04 and 0.08 m."""
    log = simulate(9, seconds=3.0, lidar="hdl32")
    (name,) = log.lidars
    shift_ns = -round(at * 100_000_000)
    stamps = log.sweep_stamps_ns[name] + shift_ns

    def read_sweep(lidar, index):
        sweep = log.read_sweep(lidar, index)
        return dataclasses.replace(sweep, stamp_ns=sweep.stamp_ns + shift_ns, time_ns=sweep.time_ns - shift_ns)

    found = odometry(dataclasses.replace(log, sweep_stamps_ns={name: stamps}, read_sweep=read_sweep))
    known = log.poses.covers(stamps)
    true = pose_at(log.poses, stamps[known])
    assert known.sum() > 25 and np.linalg.norm(true[-1, :3, 3] - true[0, :3, 3]) > 10
    assert relative_errors(found.world_from_ego[known], true).max() < 0.15


def test_refined_poses_undo_a_drift_of_half_a_metre_per_second():
    log = make_log(10)
    given = trajectory_of(log, drifting)
    found = refined(dataclasses.replace(log, poses=given))
    assert relative_errors(given.world_from_ego, true_poses(log)).min() > 0.04
    assert relative_errors(found.world_from_ego, true_poses(log)).max() < 0.012
    assert found.source == "refined" and not +log.counts
    # the world is the log's own
    assert np.allclose(found.world_from_ego[0], given.world_from_ego[0], atol=1e-9)


@pytest.mark.parametrize("fault", ["jump", "freeze"])
def test_refined_poses_do_not_follow_a_jump_or_a_freeze(fault):
    log = make_log(14)
    poses = true_poses(log).copy()
    if fault == "jump":
        poses[8:, :2, 3] += (2.4, 1.6)
    else:
        poses[5:10] = poses[5]
    found = refined(dataclasses.replace(log, poses=Trajectory(log.sweep_stamps_ns["top"], poses, "gnss")))
    assert relative_errors(found.world_from_ego, true_poses(log)).max() < 0.02
    assert log.counts["top: step of the gnss poses given up for that of a steady motion"] >= 1


def test_refined_starts_from_odometry_where_there_are_no_poses():
    log = make_log(8)
    assert relative_errors(refined(log).world_from_ego, true_poses(log)).max() < 0.012


def test_refined_keeps_the_world_of_poses_that_do_not_cover_every_sweep():
    log = make_log(10)
    given = trajectory_of(log, drifting)
    far_off = from_rotation_translation(rotation_z(2.0)[:3, :3], (500.0, 900.0, 40.0))
    cut = Trajectory(given.stamps_ns[3:8], far_off @ given.world_from_ego[3:8], "gnss")
    log = dataclasses.replace(log, poses=cut)
    found = refined(log)
    assert relative_errors(found.world_from_ego, true_poses(log)).max() < 0.012
    assert np.linalg.norm(found.world_from_ego[3, :3, 3] - cut.world_from_ego[0, :3, 3]) < 0.3
    assert log.counts["top: beyond the gnss poses, step from odometry"] == 10 - 5 - 2  # two lie within a tenth of a second of the ends


def test_refined_never_sees_the_future():
    """The poses up to a sweep are the same to the bit whatever comes after it."""
    log = make_log(8)
    given = trajectory_of(log, drifting)
    whole = refined(dataclasses.replace(log, poses=given))
    short = dataclasses.replace(log, poses=given, sweep_stamps_ns={"top": log.sweep_stamps_ns["top"][:5]})
    assert np.array_equal(refined(short).world_from_ego, whole.world_from_ego[:5])


def test_an_unreadable_sweep_is_counted_and_the_rest_goes_on():
    log = make_log(8, broken=(3,))
    log = dataclasses.replace(log, poses=trajectory_of(log, drifting))
    found = refined(log)
    kept = [0, 1, 2, 4, 5, 6, 7]
    assert np.array_equal(found.stamps_ns, log.sweep_stamps_ns["top"][kept])
    assert relative_errors(found.world_from_ego, true_poses(log)[kept]).max() < 0.02
    assert sum(log.counts.values()) == 1 and any("unreadable" in what for what in log.counts)


def test_a_sweep_that_does_not_register_keeps_the_step_and_is_counted():
    """Sweeps of nothing but scattered points: no plane anywhere."""
    log = make_log(3)
    sweep = log.read_sweep("top", 0)

    def scattered(lidar, index):
        points = np.random.default_rng(index).uniform(-40, 40, (2000, 3)).astype(np.float32)
        return dataclasses.replace(sweep, stamp_ns=int(log.sweep_stamps_ns["top"][index]), points=points, intensity=np.zeros(2000, np.float32))

    log = dataclasses.replace(log, read_sweep=scattered, poses=trajectory_of(log))
    assert relative_errors(refined(log).world_from_ego, true_poses(log)).max() < 1e-6
    assert [count for what, count in log.counts.items() if "not registered" in what] == [2]


def test_along_a_tunnel_the_start_is_kept():
    """Four walls say nothing about x: the step along them stays what the poses said, the rest is corrected."""
    rng = np.random.default_rng(1)
    walls = rng.uniform(-3, 3, (8000, 3)) * (12, 1, 1)
    for axis in (1, 2):
        rows = slice((axis - 1) * 4000, axis * 4000)
        walls[rows, axis] = np.where(walls[rows, axis] > 0, 3, -3)
    start = from_rotation_translation(np.eye(3), (0.3, 0.05, -0.04))
    found, matched, rms = register(thinned(walls, 0.25), Planes(thinned(walls, 0.25)), start)
    assert matched > 1000 and rms < 0.02
    assert abs(found[0, 3] - 0.3) < 0.02 and np.abs(found[1:3, 3]).max() < 0.005


def test_registration_means_the_same_in_any_frame():
    """Far from the target's origin the lever must not turn into a translation."""
    log = make_log(2)
    cloud = thinned(log.read_sweep("top", 0).points, 0.25)
    moved = from_rotation_translation(rotation_z(0.01)[:3, :3], (0.1, -0.05, 0.02))
    far = from_rotation_translation(rotation_z(1.0)[:3, :3], (300.0, -200.0, 5.0))
    near, _, _ = register(transform_points(inverse(moved), cloud), Planes(cloud), np.eye(4))
    there, _, _ = register(transform_points(inverse(moved), cloud), Planes(transform_points(far, cloud)), far)
    assert np.abs(near - moved).max() < 0.01
    assert np.abs(inverse(far) @ there - moved).max() < 0.01


def test_logs_without_a_readable_sweep_are_refused_in_one_line():
    for log in (make_log(2, broken=(0, 1)), dataclasses.replace(make_log(2), sweep_stamps_ns={"top": np.zeros(0, np.int64)})):
        for method in (odometry, refined):
            with pytest.raises(RecordError, match="sweep of top"):
                method(log)


def test_odometry_agrees_with_the_inertial_unit_of_a_real_drive(drive_0001):
    """Step by step within 0.12 m (of 1.3), also in the first seconds, where the plain method loses it by metres; the way within 1 %."""
    stamps = drive_0001.sweep_stamps_ns["velodyne"][: START_SWEEPS + 4]
    log = dataclasses.replace(drive_0001, sweep_stamps_ns={"velodyne": stamps})
    found = odometry(log)
    given = pose_at(log.poses, stamps)
    assert relative_errors(found.world_from_ego, given).max() < 0.12
    way = [np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1).sum() for poses in (found.world_from_ego, given)]
    assert abs(way[0] / way[1] - 1) < 0.01


def test_refining_halves_the_error_of_the_plainest_forecast_on_a_real_drive(drive_0005):
    """The last sweep moved by the poses, read in the nearest direction, 0.5 s ahead, where the satellite positions are half a metre per
    second slow."""
    stamps = drive_0005.sweep_stamps_ns["velodyne"][:8]
    log = dataclasses.replace(drive_0005, sweep_stamps_ns={"velodyne": stamps})

    def error(trajectory):
        earlier, later = (log.read_sweep("velodyne", i).points for i in (2, 7))
        poses = pose_at(trajectory, stamps[[2, 7]]) @ log.lidars["velodyne"].ego_from_lidar
        ranges = np.linalg.norm(later, axis=1)
        read, _, _ = View(transform_points(inverse(poses[1]) @ poses[0], earlier)).nearest(later[::8])
        return float(np.median(np.abs(read - ranges[::8])))

    assert error(refined(log)) < 0.5 * error(log.poses)
