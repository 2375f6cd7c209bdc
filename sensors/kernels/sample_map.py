"""Bilinear reading of channels-last maps at many places, and its gradient.

A place reads four neighbouring cells; with channels last each of them is one contiguous run, which is why this beats a general
`grid_sample` on a CPU. Places outside the map read zero, and a border cell fades to zero over half a cell.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]


@njit(nogil=True, cache=True, error_model="numpy")
def gather(maps, of, places, first, last, out):
    """out (N,C) = maps (B,H,W,C) read at places (N,2) = (row, column) in cells, cell centres at integers; of (N,) i32: which map."""
    height, width, channels = maps.shape[1], maps.shape[2], maps.shape[3]
    for i in range(first, last):
        row, column = places[i, 0], places[i, 1]
        inside = row > np.float32(-1) and row < np.float32(height) and column > np.float32(-1) and column < np.float32(width)
        r0 = int(np.floor(row)) if inside else 0
        c0 = int(np.floor(column)) if inside else 0
        fr = row - np.float32(r0) if inside else np.float32(0)
        fc = column - np.float32(c0) if inside else np.float32(0)
        # a neighbour off the map weighs nothing, and stands for any cell that exists
        top = (np.float32(1) - fr) if inside and r0 >= 0 else np.float32(0)
        bottom = fr if inside and r0 + 1 < height else np.float32(0)
        left = (np.float32(1) - fc) if c0 >= 0 else np.float32(0)
        right = fc if c0 + 1 < width else np.float32(0)
        r1, c1, r0, c0 = min(r0 + 1, height - 1), min(c0 + 1, width - 1), max(r0, 0), max(c0, 0)
        m = maps[of[i]]
        w00, w01, w10, w11 = top * left, top * right, bottom * left, bottom * right
        for c in range(channels):
            out[i, c] = w00 * m[r0, c0, c] + w01 * m[r0, c1, c] + w10 * m[r1, c0, c] + w11 * m[r1, c1, c]


@njit(nogil=True, cache=True, error_model="numpy")
def scatter(grads, of, places, out):
    """The gradient of `gather` with respect to maps: adds grads (N,C) into out (B,H,W,C), places in order, so that sums repeat exactly."""
    height, width, channels = out.shape[1], out.shape[2], out.shape[3]
    for i in range(grads.shape[0]):
        row, column = places[i, 0], places[i, 1]
        if not (row > np.float32(-1) and row < np.float32(height) and column > np.float32(-1) and column < np.float32(width)):
            continue
        r0, c0 = int(np.floor(row)), int(np.floor(column))
        fr, fc = row - np.float32(r0), column - np.float32(c0)
        for dr in range(2):
            r = r0 + dr
            if r < 0 or r >= height:
                continue
            wr = fr if dr else np.float32(1) - fr
            for dc in range(2):
                c1 = c0 + dc
                if c1 < 0 or c1 >= width:
                    continue
                w = wr * (fc if dc else np.float32(1) - fc)
                cell = out[of[i], r, c1]
                for c in range(channels):
                    cell[c] += w * grads[i, c]
