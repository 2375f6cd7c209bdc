"""The last sweep moved by ego motion, read between the four readings around a ray: bilinear in inverse range, in which planes are linear."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from sensors.evidence import newest_view
from sensors.geometry import inverse
from sensors.rays import History, Rays

Array = NDArray[Any]


def predict(history: History, rays: Rays) -> Array:
    """(R,) f32 ranges, between whichever quadrants have a reading, by nearest direction where none has; NaN without any reading."""
    return newest_view(history, inverse(rays.present_from_sensor), rays.horizon_s).interpolate(rays.directions)
