"""What moves, without labels: a velocity for each point of the newest past sweep.

Things that stand on the ground are clustered on the ground plane. A cluster that stood still is where the older sweeps had something,
too; one that moved is at a place that older sweeps saw through, or has left places that are seen through now. For those the velocity is
searched that brings the cluster onto the points of *all* older sweeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.evidence import _seen_beyond, view_from
from sensors.geometry import inverse, transform_points
from sensors.kernels import clusters
from sensors.rays import History

Array = NDArray[Any]

EXTENT_M = 64.0
GROUND_CELL_M, COARSE_CELL_M, FINE_CELL_M = 1.0, 0.25, 0.125
LOW_M, HIGH_M = 0.3, 3.0
SPLAT_SIGMA_M = 0.17
TOP_SPEED = 24.0
SEARCH_STEP = 0.5
SAMPLE = 64
LONGEST_M = 14.0
GONE_M = 0.5


@dataclass(frozen=True, eq=False)
class Motion:
    """velocity (N,3) f32 m/s per point of the newest sweep, in the ego frame of t = 0 (0: static, or unknown); alternative (N,3) f32, a
    second hypothesis, equal to velocity where there is none; cluster (N,) i32 of the moving thing that a point belongs to, -1 none."""

    velocity: Array
    alternative: Array
    cluster: Array


def motion_of(history: History) -> Motion:
    return history.once("motion", lambda: _estimate(history))


def _grid(cell_m: float) -> int:
    return int(round(2 * EXTENT_M / cell_m))


@dataclass
class Candidate:
    rows: Array
    static: float = 0.0


def _spread(rows: Array, count: int) -> Array:
    if len(rows) <= count:
        return rows
    return rows[(np.arange(count) * (len(rows) / count)).astype(np.int64)]


def _drift(sample: Array, times: Array, maps: Array) -> Array:
    steps = np.array([[0.3, 0.01], [0.15, 0.005], [0.07, 0.0025], [0.03, 0.001]])
    out = np.zeros(3)
    clusters.climb(sample, np.zeros(3), times, maps, FINE_CELL_M, 0, steps, True, out)
    return out


def _estimate(history: History) -> Motion:
    newest = history.points[-1]
    count = len(newest)
    nothing = Motion(np.zeros((count, 3), np.float32), np.zeros((count, 3), np.float32), np.full(count, -1, np.int32))
    sweeps = len(history.points)
    if sweeps < 2 or count == 0:
        return nothing
    times = np.asarray(history.times_s, np.float64)

    low = np.full((sweeps, _grid(GROUND_CELL_M), _grid(GROUND_CELL_M)), np.inf, np.float32)
    for points, into in zip(history.points, low, strict=True):
        clusters.lowest(points, GROUND_CELL_M, len(into), into)
    ground = np.empty_like(low[0])
    clusters.ground_of(low, 2, np.float32(0.4), ground)
    heights, standing = [], []
    for points in history.points:
        height = np.empty(len(points), np.float32)
        clusters.heights(points, ground, GROUND_CELL_M, height)
        heights.append(height)
        standing.append((height > LOW_M) & (height < HIGH_M))

    fine = _grid(FINE_CELL_M)
    maps = np.zeros((sweeps - 1, fine, fine), np.uint8)
    for k in range(sweeps - 1):
        clusters.splat(history.points[k], standing[k], FINE_CELL_M, SPLAT_SIGMA_M, maps[k])
    rows_standing = np.flatnonzero(standing[-1])
    if not len(rows_standing):
        return nothing

    # clusters of the newest sweep
    coarse = _grid(COARSE_CELL_M)
    cell = np.empty(count, np.int32)
    clusters.cells_of(newest, COARSE_CELL_M, coarse, cell)
    flat = np.ascontiguousarray(newest[:, :2])
    # share of older sweeps with something there
    fine_cell = np.empty(count, np.int32)
    clusters.cells_of(newest, FINE_CELL_M, fine, fine_cell)
    there = np.zeros(count, np.float32)
    inside = fine_cell >= 0
    flat_maps = maps.reshape(sweeps - 1, -1)
    first_two = min(2, sweeps - 1)
    for k in range(first_two):
        there[inside] += flat_maps[k, fine_cell[inside]] > 110
    there /= first_two
    usable = standing[-1] & (cell >= 0)

    def label(mask: Array, near_m: float) -> list[Array]:
        occupied = np.zeros((coarse, coarse), np.bool_)
        occupied.reshape(-1)[cell[mask]] = True
        labels = np.empty((coarse, coarse), np.int32)
        number = clusters.components(occupied, near_m / COARSE_CELL_M, labels)
        rows = np.flatnonzero(mask)
        of = labels.reshape(-1)[cell[rows]]
        order = np.argsort(of, kind="stable")
        bounds = np.searchsorted(of[order], np.arange(number + 1))
        return [rows[order[bounds[i] : bounds[i + 1]]] for i in range(number)]

    suspects: list[Array] = []
    loose = np.zeros(count, np.bool_)
    for rows in label(usable, 15.0):
        extent = np.ptp(flat[rows], axis=0)
        unexplained = 1 - there[rows].mean()
        if extent.max() > LONGEST_M or unexplained < 0.12:
            loose[rows[there[rows] < 0.5]] = True
        elif len(rows) >= 4:
            suspects.append(rows)
    suspects += [rows for rows in label(loose, 15.0) if len(rows) >= 6 and np.ptp(flat[rows], axis=0).max() < LONGEST_M]

    # what the newest sweep still has at the same place did not move: not to be matched
    whole = np.zeros(count, np.bool_)
    for rows in suspects:
        whole[rows] = True
    still = np.zeros((fine, fine), np.uint8)
    clusters.splat(newest, usable & ~whole & (there > 0.5), FINE_CELL_M, SPLAT_SIGMA_M, still)
    moving_maps = np.zeros_like(maps)
    lookup = []
    for k in range(sweeps - 1):
        at = np.empty(len(history.points[k]), np.int32)
        clusters.cells_of(history.points[k], FINE_CELL_M, fine, at)
        keep = standing[k] & (at >= 0)
        keep[keep] = still.reshape(-1)[at[keep]] < 110
        clusters.splat(history.points[k], keep, FINE_CELL_M, SPLAT_SIGMA_M, moving_maps[k])
        n = _grid(GROUND_CELL_M)
        start, order = np.zeros(n * n + 1, np.int32), np.empty(len(keep), np.int32)
        clusters.sort_into_cells(history.points[k], keep, GROUND_CELL_M, n, start, order)
        lookup.append((history.points[k], start, order))

    views = [view_from(history, k, inverse(history.present_from_sensor[k]), "own") for k in range(sweeps)]

    def beyond(points: Array, k: int) -> Array:
        """Reading of sweep k towards each point minus its distance."""
        view = views[k]
        start, _, azimuth, elevation, radius = view._cells[:5]
        out = np.empty(len(points), np.float32)
        towards = transform_points(inverse(history.present_from_sensor[k]), points)
        _seen_beyond(towards, start, azimuth, elevation, radius, view.n_elevation, view.elevation_step_rad, np.float32(20), out)
        return out

    steps = np.array([[0.25, 0.1], [0.12, 0.05], [0.06, 0.025]])
    velocity, alternative, cluster = nothing.velocity, nothing.alternative, nothing.cluster
    first = max(sweeps - 3, 0)
    number = 0
    debug = []
    for rows in suspects:
        sample_rows = _spread(rows, SAMPLE)
        sample = flat[sample_rows]
        peaks, scores = np.zeros((8, 2)), np.zeros(8)
        zero = clusters.overlap(sample, 0.0, 0.0, 0.0, times[:-1], maps, FINE_CELL_M, 0)
        clusters.search(sample, times[:-1], moving_maps, FINE_CELL_M, TOP_SPEED, SEARCH_STEP, first, peaks, scores)
        found = []
        for peak, score in zip(peaks, scores):
            if score < 0.25:
                continue
            out = np.zeros(3)
            value = clusters.climb(sample, np.array([peak[0], peak[1], 0.0]), times[:-1], moving_maps, FINE_CELL_M, 0, steps, False, out)
            found.append((value, out))
        if not found:
            debug.append((rows, zero, None, None))
            continue
        found.sort(key=lambda f: -f[0])
        points = newest[sample_rows]
        appeared = np.mean([np.mean(beyond(points, k) > GONE_M) for k in range(first_two)])
        value, best = found[0]
        moved = np.concatenate([points + np.array([best[0], best[1], 0], np.float32) * np.float32(times[k]) for k in range(first_two)])
        vanished = np.mean(beyond(moved, sweeps - 1) > GONE_M)
        debug.append((rows, zero, found, (appeared, vanished)))
        if np.hypot(best[0], best[1]) < 0.5 or value < 0.5 or value < zero + 0.1 or appeared + vanished < 0.25:
            continue
        history.memo.setdefault('tracks', []).append((number, rows)) 
        present, later = _fit(newest[_spread(rows, 96)], best, times[:-1], lookup)
        number += _mark(newest, heights[-1], rows, present, later, there, whole, velocity, alternative, cluster, number)
    history.memo["motion debug"] = debug
    return Motion(velocity, alternative, cluster)


LIMITS = np.array([0.6, 0.45, 0.35, 0.3, 0.3])
ACCELERATION = 2.5
AHEAD_S = 0.4


def _fit(points: Array, guess: Array, times: Array, lookup: list[tuple[Array, Array, Array]]) -> tuple[Array, Array]:
    """Present velocity (2,), and the velocity AHEAD_S later, of points (M,3) by registering them with each older sweep from guess on."""
    n = _grid(GROUND_CELL_M)
    shifts, weights = [], []
    for t, (old, start, order) in zip(times, lookup, strict=True):
        shift = guess[:2] * t
        squared, share = clusters.settle(points, old, start, order, GROUND_CELL_M, n, shift, LIMITS, len(LIMITS), 160, np.float32(0.5))
        shifts.append(shift)
        sigma = 0.03 + 0.2 / np.sqrt(len(points))
        weights.append(share**2 / sigma**2 if np.isfinite(squared) and share > 0.2 else 0.0)
    d, w = np.stack(shifts), np.array(weights)
    basis = np.stack((times, 0.5 * times**2), 1)
    if w.sum() == 0:
        return guess[:2], guess[:2]
    normal = basis.T @ (basis * w[:, None]) + np.diag([1e-2, 1 / ACCELERATION**2])
    v, a = np.linalg.solve(normal, basis.T @ (d * w[:, None]))
    return v, v + a * AHEAD_S


def _mark(newest, height, rows, best, second, there, whole, velocity, alternative, cluster, number) -> int:
    heading = np.arctan2(best[1], best[0])
    c, s = np.cos(heading), np.sin(heading)
    along = np.stack((newest[:, 0] * c + newest[:, 1] * s, -newest[:, 0] * s + newest[:, 1] * c), 1)
    low, high = along[rows].min(0) - 0.3, along[rows].max(0) + 0.3
    top = height[rows].max() + 0.5
    inside = ((along > low) & (along < high)).all(1) & (height > 0.15) & (height < top) & (whole | (there < 0.5) | (height < LOW_M))
    inside[rows] = True
    inside &= cluster < 0
    velocity[inside, :2] = best[:2]
    alternative[inside, :2] = second[:2]
    cluster[inside] = number
    return 1
