"""Rays: what is asked of a forecast, and what the past had to say.

`History` is everything a method may look at: the past sweeps of a clip, brought into the ego frame of t = 0. `Rays` is what it is asked
for: directions from where the sensor will be. That a return exists on a ray is known to the asker (the truth's directions are given);
where it lies is what has to be said.

Points stay as recorded unless a sweep was deskewed; the origin of a ray is the sensor at the sweep's stamp.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.errors import UsageError
from sensors.geometry import inverse, transform_points
from sensors.records import Clip, Frame, Lidar, Log, RecordError, Sweep

Array = NDArray[Any]

# spacing of beams where a log does not say it: a 64-beam sensor's
ELEVATION_STEP_RAD = float(np.deg2rad(0.5))
MIN_RANGE_M, MAX_RANGE_M = 2.0, 56.0
RAYS_PER_SWEEP = 16384


@dataclass(frozen=True, eq=False)
class History:
    """The past of a clip, oldest sweep first. points[i] (N_i,3) f32 and intensity[i] (N_i,) in the ego frame of t = 0; times_s (T,) <= 0;
    present_from_sensor (T,4,4): where the sensor was. elevation_step_rad: spacing of the sensor's beams.
    memo keeps what several methods derive from it (views, motion)."""

    points: tuple[Array, ...]
    intensity: tuple[Array, ...]
    times_s: Array
    present_from_sensor: Array
    elevation_step_rad: float = ELEVATION_STEP_RAD
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


@dataclass(frozen=True, eq=False)
class Rays:
    """Rays of one instant: horizon_s after t = 0; present_from_sensor (4,4); directions (R,3) f32, unit vectors in the frame of the sensor
    *then*; and the truth: ranges (R,) f32, intensity (R,) f32, index (R,) i64 of the return in its sweep."""

    horizon_s: float
    present_from_sensor: Array
    directions: Array
    ranges: Array
    intensity: Array
    index: Array

    def take(self, rows: Array) -> Rays:
        """Some of the rays: rows (R,) bool or indices."""
        truth = (self.ranges[rows], self.intensity[rows], self.index[rows])
        return Rays(self.horizon_s, self.present_from_sensor, self.directions[rows], *truth)


def inside_box(points: Array, box: tuple[float, ...]) -> Array:
    """(N,) bool: points (N,3) within (xmin, ymin, zmin, xmax, ymax, zmax)."""
    low, high = np.asarray(box[:3], points.dtype), np.asarray(box[3:], points.dtype)
    return ((points >= low) & (points <= high)).all(axis=1)


def elevation_step_of(lidar: Lidar) -> float:
    """Spacing of a LiDAR's beams in rad, a little generous: from its elevations, else from the number of beams over 27 or 40 degrees."""
    if lidar.elevations_rad is not None and len(lidar.elevations_rad) > 1:
        return float(np.clip(1.15 * np.median(np.diff(np.sort(lidar.elevations_rad))), np.deg2rad(0.2), np.deg2rad(4)))
    if lidar.beams and lidar.beams < 64:
        return float(np.deg2rad(40 / lidar.beams * 1.15))
    return ELEVATION_STEP_RAD


def _kept(log: Log, lidar: str, sweep: Sweep) -> tuple[Array, Array, Array]:
    """Indices, points and ranges (in the sensor's frame) of a sweep's returns that are not of the ego vehicle."""
    own = inside_box(transform_points(log.lidars[lidar].ego_from_lidar, sweep.points), log.ego_box)
    index = np.flatnonzero(~own)
    points = sweep.points[index]
    return index, points, np.sqrt((points.astype(np.float64) ** 2).sum(1)).astype(np.float32)


def history_of(clip: Clip) -> History:
    """The past sweeps of a clip in the ego frame of t = 0, the ego vehicle's own returns removed."""
    log, lidar = clip.log, clip.lidar
    present_from_world = inverse(clip.past[-1].world_from_ego)
    points, intensity, poses = [], [], []
    for frame in clip.past:
        present_from_sensor = present_from_world @ frame.world_from_ego @ log.lidars[lidar].ego_from_lidar
        sweep = log.read_sweep(lidar, frame.sweep_index)
        index, kept, _ = _kept(log, lidar, sweep)
        points.append(transform_points(present_from_sensor, kept))
        intensity.append(sweep.intensity[index])
        poses.append(present_from_sensor)
    times = np.array([(frame.stamp_ns - clip.stamp_ns) / 1e9 for frame in clip.past])
    return History(tuple(points), tuple(intensity), times, np.stack(poses), elevation_step_of(log.lidars[lidar]))


def rays_of(clip: Clip, frame: Frame, count: int | None = RAYS_PER_SWEEP, seed: int = 0) -> Rays:
    """The returns of one frame (of the future or of t = 0) as rays with their truth: range 2..56 m from the sensor at the stamp, the ego
    vehicle's returns removed. count rays are drawn by (seed, log, stamp), the same for every method; None takes all, in recorded order.
    RecordError where there is none."""
    if count is not None and count < 1:
        raise UsageError(f"{count} rays a sweep: give at least 1, or None for all")
    log, lidar = clip.log, clip.lidar
    sweep = log.read_sweep(lidar, frame.sweep_index)
    index, points, ranges = _kept(log, lidar, sweep)
    inside = (ranges >= MIN_RANGE_M) & (ranges <= MAX_RANGE_M)
    index, points, ranges = index[inside], points[inside], ranges[inside]
    if not len(index):
        raise RecordError(
            f"log {log.id}: {lidar} at {frame.stamp_ns}: no return between {MIN_RANGE_M:g} and {MAX_RANGE_M:g} m; nothing can be asked of it"
        )
    if count is not None and len(index) > count:
        key = (seed, zlib.crc32(log.id.encode()), frame.stamp_ns)
        drawn = np.sort(np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).choice(len(index), count, replace=False))
        index, points, ranges = index[drawn], points[drawn], ranges[drawn]
    present_from_sensor = inverse(clip.past[-1].world_from_ego) @ frame.world_from_ego @ log.lidars[lidar].ego_from_lidar
    directions = (points / ranges[:, None]).astype(np.float32)
    return Rays((frame.stamp_ns - clip.stamp_ns) / 1e9, present_from_sensor, directions, ranges, sweep.intensity[index], index)


def in_sector(points: Array, centre_rad: float, width_rad: float) -> Array:
    """(N,) bool: points (N,3) of the ego frame of t = 0 whose azimuth, seen from its origin, is within width_rad / 2 of centre_rad."""
    azimuth = np.arctan2(points[:, 1].astype(np.float64), points[:, 0].astype(np.float64))
    return np.abs((azimuth - centre_rad + np.pi) % (2 * np.pi) - np.pi) <= width_rad / 2


def hide_sector(history: History, centre_rad: float, width_rad: float) -> History:
    """The history without anything that any past sweep saw in a sector (`in_sector`); what was derived from the whole is not carried over."""
    kept = [~in_sector(points, centre_rad, width_rad) for points in history.points]
    points = tuple(p[k] for p, k in zip(history.points, kept, strict=True))
    intensity = tuple(i[k] for i, k in zip(history.intensity, kept, strict=True))
    return History(points, intensity, history.times_s, history.present_from_sensor, history.elevation_step_rad)
