"""Occupancy as column words: a grid (X, Y) of uint64 whose bit z says that cell (x, y, z) holds a point. Two million cells are a quarter of a
megabyte, and a vertical run of cells is one mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import float32, int32, njit, uint64
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 256
MAX_SIDE = 1 << 20


@njit(nogil=True, cache=True, error_model="numpy")
def _mark(points, low, size, nx, ny, nz, columns):
    n = points.shape[0]
    px, py, pz = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    column, level, inside = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32)
    lx, ly, lz = low[0], low[1], low[2]
    sx, sy, sz = size[0], size[1], size[2]
    fx, fy, fz = float32(nx), float32(ny), float32(nz)
    per_row, zero = int32(ny), float32(0)
    for start in range(0, n, BLOCK):
        count = min(BLOCK, n - start)
        for k in range(count):
            px[k], py[k], pz[k] = points[start + k, 0], points[start + k, 1], points[start + k, 2]
        for k in range(count):
            a, b, c = (px[k] - lx) / sx, (py[k] - ly) / sy, (pz[k] - lz) / sz
            ok = (a >= zero) & (a < fx) & (b >= zero) & (b < fy) & (c >= zero) & (c < fz)
            column[k] = int32(int32(int32(a if ok else zero) * per_row) + int32(b if ok else zero))
            level[k] = int32(c if ok else zero)
            inside[k] = int32(1) if ok else int32(0)
        # a point outside marks nothing, in column 0
        for k in range(count):
            columns[uint64(column[k])] |= uint64(inside[k]) << uint64(level[k])


def columns(points: Array, low: Any, size: Any, shape: Sequence[int], out: Array | None = None) -> Array:
    """(nx, ny) u64: bit z of word (x, y) is set where a point falls in cell (x, y, z). points (N, F) f32 with xyz first; low (3,), size
    (3,) or one number, m; shape (nx, ny, nz), nz at most 64. The cell is (p - low) / size truncated, in float32; points outside, NaN or
    infinite mark nothing. out: words to add to (several sweeps accumulate), else fresh ones. ValueError for other types and shapes."""
    if not isinstance(points, np.ndarray) or points.dtype != np.float32 or points.ndim != 2 or points.shape[1] < 3:
        found = f"{points.dtype} {points.shape}" if isinstance(points, np.ndarray) else type(points).__name__
        raise ValueError(f"columns: points are {found}; give float32 (N, F) with F >= 3, xyz first")
    low32, size32 = np.array(low, np.float32), np.array(np.broadcast_to(np.array(size, np.float32), 3))
    if low32.shape != (3,) or not np.isfinite(low32).all() or not np.isfinite(size32).all() or not (size32 > 0).all():
        raise ValueError(f"columns: low {low} and size {size} must be three finite numbers, sizes above 0")
    nx, ny, nz = (int(s) for s in shape)
    if not (1 <= nx <= MAX_SIDE and 1 <= ny <= MAX_SIDE and 1 <= nz <= 64 and nx * ny < 1 << 31):
        raise ValueError(f"columns: shape {tuple(shape)} must be (nx, ny, nz) with nz at most 64 and below 2^31 columns")
    if out is None:
        out = np.zeros((nx, ny), np.uint64)
    elif out.dtype != np.uint64 or out.shape != (nx, ny) or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(f"columns: out is {out.dtype} {out.shape}; give writable contiguous uint64 ({nx}, {ny})")
    _mark(np.ascontiguousarray(points), low32, size32, nx, ny, nz, out.reshape(-1))
    return out
