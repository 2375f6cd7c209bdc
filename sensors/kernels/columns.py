"""Reading columns of a fine map along rays, and the gradient.

A cell holds, of what stands in it, an amount, heights in proportion to it, numbers without a meaning, and amounts by slices of height. A ray reads
around each of its positions, bilinearly: the amount, that of its own height, the numbers, and how far the heights are above it. Two of all
slices bear on a height, so that most of a cell is never touched, and no array of places is made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]


@njit(nogil=True, cache=True, error_model="numpy")
def _place(origin, direction, r, low, cell_m):
    """Row and column, cell centres at integers, and height of a place on a ray."""
    x, y, z = origin[0] + direction[0] * r, origin[1] + direction[1] * r, origin[2] + direction[2] * r
    return (y - low[1]) / cell_m - np.float32(0.5), (x - low[0]) / cell_m - np.float32(0.5), z


@njit(nogil=True, cache=True, error_model="numpy")
def _corner(at, count):
    """The cell before a place on an axis of `count` cells, and the weights of it and of the next one: 0 for one that is not there."""
    first = int(np.floor(at))
    share = at - np.float32(first)
    return first, (np.float32(1) - share) if first >= 0 else np.float32(0), share if first + 1 < count else np.float32(0)


@njit(nogil=True, cache=True, error_model="numpy")
def _slice(height, lowest, thick, slices):
    at = min(max((height - lowest) / thick, np.float32(0)), np.float32(slices - 1))
    k = min(int(at), slices - 2)
    return k, at - np.float32(k)


@njit(nogil=True, cache=True, error_model="numpy")
def read(maps, of, origin, direction, position, around, low, cell_m, slabs, heights, free, first, last, out):
    """out (L,P,R,2+free+heights) f32 of rays first..last: maps (B,H,W,1+heights+free+slices), of (L,) i32 which; origin, direction (L,3), position
    (L,P) m, around (R,) factors of a position; low (2,) m, where cells of cell_m begin along x and y; slabs (lowest, thick) m, middle of the lowest
    slice and thickness. All f32; zero beyond the map."""
    rows, columns = maps.shape[1], maps.shape[2]
    base = 1 + heights + free
    slices = maps.shape[3] - base
    for i in range(first, last):
        m = maps[of[i]]
        for p in range(position.shape[1]):
            for q in range(around.shape[0]):
                row, column, z = _place(origin[i], direction[i], position[i, p] * around[q], low, cell_m)
                found = out[i, p, q]
                found[:] = 0
                if not (row > np.float32(-1) and row < np.float32(rows) and column > np.float32(-1) and column < np.float32(columns)):
                    continue
                r0, top, bottom = _corner(row, rows)
                c0, left, right = _corner(column, columns)
                k, share = _slice(z, slabs[0], slabs[1], slices)
                for j in range(4):
                    w = (bottom if j >> 1 else top) * (right if j & 1 else left)
                    if w == 0:
                        continue
                    cell = m[r0 + (j >> 1), c0 + (j & 1)]
                    found[0] += w * cell[0]
                    found[1] += w * ((np.float32(1) - share) * cell[base + k] + share * cell[base + k + 1])
                    for c in range(free):
                        found[2 + c] += w * cell[1 + heights + c]
                    for c in range(heights):
                        found[2 + free + c] += w * (cell[1 + c] - z * cell[0])


@njit(nogil=True, cache=True, error_model="numpy")
def add_gradient(grads, of, origin, direction, position, around, low, cell_m, slabs, heights, free, out):
    """The gradient of `read` with respect to maps: adds grads (L,P,R,2+free+heights) into out, ray by ray, so that sums repeat exactly."""
    rows, columns = out.shape[1], out.shape[2]
    base = 1 + heights + free
    slices = out.shape[3] - base
    for i in range(grads.shape[0]):
        m = out[of[i]]
        for p in range(position.shape[1]):
            for q in range(around.shape[0]):
                row, column, z = _place(origin[i], direction[i], position[i, p] * around[q], low, cell_m)
                if not (row > np.float32(-1) and row < np.float32(rows) and column > np.float32(-1) and column < np.float32(columns)):
                    continue
                r0, top, bottom = _corner(row, rows)
                c0, left, right = _corner(column, columns)
                k, share = _slice(z, slabs[0], slabs[1], slices)
                given = grads[i, p, q]
                there = given[0]
                for c in range(heights):
                    there -= z * given[2 + free + c]
                for j in range(4):
                    w = (bottom if j >> 1 else top) * (right if j & 1 else left)
                    if w == 0:
                        continue
                    cell = m[r0 + (j >> 1), c0 + (j & 1)]
                    cell[0] += w * there
                    cell[base + k] += w * (np.float32(1) - share) * given[1]
                    cell[base + k + 1] += w * share * given[1]
                    for c in range(free):
                        cell[1 + heights + c] += w * given[2 + c]
                    for c in range(heights):
                        cell[1 + c] += w * given[2 + free + c]
