"""The first hit in the occupancy that all past sweeps accumulated, in cells of 0.2 m: no readings, only a map of where something was."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.kernels.occupancy import columns
from sensors.kernels.raycast import first_hit
from sensors.rays import MAX_RANGE_M, MIN_RANGE_M, History, Rays

Array = NDArray[Any]

CELL_M = 0.2
HALF_WIDTH_M = 80.0
LEVELS = 64
BELOW_SENSOR_M = 4.8


def predict(history: History, rays: Rays) -> Array:
    """(R,) f32 ranges at which a ray passes nearest to the centre of the first occupied cell; NaN where it meets none within the bounds."""
    low = np.array([-HALF_WIDTH_M, -HALF_WIDTH_M, history.present_from_sensor[-1][2, 3] - BELOW_SENSOR_M])
    low[:2] = np.round(history.present_from_sensor[-1][:2, 3] / CELL_M) * CELL_M - HALF_WIDTH_M
    side = round(2 * HALF_WIDTH_M / CELL_M)

    def accumulated() -> Array:
        words = np.zeros((side, side), np.uint64)
        for points in history.points:
            columns(points, low, CELL_M, (side, side, LEVELS), out=words)
        return words

    occupied = history.once("occupancy of all sweeps", accumulated)
    present = np.asarray(rays.present_from_sensor, np.float64)
    directions = rays.directions.astype(np.float64) @ present[:3, :3].T
    return first_hit(occupied, low, CELL_M, present[:3, 3], directions, MAX_RANGE_M, min_range=MIN_RANGE_M, to="centre")
