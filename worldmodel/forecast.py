"""Forecasts as records: what `wm forecast` draws and what `worldmodel.load(run).forecast(clip)` gives. numpy only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# the arms of a model: itself, and what its evidence says alone; both told nothing of the readings but where and of which sweep they are; without any
MODEL, EVIDENCE_ONLY = "model", "evidence_only"
POSITIONS, EVIDENCE_POSITIONS = "model@positions", "evidence_only@positions"
NO_EVIDENCE = "model@no_evidence"

LEVELS = (0.1, 0.2, 0.5, 0.8, 0.9)


@dataclass(frozen=True, eq=False)
class Mixture:
    """Range distributions of R rays, given that there is a return: masses p (R,P) f32 summing to 1, centres m (R,P) f32 and scales s (R,P) f32
    in metres of Laplace components; F(x) = sum_i p_i Laplace CDF((x - m_i) / s_i). `sensors.kernels.mixture` reads it."""

    p: Array
    m: Array
    s: Array


@dataclass(frozen=True, eq=False)
class RayForecast:
    """The forecast of one instant. Rays leave from `present_from_sensor` (4,4), the sensor's pose at horizon_s in the ego frame of t = 0,
    along `directions` (R,3) f32 of that sensor's frame. ranges (R,) f32 are medians, quantiles (R,len(LEVELS)) f32.

    truth (R,) f32 is NaN where unknown. intensity (R,) f32 0..1 and colour (R,3) f32 0..1 are the head's, or None. baselines: ranges by
    method (NaN = no answer). hidden (R,) bool marks rays whose past was withheld (a masked sector), or None."""

    horizon_s: float
    present_from_sensor: Array
    directions: Array
    ranges: Array
    quantiles: Array
    truth: Array
    baselines: dict[str, Array] = field(default_factory=dict)
    intensity: Array | None = None
    colour: Array | None = None
    hidden: Array | None = None

    def points(self, ranges: Array) -> Array:
        """(R,3) f32 in the ego frame of t = 0 at the given ranges (R,)."""
        local = self.directions * np.asarray(ranges, np.float32)[:, None]
        return (local @ self.present_from_sensor[:3, :3].T + self.present_from_sensor[:3, 3]).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Forecast:
    """Past and forecast of one clip. past: per past sweep (N,3) f32 in the ego frame of t = 0, oldest first, at past_times_s (T,)."""

    clip: str
    run: str
    past: tuple[Array, ...]
    past_times_s: Array
    futures: tuple[RayForecast, ...]
    poses: str = "log"
    best_baseline: str = "accumulate_nearest"
