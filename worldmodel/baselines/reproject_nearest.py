"""The last sweep moved by ego motion, read by nearest direction."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from sensors.evidence import newest_view
from sensors.geometry import inverse
from sensors.rays import History, Rays

Array = NDArray[Any]


def predict(history: History, rays: Rays) -> Array:
    """(R,) f32 ranges of the newest sweep's reading nearest in angle, however far, seen from where the sensor will be; NaN without one."""
    return newest_view(history, inverse(rays.present_from_sensor), rays.horizon_s).nearest(rays.directions)[0]
