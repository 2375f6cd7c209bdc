"""The colours that pictures and pages share: what stands is cool, by height; what is wrong is hot, by how much.

Two ramps that never meet (blue to pale green, amber to magenta), each of rising or falling lightness, so that the picture also reads for
people who do not tell red from green.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BACKGROUND = (10, 13, 20)
TEXT, FAINT = (232, 236, 244), (132, 144, 164)
ACCENT = (255, 176, 58)

# metres over the ground, and metres of error, that the ramps span; below the first error the height's colour stays
HEIGHT_SPAN_M = (-0.3, 5.0)
ERROR_SPAN_M = (0.5, 4.0)

# sRGB anchors, evenly spaced
HEIGHT = ((48, 74, 150), (40, 118, 190), (42, 168, 196), (104, 208, 178), (214, 244, 206))
ERROR = ((255, 200, 74), (255, 132, 46), (250, 66, 66), (236, 44, 132))
INTENSITY = ((58, 48, 110), (128, 74, 160), (206, 108, 150), (250, 170, 132), (255, 240, 200))
LATENT = ((14, 20, 40), (24, 78, 140), (52, 168, 176), (206, 236, 190))


def ramp(values: Array, anchors: tuple[tuple[int, int, int], ...], low: float, high: float) -> Array:
    """(N,3) f32 in 0..255 for values (N,): linear between anchors, clipped to low..high; NaN takes the first."""
    share = np.clip((np.nan_to_num(np.asarray(values, np.float32), nan=low) - low) / max(high - low, 1e-9), 0, 1) * (len(anchors) - 1)
    at = np.arange(len(anchors), dtype=np.float32)
    table = np.asarray(anchors, np.float32)
    return np.stack([np.interp(share, at, table[:, c]) for c in range(3)], axis=-1).astype(np.float32)


def by_height(points: Array, ground_z: float) -> Array:
    """(N,3) f32 colours of points (N,3) by their height over ground_z."""
    return ramp(points[:, 2] - ground_z, HEIGHT, *HEIGHT_SPAN_M)


def tinted(colours: Array, error_m: Array) -> Array:
    """(N,3) f32: colours (N,3) where the absolute error (N,) is small, going over to the error ramp where it is not; NaN errors (no
    truth, no answer) leave a colour as it is."""
    error = np.nan_to_num(np.abs(np.asarray(error_m, np.float32)), nan=0.0)
    share = np.clip((error - ERROR_SPAN_M[0]) / ERROR_SPAN_M[0], 0, 1)[:, None]
    return (colours * (1 - share) + ramp(error, ERROR, *ERROR_SPAN_M) * share).astype(np.float32)


def ground_of(clouds: tuple[Array, ...], reach_m: float = 25.0) -> float:
    """Height of the ground around the vehicle: the 10th percentile of z within reach_m of the origin; 0 without points."""
    near = [c[(np.abs(c[:, :2]) < reach_m).all(axis=1), 2] for c in clouds if len(c)]
    heights = np.concatenate(near) if near else np.zeros(0)
    heights = heights[np.isfinite(heights)]
    return float(np.percentile(heights, 10)) if len(heights) else 0.0
