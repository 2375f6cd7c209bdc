"""Learning-free motion: the last sweep with what moves displaced at its velocity (`sensors.motion`: ground off, clusters, rigid
registration between the last sweeps), then read by nearest direction."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from sensors.evidence import displaced, newest_view
from sensors.geometry import inverse, transform_points
from sensors.kernels.directions import View
from sensors.rays import History, Rays

Array = NDArray[Any]


def predict(history: History, rays: Rays) -> Array:
    """(R,) f32 ranges of the reading nearest in angle among the displaced points of the newest sweep; NaN without one."""
    sensor_from_present = inverse(rays.present_from_sensor)
    points, moved = displaced(history, rays.horizon_s, 0)
    if not moved.any():
        return newest_view(history, sensor_from_present, rays.horizon_s).nearest(rays.directions)[0]
    return View(transform_points(sensor_from_present, points), history.elevation_step_rad).nearest(rays.directions)[0]
