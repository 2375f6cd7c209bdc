"""What moves, without labels: a velocity for each point of the newest past sweep, and the scene as it will be when that goes on.

Things that stand on the ground are clustered on the ground plane. A cluster that stood still is where the older sweeps had something,
too. One that moved is at a place that older sweeps saw through, or left places that are seen through now: for those the velocity is
searched that brings the cluster onto the points of all older sweeps, registration with each of them refines it, and a velocity and an
acceleration are fitted to the displacements found. Knowing its motion, what the older sweeps saw of a thing is added to it, and what it
hid at t = 0 and an older sweep saw is added to the background.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.evidence import view_from
from sensors.geometry import inverse, rotation_z, transform_points
from sensors.kernels import clusters
from sensors.kernels.directions import View
from sensors.rays import History

Array = NDArray[Any]

EXTENT_M = 64.0
GROUND_CELL_M, COARSE_CELL_M, FINE_CELL_M = 1.0, 0.25, 0.125
GROUND_BAND_M = 0.4
LOW_M, HIGH_M = 0.3, 3.0  # of what stands on the ground and may move, over the ground
NEAR_M = 15.0  # closer than this, points of one thing leave no empty cells
LONGEST_M = 14.0
SPLAT_SIGMA_M = 0.17
OCCUPIED = 110  # of 255: within 0.2 m of an occupied cell
FEWEST = 5
FLAT_M = 0.06  # what is lower is one beam on a slope, and walks with the sensor
TOP_SPEED, SEARCH_STEP = 24.0, 0.5
SLOWEST = 0.5
SEARCHED, CLIMBED, REGISTERED, PEAKS = 24, 64, 96, 4
CLIMB_STEPS = np.array([[0.25, 0.0], [0.12, 0.0], [0.06, 0.0]])
DRIFT_STEPS = np.array([[0.3, 0.01], [0.15, 0.005], [0.07, 0.0025], [0.03, 0.001]])
PAIRED_M = np.array([0.6, 0.45, 0.35, 0.3, 0.3])
SEEN_THROUGH_M = 0.5
HIDDEN_M = 0.3
HIDDEN_COUNTS = 0.15  # a point that could not be seen counts this much against a match
AZIMUTH_REACH_RAD = float(np.deg2rad(0.35))
SEEN_SHARE, MANY = 0.75, 100  # of a cluster that appeared where there was nothing or left where there is nothing now
PAIRED_SHARE, APART_M = 0.5, 0.2
HARDEST = 4.5
ACCELERATION = 2.5  # m/s^2, what road users do: the spread of the prior
AHEAD_S = 0.4
BESIDE_M = 3.0


@dataclass(frozen=True, eq=False)
class Motion:
    """For the N points of the newest sweep, in the ego frame of t = 0: velocity (N,3) f32 m/s (0: static, or unknown); alternative (N,3)
    f32, the mean velocity of the next 0.8 s if the acceleration lasts; cluster (N,) i32 of the moving thing that a point belongs to, -1
    none. movers (M,3) f32: the points of all moving things, those of older sweeps brought to t = 0, with mover_velocity and
    mover_acceleration (M,2) f32. uncovered (F,3) f32: what older sweeps saw of the static scene behind moving things."""

    velocity: Array
    alternative: Array
    cluster: Array
    movers: Array
    mover_velocity: Array
    mover_acceleration: Array
    uncovered: Array


def motion_of(history: History) -> Motion:
    """The motion of the newest past sweep; computed once per history."""
    found: Motion = history.once("motion", lambda: _estimate(history))
    return found


def ahead(history: History, sensor_from_present: Array, horizon_s: float, hypothesis: int) -> View | None:
    """The scene horizon_s after t = 0 as a sensor at sensor_from_present (4,4) will see it: moving things at their constant velocity
    (hypothesis 0) or acceleration (1), without the points they hide, and with what they uncover. None where nothing moves."""
    motion = motion_of(history)
    if not len(motion.movers) or horizon_s <= 0:
        return None
    movers = motion.movers.copy()
    movers[:, :2] += _displacement(motion.mover_velocity, motion.mover_acceleration * np.float32(hypothesis), horizon_s)
    still = history.once("motion, still", lambda: np.concatenate((history.points[-1][motion.cluster < 0], motion.uncovered)))
    hidden = _towards(View(movers, history.elevation_step_rad, sensor_from_present), still, sensor_from_present) < -HIDDEN_M
    return View(np.concatenate((still[~hidden], movers)), history.elevation_step_rad, sensor_from_present)


def _displacement(velocity: Array, acceleration: Array, seconds: float) -> Array:
    """v t + a t² / 2 of (N,2) each, but what brakes stops and does not come back."""
    along = (velocity * acceleration).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        stops = np.where(along < 0, -(velocity * velocity).sum(1) / along, np.inf)
    t = np.minimum(stops, seconds)[:, None]
    return (velocity * t + 0.5 * acceleration * t * t).astype(np.float32)


def _towards(view: View, points: Array, sensor_from_points: Array) -> Array:
    """(N,) f32: reading of the view in the direction of each point (N,3) minus its distance; NaN where it has none there."""
    start, _, azimuth, elevation, radius = view._cells[:5]
    out = np.empty(len(points), np.float32)
    reach = 0.75 * view.elevation_step_rad
    pose = np.ascontiguousarray(sensor_from_points, np.float64)
    clusters.towards(
        points, pose, start, azimuth, elevation, radius, view.n_elevation, view.elevation_step_rad, AZIMUTH_REACH_RAD, reach, out
    )  # fmt: skip
    return out


def _cells(cell_m: float) -> int:
    return round(2 * EXTENT_M / cell_m)


def _spread(rows: Array, count: int) -> Array:
    """At most count of the rows, evenly taken."""
    return rows if len(rows) <= count else rows[(np.arange(count) * (len(rows) / count)).astype(np.int64)]


def _cell_of(points: Array, cell_m: float) -> Array:
    out = np.empty(len(points), np.int32)
    clusters.cells_of(points, cell_m, _cells(cell_m), out)
    return out


def _splat(points: Array, keep: Array) -> Array:
    out = np.zeros((_cells(FINE_CELL_M), _cells(FINE_CELL_M)), np.uint8)
    clusters.splat(points, keep, FINE_CELL_M, SPLAT_SIGMA_M, out)
    return out


class _Sweeps:
    """The past sweeps, oldest first, as motion looks at them: points, the sensor's poses, heights over the ground, what stands on it, and
    maps (T-1,n,n) u8 of that for all but the newest. drift (3,): the common motion of everything (vx, vy, turn rate), which is the error
    of the poses and has been taken out of the older sweeps."""

    def __init__(self, history: History) -> None:
        self.points = list(history.points)
        self.times = np.asarray(history.times_s, np.float64)
        self.poses = [np.asarray(pose, np.float64) for pose in history.present_from_sensor]
        n = _cells(GROUND_CELL_M)
        low = np.full((len(self.points), n, n), np.inf, np.float32)
        for points, into in zip(self.points, low, strict=True):
            clusters.lowest(points, GROUND_CELL_M, n, into)
        ground = np.empty((n, n), np.float32)
        clusters.ground_of(low, 2, np.float32(GROUND_BAND_M), ground)
        self.heights = []
        for points in self.points:
            self.heights.append(np.empty(len(points), np.float32))
            clusters.heights(points, ground, GROUND_CELL_M, self.heights[-1])
        self.standing = [(height > LOW_M) & (height < HIGH_M) for height in self.heights]
        self.maps = np.stack([_splat(p, s) for p, s in zip(self.points[:-1], self.standing[:-1], strict=True)])
        self.drift = np.zeros(3)
        self._take_out_drift()

    def _take_out_drift(self) -> None:
        rows = _spread(np.flatnonzero(self.standing[-1]), 2000)
        if len(rows) < 200:
            return
        sample, drift = np.ascontiguousarray(self.points[-1][rows, :2]), np.zeros(3)
        now = clusters.overlap(sample, 0.0, 0.0, 0.0, self.times[:-1], self.maps, FINE_CELL_M, 0)
        then = clusters.climb(sample, np.zeros(3), self.times[:-1], self.maps, FINE_CELL_M, 0, DRIFT_STEPS, True, drift)
        if then < now + 0.01:
            return
        self.drift, self.middle = drift, sample.mean(0).astype(np.float64)
        for k, t in enumerate(self.times[:-1]):
            half = rotation_z(drift[2] * t / 2)[:2, :2]
            older_from_newest = rotation_z(drift[2] * t)
            older_from_newest[:2, 3] = self.middle - older_from_newest[:2, :2] @ self.middle + half @ drift[:2] * t
            self.points[k] = transform_points(inverse(older_from_newest), self.points[k])
            self.poses[k] = inverse(older_from_newest) @ self.poses[k]
            self.maps[k] = _splat(self.points[k], self.standing[k])

    def drift_at(self, place: Array) -> Array:
        """The drift's velocity (2,) at a place (2,)."""
        if not self.drift.any():
            return np.zeros(2)
        away = place - self.middle
        return np.asarray(self.drift[:2] + self.drift[2] * np.array((-away[1], away[0])))


def _components(cell: Array, rows: Array) -> list[Array]:
    """The rows, by connected component of their coarse cells."""
    n = _cells(COARSE_CELL_M)
    occupied, labels = np.zeros((n, n), np.bool_), np.empty((n, n), np.int32)
    occupied.reshape(-1)[cell[rows]] = True
    number = clusters.components(occupied, NEAR_M / COARSE_CELL_M, labels)
    of = labels.reshape(-1)[cell[rows]]
    order = np.argsort(of, kind="stable")
    return np.split(rows[order], np.searchsorted(of[order], np.arange(1, number))) if number else []


def _suspects(sweeps: _Sweeps) -> tuple[list[Array], Array]:
    """Clusters (rows of the newest sweep) that are not explained by standing still, and per point the share (N,) of the two oldest
    sweeps that had something where it is."""
    newest = sweeps.points[-1]
    there = np.zeros(len(newest), np.float32)
    fine = _cell_of(newest, FINE_CELL_M)
    inside = np.flatnonzero(fine >= 0)
    oldest = sweeps.maps[:2].reshape(min(2, len(sweeps.maps)), -1)
    for one in oldest:
        there[inside] += one[fine[inside]] > OCCUPIED
    there /= len(oldest)
    cell = _cell_of(newest, COARSE_CELL_M)
    found, loose = [], []
    for rows in _components(cell, np.flatnonzero(sweeps.standing[-1] & (cell >= 0))):
        explained = there[rows].mean()
        if len(rows) < FEWEST or explained > 0.98 or np.ptp(newest[rows, 2]) < FLAT_M:
            continue
        if explained > 0.88 or np.ptp(newest[rows, :2], axis=0).max() > LONGEST_M:
            loose.append(rows[there[rows] < 0.5])
        else:
            found.append(rows)
    if loose:
        for rows in _components(cell, np.sort(np.concatenate(loose))):
            if len(rows) >= FEWEST and np.ptp(newest[rows, 2]) >= FLAT_M and np.ptp(newest[rows, :2], axis=0).max() < LONGEST_M:
                found.append(rows)
    return found, there


def _estimate(history: History) -> Motion:
    newest = history.points[-1]
    velocity, alternative = np.zeros((len(newest), 3), np.float32), np.zeros((len(newest), 3), np.float32)
    cluster = np.full(len(newest), -1, np.int32)
    none = np.zeros((0, 3), np.float32)
    still = Motion(velocity, alternative, cluster, none, none[:, :2], none[:, :2], none)
    if len(history.points) < 2 or not len(newest):
        return still
    sweeps = _Sweeps(history)
    suspects, there = _suspects(sweeps)
    suspected = np.zeros(len(newest), np.bool_)
    for rows in suspects:
        suspected[rows] = True
    tracker = _Tracker(history, sweeps, _splat(newest, sweeps.standing[-1] & ~suspected & (there > 0.5)))
    things: list[tuple[Array, Array, Array]] = []
    left = [np.ones(len(points), np.bool_) for points in sweeps.points]
    boxes: list[_Box] = []
    for whole in sorted(suspects, key=len, reverse=True):
        rest = whole[cluster[whole] < 0]
        fitted = None if len(rest) < FEWEST else tracker.follow(rest, boxes) or tracker.track(rest)
        if fitted is None:
            continue
        rows, v, a = fitted
        box = _Box(newest[rows], sweeps.heights[-1][rows].max(), v, a)
        boxes.append(box)
        free = (cluster < 0) & (suspected | (there < 0.5) | (sweeps.heights[-1] < LOW_M))
        of = box.holds(newest, sweeps.heights[-1], 0.0, 0.3) & free
        of[rows] = True
        cluster[of] = len(things)
        shown = v + sweeps.drift_at(newest[rows, :2].mean(0))
        velocity[of, :2] = shown
        alternative[of, :2] = _displacement(shown[None], a[None], 2 * AHEAD_S)[0] / (2 * AHEAD_S)
        seen = [newest[of]]
        for k, t in enumerate(sweeps.times[:-1]):
            then = box.holds(sweeps.points[k], sweeps.heights[k], t, 0.15)
            moved = sweeps.points[k][then & left[k]]
            moved[:, :2] -= v * t + 0.5 * a * t * t
            seen.append(moved.astype(np.float32))
            left[k] &= ~box.holds(sweeps.points[k], sweeps.heights[k], t, 0.4)
        things.append((np.concatenate(seen), shown, a))
    if not things:
        return still
    movers = np.concatenate([points for points, _, _ in things])
    sizes = [len(points) for points, _, _ in things]
    own = inverse(sweeps.poses[-1])
    front = View(newest[cluster >= 0], history.elevation_step_rad, own)
    uncovered = []
    for points, kept in zip(sweeps.points[:-1], left[:-1], strict=True):
        uncovered.append(points[(_towards(front, points, own) < -SEEN_THROUGH_M) & kept])
    mover_velocity = np.repeat(np.array([v for _, v, _ in things], np.float32), sizes, axis=0)
    mover_acceleration = np.repeat(np.array([a for _, _, a in things], np.float32), sizes, axis=0)
    return Motion(velocity, alternative, cluster, movers, mover_velocity, mover_acceleration, np.concatenate(uncovered))


class _Box:
    """The space a moving thing takes: along its motion around its points (M,3), from the ground to its top; at t it was elsewhere."""

    def __init__(self, points: Array, top: float, velocity: Array, acceleration: Array) -> None:
        self.velocity, self.acceleration = velocity, acceleration
        self.cos, self.sin = velocity / np.linalg.norm(velocity)
        self.low, self.high = np.empty(2), np.array([0.0, 0.0, top + 0.4])
        turned = np.stack((points[:, 0] * self.cos + points[:, 1] * self.sin, points[:, 1] * self.cos - points[:, 0] * self.sin), 1)
        self.low[:], self.high[:2] = turned.min(0), turned.max(0)

    def holds(self, points: Array, height: Array, t: float, margin_m: float) -> Array:
        """(N,) bool: points that are inside, t seconds after t = 0 (t <= 0), within a margin."""
        x, y = self.velocity * t + 0.5 * self.acceleration * t * t
        moved = np.array((x * self.cos + y * self.sin, y * self.cos - x * self.sin))
        low, high = self.low + moved - margin_m, self.high.copy()
        high[:2] += moved + margin_m
        out = np.empty(len(points), np.bool_)
        clusters.inside(points, height, self.cos, self.sin, low, high, 0.15, out)
        return out


def _shifted(points: Array, by: Array) -> Array:
    out = points.copy()
    out[:, :2] += by.astype(np.float32)
    return out


def _two_largest(shares: list[Any]) -> float:
    """The mean of the two largest: what one sweep alone says may be an edge that another one missed."""
    return float(np.mean(sorted(shares)[-2:]))


class _Tracker:
    """Finds where a cluster of the newest sweep was in the older ones. still (n,n) u8: map of what has not moved, never matched."""

    def __init__(self, history: History, sweeps: _Sweeps, still: Array) -> None:
        self.sweeps = sweeps
        own = [inverse(np.asarray(pose, np.float64)) for pose in history.present_from_sensor]
        self.views = [(view_from(history, k, pose, "own"), inverse(sweeps.poses[k])) for k, pose in enumerate(own)]
        self.maps = np.zeros_like(sweeps.maps)
        self.lookup = []
        n = _cells(GROUND_CELL_M)
        for k, points in enumerate(sweeps.points[:-1]):
            at = _cell_of(points, FINE_CELL_M)
            keep = sweeps.standing[k] & (at >= 0)
            keep[keep] = still.reshape(-1)[at[keep]] < OCCUPIED
            clusters.splat(points, keep, FINE_CELL_M, SPLAT_SIGMA_M, self.maps[k])
            start, order = np.zeros(n * n + 1, np.int32), np.empty(len(points), np.int32)
            clusters.sort_into_cells(points, keep, GROUND_CELL_M, n, start, order)
            self.lookup.append((points, start, order))

    def _depth_behind(self, points: Array, sweep: int) -> Array:
        """(M,) f32: how far behind each point the sweep reads; negative where it is hidden, NaN where the sweep does not look."""
        view, sensor_from_present = self.views[sweep]
        return _towards(view, points, sensor_from_present)

    def _match(self, points: Array, velocity: Array, maps: Array) -> float:
        """How well points (M,3) fit the maps when they came at a velocity (2,), of those that could be seen then."""
        times = self.sweeps.times[:-1]
        hits = np.empty((len(points), len(times)), np.float32)
        clusters.point_overlap(points, velocity[0], velocity[1], times, maps, FINE_CELL_M, hits)
        if hits.mean() < HIDDEN_COUNTS:
            return 0.0
        hidden = np.stack([self._depth_behind(_shifted(points, velocity * t), k) < -SEEN_THROUGH_M for k, t in enumerate(times)], 1)
        hidden &= hits < 0.5
        return float(hits.sum() / (hits.size - (1 - HIDDEN_COUNTS) * hidden.sum()))

    def follow(self, rows: Array, boxes: list[_Box]) -> tuple[Array, Array, Array] | None:
        """The motion of one of the boxes for a cluster beside it, where that explains the cluster: a thing is often seen in pieces."""
        newest, height = self.sweeps.points[-1], self.sweeps.heights[-1]
        points = newest[_spread(rows, CLIMBED)]
        middle, middle_height = points.mean(0, keepdims=True), np.median(height[rows])[None]
        best, best_score = None, 0.5
        for box in boxes:
            if box.holds(middle, middle_height, 0.0, BESIDE_M)[0]:
                score = self._match(points, box.velocity, self.sweeps.maps)
                if score > max(best_score, self._match(points, np.zeros(2), self.sweeps.maps) + 0.1):
                    best, best_score = box, score
        return None if best is None else (rows, best.velocity, best.acceleration)

    def track(self, rows: Array) -> tuple[Array, Array, Array] | None:
        """Of a cluster the rows that move, their velocity (2,) m/s and acceleration (2,) m/s² at t = 0; None where it may as well have
        stood still."""
        newest, times = self.sweeps.points[-1], self.sweeps.times[:-1]
        points = newest[_spread(rows, CLIMBED)]
        appeared = _two_largest([np.mean(self._depth_behind(points, k) > SEEN_THROUGH_M) for k in range(len(times))])
        standing = self._match(points, np.zeros(2), self.sweeps.maps)
        evident = SEEN_SHARE if len(rows) < MANY else 0.6 * SEEN_SHARE
        for maps in (self.maps, self.sweeps.maps):
            if maps is self.sweeps.maps and appeared < 0.2:
                continue
            best = self._best(points, newest[_spread(rows, SEARCHED)], maps, max(standing + 0.2, 0.5 if len(rows) > 20 else 0.6))
            if best is None:
                continue
            vanished = _two_largest([np.mean(self._depth_behind(_shifted(points, best * t), len(times)) > SEEN_THROUGH_M) for t in times])
            if appeared + vanished >= evident:
                found = self._without_neighbours(rows, best)
                if found is not None:
                    return found
        return None

    def _best(self, points: Array, few: Array, maps: Array, needed: float) -> Array | None:
        """The velocity (2,) at which points (M,3) fit the maps best, if they fit better than needed. few: a handful of them to search with."""
        times = self.sweeps.times[:-1]
        flat = np.ascontiguousarray(points[:, :2])
        peaks, scores = np.zeros((PEAKS, 2)), np.zeros(PEAKS)
        few = np.ascontiguousarray(few[:, :2])
        clusters.search(few, times, maps, FINE_CELL_M, TOP_SPEED, SEARCH_STEP, max(len(times) - 2, 0), peaks, scores)
        best, best_score = None, needed
        for peak in peaks[scores > 0.25]:
            out = np.zeros(3)
            clusters.climb(flat, np.append(peak, 0.0), times, maps, FINE_CELL_M, 0, CLIMB_STEPS, False, out)
            score = self._match(points, out[:2], maps)
            if score > best_score:
                best, best_score = out[:2], score
        return best

    def _without_neighbours(self, rows: Array, velocity: Array) -> tuple[Array, Array, Array] | None:
        """Track the part of a cluster that moves, where it is one with something that stands."""
        newest, times = self.sweeps.points[-1], self.sweeps.times[:-1]
        hits = np.empty((2, len(rows), len(times)), np.float32)
        for which, v in enumerate((np.zeros(2), velocity)):
            clusters.point_overlap(newest[rows], v[0], v[1], times, self.sweeps.maps, FINE_CELL_M, hits[which])
        stands, moves = hits.mean(2)
        own = rows[moves >= stands - 0.1]
        if len(own) < FEWEST or len(own) > 0.85 * len(rows):
            own = rows
        fitted = self._fit(newest[_spread(own, REGISTERED)], velocity)
        return None if fitted is None else (own, *fitted)

    def _fit(self, points: Array, guess: Array) -> tuple[Array, Array] | None:
        """Velocity and acceleration at t = 0 by registering points (M,3) with each older sweep, from the velocity guess on: least
        squares of the displacements v t + a t² / 2, with a prior on a. None where they do not register, or not into a motion."""
        times, n = self.sweeps.times[:-1], _cells(GROUND_CELL_M)
        displacements, weights, shares, distances = np.zeros((len(times), 2)), np.zeros(len(times)), [], []
        sigma = 0.03 + 0.2 / np.sqrt(len(points))
        for k, (older, start, order) in enumerate(self.lookup):
            shift = guess * times[k]
            squared, share = clusters.settle(points, older, start, order, GROUND_CELL_M, n, shift, PAIRED_M, len(PAIRED_M), 160, np.float32(0.5))
            displacements[k] = shift
            shares.append(share)
            distances.append(squared**0.5)
            weights[k] = (share / sigma) ** 2 if np.isfinite(squared) and share > 0.2 else 0.0
        if _two_largest(shares) < PAIRED_SHARE or np.median(distances) > APART_M:
            return None
        basis = np.stack((times, 0.5 * times**2), 1)
        normal = basis.T @ (basis * weights[:, None]) + np.diag([1e-2, 1 / ACCELERATION**2])
        v, a = np.linalg.solve(normal, basis.T @ (displacements * weights[:, None]))
        return None if np.hypot(v[0], v[1]) < SLOWEST or np.hypot(a[0], a[1]) > HARDEST else (v, a)
