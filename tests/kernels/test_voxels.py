"""Pillars, their features and hard voxels, against plain numpy that can be checked by eye, and against spconv where it is installed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sensors.kernels.voxels import Pillars, grid_shape, hard_voxels, pillar_features, pillars

LOW, SIZE, SHAPE = (-4.0, -2.0, -1.0), (0.4, 0.25, 0.5), (20, 16, 6)
HIGH = tuple(l + s * n for l, s, n in zip(LOW, SIZE, SHAPE))


def plain_cells(points: np.ndarray, low: tuple, size: tuple, shape: tuple) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        a = (points[:, :3] - np.array(low, np.float32)) / np.array(size, np.float32)
        inside = ((a >= 0) & (a < np.array(shape, np.float32))).all(1)
    xyz = np.where(inside[:, None], a, 0).astype(np.int64)
    return np.where(inside, (xyz[:, 2] * shape[1] + xyz[:, 1]) * shape[0] + xyz[:, 0], -1)


def plain_pillars(points: np.ndarray, low: tuple, size: tuple, shape: tuple) -> tuple[np.ndarray, ...]:
    cell = plain_cells(points, low, size, shape)
    cells = np.unique(cell[cell >= 0])
    of = np.where(cell >= 0, np.searchsorted(cells, cell), -1)
    groups = [np.flatnonzero(of == v) for v in range(len(cells))]
    mean = np.zeros((len(cells), 3), np.float32)
    for v, group in enumerate(groups):
        for i in group:
            mean[v] += points[i, :3]
        mean[v] /= np.float32(len(group))
    row = np.cumsum([0] + [len(g) for g in groups])
    return cells, row, np.concatenate([*groups, np.empty(0, np.int64)]), of, mean


def plain_hard(points: np.ndarray, low: tuple, size: tuple, shape: tuple, max_points: int, max_voxels: int) -> tuple[np.ndarray, ...]:
    voxels: dict[int, list[int]] = {}
    for i, cell in enumerate(plain_cells(points, low, size, shape)):
        if cell < 0 or (cell not in voxels and len(voxels) >= max_voxels):
            continue
        group = voxels.setdefault(int(cell), [])
        if len(group) < max_points:
            group.append(i)
    out = np.zeros((len(voxels), max_points, points.shape[1]), np.float32)
    coords = np.zeros((len(voxels), 3), np.int32)
    for v, (cell, group) in enumerate(voxels.items()):
        out[v, : len(group)] = points[group]
        coords[v] = cell // (shape[0] * shape[1]), cell // shape[0] % shape[1], cell % shape[0]
    return out, coords, np.array([len(g) for g in voxels.values()], np.int32)


def border_points(seed: int, count: int) -> np.ndarray:
    """Points on cell borders and one step of float32 beside them, among hostile values."""
    rng = np.random.Generator(np.random.Philox(seed))
    lattice = rng.integers(-1, np.array(SHAPE) + 2, (count, 3)) * np.array(SIZE) + np.array(LOW)
    xyz = lattice.astype(np.float32)
    xyz = np.where(rng.random(xyz.shape) < 0.3, np.nextafter(xyz, np.float32(np.inf)), xyz)
    xyz = np.where(rng.random(xyz.shape) < 0.3, np.nextafter(xyz, np.float32(-np.inf)), xyz)
    hostile = np.array([np.nan, np.inf, -np.inf, -0.0, 3e9, -3e38, 3e38, 1e-45], np.float32)
    xyz = np.where(rng.random(xyz.shape) < 0.02, rng.choice(hostile, xyz.shape), xyz)
    return np.concatenate((xyz, rng.random((count, 1))), 1).astype(np.float32)


clouds = st.one_of(
    st.builds(border_points, st.integers(0, 10_000), st.sampled_from([0, 1, 7, 255, 256, 257, 1200])),
    hnp.arrays(np.float32, st.tuples(st.integers(0, 40), st.integers(3, 6)), elements=st.floats(-6, 6, width=32)),
    hnp.arrays(np.float32, st.tuples(st.integers(0, 40), st.integers(3, 6)), elements=st.floats(width=32)),
)


@settings(max_examples=60, deadline=None)
@given(clouds, st.booleans())
def test_pillars_are_the_sorted_cells_and_their_points_in_order(points: np.ndarray, flat: bool) -> None:
    size, shape = ((0.4, 0.25, 3.0), (20, 16)) if flat else (SIZE, SHAPE)
    whole = (*shape, 1)[:3]
    got = pillars(points, LOW, size, shape)
    cells, row, order, of, mean = plain_pillars(points, LOW, size, whole)
    np.testing.assert_array_equal(got.cells, cells)
    np.testing.assert_array_equal(got.row, row)
    np.testing.assert_array_equal(got.order, order)
    np.testing.assert_array_equal(got.of, of)
    np.testing.assert_array_equal(got.mean, mean)
    assert (got.cells.dtype, got.row.dtype, got.order.dtype, got.of.dtype, got.mean.dtype) == (np.int32,) * 4 + (np.float32,)


@settings(max_examples=40, deadline=None)
@given(clouds)
def test_features_are_raw_then_off_the_mean_then_off_the_centre(points: np.ndarray) -> None:
    grouped = pillars(points, LOW, SIZE, SHAPE)
    got = pillar_features(points, grouped)
    raw = points[grouped.order]
    v = grouped.of[grouped.order]
    cell = grouped.cells[v]
    xyz = np.stack((cell % SHAPE[0], cell // SHAPE[0] % SHAPE[1], cell // (SHAPE[0] * SHAPE[1])), 1).astype(np.float32)
    size, low = np.array(SIZE, np.float32), np.array(LOW, np.float32)
    centre = xyz * size + (low + size * np.float32(0.5))
    want = np.concatenate((raw, raw[:, :3] - grouped.mean[v], raw[:, :3] - centre), 1)
    np.testing.assert_array_equal(got, want)
    assert np.abs(got[:, -3:] / size).max(initial=0) <= 0.5001


def test_the_bitmap_is_clean_after_every_call() -> None:
    for seed in range(6):
        points = border_points(seed, 900)
        for shape in ((20, 16, 6), (7, 9, 3), (200, 300, 4)):
            np.testing.assert_array_equal(pillars(points, LOW, SIZE, shape).cells, plain_pillars(points, LOW, SIZE, shape)[0])


@settings(max_examples=60, deadline=None)
@given(clouds, st.integers(1, 9), st.integers(1, 300))
def test_hard_voxels_fill_in_point_order(points: np.ndarray, max_points: int, max_voxels: int) -> None:
    got = hard_voxels(points, LOW, HIGH, SIZE, max_points, max_voxels)
    for mine, plain in zip(got, plain_hard(points, LOW, SIZE, SHAPE, max_points, max_voxels)):
        np.testing.assert_array_equal(mine, plain)


@pytest.mark.parametrize("size", [(0.4, 0.25, 0.5), (0.1, 0.1, 0.2), (0.075, 0.075, 0.2), (0.16, 0.16, 3.0)])
def test_hard_voxels_are_spconvs(size: tuple) -> None:
    pytest.importorskip("spconv.utils", reason="spconv is not installed: pip install 'driving-worldmodel[bench]'")
    import torch
    from spconv.pytorch.utils import PointToVoxel

    rng = np.random.Generator(np.random.Philox(3))
    points = np.concatenate((rng.uniform(-5, 5, (20_000, 3)), rng.random((20_000, 1))), 1).astype(np.float32)
    step = np.rint((points[:10_000, :3] - LOW) / size)
    points[:10_000, :3] = (step * size + LOW).astype(np.float32)
    points[:5_000, :3] = np.nextafter(points[:5_000, :3], np.float32(-np.inf))
    peer = PointToVoxel(list(size), [*LOW, *HIGH], 4, 3000, 5)
    want = peer(torch.from_numpy(points))
    for mine, theirs in zip(hard_voxels(points, LOW, HIGH, size, 5, 3000), want):
        np.testing.assert_array_equal(mine, theirs.numpy())


def test_bad_arguments_are_refused_in_one_line() -> None:
    good = np.zeros((4, 4), np.float32)
    attempts = [
        lambda: pillars(good.astype(np.float64), LOW, SIZE, SHAPE),
        lambda: pillars(good[:, :2], LOW, SIZE, SHAPE),
        lambda: pillars([[0.0, 0, 0]], LOW, SIZE, SHAPE),
        lambda: pillars(good, LOW, (0.1, 0.0, 0.1), SHAPE),
        lambda: pillars(good, (0, np.nan, 0), SIZE, SHAPE),
        lambda: pillars(good, LOW, SIZE, (1 << 12, 1 << 12, 1 << 8)),
        lambda: pillars(good, LOW, SIZE, (0, 4, 1)),
        lambda: pillar_features(good[:2], pillars(good, LOW, SIZE, SHAPE)),
        lambda: hard_voxels(good, LOW, HIGH, SIZE, 0, 10),
        lambda: hard_voxels(good, HIGH, LOW, SIZE, 5, 10),
        lambda: grid_shape((0, 0, 0), (1, 1, 1), (-1, 1, 1)),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_readonly_and_strided_points_are_fine() -> None:
    points = border_points(1, 500)
    frozen = points.copy()
    frozen.setflags(write=False)
    wide = np.repeat(points, 2, axis=0)[::2]
    first: Pillars = pillars(points, LOW, SIZE, SHAPE)
    for other in (frozen, wide, np.asfortranarray(points)):
        np.testing.assert_array_equal(pillars(other, LOW, SIZE, SHAPE).mean, first.mean)
        np.testing.assert_array_equal(pillar_features(other, first), pillar_features(points, first))
