"""The metrics of "Point Cloud Forecasting as a Proxy for 4D Occupancy Forecasting" (Khurana et al., CVPR 2023) as their code computes them,
for numbers that stand beside published ones. Units are metres, the frame is the LiDAR's at t = 0, clouds are (N,3).

Three rules of theirs that nothing else here follows: an empty cloud gives NFCD 0 (count `nfcd_was_empty` beside it); errors are divided by
all rays, also those that left the sum; elevation is atan2(z, y), which is not one ("code"; "fixed" has atan2(z, hypot(x, y))).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.errors import UsageError
from sensors.kernels.nearest import nearest
from worldmodel.metrics import chamfer

Array = NDArray[Any]

VOLUME = (-70.0, -70.0, -4.5, 70.0, 70.0, 4.5)
LEAST_RANGE_M = 0.01
TOLERANCE_M = 0.02


@dataclass(frozen=True)
class Scores:
    """Of one frame: cd and nfcd in m^2, l1 in m, absrel as a share (they print it times 100), and whether nfcd is the 0 of an empty cloud."""

    cd: float
    nfcd: float
    l1: float
    absrel: float
    nfcd_was_empty: bool


def score(forecast: Array, truth: Array, origin: Array, elevation: str = "code", volume: tuple[float, ...] = VOLUME) -> Scores:
    """One frame: forecast (N,3), truth (M,3), the sensor's true place (3,). Mean them over frames, whatever their sizes, as they do."""
    near_field, was_empty = nfcd(forecast, truth, volume)
    l1, absrel = ray_errors(forecast, truth, origin, elevation, volume)
    return Scores(chamfer(forecast, truth), near_field, l1, absrel, was_empty)


def within(points: Array, volume: tuple[float, ...] = VOLUME, slack: float = 0.0) -> Array:
    """(N,) bool: points inside the volume, its faces included."""
    low, high = np.asarray(volume[:3]), np.asarray(volume[3:])
    return ((points >= low - slack) & (points <= high + slack)).all(1)


def nfcd(forecast: Array, truth: Array, volume: tuple[float, ...] = VOLUME) -> tuple[float, bool]:
    """Chamfer distance of both clouds cut, each by itself, to the volume; 0 where one is then empty, and whether it was."""
    a, b = forecast[within(forecast, volume)], truth[within(truth, volume)]
    return (0.0, True) if not len(a) or not len(b) else (chamfer(a, b), False)


def _angles(points: Array, elevation: str) -> Array:
    """(N,3): azimuth, elevation, and a constant, so that a search among points serves."""
    azimuth = np.arctan2(points[:, 0], points[:, 1])
    flat = points[:, 1] if elevation == "code" else np.hypot(points[:, 0], points[:, 1])
    return np.stack((azimuth, np.arctan2(points[:, 2], flat), np.ones(len(points))), 1)


def ray_errors(forecast: Array, truth: Array, origin: Array, elevation: str = "code", volume: tuple[float, ...] = VOLUME) -> tuple[float, float]:
    """L1 in metres and AbsRel. Each true return takes the range of the forecast point nearest in (azimuth, elevation), laid along its own
    direction; both are clamped to the volume along the ray; rays that miss it add nothing but are counted. NaN without a ray or forecast."""
    if elevation not in ("code", "fixed"):
        raise UsageError(f"4docc: elevation {elevation!r} is neither 'code' nor 'fixed'")
    origin = np.asarray(origin, np.float64).reshape(3)
    there, here = np.asarray(forecast, np.float64) - origin, np.asarray(truth, np.float64) - origin
    range_there, range_here = np.linalg.norm(there, axis=1), np.linalg.norm(here, axis=1)
    there, range_there = there[range_there > LEAST_RANGE_M], range_there[range_there > LEAST_RANGE_M]
    here, range_here = here[range_here > LEAST_RANGE_M], range_here[range_here > LEAST_RANGE_M]
    if not len(here) or not len(there):
        return float("nan"), float("nan")
    _, index = nearest(_angles(here, elevation), _angles(there, elevation))
    directions = here / range_here[:, None]
    clamped_truth, start = clamped(origin, directions, range_here, volume)
    clamped_forecast, _ = clamped(origin, directions, range_there[index], volume)
    length = clamped_truth - start
    counted = np.isfinite(clamped_truth) & (length > LEAST_RANGE_M)
    error = np.abs(clamped_truth[counted] - clamped_forecast[counted])
    return float(error.sum() / len(here)), float((error / length[counted]).sum() / len(here))


def clamped(origin: Array, directions: Array, ranges: Array, volume: tuple[float, ...] = VOLUME) -> tuple[Array, Array]:
    """Ranges (R,) moved along their rays to the volume's boundary where their ends lie outside it by more than TOLERANCE_M, and where the ray
    then starts (R,): 0, or, for a moved end of an origin outside, its entry. Infinite where the ray misses the volume."""
    low, high = np.asarray(volume[:3]), np.asarray(volume[3:])
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (low - origin) / directions, (high - origin) / directions
    outside_slab = (origin < low) | (origin > high)
    parallel = directions == 0
    near = np.where(parallel, np.where(outside_slab, np.inf, -np.inf), np.minimum(a, b)).max(1)
    far = np.where(parallel, np.where(outside_slab, -np.inf, np.inf), np.maximum(a, b)).min(1)
    start = np.maximum(near, 0.0)
    ends = origin + directions * ranges[:, None]
    inside = within(ends, volume, TOLERANCE_M)
    misses = ~inside & ((near > far) | (far < 0))
    out = np.where(inside, ranges, np.clip(ranges, start, np.maximum(far, start)))
    out[misses] = np.inf
    return out, np.where(within(ends, volume), 0.0, start)
