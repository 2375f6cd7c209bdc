"""Range images and depth maps against numpy in float64, away from the borders between pixels, where float32 may take either side."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensors.kernels.range_image import depth_maps, range_image

HOSTILE = np.array(
    [[np.nan, 1, 1], [1, np.inf, 1], [1, 1, -np.inf], [0, 0, 0], [-0.0, 0, -0.0], [3e38, 3e38, 1], [1e-45, 0, 0], [1, 1, 1e30]], np.float32
)


def with_hostile(points: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(seed))
    whole = np.concatenate((points, HOSTILE))
    return np.ascontiguousarray(whole[rng.permutation(len(whole))])


def clear_of_borders(*coordinates: np.ndarray) -> np.ndarray:
    return np.all([np.abs(c - np.rint(c)) > 1e-2 for c in coordinates], axis=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0, 1, 255, 257, 3000]), st.sampled_from([(32, 1088), (64, 2048), (1, 1), (5, 7)]))
def test_a_pixel_holds_its_nearest_point(seed: int, count: int, size: tuple) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    height, width = size
    low, high = np.deg2rad([-25.0, 8.0])
    points = (rng.normal(0, 1, (count, 3)) * (1, 1, 0.3) * rng.uniform(0.5, 60, (count, 1))).astype(np.float32)
    p = points.astype(np.float64)
    column = (np.pi - np.arctan2(p[:, 1], p[:, 0])) / (2 * np.pi) * width
    row = (high - np.arctan2(p[:, 2], np.hypot(p[:, 0], p[:, 1]))) / (high - low) * height
    points, p, column, row = (v[clear_of_borders(column, row)] for v in (points, p, column, row))
    r = np.linalg.norm(p, axis=1)
    want = np.full((height, width), np.inf)
    inside = (row >= 0) & (row < height)
    np.minimum.at(want, (row[inside].astype(int), column[inside].astype(int)), r[inside])

    given_points = with_hostile(points, seed)
    image, index = range_image(given_points, height, width, (low, high))
    assert image.dtype == np.float32 and index.dtype == np.int32 and image.flags.c_contiguous
    np.testing.assert_allclose(image, want, rtol=1e-6)
    np.testing.assert_array_equal(index >= 0, np.isfinite(image))
    np.testing.assert_allclose(np.linalg.norm(given_points[index[index >= 0]].astype(np.float64), axis=1), image[index >= 0], rtol=1e-6)


def test_left_is_left_and_up_is_up_and_the_first_of_equals_wins() -> None:
    points = np.array(
        [[10, 0.1, 0.1], [0.1, 10, 0.1], [0.1, -10, 0.1], [10, -0.1, 1.5], [10, 0.1, 0.1], [-10, -0.0, 0.1], [-10, 0.0, 0.1]], np.float32
    )
    image, index = range_image(points, 4, 8, (-0.2, 0.2))
    assert index[1].tolist() == [5, -1, 1, 0, -1, 2, -1, -1]
    assert index[0, 4] == 3 and np.isinf(image[3]).all()


CAMERA = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0]])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0, 1, 300, 3000]), st.integers(1, 4))
def test_depth_maps_hold_the_nearest_depth(seed: int, count: int, cameras: int) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    points = (rng.normal(0, 1, (count, 3)) * rng.uniform(0.5, 60, (count, 1))).astype(np.float32)
    sizes = [(int(rng.integers(1, 60)), int(rng.integers(1, 90))) for _ in range(cameras)]
    projections = []
    for c, (h, w) in enumerate(sizes):
        k = np.array([[40.0, 0, w / 2], [0, 40.0, h / 2], [0, 0, 1]])
        turn = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
        projections.append(k @ np.column_stack((CAMERA[:, :3] @ turn, rng.normal(0, 0.3, 3))))
    matrices = np.array(projections, np.float32)
    p = np.column_stack((points.astype(np.float64), np.ones(count)))
    uvd = np.einsum("cij,nj->cni", matrices.astype(np.float64), p)
    clear = np.ones(count, bool)
    for c in range(cameras):
        d = uvd[c, :, 2]
        near = np.abs(d) < 0.2
        d = np.where(near, 1.0, d)
        clear &= ~near & clear_of_borders(uvd[c, :, 0] / d + 0.5, uvd[c, :, 1] / d + 0.5)
    points, uvd = points[clear], uvd[:, clear]
    got = depth_maps(with_hostile(points, seed), matrices, sizes)
    want_hostile = depth_maps(HOSTILE, matrices, sizes)
    for c, (h, w) in enumerate(sizes):
        d = uvd[c, :, 2]
        u, v = (np.floor(uvd[c, :, i] / d + 0.5) for i in range(2))
        ok = (d > 0.1) & (u >= 0) & (u < w) & (v >= 0) & (v < h)
        want = np.full((h, w), np.inf)
        np.minimum.at(want, (v[ok].astype(int), u[ok].astype(int)), d[ok])
        # the origin and its like are points too, where a camera sees them
        want = np.minimum(want, want_hostile[c])
        np.testing.assert_allclose(got[c], want, rtol=1e-4)
        assert got[c].shape == (h, w)


def test_a_point_left_of_the_first_pixel_is_outside() -> None:
    k = np.array([[10.0, 0, 0], [0, 10, 0], [0, 0, 1]])
    projection = (k @ np.eye(3, 4))[None]
    for u, seen in ((-0.9, False), (-0.6, False), (-0.4, True), (0.4, True), (2.4, True), (2.6, False)):
        point = np.array([[u / 10 * 5, 0, 5]], np.float32)
        assert np.isfinite(depth_maps(point, projection, [(1, 3)])[0]).any() == seen


def test_bad_arguments_are_refused() -> None:
    points, p = np.zeros((3, 3), np.float32), np.zeros((1, 3, 4), np.float32)
    for attempt in (
        lambda: range_image(points.astype(np.float64), 4, 4, (-1, 1)),
        lambda: range_image(points, 0, 4, (-1, 1)),
        lambda: range_image(points, 4, 4, (1, -1)),
        lambda: range_image(points, 4, 4, (-25, 2)),
        lambda: depth_maps(points[:, :2], p, [(4, 4)]),
        lambda: depth_maps(points, p, [(4, 4), (4, 4)]),
        lambda: depth_maps(points, p * np.nan, [(4, 4)]),
        lambda: depth_maps(points, p, [(4, 0)]),
        lambda: depth_maps(points, p, [(4, 4)], min_depth_m=0.0),
    ):
        with pytest.raises(ValueError, match=r"range_image|depth_maps"):
            attempt()
