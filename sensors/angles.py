"""Angles for compiled loops: polynomials without branches, so that a loop over points becomes one over vectors of them.

Numba keeps what it compiled per file of the caller and does not look here: after a change of this file remove `__pycache__`.
"""

from __future__ import annotations

import numpy as np
from numba import float32, njit

PI, HALF_PI = np.float32(np.pi), np.float32(np.pi / 2)
# minimax on 0 .. 1: atan(t) = t * (A0 + A1 t^2 + ...)
A0, A1, A2, A3 = np.float32(0.99999934), np.float32(-0.3332986), np.float32(0.19946566), np.float32(-0.1390863)
A4, A5, A6, A7 = np.float32(0.09642197), np.float32(-0.05591233), np.float32(0.02186296), np.float32(-0.00405457)
# minimax on 0 .. pi / 2: sin(t) = t * (S0 + S1 t^2 + ...)
S0, S1, S2 = np.float32(1), np.float32(-0.166666567), np.float32(0.0083330255)
S3, S4 = np.float32(-0.00019807418), np.float32(2.60190313e-06)


@njit(nogil=True, cache=True, error_model="numpy")
def atan2(y, x):
    """atan2 of f32, off by less than 4e-7 rad, its rounding included: the octant is put right by selects. 0 for (0, 0)."""
    ax, ay = abs(x), abs(y)
    high, low = max(ax, ay), min(ax, ay)
    t = low / (high if high > float32(0) else float32(1))
    u = t * t
    a = t * (A0 + u * (A1 + u * (A2 + u * (A3 + u * (A4 + u * (A5 + u * (A6 + u * A7)))))))
    a = HALF_PI - a if ay > ax else a
    a = PI - a if x < float32(0) else a
    return -a if y < float32(0) else a


@njit(nogil=True, cache=True, error_model="numpy")
def sine_of_half2(angle):
    """sin(angle / 2)^2 of an f32 angle within -2 pi .. 2 pi, as exact as f32 has the angle."""
    half = abs(angle) * float32(0.5)
    half = min(half, PI - half)
    u = half * half
    sine = half * (S0 + u * (S1 + u * (S2 + u * (S3 + u * S4))))
    return sine * sine
