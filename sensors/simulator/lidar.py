"""Turning LiDARs: which way their beams look, when, and what they measure of a scene."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.simulator.scene import Scene
from sensors.simulator.shapes import MATERIALS

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class LidarModel:
    """A scanner: elevations (B,) rad from the uppermost beam down, columns per turn, where it sits (ego_from_lidar), how far it sees a
    surface of reflectivity 0.25 head-on (sight_m) and at all (max_m), range noise, and the share of returns lost for no reason.
    What of its own vehicle stands in the beams' way: the roof, an oval around the scanner's axis (its reach to the front, rear and sides, m,
    and how far below the scanner it lies), and posts (azimuth and half width in degrees, elevation of the top in degrees)."""

    name: str
    elevations_rad: Array
    columns: int
    ego_from_lidar: Array
    sight_m: float = 120.0
    max_m: float = 120.0
    noise_m: float = 0.018
    lost: float = 0.03
    roof: tuple[float, float, float, float] | None = None
    posts: tuple[tuple[float, float, float], ...] = ()


def _at(x: float, y: float, z: float) -> Array:
    out = np.eye(4)
    out[:3, 3] = x, y, z
    return out


def _hdl64() -> LidarModel:
    nominal = np.concatenate((np.linspace(2.0, -8.333, 32), np.linspace(-8.833, -24.333, 32)))
    spread = np.random.default_rng(64).normal(0, 0.03, 64)  # no two lasers are aligned alike
    return LidarModel(
        "hdl64",
        np.radians(nominal + spread),
        2083,
        _at(0.81, -0.32, 0.80),
        sight_m=80.0,
        lost=0.004,
        roof=(0.72, 0.92, 0.62, 0.30),
        posts=((157.0, 5.0, -13.0), (-157.0, 5.0, -13.0), (-67.0, 7.0, -16.0)),
    )


def _hdl32() -> LidarModel:
    return LidarModel(
        "hdl32", np.radians(np.linspace(10.67, -30.67, 32)), 1085, _at(0.94, 0.0, 0.91), sight_m=70.0, max_m=105.0, noise_m=0.015, lost=0.03
    )


MODELS = {"hdl64": _hdl64, "hdl32": _hdl32}
_REFLECTIVITY = np.array([m.reflectivity for m in MATERIALS.values()], np.float32)
_LOST = np.array([m.lost for m in MATERIALS.values()], np.float32)
_RETRO = np.array([m.retro for m in MATERIALS.values()])


@dataclass(frozen=True, eq=False)
class Measurement:
    """One turn, by column and within it from the top beam down. points (N,3) f32 in the LiDAR's frame at their own times, intensity (N,)
    f32, ring (N,) u16, time_ns (N,) i32 from the middle of the turn; category (N,) u8, instance (N,) i32; missing (M,3) f32: directions,
    in that frame too, of the rays with nothing on them within the scanner's reach (neither lost returns nor the own vehicle)."""

    points: Array
    intensity: Array
    ring: Array
    time_ns: Array
    category: Array
    instance: Array
    missing: Array


def beams(model: LidarModel, phase: float) -> Array:
    """Directions (columns, B, 3) f64 of a turn in the LiDAR's frame: clockwise seen from above, from the rear over left, front and right,
    as a Velodyne turns. phase: by what share of a column the first one is shifted."""
    azimuth = np.pi - (np.arange(model.columns) + phase) * (2 * np.pi / model.columns)
    e = model.elevations_rad
    flat = np.cos(e)
    return np.stack(
        (np.cos(azimuth)[:, None] * flat, np.sin(azimuth)[:, None] * flat, np.broadcast_to(np.sin(e), (model.columns, len(e)))), -1
    )  # fmt: skip


def _own_vehicle(model: LidarModel, directions: Array) -> Array:
    """Which of the rays (N,3), in the LiDAR's frame, end on the vehicle that carries the scanner (N,)."""
    azimuth = np.arctan2(directions[:, 1], directions[:, 0])
    slope = directions[:, 2] / np.maximum(np.hypot(directions[:, 0], directions[:, 1]), 1e-9)
    blocked = np.zeros(len(directions), bool)
    if model.roof is not None:
        front, rear, sides, below = model.roof
        length = np.where(np.abs(azimuth) < np.pi / 2, front, rear)
        rim = 1 / np.sqrt((np.cos(azimuth) / length) ** 2 + (np.sin(azimuth) / sides) ** 2)
        blocked |= -slope * rim > below
    for middle, half, top in model.posts:
        apart = np.abs(np.mod(azimuth - np.radians(middle) + np.pi, 2 * np.pi) - np.pi)
        blocked |= (apart < np.radians(half)) & (slope < np.tan(np.radians(top)))
    return blocked


def column_times(model: LidarModel, period_ns: int) -> Array:
    """time_ns (columns,) i64 of the columns of a turn; 0 is its middle, when the scanner faces forward."""
    return np.round(((np.arange(model.columns) + 0.5) / model.columns - 0.5) * period_ns).astype(np.int64)


def measure(scene: Scene, model: LidarModel, world_from_ego: Array, times_s: Array, time_ns: Array, rng: np.random.Generator) -> Measurement:
    """One turn: the ego's poses (columns,4,4), the street's time (columns,) and the offset from the stamp (columns,) of each column."""
    b, c = len(model.elevations_rad), model.columns
    local = beams(model, float(rng.random()))
    world_from_lidar = world_from_ego @ model.ego_from_lidar
    directions = local @ np.swapaxes(world_from_lidar[:, :3, :3], 1, 2)
    origins = np.repeat(world_from_lidar[:, :3, 3], b, axis=0)
    hits, light = scene.cast_through(origins, directions.reshape(-1, 3).astype(np.float32), np.repeat(times_s, b), rng)
    local = local.reshape(-1, 3)

    bias = np.random.default_rng(len(model.elevations_rad)).normal(0, 0.006, b)  # the same in every log: the scanner's calibration
    gain = scene.gain[hits.item] * light
    facing = np.maximum(hits.facing, 1e-3)
    reflectivity = _REFLECTIVITY[hits.material] * gain
    retro = _RETRO[hits.material]
    seen = np.where(retro, reflectivity, reflectivity * np.sqrt(facing))
    there = hits.range_m < model.max_m
    own = _own_vehicle(model, local)
    sight = model.sight_m * np.sqrt(np.minimum(seen / 0.25, 1.5))
    with np.errstate(over="ignore", invalid="ignore"):
        too_far = 1 / (1 + np.exp(np.clip((sight - hits.range_m) / (0.10 * sight), -30, 30)))
    kept = 1 - model.lost - _LOST[hits.material]
    kept = there & ~own & (rng.random(c * b, dtype=np.float32) < kept * (1 - np.nan_to_num(too_far, nan=1.0)))
    at = np.flatnonzero(kept)
    noise = rng.normal(0, 1, len(at)) * model.noise_m * (1 + 0.3 / facing[at] ** 0.5 * hits.range_m[at] / 60)
    measured = hits.range_m[at] + noise + bias[at % b]
    at, measured = at[measured > 0.9], measured[measured > 0.9]
    speckle = 1 + 0.16 * rng.normal(0, 1, len(at))
    intensity = np.clip(np.where(retro[at], seen[at], reflectivity[at] * (0.35 + 0.65 * np.sqrt(facing[at]))) * speckle, 0, 1)
    return Measurement(
        (local[at] * measured[:, None]).astype(np.float32),
        (np.round(intensity * 255) / 255).astype(np.float32),
        (at % b).astype(np.uint16),
        np.repeat(time_ns, b)[at].astype(np.int32),
        hits.category[at],
        hits.instance[at],
        local[~there & ~own].astype(np.float32),
    )
