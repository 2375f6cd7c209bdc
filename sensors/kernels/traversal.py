"""Free space: the cells that rays pass through on the way to their returns, exactly, in column words (see occupancy.py for the layout).

The three-dimensional walk becomes a walk over slabs of the ray's major horizontal axis. In each the ray touches at most two columns, and in
each of these a run of cells that is one mask. No slab depends on the one before, so the geometry of a ray is one vector loop; a second,
scalar loop ors the masks into the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import int32, njit, uint64
from numpy.typing import NDArray

Array = NDArray[Any]

LANES = 8
MAX_SIDE = 1 << 20
REACH_M = 1e9


@njit(nogil=True, cache=True, error_model="numpy")
def _cell(value, count):
    """The cell of a coordinate, clamped into 0 .. count - 1 as a float, before it becomes an integer."""
    return int32(min(max(value, 0.0), count - 0.5))


@njit(nogil=True, cache=True, error_model="numpy")
def _clip(o, d, count, t0, t1):
    """The part of t0 .. t1 within 0 .. count along one axis; backwards when there is none."""
    if d == 0.0:
        return (t0, t1) if o >= 0.0 and o < count else (1.0, 0.0)
    a, b = -o / d, (count - o) / d
    return max(t0, min(a, b)), min(t1, max(a, b))


@njit(nogil=True, cache=True, error_model="numpy")
def _slabs(rows, n, n_minor, nz, stride_m, stride_n, first, last, om, dm, on, dn, oz, dz, t0, t1):
    """Columns (two packed in a word) and masks of n slabs, those beyond the last one repeating the ray's end."""
    pairs, masks0, masks1, times, minors, levels = rows
    step = int32(1) if dm > 0.0 else int32(-1)
    per_m = 1.0 / abs(dm)
    per_n = 1.0 / dn if abs(dn) > 1e-12 else 0.0
    t_first = (first + (1.0 if dm > 0.0 else 0.0) - om) / dm
    low_m, high_m = min(first, last), max(first, last)
    side, height = float(n_minor), float(nz)
    # where the ray is at each border between slabs, and then what lies between two of them
    for s in range(n + 1):
        t = min(max(t_first + (s - 1) * per_m, t0), t1)
        times[s] = t
        minors[s] = _cell(on + dn * t, side)
        levels[s] = _cell(oz + dz * t, height)
    for s in range(n):
        j0, j1, z0, z1 = minors[s], minors[s + 1], levels[s], levels[s + 1]
        # a slab is no longer than one cell of the minor axis: a second crossing is rounding
        j1 = min(max(j1, int32(j0 - 1)), int32(j0 + 1))
        t_mid = min(max((max(j0, j1) - on) * per_n, times[s]), times[s + 1])
        z_mid = min(max(_cell(oz + dz * t_mid, height), min(z0, z1)), max(z0, z1))
        z_mid = z1 if j0 == j1 else z_mid
        i = min(max(int32(first + int32(s) * step), low_m), high_m)
        pairs[s] = uint64(i * stride_m + j0 * stride_n) | (uint64(i * stride_m + j1 * stride_n) << uint64(32))
        masks0[s] = (uint64(2) << uint64(max(z0, z_mid))) - (uint64(1) << uint64(min(z0, z_mid)))
        masks1[s] = (uint64(2) << uint64(max(z_mid, z1))) - (uint64(1) << uint64(min(z_mid, z1)))


@njit(nogil=True, cache=True, error_model="numpy")
def _carve(points, origins, low, size, nx, ny, nz, free):
    room = max(nx, ny) + 2 * LANES
    pairs, masks0, masks1 = np.empty(room, np.uint64), np.empty(room, np.uint64), np.empty(room, np.uint64)
    rows = (pairs, masks0, masks1, np.empty(room), np.empty(room, np.int32), np.empty(room, np.int32))
    one_origin = origins.shape[0] == 1
    low32 = uint64(0xFFFFFFFF)
    for r in range(points.shape[0]):
        at = 0 if one_origin else r
        ox, oy, oz = (origins[at, 0] - low[0]) / size[0], (origins[at, 1] - low[1]) / size[1], (origins[at, 2] - low[2]) / size[2]
        dx, dy, dz = (points[r, 0] - low[0]) / size[0] - ox, (points[r, 1] - low[1]) / size[1] - oy, (points[r, 2] - low[2]) / size[2] - oz
        reach = max(max(abs(points[r, 0]), abs(points[r, 1])), abs(points[r, 2]))
        base = max(max(abs(origins[at, 0]), abs(origins[at, 1])), abs(origins[at, 2]))
        # comparisons with NaN are false: max() may lose one, the sum does not
        if not (reach <= REACH_M and base <= REACH_M and abs(dx + dy + dz) < np.inf):
            continue
        t0, t1 = _clip(ox, dx, nx, 0.0, 1.0)
        t0, t1 = _clip(oy, dy, ny, t0, t1)
        t0, t1 = _clip(oz, dz, nz, t0, t1)
        if not t0 <= t1:
            continue
        if max(abs(dx), abs(dy)) < 1e-9:
            z0, z1 = _cell(oz + dz * t0, nz), _cell(oz + dz * t1, nz)
            column = uint64(_cell(ox, nx)) * uint64(ny) + uint64(_cell(oy, ny))
            free[column] |= (uint64(2) << uint64(max(z0, z1))) - (uint64(1) << uint64(min(z0, z1)))
            continue
        if abs(dx) >= abs(dy):
            first, last = _cell(ox + dx * t0, nx), _cell(ox + dx * t1, nx)
            n = (abs(last - first) // LANES + 1) * LANES
            _slabs(rows, n, ny, nz, ny, 1, first, last, ox, dx, oy, dy, oz, dz, t0, t1)
        else:
            first, last = _cell(oy + dy * t0, ny), _cell(oy + dy * t1, ny)
            n = (abs(last - first) // LANES + 1) * LANES
            _slabs(rows, n, nx, nz, 1, ny, first, last, oy, dy, ox, dx, oz, dz, t0, t1)
        for s in range(n):
            free[pairs[s] & low32] |= masks0[s]
            free[pairs[s] >> uint64(32)] |= masks1[s]


def free_space(points: Array, origins: Any, low: Any, size: Any, shape: Sequence[int], occupied: Array) -> Array:
    """(nx, ny) u64: bit z of word (x, y) is set where a segment from an origin to a point passes through cell (x, y, z) and `occupied`
    (nx, ny) u64, the words of `occupancy.columns`, does not hold it: occupied wins. points (N, F) f32 or f64 with xyz first, m; origins (3,)
    or (N, 3), inside the grid or not; low (3,), size (3,) or one number, shape (nx, ny, nz) with nz at most 64. Segments with an end that
    is not finite, or beyond 1e9 m, carve nothing. ValueError for other types and shapes."""
    if not isinstance(points, np.ndarray) or points.dtype not in (np.float32, np.float64) or points.ndim != 2 or points.shape[1] < 3:
        found = f"{points.dtype} {points.shape}" if isinstance(points, np.ndarray) else type(points).__name__
        raise ValueError(f"free_space: points are {found}; give float32 or float64 (N, F) with F >= 3, xyz first")
    # the grid's edges as the points met them: in float32
    low64 = np.array(low, np.float32).astype(np.float64)
    size64 = np.array(np.broadcast_to(np.array(size, np.float32), 3)).astype(np.float64)
    if low64.shape != (3,) or not np.isfinite(low64).all() or not np.isfinite(size64).all() or not (size64 > 0).all():
        raise ValueError(f"free_space: low {low} and size {size} must be three finite numbers, sizes above 0")
    nx, ny, nz = (int(s) for s in shape)
    if not (1 <= nx <= MAX_SIDE and 1 <= ny <= MAX_SIDE and 1 <= nz <= 64 and nx * ny < 1 << 31):
        raise ValueError(f"free_space: shape {tuple(shape)} must be (nx, ny, nz) with nz at most 64 and below 2^31 columns")
    if not isinstance(occupied, np.ndarray) or occupied.dtype != np.uint64 or occupied.shape != (nx, ny):
        found = f"{occupied.dtype} {occupied.shape}" if isinstance(occupied, np.ndarray) else type(occupied).__name__
        raise ValueError(f"free_space: occupied is {found}; give uint64 ({nx}, {ny}), as occupancy.columns makes it")
    starts = np.ascontiguousarray(np.atleast_2d(np.asarray(origins, np.float64)))
    if starts.ndim != 2 or starts.shape[1] != 3 or len(starts) not in (1, len(points)):
        raise ValueError(f"free_space: origins {np.shape(origins)} for {len(points)} points; give (3,) or (N, 3)")
    free = np.zeros((nx, ny), np.uint64)
    _carve(np.ascontiguousarray(points[:, :3], np.float64), starts, low64, size64, nx, ny, nz, free.reshape(-1))
    free &= ~occupied
    return free
