"""Readings around a ray, against plain searches over all points."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensors.kernels.directions import AZIMUTH_CELLS, ELEVATION_STEP_RAD, REACH, View


def cloud(seed: int, count: int) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(seed))
    azimuth = rng.uniform(-np.pi, np.pi, count)
    elevation = rng.choice(np.deg2rad([-24, -10, -2, 0, 3, 60]), count) + rng.normal(0, 0.003, count)
    r = rng.uniform(0.5, 80, count)
    return np.stack((r * np.cos(elevation) * np.cos(azimuth), r * np.cos(elevation) * np.sin(azimuth), r * np.sin(elevation)), 1).astype(np.float32)


def unit(points: np.ndarray) -> np.ndarray:
    p = points.astype(np.float64)
    return p / np.linalg.norm(p, axis=1, keepdims=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 400))
def test_nearest_is_nearest_however_far(seed: int, count: int) -> None:
    points, asked = cloud(seed, count), unit(cloud(seed + 1, 60))
    ranges, angle, index = View(points).nearest(asked)
    true_angle = np.arccos(np.clip(asked @ unit(points).T, -1, 1))
    np.testing.assert_allclose(angle, true_angle.min(1), atol=2e-4)
    np.testing.assert_allclose(true_angle[np.arange(60), index], true_angle.min(1), atol=2e-4)
    np.testing.assert_allclose(ranges, np.linalg.norm(points[index], axis=1), rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 400), st.sampled_from([0.01, 0.03, 0.2, 2.0]))
def test_within_a_limit_nearest_is_what_it_is_without_one(seed: int, count: int, limit: float) -> None:
    view, asked = View(cloud(seed, count)), unit(cloud(seed + 1, 60))
    free, near = view.nearest(asked), view.nearest(asked, limit)
    inside = free[1] <= limit * (1 - 1e-5)
    for a, b in zip(free, near, strict=True):
        np.testing.assert_array_equal(a[inside], b[inside])
    outside = free[1] > limit * (1 + 1e-5)
    assert np.isnan(near[0][outside]).all() and np.isnan(near[1][outside]).all() and (near[2][outside] == -1).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3000))
def test_quadrants_against_a_plain_search(seed: int, count: int) -> None:
    points, asked = cloud(seed, count), unit(cloud(seed + 1, 40)).astype(np.float32)
    ranges, daz, delev = View(points).quadrants(asked)
    azimuth, elevation = np.arctan2(points[:, 1], points[:, 0]), np.arctan2(points[:, 2], np.hypot(points[:, 0], points[:, 1]))
    step = 2 * np.pi / AZIMUTH_CELLS
    for i, d in enumerate(asked):
        a, e = np.arctan2(d[1], d[0]), np.arctan2(d[2], np.hypot(d[0], d[1]))
        da, de = (azimuth - a + np.pi) % (2 * np.pi) - np.pi, elevation - e
        columns = (np.floor((azimuth + np.pi) / step) - np.floor((a + np.pi) / step) + AZIMUTH_CELLS // 2) % AZIMUTH_CELLS - AZIMUTH_CELLS // 2
        rows = np.floor((elevation + np.pi / 2) / ELEVATION_STEP_RAD) - np.floor((e + np.pi / 2) / ELEVATION_STEP_RAD)
        near = (np.abs(columns) <= REACH) & (np.abs(rows) <= REACH)
        for quadrant in range(4):
            inside = near & ((da >= 0) == (quadrant % 2 == 1)) & ((de >= 0) == (quadrant >= 2))
            cost = (da / step) ** 2 + (de / ELEVATION_STEP_RAD) ** 2
            if np.isnan(ranges[i, quadrant]):
                # a point within float32's reach of a cell's edge may fall on either side
                assert inside.sum() <= 1
            else:
                got = (daz[i, quadrant] / step) ** 2 + (delev[i, quadrant] / ELEVATION_STEP_RAD) ** 2
                if inside.any():
                    assert got <= cost[inside].min() * 1.001 + 1e-3


def test_interpolation_is_exact_on_a_plane() -> None:
    azimuth, elevation = np.meshgrid(np.deg2rad(np.arange(-20, 20, 0.2)), np.deg2rad(np.arange(-20, -2, 0.4)))
    direction = np.stack((np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)), -1).reshape(-1, 3)
    points = direction * (-1.7 / direction[:, 2:])
    asked = direction[::7] + np.array([0, 0.001, 0.0015])
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    inner = (np.abs(np.arctan2(asked[:, 1], asked[:, 0])) < 0.3) & (asked[:, 2] < -0.06) & (asked[:, 2] > -0.3)
    view = View(points.astype(np.float32))
    truth = -1.7 / asked[:, 2]
    interpolated = np.abs(view.interpolate(asked) / truth - 1)[inner]
    nearest = np.abs(view.nearest(asked)[0] / truth - 1)[inner]
    assert interpolated.max() < 1e-3 < nearest.max()


def test_hostile_points_are_left_out() -> None:
    points = np.array([[np.nan, 0, 0], [np.inf, 1, 1], [0, 0, 0], [1e30, 0, 0], [3, 0, 0]], np.float32)
    view = View(points)
    assert len(view) == 1
    ranges, _, index = view.nearest(np.array([[-1, 0, 0], [0, 0, 1]], np.float32))
    assert ranges.tolist() == [3, 3] and index.tolist() == [4, 4]
    empty = View(points[:4])
    assert np.isnan(empty.nearest(np.eye(3, dtype=np.float32))[0]).all()
    assert np.isnan(empty.interpolate(np.eye(3, dtype=np.float32))).all()
    assert np.isnan(empty.pixel(np.eye(3, dtype=np.float32))).all()
    with pytest.raises(ValueError, match="expected"):
        View(np.zeros((3, 2), np.float32))
    for ask in (view.nearest, view.quadrants, view.interpolate):
        for directions in (np.zeros((3, 2)), np.zeros(3)):
            with pytest.raises(ValueError, match="directions of shape"):
                ask(directions)
    with pytest.raises(ValueError, match="apart"):
        View(points, 0.0)


def test_pixel_takes_the_closest_return_of_its_cell() -> None:
    points = np.array([[10, 0.001, 0.001], [5, 0.0005, 0.0005], [0, 7, 0]], np.float32)
    assert View(points).pixel(np.array([[1, 0.0001, 0.0001], [0, 1, 0.3]], np.float32)).tolist() == pytest.approx([5, 7], rel=1e-4)


def test_a_view_from_elsewhere_is_the_view_of_moved_points() -> None:
    points, asked = cloud(3, 500), unit(cloud(4, 50))
    pose = np.array([[0.6, -0.8, 0, 1.0], [0.8, 0.6, 0, -2.0], [0, 0, 1, 0.5], [0, 0, 0, 1]])
    moved = (points.astype(np.float64) @ pose[:3, :3].T + pose[:3, 3]).astype(np.float32)
    for a, b in zip(View(points, sensor_from_points=pose).nearest(asked), View(moved).nearest(asked), strict=True):
        np.testing.assert_array_equal(a, b)
