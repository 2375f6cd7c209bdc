"""Several sweeps as one cloud in the frame of the newest, each point with its age: one pass per sweep into one output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit, uint64
from numpy.typing import NDArray

Array = NDArray[Any]


@njit(nogil=True, cache=True, error_model="numpy")
def _append(points, intensity, m, lag, close, out, start):
    at = uint64(start)
    for i in range(points.shape[0]):
        x, y, z = points[i, 0], points[i, 1], points[i, 2]
        # float64 sums: the transform may go through a frame far away
        dx, dy, dz = float(x), float(y), float(z)
        out[at, 0] = m[0, 0] * dx + m[0, 1] * dy + m[0, 2] * dz + m[0, 3]
        out[at, 1] = m[1, 0] * dx + m[1, 1] * dy + m[1, 2] * dz + m[1, 3]
        out[at, 2] = m[2, 0] * dx + m[2, 1] * dy + m[2, 2] * dz + m[2, 3]
        out[at, 3] = intensity[i]
        out[at, 4] = lag
        # written always, kept by moving on
        at += uint64(not ((abs(x) < close) & (abs(y) < close)))
    return at


def aggregate(
    points: Sequence[Array], intensity: Sequence[Array], target_from_source: Sequence[Array], lags_s: Sequence[float], close_m: float = 0.0
) -> Array:
    """(M, 5) f32: x, y, z in the target frame, intensity, age in seconds, sweep after sweep in the order given, points in their own.
    points[i] (N_i, 3) f32 and intensity[i] (N_i,) f32 in the frame of sweep i, target_from_source[i] (4,4) f64 into the target's, composed
    in float64 by the caller; lags_s[i] its age. close_m: points with |x| and |y| below it in their own sweep's frame (the vehicle's roof) are
    left out, as nuScenes' devkit does; 0 keeps all. ValueError for other types, shapes and lengths, and for a non-finite transform."""
    if not (len(points) == len(intensity) == len(target_from_source) == len(lags_s)):
        raise ValueError(f"aggregate: {len(points)} points, {len(intensity)} intensity, {len(target_from_source)} transforms, {len(lags_s)} lags")
    for i, (p, v, m) in enumerate(zip(points, intensity, target_from_source)):
        if p.dtype != np.float32 or p.ndim != 2 or p.shape[1] != 3 or v.dtype != np.float32 or v.shape != (len(p),):
            raise ValueError(f"aggregate: sweep {i} has points {p.dtype} {p.shape}, intensity {v.dtype} {v.shape}; give float32 (N, 3), (N,)")
        if np.shape(m) != (4, 4) or not np.isfinite(m).all():
            raise ValueError(f"aggregate: transform {i} of shape {np.shape(m)} must be a finite (4, 4)")
    out = np.empty((sum(len(p) for p in points) + 1, 5), np.float32)
    kept = 0
    for p, v, m, lag in zip(points, intensity, target_from_source, lags_s):
        matrix = np.ascontiguousarray(m, np.float64)
        kept = int(_append(np.ascontiguousarray(p), np.ascontiguousarray(v), matrix, np.float32(lag), np.float32(close_m), out, kept))
    return out[:kept]
