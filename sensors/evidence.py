"""Evidence: what the past sweeps say about a ray, as numbers a network can weigh.

For each past sweep, newest first, and for the newest once more with its moving parts displaced to the asked instant, and as if all of it kept
pace with the sensor: the nearest reading in each quadrant around the ray, the value interpolated between them, and the nearest reading of
all; for each sweep's nearest reading, whether the other sweeps saw through the place where it puts a surface; for places along the ray,
whether the past saw through them; what the newest sweep reads beside the ray; and what older sweeps read along it from where they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sensors.angles import HALF_PI, PI, atan2
from sensors.geometry import inverse, transform_points
from sensors.kernels.directions import AZIMUTH_CELLS, View, interpolate, turn
from sensors.rays import History, Rays

Array = NDArray[Any]

DISPLACED = 2  # copies of the newest sweep with what moves displaced: at constant velocity, and at constant acceleration
MOVED = DISPLACED + 1  # and one that keeps pace with the sensor: the lorry in the next lane, the queue
SEEN_LIMIT_M = 20.0
ALONG_M = np.geomspace(3.0, 54.0, 16).astype(np.float32)  # places along a ray where is asked whether the past saw through them
ALONG_LIMIT_M = 2.0
ALONG_EVERY = 2  # sweeps
# azimuth and elevation beside a ray at which the newest sweep is read as well: what stands left, right, above and below of an opening
AROUND_RAD = np.deg2rad(
    [(s * a, e) for a, e in ((1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (32, 0), (4, 1.5), (4, -1.5), (10, 1.5)) for s in (1, -1)]
    + [(0, e) for e in (0.8, 2, 4, -0.8, -2, -4)]
).astype(np.float32)
AROUND_LIMIT_RAD = float(np.deg2rad(1.5))
PACED_LIMIT_RAD = float(np.deg2rad(1.0))


@dataclass(frozen=True, eq=False)
class Evidence:
    """For R rays and S = T + MOVED readings (T past sweeps, newest first, then the copies of the newest: DISPLACED, and one that keeps pace):
    quadrants (R,S,4) f32 ranges, interpolated (R,S) f32, nearest (R,S) f32, all NaN where there is no reading; offsets (R,S,4,2) f32
    azimuth and elevation of the quadrant readings relative to the ray, rad; angle (R,S) f32 of the nearest reading, rad;
    seen (R,T,T) f32: the reading of sweep j towards the place of sweep k's nearest reading minus its distance, in metres, cut at
    +-SEEN_LIMIT_M, NaN where j does not look there; the diagonal is NaN; along (R,ceil(T/ALONG_EVERY),len(ALONG_M)) f32: the same for the places at
    ALONG_M on the ray, asked of every ALONG_EVERY-th sweep, cut at +-ALONG_LIMIT_M; around (R,len(AROUND_RAD)) f32: the newest sweep's ranges towards
    directions beside the ray, NaN where it has none within AROUND_LIMIT_RAD; paced (R,T-1) f32: the nearest readings of the older sweeps in the
    ray's direction, each from where its sensor was, NaN where there is none within PACED_LIMIT_RAD: what keeps pace is there at the same range."""

    quadrants: Array
    interpolated: Array
    nearest: Array
    offsets: Array
    angle: Array
    seen: Array
    along: Array
    around: Array
    paced: Array


FIELDS = ("quadrants", "interpolated", "nearest", "offsets", "angle", "seen", "along", "around", "paced")


@njit(nogil=True, cache=True, error_model="numpy")
def _seen_beyond(points, start, azimuth, elevation, radius, n_elevation, step_elevation, limit, out):
    """Reading nearest to each point's direction within one cell around it, minus the point's distance; NaN where there is none."""
    step_azimuth = np.float32(2 * np.pi / AZIMUTH_CELLS)
    for i in range(points.shape[0]):
        x, y, z = points[i, 0], points[i, 1], points[i, 2]
        out[i] = np.nan
        flat = np.sqrt(x * x + y * y)
        distance = np.sqrt(flat * flat + z * z)
        if not distance > np.float32(0.1):
            continue
        a, e = atan2(y, x), atan2(z, flat)
        column = int((a + PI) / step_azimuth) % AZIMUTH_CELLS
        row = min(max(int((e + HALF_PI) / np.float32(step_elevation)), 0), n_elevation - 1)
        best = np.float32(np.inf)
        low, high = column - 1, column + 2
        for r in range(max(row - 1, 0), min(row + 1, n_elevation - 1) + 1):
            c = r * AZIMUTH_CELLS
            # the cells of a row lie one behind the other, but for those across the seam
            for at in range(start[c + max(low, 0)], start[c + min(high, AZIMUTH_CELLS)]):
                best, out[i] = _closer(turn(azimuth[at] - a), elevation[at] - e, best, radius[at] - distance, out[i])
            if low < 0 or high > AZIMUTH_CELLS:
                across = c + (AZIMUTH_CELLS - 1 if low < 0 else 0)
                for at in range(start[across], start[across + 1]):
                    best, out[i] = _closer(turn(azimuth[at] - a), elevation[at] - e, best, radius[at] - distance, out[i])
        out[i] = min(max(out[i], -limit), limit)  # of NaN both give NaN


@njit(nogil=True, cache=True, error_model="numpy")
def _closer(da, de, best, beyond, out):
    d = da * da + de * de
    return (d, beyond) if d < best else (best, out)


def _beyond(history: History, sweep: int, places: Array, limit_m: float) -> Array:
    """What a past sweep reads towards places (N,3) f32 of the ego frame of t = 0, minus their distance (N,) f32, cut at +-limit_m; NaN: nothing."""
    own = inverse(history.present_from_sensor[sweep])
    view = view_from(history, sweep, own, "own")
    start, _, azimuth, elevation, radius = view._cells[:5]
    out = np.empty(len(places), np.float32)
    towards = transform_points(own, places)
    _seen_beyond(towards, start, azimuth, elevation, radius, view.n_elevation, view.elevation_step_rad, np.float32(limit_m), out)
    return out


def nothing(history: History, count: int) -> Evidence:
    """The evidence of `count` rays about which the past says nothing."""
    sweeps = len(history.points)
    readings = sweeps + MOVED
    shapes = ((readings, 4), (readings,), (readings,), (readings, 4, 2), (readings,), (sweeps, sweeps), (-(-sweeps // ALONG_EVERY), len(ALONG_M)),
              (len(AROUND_RAD),), (sweeps - 1,))  # fmt: skip
    return Evidence(*(np.full((count, *shape), np.nan, np.float32) for shape in shapes))


def view_from(history: History, sweep: int, sensor_from_present: Array, key: object) -> View:
    """One past sweep as seen from the sensor's place; kept in the history's memo under key (the horizon in seconds for an asked instant)."""
    return history.once(("view", sweep, key), lambda: View(history.points[sweep], history.elevation_step_rad, sensor_from_present))


def newest_view(history: History, sensor_from_present: Array, horizon_s: float) -> View:
    """The newest past sweep as seen from where the sensor will be after horizon_s."""
    return view_from(history, len(history.points) - 1, sensor_from_present, horizon_s)


def displaced(history: History, horizon_s: float, hypothesis: int) -> tuple[Array, Array]:
    """The newest sweep's points (N,3) f32 with its moving parts where they would be after horizon_s, by hypothesis 0 or 1 of
    `sensors.motion`, and the mask (N,) of those that moved."""
    from sensors.motion import motion_of

    motion = motion_of(history)
    velocity = motion.velocity if hypothesis == 0 else motion.alternative
    moved = np.abs(velocity).sum(1) > 0
    points = history.points[-1].copy()
    points[moved] += (velocity[moved] * np.float32(horizon_s)).astype(np.float32)
    return points, moved


def gather(history: History, rays: Rays) -> Evidence:
    """The evidence of the past for the given rays. Looks at the rays' origin, directions and instant only, never at their truth."""
    from sensors.motion import ahead

    count, sweeps = len(rays.directions), len(history.points)
    readings = sweeps + MOVED
    sensor_from_present = inverse(rays.present_from_sensor)
    quadrants = np.empty((count, readings, 4), np.float32)
    offsets = np.empty((count, readings, 4, 2), np.float32)
    interpolated, nearest, angle = (np.empty((count, readings), np.float32) for _ in range(3))
    seen = np.full((count, sweeps, sweeps), np.nan, np.float32)
    present = np.asarray(rays.present_from_sensor, np.float64)
    along = np.empty((count, -(-sweeps // ALONG_EVERY), len(ALONG_M)), np.float32)
    places = ((rays.directions[:, None] * ALONG_M[:, None]).reshape(-1, 3) @ present[:3, :3].T + present[:3, 3]).astype(np.float32)

    def read(slot: int, view: View, directions: Array, rows: Array | slice) -> None:
        q, daz, delev = view.quadrants(directions)
        near, near_angle, _ = view.nearest(directions)
        quadrants[rows, slot], offsets[rows, slot, :, 0], offsets[rows, slot, :, 1] = q, daz, delev
        nearest[rows, slot], angle[rows, slot] = near, near_angle
        interpolated[rows, slot] = interpolate(q, daz, delev, near)

    for slot in range(sweeps):
        sweep = sweeps - 1 - slot
        read(slot, view_from(history, sweep, sensor_from_present, rays.horizon_s), rays.directions, slice(None))
        surface = np.nan_to_num(nearest[:, slot, None]) * rays.directions
        surface_present = (surface @ present[:3, :3].T + present[:3, 3]).astype(np.float32)
        for other in range(sweeps):
            if other != slot:
                beyond = _beyond(history, sweeps - 1 - other, surface_present, SEEN_LIMIT_M)
                seen[:, slot, other] = np.where(np.isnan(nearest[:, slot]), np.nan, beyond)
        if slot % ALONG_EVERY == 0:
            along[:, slot // ALONG_EVERY] = _beyond(history, sweep, places, ALONG_LIMIT_M).reshape(count, -1)
    for hypothesis in range(DISPLACED):
        slot = sweeps + hypothesis
        for field in (quadrants, offsets, interpolated, nearest, angle):
            field[:, slot] = field[:, 0]
        scene = ahead(history, sensor_from_present, rays.horizon_s, hypothesis)
        if scene is not None:
            read(slot, scene, rays.directions, slice(None))
    own = [view_from(history, k, inverse(pose), "own") for k, pose in enumerate(history.present_from_sensor)][::-1]
    read(readings - 1, own[0], rays.directions, slice(None))
    paced = np.empty((count, sweeps - 1), np.float32)
    for back, view in enumerate(own[1:]):
        paced[:, back] = view.nearest(rays.directions, PACED_LIMIT_RAD)[0]
    around = _around(newest_view(history, sensor_from_present, rays.horizon_s), rays.directions)
    return Evidence(quadrants, interpolated, nearest, offsets, angle, seen, along, around, paced)


def _around(view: View, directions: Array) -> Array:
    """(R,len(AROUND_RAD)) f32: what the view reads beside directions (R,3), see `Evidence`."""
    x, y, z = directions.astype(np.float32).T
    azimuth = np.arctan2(y, x)[:, None] + AROUND_RAD[:, 0]
    elevation = np.arctan2(z, np.hypot(x, y))[:, None] + AROUND_RAD[:, 1]
    flat = np.cos(elevation)
    beside = np.stack((flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)), 2)
    return view.nearest(beside.reshape(-1, 3), AROUND_LIMIT_RAD)[0].reshape(len(directions), -1)
