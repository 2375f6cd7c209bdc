"""The last sweep in the sensor's own frame, as if the world moved along: what a direction read then, it reads again."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from sensors.evidence import view_from
from sensors.geometry import inverse
from sensors.rays import History, Rays

Array = NDArray[Any]


def predict(history: History, rays: Rays) -> Array:
    """(R,) f32 ranges: the reading nearest in angle to each direction, in the newest sweep seen from where it was taken; NaN without one."""
    newest = len(history.points) - 1
    return view_from(history, newest, inverse(history.present_from_sensor[newest]), "own").nearest(rays.directions)[0]
