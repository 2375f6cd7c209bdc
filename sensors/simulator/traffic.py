"""Who moves in a street and how: paths along lanes and through junctions, and a driver for each that keeps its distance.

Road users are planned one after the other. Each drives (or walks) its path by the intelligent driver model (Treiber et al. 2000) against
everybody planned before, who therefore have the right of way: it follows the one ahead, waits for those who cross, stops where its path
ends. Whoever would still come too close to another, to the ego vehicle or to something that stands there is left out, so that at no instant
two of them share a place. Some are planned before the ego vehicle, which then has to brake for them; the others give way to it.

Dense traffic fills every lane of the main road as a stream: a speed at each place (even, in waves, or falling towards a queue) and gaps
that suit it, planned from the front of each lane to its rear, the ego vehicle in its place among them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.simulator.streets import CAR_PAINTS, Junction, Road, Street, Thing, rect_overlap, vehicle_size

Array = NDArray[Any]

PLAN_S = 0.1
GRID_S = 0.02
BEFORE_S = 0.3
EGO_HEIGHT_M = 0.93
# The ego vehicle in its own frame (origin above the rear axle): xmin, ymin, zmin, xmax, ymax, zmax.
EGO_BOX = (-1.2, -0.95, -EGO_HEIGHT_M, 3.6, 0.95, 0.7)
CLEARANCE_M = 0.15
# Dense traffic: how far around the ego vehicle and how many per direction at most, and how far its lanes go on beyond the road's end, which
# nobody is to brake for.
STREAM_M = 105.0
STREAM_COUNT = (24, 18)
BEYOND_M = 250.0
MOVERS = ("car", "van", "truck", "cyclist", "pedestrian")


@dataclass(frozen=True, eq=False)
class Path:
    """A way to go: places (N,2) every 0.25 m, headings (N,) without jumps, and the speed (N,) that its bends allow."""

    places: Array
    heading: Array
    allowed: Array

    @property
    def length(self) -> float:
        return (len(self.places) - 1) * 0.25

    def at(self, s: Array | float) -> tuple[Array, Array]:
        known = np.arange(len(self.places)) * 0.25
        s = np.asarray(s, np.float64)
        return np.stack((np.interp(s, known, self.places[:, 0]), np.interp(s, known, self.places[:, 1])), -1), np.interp(s, known, self.heading)


def path_through(points: Array, top_speed: float) -> Path:
    """The path along a polyline (N,2), its headings smoothed over about 2 m; at most 2.5 m/s² across."""
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    keep = np.concatenate(([True], steps > 1e-6))
    points, s = points[keep], np.concatenate(([0.0], np.cumsum(steps[steps > 1e-6])))
    at = np.arange(0, s[-1], 0.25)
    places = np.stack((np.interp(at, s, points[:, 0]), np.interp(at, s, points[:, 1])), 1)
    heading = np.unwrap(np.arctan2(*np.gradient(places, axis=0).T[::-1]))
    wide = np.pad(heading, 4, mode="edge")
    heading = np.convolve(wide, np.ones(9) / 9, mode="valid")
    bend = np.abs(np.gradient(heading)) / 0.25
    allowed = np.minimum(top_speed, np.sqrt(2.5 / np.maximum(bend, 1e-4)))
    for i in range(len(allowed) - 2, -1, -1):  # slow down before a bend, at 2 m/s²
        allowed[i] = min(allowed[i], np.sqrt(allowed[i + 1] ** 2 + 2 * 2.0 * 0.25))
    return Path(places, heading, allowed)


def lane_points(road: Road, direction: int, u: float, s_from: float, s_to: float) -> Array:
    return road.at(np.linspace(s_from, s_to, max(2, int(abs(s_to - s_from) / 0.5))), u)[0] if direction * (s_to - s_from) > 0 else np.zeros((0, 2))


def turn_points(before: Array, after: Array) -> Array:
    """A quadratic Bezier curve from the end of one polyline to the start of another, tangent to both."""
    p, q = before[-1], after[0]
    d, e = before[-1] - before[-2], after[1] - after[0]
    d, e = d / np.linalg.norm(d), e / np.linalg.norm(e)
    cross = d[0] * e[1] - d[1] * e[0]
    reach = ((q - p)[0] * e[1] - (q - p)[1] * e[0]) / cross if abs(cross) > 0.2 else np.linalg.norm(q - p) / 2
    corner = p + d * np.clip(reach, 0.5, 25.0)
    t = np.linspace(0, 1, 40)[:, None]
    return np.asarray((1 - t) ** 2 * p + 2 * t * (1 - t) * corner + t**2 * q)


@dataclass(frozen=True, eq=False)
class Actor:
    """One road user: what it is, and where it is at every GRID_S from -BEFORE_S on: middle on the ground x, y, z (T,), yaw, pitch
    (nose up), speed."""

    track: str
    kind: str
    size: tuple[float, float, float]
    number: int
    rgb: tuple[float, float, float]
    x: Array
    y: Array
    yaw: Array
    speed: Array
    z: Array
    pitch: Array

    def at(self, times_s: Array | float) -> tuple[Array, Array, Array, Array, Array, Array]:
        """x, y, z, yaw, pitch, speed at times (N,)."""
        grid = -BEFORE_S + np.arange(len(self.x)) * GRID_S
        values = [np.interp(times_s, grid, v) for v in (self.x, self.y, self.z, self.yaw, self.pitch, self.speed)]
        return values[0], values[1], values[2], values[3], values[4], values[5]

    @property
    def rects(self) -> Array:
        """(T,5) of its outline on the ground."""
        n = len(self.x)
        return np.stack((self.x, self.y, self.yaw, np.full(n, self.size[0]), np.full(n, self.size[1])), 1)


@dataclass(frozen=True, eq=False)
class Traffic:
    """Actors, and the ego vehicle: times_s (T,), world_from_ego (T,4,4), its forward speed (T,)."""

    actors: tuple[Actor, ...]
    times_s: Array
    world_from_ego: Array
    speed: Array


@dataclass(frozen=True, eq=False)
class _Trip:
    kind: str
    size: tuple[float, float, float]
    path: Path
    start: float
    speed: float
    wish: float
    stop: float | None = None


@dataclass(frozen=True)
class _Stream:
    """Dense traffic of one direction in one lane. speed: of those who move freely (0: all stand); wave: by what share it varies over
    `length_m`, with its phase; queue_m: where along the direction of travel a queue's rear is (infinite: nowhere) and how fast that moves;
    halts: whether the first of the lane stops; density of Street."""

    speed: float
    wave: float
    length_m: float
    phase: float
    queue_m: float
    queue_speed: float
    halts: bool
    density: float

    def at(self, s: float) -> float:
        """Speed at s, metres along the direction of travel from the origin; towards the queue it falls by 1.6 m/s²."""
        free = self.speed * (1 + self.wave * np.sin(2 * np.pi * s / self.length_m + self.phase))
        return float(min(free, np.sqrt(self.queue_speed**2 + 2 * 1.6 * max(0.0, self.queue_m - s))))


# acceleration, comfortable braking, hardest braking (m/s²), time gap (s), standing gap (m)
_DRIVERS = {
    "car": (1.8, 2.6, 7.5, 1.1, 2.2),
    "van": (1.6, 2.4, 7.0, 1.2, 2.4),
    "truck": (1.1, 2.0, 6.0, 1.5, 3.0),
    "cyclist": (1.0, 2.0, 4.5, 0.9, 1.2),
    "pedestrian": (1.2, 2.0, 3.0, 0.5, 0.7),
}


def _go(trip: _Trip, front: float, taken: Array, count: int) -> tuple[Array, Array]:
    """Positions and speeds (T,) at GRID_S of a trip among rectangles taken (A, count, 5) given at PLAN_S."""
    faster, softer, hardest, gap_s, gap_m = _DRIVERS[trip.kind]
    s, v = trip.start, trip.speed
    half = trip.size[1] / 2 + (0.25 if trip.kind == "pedestrian" else 0.35)
    end = min(trip.path.length - 0.5, trip.stop if trip.stop is not None else np.inf) - front
    positions, speeds = [s], [v]
    for k in range(count - 1):
        allowed = min(trip.wish, float(trip.path.allowed[min(int(s / 0.25), len(trip.path.allowed) - 1)]))
        gap = end - s
        closing = v
        if len(taken):
            ahead = s + front + np.arange(0.1, min(8 + 3.2 * v, 70.0), 0.5)
            ahead = ahead[ahead < trip.path.length]
            places, heading = trip.path.at(ahead)
            here = float(trip.path.at(s)[1])
            crossing = np.cos(taken[:, k, 2] - here) < 0.8
            now = taken[:, k]
            later = [taken[crossing, min(k + n, count - 1)] for n in (5, 10, 16)]
            rects = np.concatenate([now, *later])
            near = np.hypot(rects[:, 0] - places[:1, 0], rects[:, 1] - places[:1, 1]) < (ahead[-1] - ahead[0] if len(ahead) else 0) + 8
            if near.any() and len(ahead):
                rects = rects[near]
                dx, dy = places[:, None, 0] - rects[:, 0], places[:, None, 1] - rects[:, 1]
                c, sn = np.cos(rects[:, 2]), np.sin(rects[:, 2])
                inside = (np.abs(dx * c + dy * sn) < rects[:, 3] / 2 + half) & (np.abs(-dx * sn + dy * c) < rects[:, 4] / 2 + half)
                hit = inside.any(1)
                if hit.any():
                    first = int(np.argmax(hit))
                    blocked = float(ahead[first] - s - front)
                    if blocked < gap:
                        gap = blocked
                        of = int(np.argmax(inside[first]))
                        was = np.flatnonzero(near)[of]
                        closing = v - _speed_along(taken, was, k, float(heading[first])) if was < len(now) else v
        wanted = gap_m + max(0.0, v * gap_s + v * closing / (2 * np.sqrt(faster * softer)))
        a = faster * (1 - (v / max(allowed, 0.1)) ** 4 - (wanted / max(gap, 0.05)) ** 2)
        a = float(np.clip(a, -hardest, faster))
        fresh = max(0.0, v + a * PLAN_S)
        s += (v + fresh) / 2 * PLAN_S
        v = fresh
        positions.append(s)
        speeds.append(v)
    from scipy.interpolate import CubicHermiteSpline

    plan = np.arange(count) * PLAN_S
    curve = CubicHermiteSpline(plan, positions, speeds)
    fine = np.arange(round((count - 1) * PLAN_S / GRID_S) + 1) * GRID_S
    return np.maximum.accumulate(curve(fine)), np.maximum(curve(fine, 1), 0.0)


def _speed_along(taken: Array, of: int, k: int, heading: float) -> float:
    a, b = taken[of, max(k - 1, 0)], taken[of, min(k + 1, taken.shape[1] - 1)]
    span = (min(k + 1, taken.shape[1] - 1) - max(k - 1, 0)) * PLAN_S
    return float(((b[0] - a[0]) * np.cos(heading) + (b[1] - a[1]) * np.sin(heading)) / max(span, PLAN_S))


def drive(street: Street, seconds: float) -> tuple[Street, Traffic]:
    """The traffic of a street for `seconds`, and the street without the things that the ego vehicle would have driven over."""
    return _Planner(street, seconds).plan()


class _Planner:
    def __init__(self, street: Street, seconds: float) -> None:
        self.street = street
        self.seconds = seconds
        self.rng = np.random.default_rng([street.seed, 2])
        self.plan_count = int(np.ceil((seconds + 2 * BEFORE_S) / PLAN_S)) + 1
        self.fine = -BEFORE_S + np.arange(round((self.plan_count - 1) * PLAN_S / GRID_S) + 1) * GRID_S
        self.main = street.roads[0]
        self.accepted: list[tuple[_Trip, Array, Array]] = []  # trip, rects (T,5), speed (T,)
        self.ego: tuple[Array, Array] | None = None
        self.top = max(22.0, 1.2 * self.main.speed)
        if street.density:
            self.streams = {1: self._streams(street.density[0]), -1: self._streams(street.density[1])}

    def plan(self) -> tuple[Street, Traffic]:
        self.things = np.array([t.rect for t in self.street.things]).reshape(-1, 5)
        ego = self._ego_trip()
        self.route = ego
        self.cruise = max(ego.speed, 0.6 * ego.wish)
        rects, speed = self._follow(ego, shift=1.2)
        self.things = self.things[~self._crushed(rects)]
        for make in self._before_ego():
            self._try(make)
        for _ in range(len(self.accepted) + 1):
            rects, speed = self._follow(ego, shift=1.2)
            clash = [i for i, (_, other, _) in enumerate(self.accepted) if rect_overlap(rects, other, 0.3).any()]
            if not clash:
                break
            del self.accepted[clash[0]]
        kept = ~self._crushed(rects) if len(self.street.things) else np.zeros(0, bool)
        self.street = replace(self.street, things=tuple(t for t, k in zip(self.street.things, kept, strict=True) if k))
        self.things = np.array([t.rect for t in self.street.things]).reshape(-1, 5)
        self.ego = (rects, speed)
        for make in self._after_ego():
            self._try(make)
        actors = self._actors()
        return self.street, Traffic(actors, self.fine, self._ego_poses(rects, speed), speed)

    def _crushed(self, rects: Array) -> Array:
        """Which of the street's things (N,) the ego vehicle would touch on its way rects (T,5)."""
        things = np.array([t.rect for t in self.street.things]).reshape(-1, 5)
        return np.asarray(rect_overlap(things[:, None], rects[None, ::5], 0.35).any(1))

    def _taken(self) -> Array:
        """Rectangles (A, plan_count, 5) of everybody planned so far."""
        every = round(PLAN_S / GRID_S)
        all_rects = [rects[::every] for _, rects, _ in self.accepted]
        if self.ego is not None:
            all_rects.append(self.ego[0][::every])
        return np.stack(all_rects) if all_rects else np.zeros((0, self.plan_count, 5))

    def _follow(self, trip: _Trip, shift: float = 0.0) -> tuple[Array, Array]:
        """Outline (T,5) and speed (T,) over a trip; the outline's middle lies `shift` ahead of the point that follows the path."""
        s, v = _go(trip, trip.size[0] / 2 + shift, self._taken(), self.plan_count)
        places, heading = trip.path.at(s)
        middle = places + shift * np.stack((np.cos(heading), np.sin(heading)), 1)
        n = len(s)
        return np.stack((middle[:, 0], middle[:, 1], heading, np.full(n, trip.size[0]), np.full(n, trip.size[1])), 1), v

    def _try(self, make: Any) -> None:
        for _ in range(4):
            trip = make()
            if trip is None or trip.start + trip.size[0] > trip.path.length:
                continue
            rects, speed = self._follow(trip)
            if self._free(rects):
                self.accepted.append((trip, rects, speed))
                return

    def _free(self, rects: Array) -> bool:
        if self.ego is not None and rect_overlap(rects, self.ego[0], 0.3).any():
            return False
        if any(rect_overlap(rects, other, CLEARANCE_M).any() for _, other, _ in self.accepted):
            return False
        if len(self.things):
            low, high = rects[:, :2].min(0), rects[:, :2].max(0)
            reach = np.hypot(self.things[:, 3], self.things[:, 4]) / 2 + float(np.hypot(rects[0, 3], rects[0, 4])) / 2 + 0.5
            near = ((self.things[:, :2] > low - reach[:, None]) & (self.things[:, :2] < high + reach[:, None])).all(1)
            if near.any() and rect_overlap(self.things[near][:, None], rects[None, ::2], 0.08).any():
                return False
        return True

    # --- trips -------------------------------------------------------------------------------------------------------------

    def _ego_trip(self) -> _Trip:
        rng, road = self.rng, self.main
        wish = road.speed * rng.uniform(0.8, 1.15)
        draw = rng.random()
        speed = 0.0 if draw < 0.12 else rng.uniform(1.5, 0.6 * wish) if draw < 0.35 else wish * rng.uniform(0.75, 1.0)
        lane = int(rng.integers(road.lanes))
        u = road.lane_offset(1, lane)
        if self.street.density:
            self.lane, speed = lane, self.streams[1][lane].at(0.0)
            wish = max(speed, self.streams[1][lane].speed) * rng.uniform(0.95, 1.2)
        reach = max(speed, 3.0) * self.seconds + 5
        turnable = [j for j in self.street.junctions if 20 < j.s < 12 + 0.8 * reach]
        points = lane_points(road, 1, u, -20.0, road.stop + (BEYOND_M if self.street.density else 0.0))
        if turnable and rng.random() < 0.6:
            junction = turnable[0]
            points = self._turn(junction, u, bool(rng.random() < 0.5) if junction.left and junction.right else junction.left)
        path = path_through(points, self.top)
        speed = min(speed, float(path.allowed[80]))
        stop = 20.0 + EGO_BOX[3] if self.street.density and self.streams[1][lane].speed == 0.0 else None
        lines = [20.0 + j.s - self.street.roads[j.road].half_width - 2.0 for j in self.street.junctions]
        near = [line for line in lines if 20.0 + speed**2 / 5 + 6 < line < 20.0 + reach]
        if near and rng.random() < 0.2:  # waits at the junction's line
            stop = near[0]
        return _Trip("car", (EGO_BOX[3] - EGO_BOX[0], EGO_BOX[4] - EGO_BOX[1], 1.6), path, 20.0, speed, wish, stop)

    def _turn(self, junction: Junction, u: float, left: bool) -> Array:
        """From the main road's lane at u (going along it) into the arm of a junction."""
        side = self.street.roads[junction.road]
        direction = 1 if left else -1
        before = lane_points(self.main, 1, u, -20.0, junction.s - side.half_width - 4.5)
        out = side.lane_offset(direction, 0)
        after = lane_points(side, direction, out, direction * (self.main.half_width + 4.5), side.end(direction))
        if not (len(before) and len(after)):
            return lane_points(self.main, 1, u, -20.0, self.main.stop)
        return np.concatenate((before, turn_points(before, after), after))

    def _vehicle(self) -> tuple[str, tuple[float, float, float]]:
        kind = str(self.rng.choice(("car", "van", "truck"), p=(0.80, 0.13, 0.07)))
        return kind, vehicle_size(self.rng, kind)

    def _on_main(self, direction: int, s: float, speed: float | None = None, wish: float | None = None) -> _Trip | None:
        rng, road = self.rng, self.main
        kind, size = self._vehicle()
        lane = int(rng.integers(road.lanes))
        if not road.start + 8 < s < road.stop - 8:
            return None
        points = lane_points(road, direction, road.lane_offset(direction, lane), s, road.end(direction))
        if len(points) < 2:
            return None
        wish = road.speed * rng.uniform(0.75, 1.15) if wish is None else wish
        return _Trip(kind, size, path_through(points, 22.0), size[0] / 2, wish * rng.uniform(0.6, 1.0) if speed is None else speed, wish)

    def _streams(self, density: float) -> tuple[_Stream, ...]:
        """Dense traffic of each lane of one direction of the main road, the lane beside the median first."""
        rng, lanes = self.rng, self.main.lanes
        jam = float(np.clip((density - 0.45) / 0.5, 0, 1))
        flow = self.main.speed * (1 - 0.25 * density) * (1 - jam) + rng.uniform(0.3, 4.0) * jam
        queue = rng.uniform(12, 70) + 2.0 * flow if density > 0.2 and rng.random() < 0.35 else np.inf
        standing, halts = rng.random() < 0.5, rng.random() < 0.25 + 0.25 * density
        streams = []
        for lane in range(lanes):
            faster = 1 + 0.10 * ((lanes - 1) / 2 - lane) + rng.normal(0, 0.03 + 0.15 * jam)
            speed = 0.0 if rng.random() < 0.3 * jam else flow * max(faster, 0.3)
            wave, phase = rng.uniform(0.0, 0.08) + rng.uniform(0.2, 0.8) * jam, rng.uniform(0, 2 * np.pi)
            crawl = 0.0 if standing else float(rng.uniform(0.5, 6.0))
            streams.append(_Stream(speed, wave, rng.uniform(60, 140), phase, queue + rng.normal(0, 8), crawl, bool(halts), density))
        return tuple(streams)

    def _in_stream(self, direction: int, lane: int, behind_ego: bool | None = None) -> list[Any]:
        """Who drives in a lane, from the front to the rear; of the ego's lane those ahead of it or behind it."""
        rng, road, stream = self.rng, self.main, self.streams[direction][lane]
        trucks = ((0.52, 0.15, 0.33) if lane == road.lanes - 1 else (0.80, 0.13, 0.07)) if road.median else (0.78, 0.14, 0.08)
        far = STREAM_M if direction > 0 else STREAM_M + 1.3 * self.cruise * self.seconds
        most = STREAM_COUNT[direction < 0] * (1 if direction > 0 else 1 + self.seconds / 25) / road.lanes

        def follow(s: float, way: int, share: float) -> list[tuple[float, str, Any]]:
            """Vehicles from s on, ahead (way 1) or behind (-1), s in the direction of travel."""
            found: list[tuple[float, str, Any]] = []
            while abs(s) < far and len(found) < share * most:
                kind = str(rng.choice(("car", "van", "truck"), p=trucks))
                size = vehicle_size(rng, "trailer" if kind == "truck" and road.median and rng.random() < 0.5 else kind)
                found.append((s + way * size[0] / 2, kind, size))
                time_gap = 0.8 + rng.exponential(0.4 + 6.0 * (1 - stream.density) ** 3)
                s += way * (size[0] + 2.6 + rng.exponential(0.8) + time_gap * max(stream.at(s), 0.3))
            return found

        ahead: list[tuple[float, str, Any]] = []
        behind: list[tuple[float, str, Any]] = []
        if direction < 0:  # from those who are past the ego on
            behind = follow(rng.uniform(10, 50), -1, 1.0)
        elif behind_ego is None:  # somebody is near, often beside it
            first = rng.uniform(-9, 7) if rng.random() < 0.7 else rng.uniform(-60, 60)
            ahead, behind = follow(first, 1, 0.6), follow(first - 2.6 - max(stream.at(first), 0.3) * rng.uniform(0.8, 2.0), -1, 0.4)
        else:
            gap = 2.6 + rng.exponential(0.8) + self.route.speed * (0.7 + rng.exponential(0.3 + 3.0 * (1 - stream.density) ** 3))
            ahead, behind = ([], follow(-1.2 - gap, -1, 0.4)) if behind_ego else (follow(3.6 + gap, 1, 0.6), [])
        row = [*ahead[::-1], *behind]
        return [partial(self._streaming, direction, lane, *who, leads=i == 0 and not behind_ego) for i, who in enumerate(row)]

    def _streaming(self, direction: int, lane: int, s: float, kind: str, size: tuple[float, float, float], leads: bool) -> _Trip | None:
        """One vehicle of a stream, its middle at s along its direction; the first of a lane may stop, or crawl as the queue before it does."""
        rng, road, stream = self.rng, self.main, self.streams[direction][lane]
        aside = max(0.0, road.lane_width - 2.9) / 2
        u = road.lane_offset(direction, lane) + float(np.clip(rng.normal(0, 0.12), -aside, aside))
        start = size[0] / 2 + 0.5
        s, speed = s - rng.uniform(0, 0.3), stream.at(s)
        if not road.start < direction * s < road.stop:
            return None
        reach = self.top * (self.seconds + 1) + BEYOND_M
        path = path_through(lane_points(road, direction, u, direction * (s - start), direction * (s - start + reach)), self.top)
        speed = min(speed * rng.uniform(0.96, 1.04), float(path.allowed[int(start / 0.25)]))
        wish, stop = max(1.0, speed, stream.speed * (1 + stream.wave)) * rng.uniform(0.97, 1.15), None
        if stream.speed == 0.0:
            stop = start + size[0] / 2
        elif leads and s > stream.queue_m - 10:
            wish = max(stream.queue_speed, 0.1)
            stop = start + size[0] / 2 + speed**2 / 4 + 0.5 if stream.queue_speed == 0.0 else None
        elif leads and stream.halts:
            stop = start + size[0] / 2 + speed**2 / 5 + rng.uniform(2, 40)
        elif leads:
            wish = max(1.0, speed * rng.uniform(0.8, 1.1))
        return _Trip(kind, size, path, start, speed, wish, stop)

    def _lead(self) -> _Trip | None:
        """Ahead of the ego on its own way, at times slow, at times braking to a stop."""
        rng = self.rng
        kind, size = self._vehicle()
        gap = rng.uniform(6, 12) + self.cruise * rng.uniform(0.6, 2.5)
        start = 20.0 + 3.6 + gap + size[0] / 2
        wish = self.route.wish * rng.uniform(0.5, 1.05)
        speed = min(self.route.speed * rng.uniform(0.7, 1.1), wish) if rng.random() < 0.8 else 0.0
        stop = start + speed**2 / 4 + rng.uniform(8, 40) if rng.random() < 0.3 else None
        allowed = float(self.route.path.allowed[min(int(start / 0.25), len(self.route.path.allowed) - 1)])
        return _Trip(kind, size, self.route.path, start, min(speed, allowed), wish, stop)

    def _behind(self) -> _Trip | None:
        kind, size = self._vehicle()
        start = 20.0 - 1.2 - size[0] / 2 - self.rng.uniform(5, 9)
        return _Trip(kind, size, self.route.path, max(start, size[0] / 2), self.route.speed * self.rng.uniform(0.8, 1.0), self.route.wish * 1.05)

    def _oncoming(self) -> _Trip | None:
        return self._on_main(-1, self.rng.uniform(-30, 30 + 2.0 * self.cruise * self.seconds + 40))

    def _same_way(self) -> _Trip | None:
        return self._on_main(1, self.rng.choice((self.rng.uniform(-80, -15), self.rng.uniform(25, 100))))

    def _crosser(self) -> _Trip | None:
        """From a side road over the main one or into it, about when the ego gets there."""
        rng = self.rng
        ahead = [j for j in self.street.junctions if 12 < j.s < 40 + self.cruise * (self.seconds + 1)]
        if not ahead:
            return None
        junction = ahead[int(rng.integers(len(ahead)))]
        side = self.street.roads[junction.road]
        arms = [d for d, there in ((1, junction.right), (-1, junction.left)) if there]  # the direction of those who come from there
        direction = int(rng.choice(arms))
        speed = side.speed * rng.uniform(0.6, 1.1)
        when = (junction.s / max(self.cruise, 2.0)) * rng.uniform(0.2, 0.95)
        back = float(np.clip(speed * min(when, self.seconds * 0.8), 9, 70))
        kind, size = self._vehicle() if rng.random() < 0.8 else ("cyclist", vehicle_size(rng, "cyclist"))
        speed = min(speed, 6.0) if kind == "cyclist" else speed
        u = side.lane_offset(direction, 0)
        through = junction.left and junction.right
        if through and rng.random() < 0.65:
            points = lane_points(side, direction, u, -direction * back, side.end(direction))
        else:
            onto = int(rng.choice((-1, 1)))
            gap = self.main.half_width + 4.5
            if back < gap + 2:
                return None
            before = lane_points(side, direction, u, -direction * back, -direction * gap)
            first = junction.s + onto * (side.half_width + 4.5)
            after = lane_points(self.main, onto, self.main.lane_offset(onto, self.main.lanes - 1), first, self.main.end(onto))
            if len(before) < 2 or len(after) < 2:
                return None
            points = np.concatenate((before, turn_points(before, after), after))
        path = path_through(points, 16.0)
        return _Trip(kind, size, path, size[0] / 2, min(speed, float(path.allowed[0])), speed * 1.1)

    def _on_side(self) -> _Trip | None:
        """Along a side road, away from the main one."""
        rng = self.rng
        if not self.street.junctions:
            return None
        junction = self.street.junctions[int(rng.integers(len(self.street.junctions)))]
        side = self.street.roads[junction.road]
        direction = int(rng.choice([d for d, there in ((1, junction.left), (-1, junction.right)) if there]))
        kind, size = self._vehicle()
        points = lane_points(side, direction, side.lane_offset(direction, 0), direction * rng.uniform(12, 60), side.end(direction))
        speed = side.speed * rng.uniform(0.4, 1.0)
        return _Trip(kind, size, path_through(points, 14.0), size[0] / 2, speed, side.speed) if len(points) > 20 else None

    def _turning_off(self) -> _Trip | None:
        """Oncoming, and turns into a side road."""
        rng = self.rng
        ahead = [j for j in self.street.junctions if 10 < j.s < 60 + self.cruise * self.seconds]
        if not ahead:
            return None
        junction = ahead[int(rng.integers(len(ahead)))]
        side = self.street.roads[junction.road]
        direction = int(rng.choice([d for d, there in ((1, junction.left), (-1, junction.right)) if there]))
        gap = side.half_width + 4.5
        start = junction.s + gap + rng.uniform(4, 25)
        before = lane_points(self.main, -1, self.main.lane_offset(-1, 0), start, junction.s + gap)
        after = lane_points(side, direction, side.lane_offset(direction, 0), direction * (self.main.half_width + 4.5), side.end(direction))
        if len(before) < 2 or len(after) < 2:
            return None
        kind, size = self._vehicle()
        path = path_through(np.concatenate((before, turn_points(before, after), after)), 14.0)
        return _Trip(kind, size, path, size[0] / 2, min(self.main.speed * rng.uniform(0.3, 0.9), float(path.allowed[0])), self.main.speed)

    def _rider(self) -> _Trip | None:
        """A cyclist at the right of a lane of the main road."""
        rng, road = self.rng, self.main
        direction = int(rng.choice((-1, 1)))
        u = -direction * (road.lane_width * road.lanes - 0.55)
        s = rng.uniform(-40, 50 + self.cruise * self.seconds)
        points = lane_points(road, direction, u, s, road.end(direction))
        size = vehicle_size(rng, "cyclist")
        wish = rng.uniform(3.0, 7.0)
        return _Trip("cyclist", size, path_through(points, 8.0), size[0] / 2, wish * rng.uniform(0.7, 1.0), wish) if len(points) > 20 else None

    def _walker(self) -> _Trip | None:
        """Along a pavement, or standing on it."""
        rng = self.rng
        road = self.main if rng.random() < 0.75 or len(self.street.roads) == 1 else self.street.roads[int(rng.integers(1, len(self.street.roads)))]
        side, direction = int(rng.choice((-1, 1))), int(rng.choice((-1, 1)))
        u = side * (road.half_width + rng.uniform(0.9, max(1.0, road.sidewalk - 0.4)))
        low, high = (-25, 60 + self.cruise * self.seconds) if road is self.main else (road.start + 20, road.stop - 20)
        s = rng.uniform(max(low, road.start + 10), min(high, road.stop - 10)) if high > low + 1 else 0.0
        points = lane_points(road, direction, u, s, s + direction * (4.0 + 2.2 * (self.seconds + 1)))
        wish = rng.uniform(0.8, 1.9) if rng.random() < 0.85 else 0.05
        size = vehicle_size(rng, "pedestrian")
        return _Trip("pedestrian", size, path_through(points, 3.0), size[0] / 2, wish * rng.uniform(0.6, 1.0), wish)

    def _walks_over(self) -> _Trip | None:
        """Over the main road ahead of the ego, from one pavement to the other."""
        rng, road = self.rng, self.main
        nearest = 6.0 + self.route.speed**2 / 5.0
        s = rng.uniform(nearest, nearest + 12 + self.cruise * self.seconds)
        side = int(rng.choice((-1, 1)))
        edge = road.half_width + 1.2
        across = np.linspace(side * (edge + 1.0), -side * (edge + 12.0), 60)
        slant = rng.normal(0, 0.12)
        points = np.stack([road.at(s + slant * u, u)[0] for u in across])
        wish = rng.uniform(0.9, 2.4)
        size = vehicle_size(rng, "pedestrian")
        start = size[0] / 2 + (rng.uniform(0, edge * 1.6) if rng.random() < 0.7 else 0.0)
        return _Trip("pedestrian", size, path_through(points, 3.0), start, wish * rng.uniform(0.7, 1.0), wish, stop=2 * edge + 1.5)

    def _before_ego(self) -> list[Any]:
        rng = self.rng
        chosen: list[Any] = []
        if self.street.density:
            if self.street.junctions:
                chosen += [self._walks_over] * int(rng.random() < 0.2) + [self._crosser] * int(rng.random() < 0.2)
            return chosen + self._in_stream(1, self.lane, behind_ego=False)
        if rng.random() < 0.55:
            chosen.append(self._lead)
        if rng.random() < 0.40:
            chosen.append(self._walks_over)
        if rng.random() < 0.45:
            chosen.append(self._crosser)
        if rng.random() < 0.20:
            chosen.append(self._rider)
        return chosen

    def _after_ego(self) -> list[Any]:
        rng = self.rng
        busy = rng.uniform(0.6, 1.5) * (1 + self.seconds / 25)
        mean = {
            self._oncoming: 2.6, self._same_way: 1.6, self._crosser: 1.6, self._turning_off: 0.6, self._on_side: 1.2, self._rider: 1.0,
            self._walker: 5.0, self._walks_over: 0.8,
        }  # fmt: skip
        chosen: list[Any] = [self._oncoming, self._crosser]
        if self.street.density:
            chosen = self._in_stream(1, self.lane, behind_ego=True)
            for direction in (1, -1):
                for lane in (lane for lane in range(self.main.lanes) if direction < 0 or lane != self.lane):
                    chosen += self._in_stream(direction, lane)
            mean = {} if self.main.median else {m: e for m, e in mean.items() if m not in (self._oncoming, self._same_way)}
        for make, expected in mean.items():
            chosen += [make] * int(rng.poisson(expected * busy))
        if not self.street.density and rng.random() < 0.4:
            chosen.append(self._behind)
        return chosen

    # --- poses -------------------------------------------------------------------------------------------------------------

    def _smooth(self, values: Array) -> Array:
        """A running mean over 0.3 s along the last axis: what springs and tyres do to kerbs."""
        wide = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(8, 8)], mode="edge")
        total = np.cumsum(np.concatenate((np.zeros((*values.shape[:-1], 1)), wide), -1), -1)
        return np.asarray((total[..., 17:] - total[..., :-17]) / 17)

    def _actors(self) -> tuple[Actor, ...]:
        if not self.accepted:
            return ()
        rects = np.stack([r for _, r, _ in self.accepted])
        ahead = 0.32 * rects[..., 3]
        forward = np.stack((np.cos(rects[..., 2]), np.sin(rects[..., 2])), -1) * ahead[..., None]
        every = 5
        points = np.stack((rects[:, ::every, :2] + forward[:, ::every], rects[:, ::every, :2] - forward[:, ::every]))
        heights = self.street.height(points.reshape(-1, 2)).reshape(points.shape[:-1])
        fine = np.arange(rects.shape[1])
        both = np.stack([[np.interp(fine, fine[::every], row) for row in end] for end in heights])
        front, rear = self._smooth(both)
        actors = []
        for i, (trip, r, speed) in enumerate(self.accepted):
            if trip.kind in ("cyclist", "pedestrian"):
                rgb = tuple(float(c) for c in self.rng.uniform(0.08, 0.85, 3))
            else:
                rgb = CAR_PAINTS[int(self.rng.integers(len(CAR_PAINTS)))]
            pitch = np.zeros(len(speed)) if trip.kind == "pedestrian" else np.arctan2(front[i] - rear[i], 2 * ahead[i])
            paint = (rgb[0], rgb[1], rgb[2])
            actors.append(
                Actor(f"{trip.kind}-{i:03d}", trip.kind, trip.size, i, paint, r[:, 0], r[:, 1], r[:, 2], speed, (front[i] + rear[i]) / 2, pitch)
            )
        return tuple(actors)

    def _ego_poses(self, rects: Array, speed: Array) -> Array:
        """world_from_ego (T,4,4): on its wheels on the ground, leaning with braking and shaking a little with the road."""
        yaw = rects[:, 2]
        forward, left = np.stack((np.cos(yaw), np.sin(yaw)), 1), np.stack((-np.sin(yaw), np.cos(yaw)), 1)
        origin = rects[:, :2] - 1.2 * forward
        wheels = np.stack([origin + 2.7 * forward, origin, origin + 1.35 * forward + 0.8 * left, origin + 1.35 * forward - 0.8 * left])
        front, rear, port, starboard = self._smooth(self.street.height(wheels.reshape(-1, 2)).reshape(4, -1))
        phase, hz = self.rng.uniform(0, 2 * np.pi, 6), self.rng.uniform(0.7, 2.6, 6)
        shake = np.sin(2 * np.pi * hz[:, None] * self.fine + phase[:, None]) * np.clip(speed / 8, 0.05, 1.0)
        braking = self._smooth(np.gradient(speed, GRID_S))
        pitch = np.arctan2(front - rear, 2.7) + 0.004 * np.clip(braking, -6, 3) / 3 + 0.0008 * (shake[0] + shake[1])
        roll = np.arctan2(port - starboard, 1.6) + 0.0008 * (shake[2] + shake[3])
        height = rear + EGO_HEIGHT_M + 0.003 * (shake[4] + shake[5])
        poses = np.tile(np.eye(4), (len(yaw), 1, 1))
        poses[:, :3, :3] = rotations(yaw, pitch, roll)
        poses[:, :2, 3], poses[:, 2, 3] = origin, height
        return poses


def rotations(yaw: Array, pitch: Array, roll: Array) -> Array:
    """(N,3,3) world_from_body of yaw (left), pitch (nose up) and roll (left side up), (N,) each, applied in this order from outside."""
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    x = np.stack((cy * cp, sy * cp, sp), -1)
    side = np.stack((-sy, cy, np.zeros_like(cy)), -1)
    up = np.cross(x, side)
    y = side * cr[..., None] + up * sr[..., None]
    return np.stack((x, y, np.cross(x, y)), -1)


def parked(street: Street) -> tuple[Thing, ...]:
    """The things that are labelled with boxes: vehicles standing at the kerb or in a drive."""
    return tuple(t for t in street.things if t.kind in MOVERS)
