"""All past sweeps moved by ego motion, read by nearest direction: what 4D-Occ calls ray tracing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.evidence import view_from
from sensors.geometry import inverse
from sensors.rays import History, Rays

Array = NDArray[Any]


def predict(history: History, rays: Rays) -> Array:
    """(R,) f32 ranges of the reading nearest in angle among all past sweeps, the newer one of two equally near; NaN without any."""
    sensor_from_present = inverse(rays.present_from_sensor)
    best = np.full(len(rays.directions), np.nan, np.float32)
    best_angle = np.full(len(rays.directions), np.inf, np.float32)
    for sweep in reversed(range(len(history.points))):
        ranges, angle, _ = view_from(history, sweep, sensor_from_present, rays.horizon_s).nearest(rays.directions)
        nearer = angle < best_angle
        best[nearer], best_angle[nearer] = ranges[nearer], angle[nearer]
    return best
