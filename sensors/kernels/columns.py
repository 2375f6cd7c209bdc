"""Reading columns of fine maps along rays, and the gradient.

A column holds, of what is in a cell, an amount; heights, and where it is from the cell's middle along x and y, in proportion to it; numbers without a
meaning; and amounts by slices of height. Most cells are empty, so that columns lie in one array, and maps say which row of it is a cell's. A ray
reads around each of its positions, bilinearly, and adds up over several maps: the amount, that of its own height, the numbers, how far the heights
are above it, and how far to its left it all is. Two of all slices bear on a height, so that most of a column is never touched, and no array of
places is made.
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
def _left(direction):
    """The unit vector (x, y) to the left of a ray; zero for one that goes straight up or down."""
    flat = np.hypot(direction[0], direction[1])
    return (-direction[1] / flat, direction[0] / flat) if flat > 0 else (np.float32(0), np.float32(0))


@njit(nogil=True, cache=True, error_model="numpy")
def read(columns, row, of, origin, direction, position, around, low, cell_m, slabs, heights, free, first, last, out):
    """out (L,P,R,3+free+heights) f32 of rays first..last: amount, that at the ray's height, free numbers, heights above the ray and metres to its
    left in proportion to the amount. columns (V,3+heights+free+slices): amount, heights, free, x and y, slices; row (B,H,W) i32: which of them a
    cell has, -1 none; of (L,M) i32: the maps that a ray reads; origin, direction (L,3), position (L,P) m, around (R,) factors of a position; low
    (2,) m, where cells of cell_m begin along x and y; slabs (lowest, thick) m, middle of the lowest slice and thickness. Floats f32; zero beyond
    the map."""
    rows, width = row.shape[1], row.shape[2]
    base = 3 + heights + free
    slices = columns.shape[1] - base
    for i in range(first, last):
        nx, ny = _left(direction[i])
        for p in range(position.shape[1]):
            for q in range(around.shape[0]):
                y, x, z = _place(origin[i], direction[i], position[i, p] * around[q], low, cell_m)
                found = out[i, p, q]
                found[:] = 0
                if not (y > np.float32(-1) and y < np.float32(rows) and x > np.float32(-1) and x < np.float32(width)):
                    continue
                r0, top, bottom = _corner(y, rows)
                c0, left, right = _corner(x, width)
                k, share = _slice(z, slabs[0], slabs[1], slices)
                for j in range(4):
                    w = (bottom if j >> 1 else top) * (right if j & 1 else left)
                    if w == 0:
                        continue
                    aside = (nx * (np.float32(c0 + (j & 1)) - x) + ny * (np.float32(r0 + (j >> 1)) - y)) * cell_m
                    for m in range(of.shape[1]):
                        v = row[of[i, m], r0 + (j >> 1), c0 + (j & 1)]
                        if v < 0:
                            continue
                        column = columns[v]
                        found[0] += w * column[0]
                        found[1] += w * ((np.float32(1) - share) * column[base + k] + share * column[base + k + 1])
                        for c in range(free):
                            found[2 + c] += w * column[1 + heights + c]
                        for c in range(heights):
                            found[2 + free + c] += w * (column[1 + c] - z * column[0])
                        found[2 + free + heights] += w * (nx * column[base - 2] + ny * column[base - 1] + aside * column[0])


@njit(nogil=True, cache=True, error_model="numpy")
def add_gradient(grads, row, of, origin, direction, position, around, low, cell_m, slabs, heights, free, out):
    """The gradient of `read` with respect to columns: adds grads (L,P,R,3+free+heights) into out, ray by ray, so that sums repeat exactly."""
    rows, width = row.shape[1], row.shape[2]
    base = 3 + heights + free
    slices = out.shape[1] - base
    for i in range(grads.shape[0]):
        nx, ny = _left(direction[i])
        for p in range(position.shape[1]):
            for q in range(around.shape[0]):
                y, x, z = _place(origin[i], direction[i], position[i, p] * around[q], low, cell_m)
                if not (y > np.float32(-1) and y < np.float32(rows) and x > np.float32(-1) and x < np.float32(width)):
                    continue
                r0, top, bottom = _corner(y, rows)
                c0, left, right = _corner(x, width)
                k, share = _slice(z, slabs[0], slabs[1], slices)
                given = grads[i, p, q]
                of_left = given[2 + free + heights]
                there = given[0]
                for c in range(heights):
                    there -= z * given[2 + free + c]
                for j in range(4):
                    w = (bottom if j >> 1 else top) * (right if j & 1 else left)
                    if w == 0:
                        continue
                    aside = (nx * (np.float32(c0 + (j & 1)) - x) + ny * (np.float32(r0 + (j >> 1)) - y)) * cell_m
                    for m in range(of.shape[1]):
                        v = row[of[i, m], r0 + (j >> 1), c0 + (j & 1)]
                        if v < 0:
                            continue
                        column = out[v]
                        column[0] += w * (there + aside * of_left)
                        column[base + k] += w * (np.float32(1) - share) * given[1]
                        column[base + k + 1] += w * share * given[1]
                        for c in range(free):
                            column[1 + heights + c] += w * given[2 + c]
                        for c in range(heights):
                            column[1 + c] += w * given[2 + free + c]
                        column[base - 2] += w * nx * of_left
                        column[base - 1] += w * ny * of_left
