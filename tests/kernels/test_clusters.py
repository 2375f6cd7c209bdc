"""The kernels of motion against slow twins in plain numpy."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from sensors.kernels import clusters
from sensors.kernels.directions import View

CELL, N = 0.5, 32


def hostile(seed, count):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-10, 10, (count, 3)).astype(np.float32)
    bad = rng.random(count) < 0.1
    points[bad, rng.integers(0, 2, bad.sum())] = rng.choice(np.array([np.nan, np.inf, -np.inf, 1e30, -8.0, 8.0], np.float32), bad.sum())
    return points, rng


def cell_twin(points):
    with np.errstate(invalid="ignore", over="ignore"):
        at = np.floor(points[:, :2] / np.float32(CELL) + np.float32(N // 2))
        ok = ((at >= 0) & (at < N)).all(1)
    out = np.full(len(points), -1)
    out[ok] = (at[ok, 0] * N + at[ok, 1]).astype(int)
    return out


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 200))
def test_cells_lowest_and_heights_are_those_of_plain_numpy(seed, count):
    points, _ = hostile(seed, count)
    cell = np.empty(count, np.int32)
    clusters.cells_of(points, CELL, N, cell)
    want = cell_twin(points)
    assert np.array_equal(cell, want)
    low = np.full((N, N), np.inf, np.float32)
    clusters.lowest(points, CELL, N, low)
    twin = np.full(N * N, np.inf, np.float32)
    np.minimum.at(twin, want[want >= 0], points[want >= 0, 2])
    assert np.array_equal(low.reshape(-1), twin)
    height = np.empty(count, np.float32)
    clusters.heights(points, low, CELL, height)
    expected = np.where(want >= 0, points[:, 2] - twin[want], np.nan)
    assert np.array_equal(height, expected.astype(np.float32), equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
def test_components_are_those_of_scipy(seed, share):
    occupied = np.random.default_rng(seed).random((N, N)) < share
    for near, structure in ((1e9, np.ones((3, 3))), (0.0, None)):
        out = np.empty((N, N), np.int32)
        number = clusters.components(occupied, near, out)
        if structure is None:
            # across one empty cell: connected within two cells, which dilating says for 5 x 5 neighbourhoods only pair by pair
            want, count = pairwise(occupied, 2)
        else:
            want, count = ndimage.label(occupied, structure)
        assert number == count
        assert np.array_equal(out >= 0, occupied)
        pairs = set(zip(out[occupied].tolist(), want[occupied].tolist(), strict=True))
        assert len(pairs) == count


def pairwise(occupied, reach):
    at = np.argwhere(occupied)
    label = np.arange(len(at))
    near = np.abs(at[:, None] - at[None]).max(-1) <= reach
    while True:
        smaller = np.where(near, label[None], len(at)).min(1) if len(at) else label
        if np.array_equal(smaller, label):
            break
        label = smaller
    out = np.zeros(occupied.shape, int)
    names, inverse = np.unique(label, return_inverse=True)
    out[occupied] = inverse + 1
    return out, len(names)


def test_ground_outvotes_reflections_from_below_and_things_above():
    low = np.zeros((5, N, N), np.float32) + np.random.default_rng(0).normal(0, 0.02, (5, N, N)).astype(np.float32)
    low[0, 5:12, 5:12] = -4.0  # under the road, in one sweep
    low[:, 20, 20:22] = -3.0  # under the road in all sweeps, but few cells
    low[:, 10:13, 20:22] = 1.4  # a roof
    low[:, :, 30:] = np.inf
    low[:, 28:, 20:] = np.inf
    out = np.empty((N, N), np.float32)
    clusters.ground_of(low, 2, np.float32(0.4), out)
    assert np.abs(out[:28, :30]).max() < 0.15
    assert np.isinf(out[31, 31])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 40))
def test_splat_is_the_nearest_occupied_cell_in_a_gaussian(seed, count):
    points, rng = hostile(seed, count)
    keep = rng.random(count) < 0.7
    out = np.zeros((N, N), np.uint8)
    clusters.splat(points, keep, CELL, 0.6, out)
    reach = clusters.SPLAT_REACH
    cells = {(c // N, c % N) for c, k in zip(cell_twin(points), keep, strict=True) if k and c >= 0}
    cells = {(r, c) for r, c in cells if reach <= r < N - reach and reach <= c < N - reach}
    want = np.zeros((N, N), np.uint8)
    for r, c in cells:
        for rr in range(r - reach, r + reach + 1):
            for cc in range(c - reach, c + reach + 1):
                d2 = ((rr - r) ** 2 + (cc - c) ** 2) * CELL * CELL
                want[rr, cc] = max(want[rr, cc], int(255 * np.exp(-0.5 * d2 / 0.36)))
    assert np.abs(out.astype(int) - want).max(initial=0) <= 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_overlap_and_point_overlap_read_the_maps_where_the_points_were(seed):
    rng = np.random.default_rng(seed)
    maps = rng.integers(0, 256, (3, N, N)).astype(np.uint8)
    points, times = rng.uniform(-6, 6, (20, 2)).astype(np.float32), np.array([-0.6, -0.4, -0.2])
    v = rng.uniform(-9, 9, 2)
    out = np.empty((20, 3), np.float32)
    clusters.point_overlap(points, v[0], v[1], times, maps, CELL, out)
    want = np.zeros((20, 3))
    for k, t in enumerate(times):
        at = cell_twin(np.concatenate((points + (v * t).astype(np.float32), np.zeros((20, 1), np.float32)), 1))
        want[:, k] = np.where(at >= 0, maps[k].reshape(-1)[at], 0) / 255
    # a point may fall on the other side of a cell's edge by rounding
    assert (np.abs(out - want) > 1e-6).mean() < 0.05
    assert abs(clusters.overlap(points, v[0], v[1], 0.0, times, maps, CELL, 0) - out.mean()) < 0.02


def pooled(maps):
    out = np.empty((len(maps), maps.shape[1] // clusters.POOL, maps.shape[2] // clusters.POOL), np.uint8)
    for one, into in zip(maps, out, strict=True):
        clusters.pool(one, into)
    return out


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_pooled_map_is_the_largest_around_each_block(seed):
    rng = np.random.default_rng(seed)
    map_ = rng.integers(0, 256, (N, N)).astype(np.uint8) * (rng.random((N, N)) < 0.05)
    blocks = map_.reshape(N // clusters.POOL, clusters.POOL, N // clusters.POOL, clusters.POOL).max((1, 3))
    assert np.array_equal(pooled(map_[None])[0], ndimage.maximum_filter(blocks, 3, mode="constant"))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), step=st.sampled_from([0.4, 1.5, 3.0]), least=st.floats(0, 0.6),
    band=st.sampled_from([(0.0, 0.0), (16.0, 3.0), (3.0, 13.0), (17.0, 11.0)]),
)  # fmt: skip
def test_search_leaves_out_only_what_cannot_be_a_peak(seed, step, least, band):
    rng = np.random.default_rng(seed)
    maps = np.zeros((3, N, N), np.uint8)
    shape = rng.uniform(-7, 7, (12, 2)).astype(np.float32)
    times, v = np.array([-0.6, -0.4, -0.2]), rng.uniform(-8, 8, 2) * rng.choice((1, 2))
    for k, t in enumerate(times):
        there = shape[rng.random(12) < 0.8] + (v * t).astype(np.float32)
        old = np.concatenate((there, rng.uniform(-8, 8, (6, 2)).astype(np.float32)))
        clusters.splat(np.concatenate((old, np.zeros((len(old), 1), np.float32)), 1), np.ones(len(old), bool), CELL, 0.6, maps[k])
    peaks, scores = np.zeros((4, 2)), np.zeros(4)
    clusters.search(shape, times, maps, pooled(maps), CELL, 10.0, *band, step, 1, least, peaks, scores)
    along, aside = (np.arange(-half, half + 1) * step for half in (int(max(10.0, most) / step) for most in band))
    grid = np.full((len(along), len(aside)), -1.0)
    for a, vx in enumerate(along):
        for b, vy in enumerate(aside):
            if vx * vx + vy * vy <= 100.0 or (abs(vx) <= band[0] and abs(vy) <= band[1]):
                grid[a, b] = clusters.overlap(shape, vx, vy, 0.0, times, maps, CELL, 1)
    inner = grid[1:-1, 1:-1]
    best = inner[(inner == ndimage.maximum_filter(grid, 3, mode="nearest")[1:-1, 1:-1]) & (inner > least + 0.02)]
    # points on a cell's edge may be counted on either side by rounding, which moves a score by a few points' worth
    if len(best):
        assert scores[0] >= best.max() - 0.05
    assert (scores[scores >= 0] > least).all()
    for peak, score in zip(peaks, scores, strict=True):
        if score >= 0:
            assert abs(score - clusters.overlap(shape, *peak, 0.0, times, maps, CELL, 1)) < 0.05


def test_search_and_climb_find_the_velocity_that_was_put_in():
    rng = np.random.default_rng(3)
    shape = rng.uniform(-1, 1, (60, 2)) * (2.0, 0.8)
    times, v, cell, n = np.array([-0.8, -0.6, -0.4, -0.2]), np.array((5.3, -3.1)), 0.125, 256
    maps = np.zeros((4, n, n), np.uint8)
    for k, t in enumerate(times):
        old = np.concatenate((shape + v * t, np.zeros((60, 1))), 1).astype(np.float32)
        clusters.splat(old, np.ones(60, bool), cell, 0.17, maps[k])
    peaks, scores, out = np.zeros((3, 2)), np.zeros(3), np.zeros(3)
    flat = shape.astype(np.float32)
    clusters.search(flat, times, maps, pooled(maps), cell, 12.0, 20.0, 2.0, 0.5, 2, 0.1, peaks, scores)
    assert np.abs(peaks[0] - v).max() <= 0.5
    assert (np.diff(scores) <= 0).all()
    steps = np.array([[0.25, 0.0], [0.06, 0.0]])
    score = clusters.climb(flat, np.append(peaks[0], 0.0), times, maps, cell, 0, steps, False, out)
    assert np.abs(out[:2] - v).max() < 0.12 and score > 0.9


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_settle_recovers_a_shift_among_strangers(seed):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-1, 1, (80, 3)).astype(np.float32) * np.array((2, 1, 0.7), np.float32)
    true = rng.uniform(-1, 1, 2)
    old = np.concatenate((points + np.array((*true, 0), np.float32), rng.uniform(4, 9, (50, 3)).astype(np.float32)))
    start, order = np.zeros(N * N + 1, np.int32), np.empty(len(old), np.int32)
    keep = np.ones(len(old), bool)
    kept = clusters.sort_into_cells(old, keep, CELL, N, start, order)
    want = cell_twin(old)
    assert kept == (want >= 0).sum()
    for c in np.unique(want[want >= 0]):
        assert order[start[c] : start[c + 1]].tolist() == np.flatnonzero(want == c).tolist()
    shift = true + rng.uniform(-0.1, 0.1, 2)
    limits = np.array([0.6, 0.45, 0.35, 0.3, 0.3, 0.3])
    squared, share = clusters.settle(points, old, start, order, CELL, N, shift, limits, 6, 200, np.float32(0.5))
    assert np.abs(shift - true).max() < 0.03 and share > 0.9 and squared < 0.01
    far = np.array((-30.0, 0.0))
    assert clusters.settle(points, old, start, order, CELL, N, far, limits, 6, 200, np.float32(0.5)) == (np.inf, 0.0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_towards_is_the_nearest_reading_in_the_ellipse(seed):
    points, rng = hostile(seed, 300)
    asked, _ = hostile(seed + 1, 60)
    pose = np.eye(4)
    pose[:3, 3] = rng.uniform(-1, 1, 3)
    step = float(np.deg2rad(4))
    view = View(points, step)
    start, _, azimuth, elevation, radius = view._cells[:5]
    out = np.empty(len(asked), np.float32)
    reach = np.array((np.deg2rad(0.35), np.deg2rad(3.0)))
    clusters.towards(asked, pose, start, azimuth, elevation, radius, view.n_elevation, step, reach[0], reach[1], out)
    with np.errstate(all="ignore"):
        q = asked.astype(np.float64) + pose[:3, 3]
        a, e = np.arctan2(q[:, 1], q[:, 0]), np.arctan2(q[:, 2], np.hypot(q[:, 0], q[:, 1]))
        distance = np.linalg.norm(q, axis=1)
        kept = len(azimuth)
        da = (azimuth[None, :kept] - a[:, None] + np.pi) % (2 * np.pi) - np.pi
        d = (da / reach[0]) ** 2 + ((elevation[None, :kept] - e[:, None]) / reach[1]) ** 2
        d = np.where(np.isfinite(d), d, np.inf)
    best = d.argmin(1)
    for i in range(len(asked)):
        ordered = np.sort(d[i])[:2]
        if not np.isfinite(ordered).all():
            continue
        if abs(ordered[0] - 1) < 0.01 or ordered[1] - ordered[0] < 0.01 or not distance[i] < 1e6:
            continue
        if ordered[0] < 1:
            assert abs(out[i] - (radius[best[i]] - distance[i])) < 1e-3
        else:
            assert np.isnan(out[i])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), heading=st.floats(-3.2, 3.2))
def test_inside_is_a_turned_box(seed, heading):
    points, rng = hostile(seed, 100)
    height = rng.uniform(-1, 3, 100).astype(np.float32)
    height[:5] = np.nan
    c, s = np.cos(heading), np.sin(heading)
    low, high = np.array((-4.0, -2.0)), np.array((5.0, 3.0, 2.0))
    out = np.empty(100, bool)
    clusters.inside(points, height, c, s, low, high, 0.15, out)
    with np.errstate(all="ignore"):
        p = points.astype(np.float64)
        along, left = p[:, 0] * c + p[:, 1] * s, p[:, 1] * c - p[:, 0] * s
        want = (along > low[0]) & (along < high[0]) & (left > low[1]) & (left < high[1]) & (height > 0.15) & (height < 2.0)
    assert np.array_equal(out, want)


def looks_of(seed, sweeps=3):
    """A few sweeps as views, and the same joined as the kernels want them."""
    rng = np.random.default_rng(seed)
    clouds = [(rng.normal(0, 6, (400, 3)) * (1, 1, 0.1)).astype(np.float32) for _ in range(sweeps)]
    poses = [np.eye(4) for _ in range(sweeps)]
    for pose in poses:
        pose[:3, 3] = rng.normal(0, 0.5, 3)
    views = [View(cloud, 0.02, pose) for cloud, pose in zip(clouds, poses, strict=True)]
    first = np.cumsum([0] + [len(view) for view in views])
    azimuth, elevation, radius = (np.concatenate([view._cells[i] for view in views]) for i in (2, 3, 4))
    start = np.stack([view._cells[0] for view in views])
    return views, poses, (start, first, azimuth, elevation, radius, np.stack(poses).astype(np.float32), views[0].n_elevation, 0.02, 0.006, 0.015), rng


def depths(view, pose, points):
    out = np.empty(len(points), np.float32)
    start, _, azimuth, elevation, radius = view._cells[:5]
    clusters.towards(points, pose, start, azimuth, elevation, radius, view.n_elevation, 0.02, 0.006, 0.015, out)
    return out


def shifted(points, v, t):
    return points + np.array((*(v * t), 0.0)).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_hidden_is_what_towards_finds_behind_a_reading(seed):
    views, poses, _, rng = looks_of(seed)
    points = (rng.normal(0, 8, (3000, 3)) * (1, 1, 0.1)).astype(np.float32)
    points[:3] = (np.nan, 0, 0), (0, 0, 0), (1e9, 0, 0)
    for view, pose in zip(views, poses, strict=True):
        out = np.empty(len(points), np.bool_)
        start, _, azimuth, elevation, radius = view._cells[:5]
        clusters.hidden(points, pose, start, azimuth, elevation, radius, view.n_elevation, 0.02, 0.006, 0.015, 0.3, out)
        assert np.array_equal(out, depths(view, pose, points) < -0.3)
        assert out.sum() > 20


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_match_and_seen_through_are_those_of_plain_numpy(seed):
    views, poses, looks, rng = looks_of(seed)
    maps = (rng.integers(0, 256, (3, N, N)) * (rng.random((3, N, N)) < 0.5)).astype(np.uint8)
    points = (rng.normal(0, 4, (40, 3)) * (1, 1, 0.1)).astype(np.float32)
    times, v = np.array([-0.6, -0.4, -0.2]), rng.uniform(-9, 9, 2)
    hits = np.empty((40, 3), np.float32)
    clusters.point_overlap(points, v[0], v[1], times, maps, CELL, hits)
    behind = np.stack([depths(view, pose, shifted(points, v, t)) for view, pose, t in zip(views, poses, times, strict=True)], 1)
    unseen = (behind < -0.5) & (hits < 0.5)
    want = hits.sum() / (hits.size - 0.85 * unseen.sum()) if hits.mean() >= 0.15 else 0.0
    score = clusters.match(points, v[0], v[1], times, maps, CELL, looks, 0.5, 0.15, 0.0)
    assert abs(score - want) < 1e-5
    assert clusters.match(points, v[0], v[1], times, maps, CELL, looks, 0.5, 0.15, want + 0.01) in (0.0, score)
    assert want == 0 or clusters.match(points, v[0], v[1], times, maps, CELL, looks, 0.5, 0.15, want - 0.01) == score
    shares = np.empty(3)
    clusters.seen_through(points, v[0], v[1], times, np.arange(3), looks, 0.5, shares)
    assert np.array_equal(shares, (behind > 0.5).mean(0))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 300))
def test_what_is_taken_is_inside_and_free_and_what_is_near_is_free_no_more(seed, count):
    points, rng = hostile(seed, count)
    height = rng.uniform(-1, 3, count).astype(np.float32)
    turn, low, high = rng.uniform(-3, 3), np.array((-4.0, -2.0)), np.array((5.0, 3.0, 2.0))
    free = rng.random(count) < 0.7
    before, rows = free.copy(), np.empty(count, np.int32)
    taken = rows[: clusters.take_inside(points, height, np.cos(turn), np.sin(turn), low, high, 0.15, 0.2, 0.6, free, rows)]
    masks = []
    for margin in (0.2, 0.6):
        out = np.empty(count, np.bool_)
        clusters.inside(points, height, np.cos(turn), np.sin(turn), low - margin, high + np.array((margin, margin, 0.0)), 0.15, out)
        masks.append(out)
    assert np.array_equal(taken, np.flatnonzero(masks[0] & before))
    assert np.array_equal(free, before & ~masks[1])
