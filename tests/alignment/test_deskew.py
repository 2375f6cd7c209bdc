"""Motion compensation against a scanner that really rolls: rays cast one by one from where it then was."""

import numpy as np
import pytest

from sensors.alignment.deskew import KNOT_NS, MAX_INSTANTS, deskew, deskew_steady, times_from_azimuth
from sensors.alignment.odometry import register
from sensors.geometry import inverse, pose_at, transform_points
from sensors.kernels.registration import Planes, thinned
from sensors.records import RecordError, Trajectory
from sensors.simulator.log import simulate
from tests.alignment.conftest import EGO_FROM_LIDAR, PERIOD_NS, START_NS, cast, ego_pose, make_log, street, trajectory_of

FINE = np.arange(START_NS - 2 * PERIOD_NS, START_NS + 3 * PERIOD_NS, 10**6)
TRAJECTORY = Trajectory(FINE, np.stack([ego_pose((s - START_NS) / 1e9) for s in FINE]))
WALL_X = 30.0


def rolling_wall(count=2000):
    """Points on the plane x = WALL_X of the world, each seen from where the LiDAR was at its own time (count,), and those places."""
    times = np.linspace(-PERIOD_NS // 2, PERIOD_NS // 2 - 1, count).astype(np.int64)
    poses = pose_at(TRAJECTORY, START_NS + times) @ EGO_FROM_LIDAR
    rng = np.random.default_rng(0)
    local = np.stack((np.ones(count), rng.uniform(-0.8, 0.8, count), rng.uniform(-0.05, 0.2, count)), 1)
    rays = np.einsum("nij,nj->ni", poses[:, :3, :3], local)
    ranges = (WALL_X - poses[:, 0, 3]) / rays[:, 0]
    return (local * ranges[:, None]).astype(np.float32), times.astype(np.int32), poses


@pytest.mark.parametrize("at_ns", [None, START_NS + 70_000_000])
def test_a_rolling_scan_of_a_wall_becomes_a_wall(at_ns):
    points, times, poses = rolling_wall()
    moved, origins = deskew(points, times, EGO_FROM_LIDAR, TRAJECTORY, START_NS, at_ns)
    world_from_at = pose_at(TRAJECTORY, np.array([START_NS if at_ns is None else at_ns]))[0] @ EGO_FROM_LIDAR
    assert np.abs(transform_points(world_from_at, points.astype(np.float64))[:, 0] - WALL_X).max() > 0.3
    assert np.abs(transform_points(world_from_at, moved.astype(np.float64))[:, 0] - WALL_X).max() < 1e-3
    assert np.abs(transform_points(world_from_at, origins.astype(np.float64)) - poses[:, :3, 3]).max() < 1e-4
    # a ray keeps its length and its direction in the world
    assert np.allclose(np.linalg.norm(moved - origins, axis=1), np.linalg.norm(points, axis=1), rtol=1e-5)
    assert moved.dtype == origins.dtype == np.float32 and moved.shape == origins.shape == points.shape


def test_more_instants_than_knots_cost_less_than_a_millimetre():
    points, times, _ = rolling_wall(3 * MAX_INSTANTS)
    assert len(np.unique(times)) > MAX_INSTANTS
    moved, origins = deskew(points, times, EGO_FROM_LIDAR, TRAJECTORY, START_NS)
    exact = [deskew(points[i::4], times[i::4], EGO_FROM_LIDAR, TRAJECTORY, START_NS) for i in range(4)]
    bound = 9.0 * KNOT_NS / 2e9 + 0.1 * 40 * KNOT_NS / 2e9 + 2e-5
    for i, (points_i, origins_i) in enumerate(exact):
        assert np.abs(moved[i::4] - points_i).max() < bound < 1e-3
        assert np.abs(origins[i::4] - origins_i).max() < bound


def test_each_ray_of_a_whole_sweep_starts_where_it_did_and_ends_on_its_surface():
    """Cast again from the origins that deskewing gives: the scene is met at the deskewed points. From the sensor at the stamp it is not."""
    sweep = make_log(2, rolling=True, noise_m=0.0).read_sweep("top", 1)
    moved, origins = deskew(sweep.points, sweep.time_ns, EGO_FROM_LIDAR, TRAJECTORY, sweep.stamp_ns)
    world_from_lidar = pose_at(TRAJECTORY, np.array([sweep.stamp_ns]))[0] @ EGO_FROM_LIDAR

    def missed(points, starts):
        ends, starts = (transform_points(world_from_lidar, p.astype(np.float64)) for p in (points, starts))
        length = np.linalg.norm(ends - starts, axis=1)
        return np.abs(cast(street(0), starts, (ends - starts) / length[:, None]) - length)

    assert np.quantile(missed(moved, origins), 0.99) < 2e-3
    assert np.quantile(missed(sweep.points, np.zeros_like(origins)), 0.9) > 0.1


def test_the_steady_motion_of_odometry_is_the_trajectory_of_a_steady_car():
    points, times, _ = rolling_wall()
    now, last = (pose_at(TRAJECTORY, np.array([s]))[0] @ EGO_FROM_LIDAR for s in (START_NS, START_NS - PERIOD_NS))
    moved = deskew_steady(points.astype(np.float64), times, inverse(last) @ now, PERIOD_NS)
    exact, _ = deskew(points, times, EGO_FROM_LIDAR, TRAJECTORY, START_NS)
    assert np.abs(moved - exact).max() < 3e-3
    backwards = deskew_steady(points.astype(np.float64), times, inverse(now) @ last, -PERIOD_NS)
    assert np.abs(backwards - exact).max() < 3e-3


def test_without_times_or_poses_it_refuses():
    points, times, _ = rolling_wall(10)
    with pytest.raises(RecordError, match="no time per point"):
        deskew(points, None, EGO_FROM_LIDAR, TRAJECTORY, START_NS)
    with pytest.raises(RecordError, match="times"):
        deskew(points, times[:5], EGO_FROM_LIDAR, TRAJECTORY, START_NS)
    with pytest.raises(RecordError, match="trajectory covers"):
        deskew(points, times, EGO_FROM_LIDAR, TRAJECTORY, START_NS + 10**10)
    assert all(part.shape == (0, 3) for part in deskew(points[:0], times[:0], EGO_FROM_LIDAR, TRAJECTORY, START_NS))


def test_times_from_azimuth_are_those_of_the_scanner_that_spins_so():
    """The made scanner turns clockwise and faces forward at its stamp; the car's own motion turns the azimuths a little."""
    sweep = make_log(1, rolling=True, noise_m=0.0).read_sweep("top", 0)
    guess = times_from_azimuth(sweep.points, PERIOD_NS, clockwise=True)
    assert np.abs(guess - sweep.time_ns).max() < 0.002 * PERIOD_NS
    other = times_from_azimuth(sweep.points, PERIOD_NS, clockwise=False)
    assert np.median(np.abs(other - sweep.time_ns)) > 0.2 * PERIOD_NS
    shifted = times_from_azimuth(np.array([[0.0, 1, 0], [0, -1, 0]]), PERIOD_NS, clockwise=True, azimuth_at_stamp_rad=np.pi / 2)
    assert shifted[0] == 0 and abs(shifted[1]) == PERIOD_NS // 2
    for period in (0, -5, 2 * 10**9):
        with pytest.raises(RecordError, match="period"):
            times_from_azimuth(sweep.points, period, clockwise=True)


def test_the_simulators_rolling_sweeps_lie_on_each_other_once_deskewed():
    """Registration of two sweeps 0.5 s apart from the true poses: as recorded it finds a motion that is not there, deskewed hardly any."""
    log = simulate(2, seconds=0.7, lidar="hdl32")
    lidar = log.reference_lidar
    sensor, stamps = log.lidars[lidar], log.sweep_stamps_ns[lidar]
    poses = pose_at(log.poses, stamps) @ sensor.ego_from_lidar
    clouds = {False: [], True: []}
    for index in (1, 6):
        sweep = log.read_sweep(lidar, index)
        clouds[False].append(thinned(sweep.points, 0.2))
        clouds[True].append(thinned(deskew(sweep.points, sweep.time_ns, sensor.ego_from_lidar, log.poses, sweep.stamp_ns)[0], 0.2))
    second_from_first = inverse(poses[6]) @ poses[1]
    moved = {}
    for deskewed, (first, second) in clouds.items():
        found, matched, _ = register(second, Planes(transform_points(second_from_first, first)), np.eye(4))
        assert matched > 1000
        moved[deskewed] = np.linalg.norm(found[:3, 3])
    assert moved[True] < 0.02
    assert moved[True] < 0.6 * moved[False]


def test_deskewing_needs_no_more_than_the_trajectory_of_a_log():
    log = make_log(3, rolling=True)
    trajectory = trajectory_of(log)
    sweep = log.read_sweep("top", 1)
    moved, _ = deskew(sweep.points, sweep.time_ns, log.lidars["top"].ego_from_lidar, trajectory, sweep.stamp_ns)
    fine, _ = deskew(sweep.points, sweep.time_ns, log.lidars["top"].ego_from_lidar, TRAJECTORY, sweep.stamp_ns)
    assert np.abs(moved - fine).max() < 0.02
