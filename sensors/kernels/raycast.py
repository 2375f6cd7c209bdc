"""The first occupied cell along rays, exactly, in column words (see occupancy.py for the layout: (X, Y) u64, bit z).

A ray is a walk over slabs of its major horizontal axis. Within a slab it touches at most two columns, and in each a run of cells that is
one mask; a slab is free when neither word meets its mask. A coarse grid, the OR of 8 x 8 columns, skips eight slabs at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types, uint64
from numba.extending import intrinsic
from numpy.typing import NDArray

Array = NDArray[Any]

COARSE = 8
# rounding of a coarse walk against the fine one, in fine cells: far above float64's, far below a cell
SLACK = 1e-6
REACH_M = 1e9


@intrinsic
def _trailing_zeros(typingctx, word):
    def generate(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@intrinsic
def _leading_zeros(typingctx, word):
    def generate(context, builder, signature, args):
        return builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@njit(nogil=True, cache=True, error_model="numpy")
def _coarse(columns):
    nx, ny = columns.shape
    out = np.zeros(((nx + COARSE - 1) // COARSE, (ny + COARSE - 1) // COARSE), np.uint64)
    for x in range(nx):
        for y in range(ny):
            out[x // COARSE, y // COARSE] |= columns[x, y]
    return out


@njit(nogil=True, cache=True, error_model="numpy")
def _cell(value, count):
    """The cell of a coordinate, clamped into 0 .. count - 1 as a float, before it becomes an integer."""
    return int(min(max(value, 0.0), count - 0.5))


@njit(nogil=True, cache=True, error_model="numpy")
def _run(a, b):
    """The mask of bits a .. b, in either order, both of 0 .. 63."""
    low, high = min(a, b), max(a, b)
    return (uint64(2) << uint64(high)) - (uint64(1) << uint64(low))


@njit(nogil=True, cache=True, error_model="numpy")
def _nearest_bit(word, up):
    return int(_trailing_zeros(word)) if up else 63 - int(_leading_zeros(word))


@njit(nogil=True, cache=True, error_model="numpy")
def _clip(o, d, count, t0, t1):
    """The part of t0 .. t1 within 0 .. count along one axis; backwards when there is none."""
    if d == 0.0:
        return (t0, t1) if o >= 0.0 and o < count else (1.0, 0.0)
    a, b = -o / d, (count - o) / d
    return max(t0, min(a, b)), min(t1, max(a, b))


@njit(nogil=True, cache=True, error_model="numpy")
def _entry(cell, o, d, t):
    """The later of t and the crossing of the plane by which a ray enters a cell along one axis."""
    if d == 0.0:
        return t
    return max(t, (cell + (0.0 if d > 0.0 else 1.0) - o) / d)


@njit(nogil=True, cache=True, error_model="numpy")
def _walk(columns, coarse, n_major, n_minor, nz, strides, om, dm, on, dn, oz, dz, t0, t1):
    """First hit between t0 and t1 of a ray in cell units; m is the major axis, n the minor one. Major, minor and z cell, or -1."""
    stride_m, stride_n, block_m, block_n = strides
    step = 1 if dm > 0.0 else -1
    exit_side = 1 if dm > 0.0 else 0
    up = dz > 0.0
    per_m = 1.0 / dm
    per_n = 1.0 / dn if dn != 0.0 else 0.0
    first, last = _cell(om + dm * t0, n_major), _cell(om + dm * t1, n_major)
    t_in = t0
    i = first
    while (last - i) * step >= 0:
        # the end of this coarse slab, in fine slabs
        block = i // COARSE
        block_last = block * COARSE + (COARSE - 1 if step > 0 else 0)
        if (last - block_last) * step < 0:
            block_last = last
        t_block = t1 if block_last == last else min(max((block_last + exit_side - om) * per_m, t_in), t1)
        a, b = on + dn * t_in, on + dn * t_block
        c_first = _cell(min(a, b) - SLACK, n_minor) // COARSE
        c_last = _cell(max(a, b) + SLACK, n_minor) // COARSE
        # at most three columns of blocks, the third only by the slack
        row = block * block_m
        word = coarse[uint64(row + c_first * block_n)] | coarse[uint64(row + c_last * block_n)]
        word |= coarse[uint64(row + (c_first + c_last) // 2 * block_n)]
        a, b = oz + dz * t_in, oz + dz * t_block
        if word & _run(_cell(min(a, b) - SLACK, nz), _cell(max(a, b) + SLACK, nz)) == uint64(0):
            t_in = t_block
            i = block_last + step
            continue
        j0, z0 = _cell(on + dn * t_in, n_minor), _cell(oz + dz * t_in, nz)
        while (block_last - i) * step >= 0:
            t_out = t1 if i == last else min(max((i + exit_side - om) * per_m, t_in), t1)
            j_out, z1 = _cell(on + dn * t_out, n_minor), _cell(oz + dz * t_out, nz)
            # a slab is no longer than one cell of the minor axis: a second crossing is rounding
            j1 = min(max(j_out, j0 - 1), j0 + 1)
            t_mid = min(max((max(j0, j1) - on) * per_n, t_in), t_out)
            z_mid = min(max(_cell(oz + dz * t_mid, nz), min(z0, z1)), max(z0, z1))
            z_mid = z1 if j1 == j0 else z_mid
            row = i * stride_m
            hit0 = columns[uint64(row + j0 * stride_n)] & _run(z0, z_mid)
            hit1 = columns[uint64(row + j1 * stride_n)] & _run(z_mid, z1)
            if (hit0 | hit1) != uint64(0):
                if hit0 != uint64(0):
                    return i, j0, _nearest_bit(hit0, up)
                return i, j1, _nearest_bit(hit1, up)
            t_in, j0, z0 = t_out, j_out, z1
            i += step
    return -1, -1, -1


@njit(nogil=True, cache=True, error_model="numpy")
def _cast(columns, coarse, low, size, origins, directions, min_range, max_range, entry, centre):
    nx, ny = columns.shape
    nz = 64
    blocks = coarse.shape[1]
    flat, flat_coarse = columns.reshape(-1), coarse.reshape(-1)
    one_origin = origins.shape[0] == 1
    for r in range(directions.shape[0]):
        entry[r], centre[r] = np.nan, np.nan
        at = 0 if one_origin else r
        dx, dy, dz = directions[r, 0], directions[r, 1], directions[r, 2]
        norm = np.sqrt(dx * dx + dy * dy + dz * dz)
        if not (norm > 1e-30 and norm < 1e30):
            continue
        if not (abs(origins[at, 0]) < REACH_M and abs(origins[at, 1]) < REACH_M and abs(origins[at, 2]) < REACH_M):
            continue
        ox, oy, oz = (origins[at, 0] - low[0]) / size[0], (origins[at, 1] - low[1]) / size[1], (origins[at, 2] - low[2]) / size[2]
        dx, dy, dz = dx / norm / size[0], dy / norm / size[1], dz / norm / size[2]
        # a component that moves less than a billionth of a cell over any range is none, and its inverse would overflow
        dx = dx if abs(dx) > 1e-14 else 0.0
        dy = dy if abs(dy) > 1e-14 else 0.0
        dz = dz if abs(dz) > 1e-14 else 0.0
        t0, t1 = _clip(ox, dx, nx, min_range, max_range)
        t0, t1 = _clip(oy, dy, ny, t0, t1)
        t0, t1 = _clip(oz, dz, nz, t0, t1)
        if not t0 <= t1:
            continue
        if dx == 0.0 and dy == 0.0:
            x, y = _cell(ox, nx), _cell(oy, ny)
            hit = columns[x, y] & _run(_cell(oz + dz * t0, nz), _cell(oz + dz * t1, nz))
            x, z = (x, _nearest_bit(hit, dz > 0.0)) if hit != uint64(0) else (-1, -1)
        elif abs(dx) >= abs(dy):
            x, y, z = _walk(flat, flat_coarse, nx, ny, nz, (ny, 1, blocks, 1), ox, dx, oy, dy, oz, dz, t0, t1)
        else:
            y, x, z = _walk(flat, flat_coarse, ny, nx, nz, (1, ny, 1, blocks), oy, dy, ox, dx, oz, dz, t0, t1)
        if x < 0:
            continue
        entry[r] = min(_entry(z, oz, dz, _entry(y, oy, dy, _entry(x, ox, dx, t0))), t1)
        mx, my, mz = (x + 0.5 - ox) * size[0], (y + 0.5 - oy) * size[1], (z + 0.5 - oz) * size[2]
        centre[r] = max(mx * dx * size[0] + my * dy * size[1] + mz * dz * size[2], min_range)


def _checked(columns: Array, low: Any, size: Any, origins: Any, directions: Any) -> tuple[Array, Array, Array, Array, Array]:
    if not isinstance(columns, np.ndarray) or columns.dtype != np.uint64 or columns.ndim != 2 or 0 in columns.shape:
        found = f"{columns.dtype} {columns.shape}" if isinstance(columns, np.ndarray) else type(columns).__name__
        raise ValueError(f"first_hit: columns are {found}; give uint64 (X, Y), as occupancy.columns makes them")
    # the grid's edges as the points met them: in float32
    low64 = np.array(low, np.float32).astype(np.float64)
    size64 = np.array(np.broadcast_to(np.array(size, np.float32), 3)).astype(np.float64)
    if low64.shape != (3,) or not np.isfinite(low64).all() or not np.isfinite(size64).all() or not (size64 > 0).all():
        raise ValueError(f"first_hit: low {low} and size {size} must be three finite numbers, sizes above 0")
    d = np.ascontiguousarray(directions, np.float64)
    o = np.ascontiguousarray(np.atleast_2d(np.asarray(origins, np.float64)))
    if d.ndim != 2 or d.shape[1] != 3 or o.ndim != 2 or o.shape[1] != 3 or len(o) not in (1, len(d)):
        raise ValueError(f"first_hit: origins {np.shape(origins)} and directions {d.shape}; give (R, 3) directions and (3,) or (R, 3) origins")
    return np.ascontiguousarray(columns), low64, size64, o, d


def first_hit(
    columns: Array, low: Any, size: Any, origins: Any, directions: Any, max_range: float, *, min_range: float = 0.0, to: str = "entry"
) -> Array:
    """Range (R,) f32 along each ray to the first occupied cell it passes through, NaN where there is none within min_range .. max_range.
    columns (X,Y) u64 from `occupancy.columns` with the same low (3,) and size (3,) or one number, m; origins (3,) or (R,3), inside the grid
    or not; directions (R,3) of any length. to: "entry" is where the ray enters the cell (min_range when it starts in one), "centre" where it
    passes nearest to its centre. A zero or non-finite direction, or an origin beyond 1e9 m, has no answer. ValueError for other types and shapes."""
    if to not in ("entry", "centre"):
        raise ValueError(f"first_hit: to {to!r} is neither 'entry' nor 'centre'")
    if not 0.0 <= min_range <= max_range <= REACH_M:
        raise ValueError(f"first_hit: ranges {min_range} .. {max_range} must ascend within 0 .. 1e9 m")
    columns, low64, size64, o, d = _checked(columns, low, size, origins, directions)
    entry, centre = np.empty(len(d), np.float32), np.empty(len(d), np.float32)
    _cast(columns, _coarse(columns), low64, size64, o, d, float(min_range), float(max_range), entry, centre)
    return entry if to == "entry" else centre
