"""Maxima over runs of rows: what turns point features into pillar features, and the gradient's way back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]


@njit(nogil=True, cache=True, error_model="numpy")
def _segment_max(values, row, out, at):
    channels = values.shape[1]
    for v in range(row.shape[0] - 1):
        first, last = row[v], row[v + 1]
        for c in range(channels):
            out[v, c] = values[first, c]
            at[v, c] = first
        for i in range(first + 1, last):
            for c in range(channels):
                if values[i, c] > out[v, c]:
                    out[v, c] = values[i, c]
                    at[v, c] = i


@njit(nogil=True, cache=True, error_model="numpy")
def _scatter_rows(grads, at, out):
    for v in range(grads.shape[0]):
        for c in range(grads.shape[1]):
            out[at[v, c], c] += grads[v, c]


def segment_max(values: Array, row: Array) -> tuple[Array, Array]:
    """Per segment v the maximum over rows row[v]..row[v+1]-1 of values (M,C) f32, and the row (V,C) i32 that holds it (the first of equals).
    row (V+1,) i32 ascending, within 0..M; no segment may be empty."""
    if len(row) > 1 and ((np.diff(row) <= 0).any() or row[0] < 0 or row[-1] > len(values)):
        raise ValueError("segment_max: an empty segment has no maximum, and none reaches beyond the values")
    out = np.empty((len(row) - 1, values.shape[1]), np.float32)
    at = np.empty(out.shape, np.int32)
    _segment_max(values, row, out, at)
    return out, at


def scatter_rows(grads: Array, at: Array, rows: int) -> Array:
    """The gradient of `segment_max` with respect to its values: (rows, C) f32, zero but for the rows that held a maximum."""
    out = np.zeros((rows, grads.shape[1]), np.float32)
    _scatter_rows(grads, at, out)
    return out
