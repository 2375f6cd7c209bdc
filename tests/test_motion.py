"""Motion without labels, on scenes small enough to know by heart: a flat road, boxes on it, 32 beams."""

from __future__ import annotations

import numpy as np
import pytest

from sensors.evidence import ALONG_LIMIT_M, ALONG_M, AROUND_RAD, gather
from sensors.geometry import inverse, rotation_z, transform_points
from sensors.kernels.directions import View
from sensors.motion import _displacement, ahead, motion_of
from sensors.rays import History, Rays

SENSOR_HEIGHT_M = 1.8
TIMES_S = np.array([-0.8, -0.6, -0.4, -0.2, 0.0])
STEP_RAD = float(np.deg2rad(1.15))


def directions():
    azimuth = np.deg2rad(np.arange(0, 360, 0.2))
    elevation = np.deg2rad(np.linspace(-25, 6, 32))
    a, e = np.meshgrid(azimuth, elevation)
    return np.stack((np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)), -1).reshape(-1, 3)


def cast(boxes, origin, rng=None):
    """Ranges (R,) of all directions from an origin over the plane z = 0 and axis-aligned boxes (centre x, y; size l, w, h); inf: no return."""
    d = directions()
    with np.errstate(divide="ignore", invalid="ignore"):
        hit = np.where(d[:, 2] < 0, -origin[2] / d[:, 2], np.inf)
        for x, y, length, width, height in boxes:
            low, high = np.array((x - length / 2, y - width / 2, 0.15)), np.array((x + length / 2, y + width / 2, height))
            one, other = (low - origin) / d, (high - origin) / d
            enter, leave = np.minimum(one, other).max(1), np.maximum(one, other).min(1)
            hit = np.where((enter < leave) & (enter > 0) & (enter < hit), enter, hit)
    hit = np.where(hit < 70, hit, np.inf)
    return hit if rng is None else hit + rng.normal(0, 0.01, len(hit))


PARKED = [(12.0, -7.0, 4.2, 1.8, 1.5), (18.0, -7.0, 4.2, 1.8, 1.5), (-9.0, -7.0, 4.4, 1.8, 1.6)]
WALLS = [(0.0, 16.0, 110.0, 0.5, 5.0), (0.0, -12.0, 110.0, 0.5, 5.0), (30.0, 3.0, 0.5, 14.0, 4.0)]


def history(moving=(), times=TIMES_S, drift=(0.0, 0.0)):
    """moving: (box at t = 0, velocity). The sensor stands still; drift: what its poses are wrong by, m/s."""
    rng = np.random.default_rng(5)
    points, poses, truth = [], [], None
    origin = np.array((0.0, 0.0, SENSOR_HEIGHT_M))
    for t in times:
        boxes = [*PARKED, *WALLS, *((x + vx * t, y + vy * t, *size) for (x, y, *size), (vx, vy) in moving)]
        ranges = cast(boxes, origin, rng)
        seen = np.isfinite(ranges)
        pose = np.eye(4)
        pose[:3, 3] = origin + np.array((*drift, 0.0)) * t
        points.append((directions()[seen] * ranges[seen, None] + pose[:3, 3]).astype(np.float32))
        poses.append(pose)
    truth = points[-1]
    return History(tuple(points), tuple(np.zeros(len(p), np.float32) for p in points), np.asarray(times), np.stack(poses), STEP_RAD), truth


def on(points, box, margin=0.05):
    x, y, length, width, height = box
    return (
        (np.abs(points[:, 0] - x) < length / 2 + margin)
        & (np.abs(points[:, 1] - y) < width / 2 + margin)
        & (points[:, 2] > 0.2)
        & (points[:, 2] < height + margin)
    )


def beside(points, box):
    """Everything that is neither on the box nor within half a metre of it."""
    return (np.abs(points[:, 0] - box[0]) > box[2] / 2 + 0.5) | (np.abs(points[:, 1] - box[1]) > box[3] / 2 + 0.5)


CAR, WALKER = (4.2, 1.8, 1.5), (0.5, 0.6, 1.75)


@pytest.mark.parametrize(
    ("box", "velocity"),
    [
        ((10.0, 4.0, *CAR), (8.0, 0.0)),
        ((14.0, 3.5, *CAR), (-17.0, 0.0)),
        ((15.0, 2.0, *CAR), (2.0, 0.0)),
        ((16.0, 4.0, *CAR), (34.0, 0.0)),
        ((-7.0, 4.0, *CAR), (-36.0, 0.0)),
        ((8.0, 3.0, *WALKER), (1.2, -0.5)),
        ((-12.0, 5.0, *WALKER), (0.0, 1.5)),
    ],
)
def test_what_moves_is_found_with_its_velocity_and_the_rest_stands(box, velocity):
    past, points = history([(box, velocity)])
    motion = motion_of(past)
    body = on(points, box)
    assert body.sum() > 20
    error = np.linalg.norm(motion.velocity[body, :2] - velocity, axis=1)
    assert np.mean(error < max(0.5, 0.025 * np.hypot(*velocity))) > 0.9
    assert np.mean(motion.cluster[body] >= 0) > 0.9
    assert np.mean(motion.cluster[beside(points, box)] >= 0) < 0.001
    assert (motion.velocity[motion.cluster < 0] == 0).all() and (motion.alternative[motion.cluster < 0] == 0).all()
    assert (motion.velocity[:, 2] == 0).all()


def test_where_nothing_moves_nothing_is_said_to():
    past, _ = history()
    assert np.mean(motion_of(past).cluster >= 0) < 0.002


def test_poses_that_drift_make_nothing_move_and_hide_no_mover():
    box, velocity, drift = (10.0, 4.0, *CAR), np.array((6.0, 0.0)), np.array((0.4, -0.3))
    past, points = history([(box, velocity)], drift=drift)
    motion = motion_of(past)
    body = on(points, box)
    assert np.mean(motion.cluster[beside(points, box)] >= 0) < 0.002
    # with such poses the thing appears to move by the drift as well, and will go on to do so
    assert np.linalg.norm(np.median(motion.velocity[body, :2], axis=0) - velocity - drift) < 0.5


def test_the_scene_ahead_has_the_mover_where_it_will_be_and_the_wall_where_it_was():
    box, velocity = (10.0, 4.0, *CAR), np.array((8.0, 0.0))
    past, points = history([(box, velocity)])
    sensor = inverse(past.present_from_sensor[-1])
    origin = np.array((0.0, 0.0, SENSOR_HEIGHT_M))
    for horizon in (0.2, 0.6):
        later = (box[0] + velocity[0] * horizon, box[1], *box[2:])
        truth, empty = cast([*PARKED, *WALLS, later], origin), cast([*PARKED, *WALLS], origin)
        then, now = truth < empty - 0.5, cast([*PARKED, *WALLS, box], origin) < empty - 0.5
        view = ahead(past, sensor, horizon, 0)
        assert view is not None
        error = np.abs(view.nearest(directions().astype(np.float32))[0] - truth)
        static = np.abs(View(points, STEP_RAD, sensor).nearest(directions().astype(np.float32))[0] - truth)
        for rays in (then, now & ~then):
            assert np.median(error[rays]) < 0.1
            assert error[rays].mean() < 0.35 * static[rays].mean()
    assert ahead(past, sensor, 0.0, 0) is None


def test_what_is_seen_through_now_is_not_added_to_a_mover():
    box, velocity = (10.0, 4.0, *CAR), np.array((8.0, 0.0))
    past, _ = history([(box, velocity)])
    # in one older sweep something floats over the car as it was then, where the newest sweep sees the wall behind
    at = np.array((box[0], box[1], 1.75)) + np.random.default_rng(0).normal(0, 0.02, (50, 3))
    older = np.concatenate((past.points[1], (at + np.array((*velocity, 0.0)) * TIMES_S[1]).astype(np.float32)))
    points = (past.points[0], older, *past.points[2:])
    dark = tuple(np.zeros(len(p), np.float32) for p in points)
    motion = motion_of(History(points, dark, past.times_s, past.present_from_sensor, STEP_RAD))
    assert on(motion.movers, box).sum() > 1500
    assert (np.linalg.norm(motion.movers - at.mean(0), axis=1) < 0.08).sum() == 0


def test_evidence_carries_the_displaced_scene_beside_the_sweeps():
    box, velocity = (10.0, 4.0, *CAR), np.array((8.0, 0.0))
    past, _ = history([(box, velocity)])
    truth = cast([*PARKED, *WALLS, (box[0] + 3.2, box[1], *box[2:])], np.array((0.0, 0.0, SENSOR_HEIGHT_M)))
    seen = np.flatnonzero(np.isfinite(truth))[::7]
    rays = Rays(0.4, past.present_from_sensor[-1], directions()[seen].astype(np.float32), truth[seen], np.zeros(len(seen)), seen)
    evidence = gather(past, rays)
    error = np.abs(evidence.nearest - truth[seen, None])
    moved = error[:, 0] > 1.0
    assert moved.sum() > 20
    assert error[moved, len(past.points)].mean() < 0.5 * error[moved, 0].mean()


def test_what_keeps_pace_with_the_sensor_is_read_where_it_was():
    past, _ = history(drift=(8.0, 0.0))  # all that is seen stays where it is, seen from a sensor on its way
    still = cast([*PARKED, *WALLS], np.array((0.0, 0.0, SENSOR_HEIGHT_M)))
    seen = np.flatnonzero(np.isfinite(still))[::7]
    ahead_of_it = past.present_from_sensor[-1].copy()
    ahead_of_it[0, 3] += 8.0 * 0.4
    rays = Rays(0.4, ahead_of_it, directions()[seen].astype(np.float32), still[seen], np.zeros(len(seen)), seen)
    evidence = gather(past, rays)
    assert np.abs(evidence.nearest[:, -1] - still[seen]).max() < 0.06 and (np.abs(evidence.nearest[:, 0] - still[seen]) > 1.0).sum() > 100
    assert evidence.paced.shape == (len(seen), len(past.points) - 1)
    assert np.abs(evidence.paced - still[seen, None]).max() < 0.06
    away = rays.directions * np.array([1, 1, -1], np.float32)  # far above what the sensor reads
    assert np.isnan(gather(past, Rays(0.4, ahead_of_it, away, still[seen], np.zeros(len(seen)), seen)).paced[rays.directions[:, 2] < -0.2]).all()


def test_places_along_a_ray_are_seen_through_up_to_the_surface():
    past, _ = history(drift=(2.0, 0.0))
    azimuth = np.deg2rad(np.array((88.0, 92.0, -88.0, -91.0)))  # towards the walls along the road: 13.95 m and 9.95 m of free space
    level = np.stack((np.cos(azimuth), np.sin(azimuth), np.full(4, 0.05)), 1)
    level /= np.linalg.norm(level, axis=1, keepdims=True)
    rays = Rays(0.4, past.present_from_sensor[-1], level.astype(np.float32), np.ones(4), np.zeros(4), np.arange(4))
    along = gather(past, rays).along
    assert along.shape == (4, 3, len(ALONG_M))
    surface = np.array((15.75, 15.75, 11.75, 11.75)) / np.abs(level[:, 1])
    free = surface[:, None, None] - ALONG_M
    clear = np.abs(free) > 0.3  # a reading beside the place lies where the wall is, give or take its slant over a cell
    there = ~np.isnan(along)
    assert there.mean() > 0.9
    assert (np.sign(along) == np.sign(free))[there & clear].all()
    assert np.abs(along - free.clip(-ALONG_LIMIT_M, ALONG_LIMIT_M))[there].max() < 0.5


def test_what_stands_beside_a_ray_is_read_from_the_newest_sweep():
    past, _ = history(drift=(2.0, 0.0))
    azimuth = np.deg2rad(np.array((80.0, 100.0, -85.0)))
    level = np.stack((np.cos(azimuth), np.sin(azimuth), np.full(3, 0.05)), 1)
    rays = Rays(0.4, past.present_from_sensor[-1], level.astype(np.float32), np.ones(3), np.zeros(3), np.arange(3))
    around = gather(past, rays).around
    assert around.shape == (3, len(AROUND_RAD))
    wall = np.array((15.75, 15.75, 11.75))[:, None]
    facing = np.abs(np.sin(azimuth[:, None] + AROUND_RAD[:, 0])) > 0.8  # there the walls along the road are what is seen
    expected = wall / np.abs(np.sin(azimuth[:, None] + AROUND_RAD[:, 0]))
    flat = facing & (AROUND_RAD[:, 1] == 0)
    assert not np.isnan(around[flat]).any()
    assert np.abs(around / expected - 1)[flat].max() < 0.03


def test_a_turning_world_frame_turns_the_answer_along():
    box, velocity = (10.0, 4.0, *CAR), (8.0, 0.0)
    past, points = history([(box, velocity)])
    turn = rotation_z(0.7)
    turned = History(
        tuple(transform_points(turn, p) for p in past.points), past.intensity, past.times_s, turn @ past.present_from_sensor, past.elevation_step_rad
    )
    body = on(points, box)
    found = np.median(motion_of(turned).velocity[body, :2], axis=0)
    assert np.linalg.norm(found - turn[:2, :2] @ velocity) < 0.5


def test_the_answer_is_kept_and_the_points_are_left_alone():
    past, _ = history([((10.0, 4.0, *CAR), (8.0, 0.0))], drift=(0.3, 0.0))
    before = [p.copy() for p in past.points]
    assert motion_of(past) is motion_of(past)
    assert all(np.array_equal(one, other) for one, other in zip(before, past.points, strict=True))
    again, _ = history([((10.0, 4.0, *CAR), (8.0, 0.0))], drift=(0.3, 0.0))
    assert np.array_equal(motion_of(again).velocity, motion_of(past).velocity)


@pytest.mark.parametrize("sweeps", [0, 1, 2, 3])
def test_short_empty_and_broken_pasts_are_answered(sweeps):
    full, _ = history([((10.0, 4.0, *CAR), (8.0, 0.0))], times=TIMES_S[-3:])
    if sweeps == 0:
        points = tuple(np.zeros((0, 3), np.float32) for _ in range(3))
    else:
        points = full.points[-sweeps:]
        points = (*points[:-1], np.concatenate((points[-1], np.full((3, 3), np.nan, np.float32), np.full((2, 3), 1e9, np.float32))))
    dark = tuple(np.zeros(len(p), np.float32) for p in points)
    past = History(points, dark, full.times_s[-len(points) :], full.present_from_sensor[-len(points) :], STEP_RAD)
    motion = motion_of(past)
    assert motion.velocity.shape == motion.alternative.shape == points[-1].shape
    assert motion.cluster.shape == points[-1].shape[:1]
    assert np.isfinite(motion.velocity).all() and np.isfinite(motion.alternative).all()
    if sweeps == 3:
        assert (motion.cluster >= 0).any()


def test_what_brakes_stops_and_does_not_come_back():
    v, a = np.array([[4.0, 0.0], [4.0, 0.0], [0.0, 2.0]]), np.array([[-4.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    assert np.allclose(_displacement(v, a, 0.5), v * 0.5 + a * 0.125)
    assert np.allclose(_displacement(v, a, 3.0)[0], (2.0, 0.0))
    assert np.allclose(_displacement(v, a, 3.0)[1:], (v * 3.0 + a * 4.5)[1:])
