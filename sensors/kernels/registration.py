"""Point-to-plane registration of one cloud to another, deterministic and on one core.

The target's points are sorted into hashed cells. A plane is fitted around each by the eigenvectors of its neighbours' scatter, and kept
only where the neighbourhood is a surface: flat, and wide in two directions (a single ring on the ground is a line, and its normal would be
a guess). A step of the registration finds for every source point the nearest such target point within a limit, and sums the normal
equations of the distances to their planes under Tukey's weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]

# a neighbourhood is a plane when it is this much thinner than wide, and at least this wide (standard deviation, m) both ways
FLATNESS = 0.15
MIN_WIDTH_M = 0.06
MIN_NEIGHBOURS = 6
REACH_M = 1e5


@njit(nogil=True, cache=True, error_model="numpy")
def _bucket(x, y, z, mask):
    h = np.uint64(x) * np.uint64(73856093) ^ np.uint64(y) * np.uint64(19349669) ^ np.uint64(z) * np.uint64(83492791)
    h ^= h >> np.uint64(17)
    h *= np.uint64(0xED5AD4BBAC4C1B51)
    h ^= h >> np.uint64(31)
    return np.int64(h & mask)


@njit(nogil=True, cache=True, error_model="numpy")
def _grid(points, cell):
    """Points sorted by bucket: start (B+1,) i32, sorted points (n,3) f64, their cells (n,3) i64, their places in the input (n,) i32."""
    n = points.shape[0]
    buckets = 16
    while buckets < 2 * n:
        buckets *= 2
    mask = np.uint64(buckets - 1)
    start = np.zeros(buckets + 1, np.int32)
    of = np.empty(n, np.int64)
    for i in range(n):
        of[i] = _bucket(
            np.int64(np.floor(points[i, 0] / cell)), np.int64(np.floor(points[i, 1] / cell)), np.int64(np.floor(points[i, 2] / cell)), mask
        )
        start[of[i] + 1] += 1
    for b in range(buckets):
        start[b + 1] += start[b]
    fill = start[:-1].copy()
    out = np.empty((n, 3), np.float64)
    cells = np.empty((n, 3), np.int64)
    order = np.empty(n, np.int32)
    for i in range(n):
        at = fill[of[i]]
        fill[of[i]] = at + 1
        order[at] = i
        for a in range(3):
            out[at, a] = points[i, a]
            cells[at, a] = np.int64(np.floor(points[i, a] / cell))
    return start, out, cells, order


@njit(nogil=True, cache=True, error_model="numpy")
def _eigen3(m, v):
    """Jacobi rotations: m (3,3) symmetric becomes diagonal, the columns of v its eigenvectors."""
    for a in range(3):
        for b in range(3):
            v[a, b] = 1.0 if a == b else 0.0
    for _ in range(12):
        if abs(m[0, 1]) + abs(m[0, 2]) + abs(m[1, 2]) <= 1e-14 * (abs(m[0, 0]) + abs(m[1, 1]) + abs(m[2, 2])) + 1e-300:
            break
        for p in range(2):
            for q in range(p + 1, 3):
                if m[p, q] == 0.0:
                    continue
                theta = (m[q, q] - m[p, p]) / (2.0 * m[p, q])
                t = 1.0 / (abs(theta) + np.sqrt(theta * theta + 1.0))
                if theta < 0:
                    t = -t
                c = 1.0 / np.sqrt(t * t + 1.0)
                s = t * c
                for k in range(3):
                    mp, mq = m[k, p], m[k, q]
                    m[k, p], m[k, q] = c * mp - s * mq, s * mp + c * mq
                for k in range(3):
                    mp, mq = m[p, k], m[q, k]
                    m[p, k], m[q, k] = c * mp - s * mq, s * mp + c * mq
                for k in range(3):
                    vp, vq = v[k, p], v[k, q]
                    v[k, p], v[k, q] = c * vp - s * vq, s * vp + c * vq


@njit(nogil=True, cache=True, error_model="numpy")
def _normals(start, points, cells, cell, radius, normals):
    """Normal (n,3) of the plane around each sorted point, zero where its neighbourhood within radius <= cell is not a plane."""
    mask = np.uint64(start.shape[0] - 2)
    moment = np.empty((3, 3))
    vectors = np.empty((3, 3))
    mean = np.empty(3)
    for i in range(points.shape[0]):
        normals[i, :] = 0.0
        count = 0
        mean[:] = 0.0
        moment[:, :] = 0.0
        for dx in range(-1, 2):
            for dy in range(-1, 2):
                for dz in range(-1, 2):
                    x, y, z = cells[i, 0] + dx, cells[i, 1] + dy, cells[i, 2] + dz
                    b = _bucket(x, y, z, mask)
                    for at in range(start[b], start[b + 1]):
                        # two cells may share a bucket: only the points of this one
                        if cells[at, 0] != x or cells[at, 1] != y or cells[at, 2] != z:
                            continue
                        ox, oy, oz = points[at, 0] - points[i, 0], points[at, 1] - points[i, 1], points[at, 2] - points[i, 2]
                        if ox * ox + oy * oy + oz * oz > radius * radius:
                            continue
                        count += 1
                        mean[0] += ox
                        mean[1] += oy
                        mean[2] += oz
                        moment[0, 0] += ox * ox
                        moment[0, 1] += ox * oy
                        moment[0, 2] += ox * oz
                        moment[1, 1] += oy * oy
                        moment[1, 2] += oy * oz
                        moment[2, 2] += oz * oz
        if count < MIN_NEIGHBOURS:
            continue
        for a in range(3):
            for b in range(a, 3):
                moment[a, b] = moment[a, b] / count - mean[a] / count * (mean[b] / count)
                moment[b, a] = moment[a, b]
        _eigen3(moment, vectors)
        least = 0
        for a in range(1, 3):
            if moment[a, a] < moment[least, least]:
                least = a
        middle = min(moment[(least + 1) % 3, (least + 1) % 3], moment[(least + 2) % 3, (least + 2) % 3])
        if middle > MIN_WIDTH_M * MIN_WIDTH_M and max(moment[least, least], 0.0) < FLATNESS * FLATNESS * middle:
            for a in range(3):
                normals[i, a] = vectors[a, least]


@njit(nogil=True, cache=True, error_model="numpy")
def _normal_equations(source, target_from_source, start, points, cells, normals, cell, limit, tukey, a_out, b_out):
    """Sums over the source points that have a plane within limit: returns their number, the sum of weights and of weighted squared
    distances; adds to a_out (6,6), b_out (6,). Unknowns: rotation about the target's origin, then translation."""
    mask = np.uint64(start.shape[0] - 2)
    a_out[:, :] = 0.0
    b_out[:] = 0.0
    matched, weights, squares = 0, 0.0, 0.0
    j = np.empty(6)
    m = target_from_source
    for i in range(source.shape[0]):
        sx, sy, sz = source[i, 0], source[i, 1], source[i, 2]
        x = m[0, 0] * sx + m[0, 1] * sy + m[0, 2] * sz + m[0, 3]
        y = m[1, 0] * sx + m[1, 1] * sy + m[1, 2] * sz + m[1, 3]
        z = m[2, 0] * sx + m[2, 1] * sy + m[2, 2] * sz + m[2, 3]
        best, best_at = limit * limit, -1
        for cx in range(np.int64(np.floor((x - limit) / cell)), np.int64(np.floor((x + limit) / cell)) + 1):
            for cy in range(np.int64(np.floor((y - limit) / cell)), np.int64(np.floor((y + limit) / cell)) + 1):
                for cz in range(np.int64(np.floor((z - limit) / cell)), np.int64(np.floor((z + limit) / cell)) + 1):
                    b = _bucket(cx, cy, cz, mask)
                    for at in range(start[b], start[b + 1]):
                        if normals[at, 0] == 0.0 and normals[at, 1] == 0.0 and normals[at, 2] == 0.0:
                            continue
                        d = (points[at, 0] - x) ** 2 + (points[at, 1] - y) ** 2 + (points[at, 2] - z) ** 2
                        if d < best:
                            best, best_at = d, at
        if best_at < 0:
            continue
        nx, ny, nz = normals[best_at, 0], normals[best_at, 1], normals[best_at, 2]
        r = nx * (x - points[best_at, 0]) + ny * (y - points[best_at, 1]) + nz * (z - points[best_at, 2])
        if abs(r) >= tukey:
            continue
        w = (1.0 - (r / tukey) ** 2) ** 2
        j[0], j[1], j[2] = y * nz - z * ny, z * nx - x * nz, x * ny - y * nx
        j[3], j[4], j[5] = nx, ny, nz
        for a in range(6):
            b_out[a] -= w * r * j[a]
            for c in range(6):
                a_out[a, c] += w * j[a] * j[c]
        matched += 1
        weights += w
        squares += w * r * r
    return matched, weights, squares


def _cloud(what: str, points: Array) -> Array:
    points = np.ascontiguousarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"{what}: points of shape {points.shape}, expected (N, 3)")
    if not (np.abs(points) < REACH_M).all():
        raise ValueError(f"{what}: points that are not finite or farther than {REACH_M:g} m")
    return points


class Planes:
    """A target cloud (N,3) m with the planes around its points, fitted to their neighbours within radius_m."""

    def __init__(self, points: Array, radius_m: float = 0.75) -> None:
        points = _cloud("target", points)
        self.cell_m = float(radius_m)
        self._start, self.points, self._cells, self.order = _grid(points, self.cell_m)
        self.normals = np.empty_like(self.points)
        _normals(self._start, self.points, self._cells, self.cell_m, self.cell_m, self.normals)

    def equations(self, source: Array, target_from_source: Array, limit_m: float, tukey_m: float) -> tuple[Array, Array, int, float, float]:
        """Normal equations A (6,6), b (6,) of one step for source (N,3) m: the small motion x = (rotation vector about the target's
        origin, translation) that solves A x = b is to be applied on the left of target_from_source. Then the number of source points with
        a plane within limit_m, the sum of their Tukey weights (zero beyond tukey_m), and of weighted squared distances, m²."""
        a, b = np.zeros((6, 6)), np.zeros(6)
        matched, weights, squares = _normal_equations(
            _cloud("source", source), np.ascontiguousarray(target_from_source, np.float64),
            self._start, self.points, self._cells, self.normals, self.cell_m, float(limit_m), float(tukey_m), a, b,
        )  # fmt: skip
        return a, b, int(matched), float(weights), float(squares)


def thinned(points: Array, voxel_m: float) -> Array:
    """One point (M,3) f64 per occupied voxel of (N,3): the mean of those inside, in ascending order of the voxels."""
    points = _cloud("cloud", points)
    if not len(points):
        return points
    cells = np.floor(points / voxel_m).astype(np.int64)
    cells -= cells.min(0)
    nx, ny, nz = (int(n) + 1 for n in cells.max(0))
    if nx * ny * nz >= 2**62:
        raise ValueError(f"cloud: {nx} x {ny} x {nz} voxels are too many to count")
    _, row, count = np.unique((cells[:, 0] * ny + cells[:, 1]) * nz + cells[:, 2], return_inverse=True, return_counts=True)
    row = row.reshape(-1)
    return np.stack([np.bincount(row, points[:, a], len(count)) / count for a in range(3)], 1)
