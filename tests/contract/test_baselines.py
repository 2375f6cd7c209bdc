"""What every baseline promises, found by discovery: an answer a ray, without a look at the truth, the same every time."""

import dataclasses

import numpy as np
import pytest

from sensors.rays import History, Rays
from worldmodel.evaluate import baselines

BASELINES = baselines()


def street(seed: int, count: int = 12000) -> tuple[History, Rays]:
    """Past sweeps of a sensor that drives between two walls, and rays of a later one into them."""
    rng = np.random.Generator(np.random.Philox(seed))

    def seen_from(x: float) -> np.ndarray:
        directions = rng.normal(size=(count, 3)) * (1, 1, 0.15)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        with np.errstate(divide="ignore"):
            ranges = np.minimum(np.abs(8 / directions[:, 1]), np.where(directions[:, 2] < 0, -1.7 / directions[:, 2], np.inf))
        keep = (ranges > 2) & (ranges < 56)
        return (np.array([x, 0, 1.7]) + directions[keep] * ranges[keep, None]).astype(np.float32)

    times = np.array([-0.8, -0.6, -0.4, -0.2, 0.0])
    poses = np.tile(np.eye(4), (5, 1, 1))
    poses[:, 0, 3], poses[:, 2, 3] = times * 10, 1.7
    points = tuple(seen_from(x) for x in times * 10)
    later = np.eye(4)
    later[:3, 3] = 6, 0, 1.7
    truth = seen_from(6.0)[:1500] - later[:3, 3]
    ranges = np.linalg.norm(truth, axis=1).astype(np.float32)
    intensity = tuple(np.full(len(p), 0.5, np.float32) for p in points)
    rays = Rays(0.6, later, (truth / ranges[:, None]).astype(np.float32), ranges, np.zeros(len(ranges), np.float32), np.arange(len(ranges)))
    return History(points, intensity, times, poses), rays


def fresh(history: History) -> History:
    return dataclasses.replace(history, memo={})


def test_the_baselines_of_the_tables_are_there():
    assert set(BASELINES) >= {"copy", "reproject_pixel", "reproject_nearest", "reproject_interp", "accumulate_nearest", "raytrace", "flow"}


@pytest.mark.parametrize("name", BASELINES)
def test_answers_are_ranges_near_the_truth_and_repeat(name):
    history, rays = street(0)
    answers = BASELINES[name](history, rays)
    assert answers.shape == rays.ranges.shape and answers.dtype == np.float32
    known = answers[np.isfinite(answers)]
    assert (known > 0).all() and len(known) > 0.8 * len(answers)
    # walls and road: even the worst of them is right to a metre and a half more often than not
    assert np.nanmedian(np.abs(answers - rays.ranges)) < 1.5
    np.testing.assert_array_equal(BASELINES[name](fresh(history), rays), answers)
    np.testing.assert_array_equal(BASELINES[name](history, rays), answers)


@pytest.mark.parametrize("name", BASELINES)
def test_the_truth_is_not_looked_at(name):
    history, rays = street(1)
    answers = BASELINES[name](fresh(history), rays)
    other = np.random.Generator(np.random.Philox(1)).permutation(rays.ranges)
    nothing = dataclasses.replace(rays, ranges=np.full_like(other, np.nan), intensity=np.full_like(other, np.nan), index=rays.index[::-1])
    np.testing.assert_array_equal(BASELINES[name](fresh(history), dataclasses.replace(rays, ranges=other)), answers)
    np.testing.assert_array_equal(BASELINES[name](fresh(history), nothing), answers)


@pytest.mark.parametrize("name", BASELINES)
def test_each_ray_is_answered_by_itself(name):
    history, rays = street(2)
    rows = np.random.Generator(np.random.Philox(2)).permutation(len(rays.ranges))[:300]
    few = Rays(rays.horizon_s, rays.present_from_sensor, rays.directions[rows], rays.ranges[rows], rays.intensity[rows], rays.index[rows])
    np.testing.assert_array_equal(BASELINES[name](history, few), BASELINES[name](history, rays)[rows])


@pytest.mark.parametrize("name", BASELINES)
def test_without_a_past_there_is_no_answer(name):
    history, rays = street(3)
    empty = tuple(np.zeros((0, 3), np.float32) for _ in history.points)
    blank = History(empty, tuple(np.zeros(0, np.float32) for _ in empty), history.times_s, history.present_from_sensor)
    answers = BASELINES[name](blank, rays)
    assert answers.shape == rays.ranges.shape and np.isnan(answers).all()


@pytest.mark.parametrize("name", BASELINES)
def test_no_rays_no_answers(name):
    history, rays = street(4)
    none = Rays(rays.horizon_s, rays.present_from_sensor, rays.directions[:0], rays.ranges[:0], rays.intensity[:0], rays.index[:0])
    assert BASELINES[name](history, none).shape == (0,)


@pytest.mark.parametrize("name", BASELINES)
def test_the_past_is_left_as_it_was(name):
    history, rays = street(5)
    before = [points.copy() for points in history.points]
    BASELINES[name](history, rays)
    for points, was in zip(history.points, before, strict=True):
        np.testing.assert_array_equal(points, was)
