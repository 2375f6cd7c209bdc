"""A small procedural street as a forecast: ground, two walls and a car that crosses, seen by 24 beams; the "model" is the truth with noise,
the "baseline" leaves the car where it was at t = 0."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from worldmodel.forecast import LEVELS, Forecast, RayForecast

HEIGHT_M = 1.7
HOSTILE = "street/</script><script>alert(1)</script>\" onerror=alert(1) ' {{7*7}} ]]> \u2028 javascript:x \x1b[31m@0"


def _ranges(directions: np.ndarray, origin: np.ndarray, car_y: float) -> np.ndarray:
    """First hit of each ray with the ground, the walls at y = +-9 m and the car, in metres; NaN beyond 50 m."""
    with np.errstate(divide="ignore", invalid="ignore"):
        hits = [(-HEIGHT_M - origin[2]) / directions[:, 2], (9 - origin[1]) / directions[:, 1], (-9 - origin[1]) / directions[:, 1]]
        low, high = np.array([13.0, car_y - 2.2, -HEIGHT_M]), np.array([14.8, car_y + 2.2, -0.2])
        near, far = (low - origin) / directions, (high - origin) / directions
        enter, leave = np.minimum(near, far).max(axis=1), np.maximum(near, far).min(axis=1)
    hits.append(np.where((enter > 0) & (enter < leave), enter, np.inf))
    nearest = np.min([np.where(h > 0.5, h, np.inf) for h in hits], axis=0)
    return np.where(nearest < 50, nearest, np.nan).astype(np.float32)


def make_street(clip: str = "synthetic/street-000001@400000000", *, hidden: bool = False, colour: bool = True, columns: int = 120) -> Forecast:
    rng = np.random.default_rng(0)
    azimuth, elevation = np.meshgrid(np.linspace(-np.pi, np.pi, columns, endpoint=False), np.deg2rad(np.linspace(-24, 4, 24)))
    directions = np.stack([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], axis=-1)
    directions = directions.reshape(-1, 3).astype(np.float32)
    past_times = np.array([-0.4, -0.2, 0.0])
    past = []
    for time in past_times:
        origin = np.array([5 * time, 0, 0])
        ranges = _ranges(directions, origin, 4 + 8 * time)
        known = np.isfinite(ranges)
        past.append((origin + directions[known] * ranges[known, None]).astype(np.float32))
    futures = []
    for horizon in (0.2, 0.4, 0.6):
        pose = np.eye(4)
        pose[0, 3] = 5 * horizon
        truth = _ranges(directions, pose[:3, 3], 4 + 8 * horizon)
        known = np.isfinite(truth)
        ray, truth = directions[known], truth[known]
        model = (truth + rng.normal(0, 0.05, len(truth))).astype(np.float32)
        old = _ranges(ray, pose[:3, 3], 4.0)
        width = 0.1 + 0.05 * truth
        quantiles = (model[:, None] + width[:, None] * np.linspace(-1, 1, len(LEVELS))).astype(np.float32)
        baselines = {"accumulate_nearest": old, "none_at_all": np.full(len(truth), np.nan, np.float32)}
        ends = pose[:3, 3] + ray * truth[:, None]
        ahead = np.abs(np.arctan2(ends[:, 1], ends[:, 0])) < np.deg2rad(30)
        futures.append(RayForecast(horizon, pose, ray, model, quantiles, truth, baselines, rng.random(len(truth)).astype(np.float32),
                                   rng.random((len(truth), 3)).astype(np.float32) if colour else None, ahead if hidden else None))  # fmt: skip
    return Forecast(clip, "runs/street", tuple(past), past_times, tuple(futures))


@pytest.fixture
def street() -> Callable[..., Forecast]:
    return make_street


@pytest.fixture
def hostile() -> str:
    return HOSTILE
