"""Registration against its twin in plain numpy, on random and on awkward clouds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensors.geometry import from_rotation_translation, inverse, rotation_z, transform_points
from sensors.kernels.registration import FLATNESS, MIN_NEIGHBOURS, MIN_WIDTH_M, Planes, thinned


def slow_normals(points, radius):
    """For each point (N,3): unit normal of the plane of its neighbours within radius, or None; and whether it is close to the thresholds."""
    out, sure = [], []
    for p in points:
        near = points[((points - p) ** 2).sum(1) <= radius * radius]
        values, vectors = np.linalg.eigh(np.cov(near.T, bias=True)) if len(near) >= MIN_NEIGHBOURS else (np.zeros(3), np.eye(3))
        flat = max(values[0], 0) < FLATNESS**2 * values[1] and values[1] > MIN_WIDTH_M**2
        out.append(vectors[:, 0] if flat and len(near) >= MIN_NEIGHBOURS else None)
        sure.append(abs(values[0] - FLATNESS**2 * values[1]) > 1e-9 and abs(values[1] - MIN_WIDTH_M**2) > 1e-9)
    return out, np.array(sure)


def slow_equations(source, pose, points, normals, limit, tukey):
    a, b, matched = np.zeros((6, 6)), np.zeros(6), 0
    planes = np.flatnonzero(np.abs(normals).sum(1) > 0)
    for p in transform_points(pose, source):
        if not len(planes):
            continue
        d = ((points[planes] - p) ** 2).sum(1)
        at = planes[d.argmin()]
        if d.min() >= limit * limit:
            continue
        r = normals[at] @ (p - points[at])
        if abs(r) >= tukey:
            continue
        w = (1 - (r / tukey) ** 2) ** 2
        j = np.concatenate((np.cross(p, normals[at]), normals[at]))
        a, b, matched = a + w * np.outer(j, j), b - w * r * j, matched + 1
    return a, b, matched


def clouds(seed, count, kind):
    rng = np.random.default_rng(seed)
    points = rng.normal(0, 2, (count, 3))
    if kind == "wall":
        points[:, 0] = 5 + rng.normal(0, 0.01, count)
    elif kind == "line":
        points[:, 1:] = rng.normal(0, 0.005, (count, 2))
    elif kind == "one place":
        points[:] = points[:1]
    elif kind == "far":
        points += (9e4, -9e4, 10)
    return points


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0, 1, 2, 7, 60, 200]), st.sampled_from(["blob", "wall", "line", "one place", "far"]))
def test_normals_and_equations_are_those_of_the_twin(seed, count, kind):
    target = clouds(seed, count, kind)
    source = clouds(seed + 1, 50, kind)
    planes = Planes(target, 0.9)
    assert np.array_equal(np.sort(planes.order), np.arange(count)) and np.array_equal(planes.points, target[planes.order])
    expected, sure = slow_normals(planes.points, 0.9)
    for normal, twin, clear in zip(planes.normals, expected, sure, strict=True):
        if not clear:
            continue
        assert (twin is None) == (np.abs(normal).sum() == 0)
        if twin is not None:
            assert abs(abs(normal @ twin) - 1) < 1e-6
    pose = from_rotation_translation(rotation_z(0.03)[:3, :3], (0.1, -0.05, 0.02)) if kind != "far" else np.eye(4)
    a, b, matched, weights, _ = planes.equations(source, pose, 0.6, 0.4)
    a2, b2, matched2 = slow_equations(source, pose, planes.points, planes.normals, 0.6, 0.4)
    assert matched == matched2
    assert np.allclose(a, a2, rtol=1e-9, atol=1e-6) and np.allclose(b, b2, rtol=1e-9, atol=1e-6)
    assert weights <= matched


def test_one_step_on_three_walls_finds_the_motion():
    rng = np.random.default_rng(0)
    walls = []
    for axis in range(3):
        wall = rng.uniform(-4, 4, (3000, 3))
        wall[:, axis] = -4
        walls.append(wall)
    cloud = np.concatenate(walls)
    moved = from_rotation_translation(rotation_z(0.002)[:3, :3], (0.02, -0.01, 0.015))
    a, b, matched, _, _ = Planes(cloud).equations(transform_points(inverse(moved), cloud), np.eye(4), 0.25, 0.15)
    assert matched > 6000
    assert np.allclose(np.linalg.solve(a, b), (0, 0, 0.002, 0.02, -0.01, 0.015), atol=5e-4)


def test_a_ring_on_the_ground_has_no_normal():
    """Its points are a line: any plane through it would be a guess."""
    angle = np.linspace(0, 2 * np.pi, 2000)
    assert not Planes(np.stack((8 * np.cos(angle), 8 * np.sin(angle), np.zeros(2000)), 1), 0.5).normals.any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0, 1, 500]), st.sampled_from(["blob", "wall", "one place", "far"]), st.sampled_from([0.1, 0.25, 3.0]))
def test_thinning_is_the_mean_of_each_voxel(seed, count, kind, voxel):
    points = clouds(seed, count, kind)
    expected = {}
    for p in points:
        expected.setdefault(tuple(np.floor(p / voxel)), []).append(p)
    found = thinned(points, voxel)
    assert found.shape == (len(expected), 3)
    assert np.allclose(found, np.array([np.mean(expected[key], 0) for key in sorted(expected)]).reshape(-1, 3), rtol=0, atol=1e-9)


@pytest.mark.parametrize("bad", [np.full((4, 3), np.nan), np.full((4, 3), 1e9), np.zeros((4, 2)), np.zeros(3)])
def test_clouds_that_cannot_be_are_refused(bad):
    for use in (Planes, lambda cloud: thinned(cloud, 0.2), lambda cloud: Planes(np.zeros((1, 3))).equations(cloud, np.eye(4), 0.5, 0.5)):
        with pytest.raises(ValueError, match=r"target|source|cloud"):
            use(bad)
