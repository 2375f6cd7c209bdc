"""What moves, without labels: a velocity for each point of the newest past sweep, and the scene as it will be when that goes on.

Things that stand on the ground are clustered on the ground plane. A cluster that stood still is where the older sweeps had something,
too. One that moved is at a place that older sweeps saw through, or left places that are seen through now: for those the velocity is
searched that brings the cluster onto the points of all older sweeps, registration with each of them refines it, and a velocity and an
acceleration are fitted to the displacements found. A thing is seen in pieces: what is in front of it and came there as it came belongs to
it. Knowing its motion, what the older sweeps saw of a thing is added to it unless the newest sweep sees through that, and what it hid at
t = 0 and an older sweep saw is added to the background.
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
LOWEST_M = 0.15
FLAT_M = 0.06  # what is lower is one beam on a slope, and walks with the sensor
TOP_SPEED, SEARCH_STEP = 24.0, 0.5
# faster than that is only who drives along the road, which is where the ego vehicle heads
TOP_ALONG, TOP_ASIDE = 45.0, 6.0
SLOWEST = 0.5
SEARCHED, CLIMBED, REGISTERED, PEAKS = 24, 64, 96, 4
LEAST_OVERLAP = 0.4  # of a velocity worth a closer look: one that holds has more than half of the points on the maps
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
GAP_M, SHORTER_M = 1.5, 0.5
AWAY_M = 0.3
THERE_SHARE = 0.1


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
    hidden = _hidden(View(movers, history.elevation_step_rad, sensor_from_present), still, sensor_from_present, HIDDEN_M)
    return View(np.concatenate((still[~hidden], movers)), history.elevation_step_rad, sensor_from_present)


def _displacement(velocity: Array, acceleration: Array, seconds: float) -> Array:
    """v t + a t² / 2 of (N,2) each, but what brakes stops and does not come back."""
    along = (velocity * acceleration).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        stops = np.where(along < 0, -(velocity * velocity).sum(1) / along, np.inf)
    t = np.minimum(stops, seconds)[:, None]
    return (velocity * t + 0.5 * acceleration * t * t).astype(np.float32)


def towards(view: View, points: Array, sensor_from_points: Array) -> Array:
    """(N,) f32: reading of the view in the direction of each point (N,3) minus its distance; NaN where it has none there."""
    start, _, azimuth, elevation, radius = view._cells[:5]
    out = np.empty(len(points), np.float32)
    reach = 0.75 * view.elevation_step_rad
    pose = np.ascontiguousarray(sensor_from_points, np.float64)
    clusters.towards(
        points, pose, start, azimuth, elevation, radius, view.n_elevation, view.elevation_step_rad, AZIMUTH_REACH_RAD, reach, out
    )  # fmt: skip
    return out


def _hidden(view: View, points: Array, sensor_from_points: Array, margin_m: float) -> Array:
    """(N,) bool: points (N,3) in whose direction the view reads more than margin_m nearer."""
    start, _, azimuth, elevation, radius = view._cells[:5]
    out = np.empty(len(points), np.bool_)
    pose, reach = np.ascontiguousarray(sensor_from_points, np.float64), 0.75 * view.elevation_step_rad
    clusters.hidden(
        points, pose, start, azimuth, elevation, radius, view.n_elevation, view.elevation_step_rad, AZIMUTH_REACH_RAD, reach, margin_m, out
    )  # fmt: skip
    return out


def _joined(views: list[View], sensor_from_present: list[Array]) -> tuple[Any, ...]:
    """Several views as what `clusters.match` and `clusters.seen_through` look into: start (T,C+1), first (T+1,) rows of each in azimuth,
    elevation and radius, poses (T,4,4) f32, and how cells and reach are cut."""
    first = np.cumsum([0] + [len(view) for view in views])
    start = np.stack([view._cells[0] for view in views])
    azimuth, elevation, radius = (np.concatenate([view._cells[i] for view in views]) for i in (2, 3, 4))
    poses = np.stack(sensor_from_present).astype(np.float32)
    step = views[0].elevation_step_rad
    return start, first, azimuth, elevation, radius, poses, views[0].n_elevation, step, AZIMUTH_REACH_RAD, 0.75 * step


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


def _components(cell: Array, rows: Array) -> tuple[Array, Array]:
    """The rows ordered by connected component of their coarse cells, and where each component starts (K,)."""
    n = _cells(COARSE_CELL_M)
    occupied, labels = np.zeros((n, n), np.bool_), np.empty((n, n), np.int32)
    occupied.reshape(-1)[cell[rows]] = True
    number = clusters.components(occupied, NEAR_M / COARSE_CELL_M, labels)
    of = labels.reshape(-1)[cell[rows]]
    order = np.argsort(of, kind="stable")
    return rows[order], np.searchsorted(of[order], np.arange(number))


def _things(points: Array, cell: Array, rows: Array) -> list[tuple[Array, float]]:
    """Those components of the rows that have FEWEST points and are not flat, each with its length on the ground."""
    ordered, start = _components(cell, rows)
    if not len(start):
        return []
    count = np.diff(np.append(start, len(ordered)))
    here = points[ordered]
    span = np.maximum.reduceat(here, start) - np.minimum.reduceat(here, start)
    chosen = np.flatnonzero((count >= FEWEST) & (span[:, 2] >= FLAT_M))
    return [(ordered[start[i] : start[i] + count[i]], float(span[i, :2].max())) for i in chosen]


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
    for rows, length in _things(newest, cell, np.flatnonzero(sweeps.standing[-1] & (cell >= 0))):
        explained = there[rows].mean()
        if explained > 0.98:
            continue
        if explained > 0.88 or length > LONGEST_M:
            loose.append(rows[there[rows] < 0.5])
        else:
            found.append(rows)
    if loose:
        found += [rows for rows, length in _things(newest, cell, np.sort(np.concatenate(loose))) if length < LONGEST_M]
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
    free = [np.ones(len(points), np.bool_) for points in sweeps.points[:-1]]
    free.append(suspected | (there < 0.5) | (sweeps.heights[-1] < LOW_M))
    own = tracker.sensor_from_present[-1]
    boxes: list[_Box] = []
    for whole in sorted(suspects, key=len, reverse=True):
        rest = whole[cluster[whole] < 0]
        fitted = None if len(rest) < FEWEST else tracker.follow(rest, boxes) or tracker.track(rest)
        if fitted is None:
            continue
        rows, v, a = fitted
        rows = tracker.complete(rows, v, a, sweeps.standing[-1] & (cluster < 0))
        box = _Box(newest[rows], sweeps.heights[-1][rows].max(), v, a)
        boxes.append(box)
        of = np.union1d(rows, box.take(newest, sweeps.heights[-1], free[-1], 0.0, 0.3, 0.3))
        cluster[of], free[-1][of] = len(things), False
        shown = v + sweeps.drift_at(newest[rows, :2].mean(0))
        velocity[of, :2] = shown
        alternative[of, :2] = _displacement(shown[None], a[None], 2 * AHEAD_S)[0] / (2 * AHEAD_S)
        older = []
        for k, t in enumerate(sweeps.times[:-1]):
            moved = sweeps.points[k][box.take(sweeps.points[k], sweeps.heights[k], free[k], t, 0.15, 0.4)]
            moved[:, :2] -= v * t + 0.5 * a * t * t
            older.append(moved.astype(np.float32))
        back = np.concatenate(older)
        # where the newest sweep sees through them, they were of something else, or are not where this motion says
        back = back[~(towards(tracker.views[-1], back, own) > SEEN_THROUGH_M)]
        things.append((np.concatenate((newest[of], back)), shown, a))
    if not things:
        return still
    movers = np.concatenate([points for points, _, _ in things])
    sizes = [len(points) for points, _, _ in things]
    front = View(newest[cluster >= 0], history.elevation_step_rad, own)
    uncovered = []
    for points, kept in zip(sweeps.points[:-1], free[:-1], strict=True):
        uncovered.append(points[_hidden(front, points, own, SEEN_THROUGH_M) & kept])
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

    def take(self, points: Array, height: Array, free: Array, t: float, inner_m: float, outer_m: float) -> Array:
        """Rows (K,) of the free (N,) points that are inside, t seconds after t = 0 (t <= 0), within a margin of inner_m; what is within
        outer_m is not free afterwards."""
        moved = self._moved(t)
        rows = np.empty(len(points), np.int32)
        count = clusters.take_inside(
            points, height, self.cos, self.sin, self.low + moved, self.high + np.append(moved, 0.0), LOWEST_M, inner_m, outer_m, free, rows
        )
        return rows[:count]

    def holds(self, points: Array, height: Array, t: float, margin_m: float) -> Array:
        """(N,) bool: points that are inside, t seconds after t = 0 (t <= 0), within a margin."""
        moved = self._moved(t)
        out = np.empty(len(points), np.bool_)
        low, high = self.low + moved - margin_m, self.high + np.append(moved + margin_m, 0.0)
        clusters.inside(points, height, self.cos, self.sin, low, high, LOWEST_M, out)
        return out

    def is_beside(self, x: float, y: float, height: float, margin_m: float) -> bool:
        """Whether one point is inside at t = 0 within a margin."""
        along, left = x * self.cos + y * self.sin, y * self.cos - x * self.sin
        return bool(
            self.low[0] - margin_m < along < self.high[0] + margin_m
            and self.low[1] - margin_m < left < self.high[1] + margin_m
            and LOWEST_M < height < self.high[2]
        )

    def _moved(self, t: float) -> Array:
        """How far along its motion and left of it (2,) the box was at t."""
        x, y = self.velocity * t + 0.5 * self.acceleration * t * t
        return np.array((x * self.cos + y * self.sin, y * self.cos - x * self.sin))


def _two_largest(shares: list[Any]) -> float:
    """The mean of the two largest: what one sweep alone says may be an edge that another one missed."""
    largest = sorted(shares)[-2:]
    return float(sum(largest) / len(largest))


class _Tracker:
    """Finds where a cluster of the newest sweep was in the older ones. still (n,n) u8: map of what has not moved, never matched."""

    def __init__(self, history: History, sweeps: _Sweeps, still: Array) -> None:
        self.sweeps = sweeps
        own = [inverse(np.asarray(pose, np.float64)) for pose in history.present_from_sensor]
        self.views = [view_from(history, k, pose, "own") for k, pose in enumerate(own)]
        self.sensor_from_present = [inverse(pose) for pose in sweeps.poses]
        self.looks = _joined(self.views, self.sensor_from_present)
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
        self.first = max(len(sweeps.maps) - 2, 0)
        self.pooled = {}
        for maps in (self.maps, sweeps.maps):
            pooled = np.zeros((len(maps), maps.shape[1] // clusters.POOL, maps.shape[2] // clusters.POOL), np.uint8)
            for one, into in zip(maps[self.first :], pooled[self.first :], strict=True):
                clusters.pool(one, into)
            self.pooled[id(maps)] = pooled

    def _match(self, points: Array, velocity: Array, maps: Array, needed: float = 0.0) -> float:
        """How well points (M,3) fit the maps when they came at a velocity (2,), of those that could be seen then; 0 if surely not better
        than needed."""
        times = self.sweeps.times[:-1]
        return float(clusters.match(points, *velocity, times, maps, FINE_CELL_M, self.looks, SEEN_THROUGH_M, HIDDEN_COUNTS, needed))

    def _seen_through(self, points: Array, velocity: Array, times: Array, sweeps: Array) -> float:
        """The share of points (M,3), moved to the times, that sweeps see through: the mean of the two largest, as what one sweep alone says
        may be an edge that another one missed."""
        shares = np.empty(len(times))
        clusters.seen_through(points, *velocity, times, sweeps, self.looks, SEEN_THROUGH_M, shares)
        return _two_largest(shares.tolist())

    def follow(self, rows: Array, boxes: list[_Box]) -> tuple[Array, Array, Array] | None:
        """The motion of one of the boxes for a cluster beside it, where that explains the cluster: a thing is often seen in pieces."""
        if not boxes:
            return None
        newest, height = self.sweeps.points[-1], self.sweeps.heights[-1]
        points = newest[_spread(rows, CLIMBED)]
        (x, y, _), middle_height = points.mean(0).tolist(), float(np.median(height[rows]))
        near = [box for box in boxes if box.is_beside(x, y, middle_height, BESIDE_M)]
        if not near:
            return None
        best, best_score = None, max(0.5, self._match(points, np.zeros(2), self.sweeps.maps) + 0.1)
        for box in near:
            score = self._match(points, box.velocity, self.sweeps.maps, best_score)
            if score > best_score:
                best, best_score = box, score
        return None if best is None else (rows, best.velocity, best.acceleration)

    def track(self, rows: Array) -> tuple[Array, Array, Array] | None:
        """Of a cluster the rows that move, their velocity (2,) m/s and acceleration (2,) m/s² at t = 0; None where it may as well have
        stood still."""
        newest, times = self.sweeps.points[-1], self.sweeps.times[:-1]
        points, still, older = newest[_spread(rows, CLIMBED)], np.zeros(2), np.arange(len(times))
        appeared = self._seen_through(points, still, np.zeros(len(times)), older)
        standing = self._match(points, still, self.sweeps.maps)
        evident = SEEN_SHARE if len(rows) < MANY else 0.6 * SEEN_SHARE
        for maps in (self.maps, self.sweeps.maps):
            if maps is self.sweeps.maps and appeared < 0.2:
                continue
            best = self._best(points, newest[_spread(rows, SEARCHED)], maps, max(standing + 0.2, 0.5 if len(rows) > 20 else 0.6))
            if best is None:
                continue
            vanished = self._seen_through(points, best, times, np.full(len(times), len(times)))
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
        pooled = self.pooled[id(maps)]
        clusters.search(few, times, maps, pooled, FINE_CELL_M, TOP_SPEED, TOP_ALONG, TOP_ASIDE, SEARCH_STEP, self.first, LEAST_OVERLAP, peaks, scores)
        best, best_score = None, needed
        for peak in peaks[scores > 0]:
            out = np.zeros(3)
            clusters.climb(flat, np.append(peak, 0.0), times, maps, FINE_CELL_M, 0, CLIMB_STEPS, False, out)
            score = self._match(points, out[:2], maps, best_score)
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
        if fitted is None:
            return None
        if len(own) < len(rows) and self._moves_along(np.setdiff1d(rows, own), rows, *fitted):
            own = rows
        return own, *fitted

    def _moves_along(self, rows: Array, whole: Array, velocity: Array, acceleration: Array) -> bool:
        """Whether rows may move with the thing that whole is then: where they are, older sweeps had nothing before the thing came there.
        A side that slides along itself looks as if it stood still, but in front of it there was nothing."""
        sweeps = self.sweeps
        newest, height = sweeps.points[-1], sweeps.heights[-1]
        box = _Box(newest[whole], height[whole].max(), velocity, acceleration)
        cell = _cell_of(newest[rows], FINE_CELL_M)
        before, there = 0, 0
        for map_, t in zip(self.sweeps.maps, sweeps.times[:-1], strict=True):
            away = ~box.holds(newest[rows], height[rows], t, AWAY_M) & (cell >= 0)
            before += int(away.sum())
            there += int((map_.reshape(-1)[cell[away]] > OCCUPIED).sum())
        return before >= FEWEST and there < THERE_SHARE * before

    def complete(self, rows: Array, velocity: Array, acceleration: Array, free: Array) -> Array:
        """The rows of a moving thing and what of it reaches farther in the direction of its motion: free (N,) points that stand in front of
        it, in no more than its width, as far as they may move with it. The side of a car that drives away is thin, and falls to pieces."""
        newest, height = self.sweeps.points[-1], self.sweeps.heights[-1]
        box = _Box(newest[rows], height[rows].max(), velocity, acceleration)
        box.high[0] += LONGEST_M
        front = np.flatnonzero(box.holds(newest, height, 0.0, AWAY_M) & free)
        box.high[0] -= LONGEST_M
        along = newest[front, 0] * box.cos + newest[front, 1] * box.sin
        order = np.argsort(along, kind="stable")
        front, along = front[order], along[order]
        beyond = np.searchsorted(along, box.high[0])
        gaps = np.flatnonzero(np.diff(np.append(box.high[0], along[beyond:])) > GAP_M)
        last = beyond + (gaps[0] if len(gaps) else len(along) - beyond)
        while last > beyond:
            whole = np.union1d(rows, front[:last])
            if along[last - 1] - box.low[0] < LONGEST_M and self._moves_along(front[:last], whole, velocity, acceleration):
                return whole
            last = np.searchsorted(along, along[last - 1] - SHORTER_M)
        return rows

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
