"""The last sweep moved by ego motion, read per pixel of a range image: the closest return in the pixel a ray falls in."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from sensors.evidence import newest_view
from sensors.geometry import inverse
from sensors.rays import History, Rays

Array = NDArray[Any]


def predict(history: History, rays: Rays) -> Array:
    """(R,) f32 ranges of the pixels of 0.18 degrees by 0.84 beam spacings, by nearest direction where one is empty; NaN without a reading."""
    return newest_view(history, inverse(rays.present_from_sensor), rays.horizon_s).pixel(rays.directions)
