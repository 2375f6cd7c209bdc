"""A street, drawn from a seed: roads with crossings, the ground they lie on, and what stands beside them.

World frame: x east, y north, z up, metres; the main road begins in the west and passes the origin. Positions on a road are (s, u): arc
length along the centre line and lateral offset, positive to the left. Traffic keeps to the right.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Triple = tuple[float, float, float]

STEP_M = 1.0
KERB_M = 0.12
REACH_M = 115.0
PARKING_M = 2.2


@dataclass(frozen=True)
class Style:
    """Ranges that the streets of one kind are drawn from."""

    lanes: tuple[int, ...]
    lane: tuple[float, float]
    parking: float
    sidewalk: tuple[float, float]
    setback: tuple[float, float]
    storeys: tuple[int, int]
    gap: tuple[float, float]
    gap_share: float
    frontage: tuple[float, float]
    street_trees: float
    garden: float
    speed: tuple[float, float]
    radius: float


STYLES = {
    "residential": Style((1,), (2.8, 3.4), 0.70, (1.6, 3.0), (0.5, 9.0), (1, 3), (3.0, 14.0), 0.55, (8, 16), 0.45, 0.8, (6, 12), 60),
    "urban": Style((1, 1, 2), (3.0, 3.5), 0.80, (2.5, 5.5), (0.0, 2.5), (3, 6), (4.0, 16.0), 0.20, (10, 26), 0.55, 0.15, (7, 14), 60),
    "suburban": Style((1,), (2.9, 3.5), 0.35, (1.6, 2.8), (5.0, 16.0), (1, 3), (5.0, 26.0), 0.65, (9, 18), 0.35, 1.0, (8, 15), 60),
    "arterial": Style((1, 2, 2), (3.2, 3.7), 0.25, (2.0, 4.5), (3.0, 16.0), (2, 6), (6.0, 30.0), 0.50, (14, 40), 0.75, 0.5, (11, 20), 130),
    "trunk": Style((2, 2, 3), (3.3, 3.75), 0.0, (0.0, 0.0), (0, 0), (1, 4), (0, 0), 0.0, (14, 40), 0.0, 0.0, (16, 30), 300),
}
SHARES = {"residential": 0.36, "urban": 0.26, "suburban": 0.22, "arterial": 0.16}
# Trunk roads, and dense traffic on the other roads that have it, are drawn by a generator of their own.
TRUNK_SHARE = 0.2
RUSH_SHARE = 0.25
# What trunk roads need beyond the others: room for the speeds there, and sight to all sides that ends before the road does.
TRUNK_FASTER = 1.6
TRUNK_REACH_M = 175.0
# what stands between the directions of a trunk road, and how wide that strip is
MEDIANS = {"rail": (1.6, 4.0), "barrier": (1.4, 2.6), "hedge": (2.6, 5.0), "grass": (4.0, 9.0)}
BANK_M = (2.0, 14.0)


@dataclass(frozen=True, eq=False)
class Road:
    """centre (N,2) at every STEP_M of arc length from s = start on, heading (N,) rad without jumps; lanes per direction, parking strips
    (left, right), median: width of what lies between the directions; half_width reaches to the kerbs."""

    centre: Array
    heading: Array
    start: float
    lane_width: float
    lanes: int
    parking: tuple[bool, bool]
    sidewalk: float
    speed: float
    shoulder: float = 0.3
    median: float = 0.0

    @property
    def half_width(self) -> float:
        return self.median / 2 + self.lane_width * self.lanes + (PARKING_M if any(self.parking) else self.shoulder)

    @property
    def stop(self) -> float:
        return self.start + (len(self.centre) - 1) * STEP_M

    def end(self, direction: int) -> float:
        """The arc length at which traffic along (+1) or against (-1) the road leaves it."""
        return self.stop if direction > 0 else self.start

    def at(self, s: Array | float, u: Array | float = 0.0) -> tuple[Array, Array]:
        """World positions (...,2) and headings (...,) at (s, u); beyond the ends straight on."""
        s = np.asarray(s, np.float64)
        known = self.start + np.arange(len(self.centre)) * STEP_M
        inside = np.clip(s, known[0], known[-1])
        heading = np.interp(inside, known, self.heading)
        c, n = np.cos(heading), np.sin(heading)
        x = np.interp(inside, known, self.centre[:, 0]) + (s - inside) * c - u * n
        y = np.interp(inside, known, self.centre[:, 1]) + (s - inside) * n + u * c
        return np.stack((x, y), -1), heading

    def lane_offset(self, direction: int, lane: int) -> float:
        """u of the middle of a lane (0 is the one beside the centre line) for traffic along (+1) or against (-1) the road."""
        return -direction * (self.median / 2 + self.lane_width * (lane + 0.5))

    @cached_property
    def bounds(self) -> tuple[Array, Array]:
        """Least and greatest x and y of the centre line."""
        return self.centre.min(0), self.centre.max(0)

    @cached_property
    def _tree(self) -> Any:
        from scipy.spatial import cKDTree

        return cKDTree(self.centre)

    def locate(self, points: Array, reach: float) -> tuple[Array, Array]:
        """(s, u) of world points (N,2); u is infinite farther than `reach` from the centre line, and the plain distance beyond the ends."""
        distance, index = self._tree.query(points, distance_upper_bound=reach)
        near = np.isfinite(distance)
        index = np.where(near, index, 0)
        h = self.heading[index]
        delta = points - self.centre[index]
        along = delta[:, 0] * np.cos(h) + delta[:, 1] * np.sin(h)
        u = -delta[:, 0] * np.sin(h) + delta[:, 1] * np.cos(h)
        beyond = np.abs(along) > STEP_M
        u = np.where(beyond, np.where(u < 0, -1.0, 1.0) * np.hypot(u, along), u)
        return self.start + index * STEP_M + along, np.where(near, u, np.inf)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_tree"}


@dataclass(frozen=True)
class Junction:
    """Where the main road's s meets another road: that road's index and s there, and whether it goes on to the left and to the right."""

    s: float
    road: int
    road_s: float
    left: bool
    right: bool


@dataclass(frozen=True)
class Thing:
    """Something that stands still on a rectangle of ground: kind (a key of scene.KINDS), centre, yaw, length, width, height, its own
    number (the seed of its mesh), colour and a kind-specific pair of numbers."""

    kind: str
    x: float
    y: float
    yaw: float
    length: float
    width: float
    height: float
    number: int
    rgb: tuple[float, float, float] = (0.6, 0.6, 0.6)
    extra: tuple[float, float] = (0.0, 0.0)

    @property
    def rect(self) -> tuple[float, float, float, float, float]:
        return (self.x, self.y, self.yaw, self.length, self.width)


@dataclass(frozen=True, eq=False)
class Street:
    """Roads (the first is the main one), junctions along it, things beside it, and the ground's waves: (K,4) of amplitude, wave vector
    (2), phase, for the land, the roads' surface and the open ground. median: a key of MEDIANS, or "" where the directions share one
    carriageway; bank: how far the land rises beside the roads (negative: falls); density: of dense traffic along the main road and
    against it, from 0 (sparse) to 1 (at a standstill), None where traffic is what it mostly is."""

    seed: int
    style: str
    roads: tuple[Road, ...]
    junctions: tuple[Junction, ...]
    slope: tuple[float, float]
    waves: tuple[Array, Array, Array]
    things: tuple[Thing, ...] = ()
    sun: tuple[float, float] = (0.7, 0.8)
    warm: float = field(default=0.5)
    median: str = ""
    bank: float = 0.0
    density: tuple[float, float] | None = None

    def edge_distance(self, points: Array, reach: float = 45.0) -> tuple[Array, Array, Array, Array, Array]:
        """For world points (N,2): distance to the nearest carriageway's edge (negative on it, large far from all), that road's index
        (-1 for none), s and u there, and on how many carriageways the point lies."""
        n = len(points)
        best, road = np.full(n, 1e3), np.full(n, -1)
        s, u, on = np.zeros(n), np.full(n, 1e3), np.zeros(n, np.int64)
        low, high = (points.min(0) - reach, points.max(0) + reach) if n else (np.zeros(2), np.zeros(2))
        for index, r in enumerate(self.roads):
            if (r.bounds[0] > high).any() or (r.bounds[1] < low).any():
                continue
            rs, ru = r.locate(points, reach)
            d = np.abs(ru) - r.half_width
            on += d < 0
            nearer = d < best
            best, road = np.where(nearer, d, best), np.where(nearer, index, road)
            s, u = np.where(nearer, rs, s), np.where(nearer, ru, u)
        return best, road, s, u, on

    def land(self, points: Array) -> Array:
        """Height (N,) of the land without roads' profile and small unevenness."""
        return points @ np.array(self.slope) + _waves(self.waves[0], points)

    def banked(self, edge: Array) -> Array:
        """By how much (N,) the banks lift the ground at these distances from a carriageway's edge."""
        t = np.clip((edge - BANK_M[0]) / (BANK_M[1] - BANK_M[0]), 0, 1)
        return np.asarray(self.bank * t * t * (3 - 2 * t))

    def height(self, points: Array) -> Array:
        """Ground height (N,) at world points (N,2): land, the carriageways' camber (2.5 %), kerbs, small unevenness."""
        return self.profile(points, self.edge_distance(points)[0])

    def profile(self, points: Array, edge: Array, kerb: float = KERB_M) -> Array:
        land = self.land(points) + _waves(self.waves[1], points)
        camber = 0.025 * np.clip(-edge, 0, 6.0)
        rough = np.clip((edge - 1.5) / 3.0, 0, 1)
        return land + np.where(edge < 0, camber, kerb) + rough * _waves(self.waves[2], points) + self.banked(edge)


def _waves(table: Array, points: Array) -> Array:
    total = np.zeros(len(points))
    for amplitude, kx, ky, phase in table:
        total += amplitude * np.sin(points[:, 0] * kx + points[:, 1] * ky + phase)
    return total


def rect_overlap(a: Array, b: Array, margin: float = 0.0) -> Array:
    """Whether rectangles a and b (...,5: x, y, yaw, length, width; broadcast together) come closer than `margin` along every one of their
    four axes (separating axes: with margin 0 exactly whether they overlap)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    dx, dy = b[..., 0] - a[..., 0], b[..., 1] - a[..., 1]
    ca, sa, cb, sb = np.cos(a[..., 2]), np.sin(a[..., 2]), np.cos(b[..., 2]), np.sin(b[..., 2])
    c, s = np.abs(ca * cb + sa * sb), np.abs(sa * cb - ca * sb)
    la, wa, lb, wb = a[..., 3] / 2, a[..., 4] / 2, b[..., 3] / 2, b[..., 4] / 2
    return np.asarray(
        (np.abs(dx * ca + dy * sa) < la + lb * c + wb * s + margin)
        & (np.abs(-dx * sa + dy * ca) < wa + lb * s + wb * c + margin)
        & (np.abs(dx * cb + dy * sb) < lb + la * c + wa * s + margin)
        & (np.abs(-dx * sb + dy * cb) < wb + la * s + wa * c + margin)
    )


def build_street(seed: int, ahead_m: float) -> Street:
    """The street of a seed, with room for `ahead_m` of driving from the origin (TRUNK_FASTER times that on a trunk road) and REACH_M
    (TRUNK_REACH_M) of sight before and beyond."""
    rng, crowd = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 9])
    name = str(rng.choice(list(SHARES), p=list(SHARES.values())))
    name = "trunk" if crowd.random() < TRUNK_SHARE else name
    rush = name == "trunk" or (name in ("urban", "arterial") and crowd.random() < RUSH_SHARE)
    density = (float(crowd.uniform(0, 1)), float(crowd.uniform(0, 1))) if rush else None
    if name == "trunk":
        return _trunk_road(seed, rng, ahead_m, density)
    style = STYLES[name]
    main = _main_road(rng, style, ahead_m, REACH_M)
    roads, junctions = _side_roads(rng, main)
    bearing, steep = rng.uniform(0, 2 * np.pi), rng.triangular(0, 0.0, 0.045)
    waves = (_draw_waves(rng, 3, (80, 260), (0.1, 0.7)), _draw_waves(rng, 3, (3, 11), (0.002, 0.007)), _draw_waves(rng, 4, (2.2, 7), (0.01, 0.045)))
    street = Street(
        seed, name, (main, *roads), junctions, (steep * np.cos(bearing), steep * np.sin(bearing)), waves,
        sun=(float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(0.5, 1.1))), warm=float(rng.random()), density=density,
    )  # fmt: skip
    furnishing = _Furnishing(street, style, rng)
    furnishing.line_streets()
    return replace(street, things=tuple(furnishing.things))


def _trunk_road(seed: int, rng: np.random.Generator, ahead_m: float, density: tuple[float, float] | None) -> Street:
    style = STYLES["trunk"]
    median = str(rng.choice(list(MEDIANS), p=(0.45, 0.25, 0.15, 0.15)))
    main = _main_road(rng, style, TRUNK_FASTER * ahead_m, TRUNK_REACH_M)
    main = replace(main, median=float(rng.uniform(*MEDIANS[median])), shoulder=float(rng.triangular(0.4, 0.6, 3.0)))
    bearing, steep = rng.uniform(0, 2 * np.pi), rng.triangular(0, 0.0, 0.03)
    waves = (_draw_waves(rng, 2, (200, 500), (0.2, 1.0)), _draw_waves(rng, 3, (4, 16), (0.001, 0.004)), _draw_waves(rng, 4, (2.2, 7), (0.01, 0.06)))
    bank = float(rng.choice((0.0, 1.0, -1.0), p=(0.35, 0.4, 0.25)) * rng.uniform(1.0, 3.5))
    street = Street(
        seed, "trunk", (main,), (), (steep * np.cos(bearing), steep * np.sin(bearing)), waves,
        sun=(float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(0.5, 1.1))), warm=float(rng.random()), median=median, bank=bank, density=density,
    )  # fmt: skip
    furnishing = _Furnishing(street, style, rng)
    furnishing.line_trunk()
    return replace(street, things=tuple(furnishing.things))


def _draw_waves(rng: np.random.Generator, count: int, length: tuple[float, float], amplitude: tuple[float, float]) -> Array:
    bearing = rng.uniform(0, 2 * np.pi, count)
    k = 2 * np.pi / rng.uniform(*length, count)
    return np.stack((rng.uniform(*amplitude, count), k * np.cos(bearing), k * np.sin(bearing), rng.uniform(0, 2 * np.pi, count)), 1)


def _line(start: Array, heading: float, curvature: Array) -> tuple[Array, Array]:
    """Centre line (N,2) and heading (N,) that leave `start` with a heading; curvature (N-1,) 1/m per step."""
    headings = heading + np.concatenate(([0.0], np.cumsum(curvature * STEP_M)))
    middle = (headings[1:] + headings[:-1]) / 2
    steps = np.stack((np.cos(middle), np.sin(middle)), 1) * STEP_M
    return np.concatenate((start[None], start + np.cumsum(steps, 0))), headings


def _main_road(rng: np.random.Generator, style: Style, ahead_m: float, reach_m: float) -> Road:
    count = int(2 * reach_m + ahead_m)
    curvature: list[float] = []
    heading = 0.0
    while len(curvature) < count:
        length = int(rng.uniform(30, 90))
        k = 0.0 if rng.random() < 0.4 else rng.uniform(0.15, 1.0) * (1 / style.radius) * rng.choice((-1, 1))
        if abs(heading + k * length) > 0.7:
            k = -np.sign(heading) * abs(k)
        curvature += [k] * length
        heading += k * length
    bends = np.convolve(curvature[:count], np.hanning(17) / np.hanning(17).sum(), mode="same")
    centre, headings = _line(np.zeros(2), 0.0, bends)
    origin = int(reach_m)
    headings = headings - headings[origin]
    centre, headings = _line(np.zeros(2), float(headings[0]), np.diff(headings) / STEP_M)
    parking = (bool(rng.random() < style.parking), bool(rng.random() < style.parking))
    speed = float(rng.uniform(*style.speed))
    return Road(
        centre - centre[origin], headings, -reach_m, float(rng.uniform(*style.lane)), int(rng.choice(style.lanes)), parking,
        float(rng.uniform(*style.sidewalk)), speed,
    )  # fmt: skip


def _side_roads(rng: np.random.Generator, main: Road) -> tuple[list[Road], tuple[Junction, ...]]:
    roads: list[Road] = []
    junctions = []
    s = rng.uniform(14, 50) - 100.0 * (rng.random() < 0.6)
    while s < main.stop - 25:
        arms = rng.random()
        left, right = bool(arms < 0.7), bool(arms > 0.35)
        point, heading = main.at(s)
        across = float(heading) + np.pi / 2 + rng.normal(0, 0.16)
        bend = 0.0 if rng.random() < 0.6 else float(rng.uniform(-1, 1)) / 90.0
        lane, parking = float(rng.uniform(2.6, 3.2)), (bool(rng.random() < 0.5), bool(rng.random() < 0.5))
        before, after = int(REACH_M) * right, int(REACH_M) * left
        curvature = np.zeros(before + after)
        steps = np.arange(before + after) - before
        curvature[np.abs(steps) > 18] = bend
        # the road runs from right to left through the junction; walked backwards from it for the right arm
        right_centre, right_heading = _line(point, across + np.pi, -curvature[:before][::-1])
        left_centre, left_heading = _line(point, across, curvature[before:])
        centre = np.concatenate((right_centre[::-1][:-1], left_centre))
        headings = np.concatenate((right_heading[::-1][:-1] - np.pi, left_heading))
        roads.append(Road(centre, headings, -float(before), lane, 1, parking, float(rng.uniform(1.4, 2.4)), float(rng.uniform(6, 11))))
        junctions.append(Junction(float(s), len(roads), 0.0, left, right))
        s += rng.uniform(38, 105)
    return roads, tuple(junctions)


CAR_PAINTS = (
    (0.75, 0.76, 0.78), (0.10, 0.10, 0.12), (0.90, 0.90, 0.90), (0.35, 0.36, 0.40), (0.12, 0.20, 0.45), (0.55, 0.08, 0.08),
    (0.20, 0.32, 0.25), (0.60, 0.52, 0.40),
)  # fmt: skip
WALL_PAINTS = (
    (0.86, 0.80, 0.68), (0.80, 0.78, 0.74), (0.62, 0.34, 0.26), (0.72, 0.60, 0.46), (0.90, 0.88, 0.84), (0.66, 0.70, 0.72), (0.78, 0.66, 0.58),
)  # fmt: skip


def vehicle_size(rng: np.random.Generator, kind: str) -> tuple[float, float, float]:
    """(length, width, height) of a kind, drawn."""
    low, high = {
        "car": ((3.6, 1.62, 1.38), (4.9, 1.90, 1.68)),
        "van": ((4.8, 1.90, 1.90), (6.0, 2.10, 2.60)),
        "truck": ((6.5, 2.30, 2.80), (9.5, 2.50, 3.60)),
        "trailer": ((10.0, 2.45, 3.40), (16.0, 2.55, 4.00)),
        "cyclist": ((1.70, 0.58, 1.62), (1.85, 0.66, 1.85)),
        "pedestrian": ((0.55, 0.52, 1.45), (0.80, 0.68, 1.92)),
    }[kind]
    size = rng.uniform(low, high)
    return float(size[0]), float(size[1]), float(size[2])


class _Furnishing:
    """Puts things beside the roads of a street, none on another, on a carriageway or on a pavement where it does not belong."""

    def __init__(self, street: Street, style: Style, rng: np.random.Generator) -> None:
        self.street, self.style, self.rng = street, style, rng
        self.things: list[Thing] = []
        self.rects = np.zeros((4096, 5))

    def line_streets(self) -> None:
        for line in (self._parked, self._frontage, self._kerbside):
            for index in range(len(self.street.roads)):
                for side in (-1, 1):
                    line(index, side)
        self._close_ends()
        self._far_off()

    def line_trunk(self) -> None:
        self._median()
        for side in (-1, 1):
            self._verge(side)
        self._far_off()

    def put(
        self, kind: str, place: tuple[Array, float], size: Triple, clear: float, rgb: Triple = (0.6, 0.6, 0.6),
        extra: tuple[float, float] = (0.0, 0.0), margin: float = 0.25,
    ) -> bool:  # fmt: skip
        """Place it unless it would touch another thing or come nearer than `clear` to a carriageway's edge."""
        (x, y), yaw = place
        l, w, _ = size
        rect = np.array((x, y, yaw, l, w))
        count = len(self.things)
        others = self.rects[:count]
        near = np.hypot(others[:, 0] - x, others[:, 1] - y) < (np.hypot(l, w) + np.hypot(others[:, 3], others[:, 4])) / 2 + margin
        if count >= len(self.rects) or (near.any() and rect_overlap(rect, others[near], margin).any()):
            return False
        along, across = np.linspace(-l / 2, l / 2, 2 + int(l // 3)), np.linspace(-w / 2, w / 2, 2 + int(w // 3))
        if clear > -5:
            c, s = np.cos(yaw), np.sin(yaw)
            gx, gy = (g.ravel() for g in np.meshgrid(along, across))
            points = np.stack((x + c * gx - s * gy, y + s * gx + c * gy), 1)
            if self.street.edge_distance(points, 30.0)[0].min() < clear:
                return False
        self.rects[count] = rect
        self.things.append(Thing(kind, float(x), float(y), float(yaw), l, w, size[2], count, rgb, extra))
        return True

    def _paint(self, paints: tuple[Triple, ...]) -> Triple:
        return paints[int(self.rng.integers(len(paints)))]

    def place(self, road: Road, s: float, u: float, turn: float = 0.0) -> tuple[Array, float]:
        point, heading = road.at(s, u)
        return point, float(heading) + turn

    def _junction_free(self, index: int, point: Array, gap: float) -> bool:
        others = [r for i, r in enumerate(self.street.roads) if i != index]
        return all(abs(float(r.locate(point[None], 40.0)[1][0])) - r.half_width > gap for r in others)

    def _parked(self, index: int, side: int) -> None:
        road, rng = self.street.roads[index], self.rng
        if not road.parking[0 if side > 0 else 1]:
            return
        occupancy = rng.uniform(0.15, 0.85)
        u = side * (road.half_width - PARKING_M / 2)
        s = road.start + rng.uniform(2, 8)
        while s < road.stop - 4:
            kind = str(rng.choice(("car", "van", "truck"), p=(0.86, 0.12, 0.02)))
            size = vehicle_size(rng, kind)
            size = (size[0], min(size[1], PARKING_M - 0.15), size[2])
            if rng.random() < occupancy:
                turn = (0.0 if side < 0 else np.pi) + (np.pi if rng.random() < 0.08 else 0.0) + rng.normal(0, 0.012)
                place = self.place(road, s + size[0] / 2, u + rng.normal(0, 0.05), turn)
                if self._junction_free(index, place[0], 6.0):
                    self.put(kind, place, size, -10.0, self._paint(CAR_PAINTS))
            s += size[0] + rng.uniform(0.7, 2.2)

    def _frontage(self, index: int, side: int) -> None:
        """Buildings and what fills the gaps between them."""
        road, rng, style = self.street.roads[index], self.rng, self.style
        line = road.half_width + road.sidewalk
        typical = rng.uniform(*style.setback)
        s = road.start + rng.uniform(-4, 4)
        turn = np.pi if side > 0 else 0.0  # a building's front is its -y side
        while s < road.stop:
            front = rng.uniform(*style.frontage)
            depth = rng.uniform(7, 14)
            setback = max(0.05, typical + rng.normal(0, 0.25 * typical + 0.15))
            storeys = int(rng.integers(style.storeys[0], style.storeys[1] + 1))
            paint = np.clip(np.array(self._paint(WALL_PAINTS)) + rng.normal(0, 0.03, 3), 0.05, 1)
            place = self.place(road, s + front / 2, side * (line + setback + depth / 2), turn if side > 0 else turn + np.pi)
            size = (front, depth, 2.9 * storeys + rng.uniform(0.2, 1.2))
            built = self.put("building", place, size, road.sidewalk * 0.6, (float(paint[0]), float(paint[1]), float(paint[2])), margin=0.0)
            if built and setback > 2.0:
                self._garden(road, side, s, front, line, setback, drive=rng.random() < 0.4)
            if not built:
                s += 3.0
                continue
            s += front + 0.03
            if rng.random() < style.gap_share:
                gap = rng.uniform(*style.gap)
                self._gap(road, side, s, gap, line)
                s += gap

    def _barrier(self, road: Road, side: int, s: float, length: float, u: float) -> None:
        rng = self.rng
        if length < 1.0:
            return
        place = self.place(road, s + length / 2, side * u)
        draw = rng.random()
        if draw < 0.55:
            self.put("hedge", place, (length, rng.uniform(0.6, 1.1), rng.uniform(0.8, 2.2)), 0.8)
        elif draw < 0.9:
            tint = rng.uniform(0.35, 0.75)
            self.put("fence", place, (length, 0.2, rng.uniform(0.7, 1.9)), 0.8, (tint, 0.92 * tint, 0.85 * tint))

    def _garden(self, road: Road, side: int, s: float, front: float, line: float, setback: float, drive: bool) -> None:
        rng = self.rng
        if rng.random() < self.style.garden:
            opening = 3.0 if drive else 1.2
            cut = rng.uniform(0.5, max(0.6, front - opening - 0.5))
            self._barrier(road, side, s, cut, line + 0.7)
            self._barrier(road, side, s + cut + opening, front - cut - opening, line + 0.7)
        if drive and setback > 6.0 and rng.random() < 0.6:
            size = vehicle_size(rng, "car")
            place = self.place(road, s + rng.uniform(2, max(2.1, front - 2)), side * (line + 0.8 + size[0] / 2), np.pi / 2 * rng.choice((-1, 1)))
            self.put("car", place, size, 1.0, self._paint(CAR_PAINTS))
        for _ in range(rng.poisson(0.18 * setback)):
            u = side * (line + rng.uniform(1.4, max(1.5, setback - 0.8)))
            self._tree(self.place(road, s + rng.uniform(0.5, front), u), small=rng.random() < 0.6)

    def _gap(self, road: Road, side: int, s: float, gap: float, line: float) -> None:
        """A driveway, a garden behind a hedge, a yard with a house at its end, or open ground."""
        rng = self.rng
        draw = rng.random()
        if draw < 0.45:
            self._barrier(road, side, s + 0.1, gap - 0.2, line + rng.uniform(0.6, 2.0))
        elif draw < 0.65:
            size = (max(2.0, gap - 0.8), rng.uniform(5, 8), rng.uniform(2.4, 3.0))
            place = self.place(road, s + gap / 2, side * (line + rng.uniform(6, 16) + size[1] / 2), np.pi * (side > 0))
            self.put("building", place, size, 1.0, (0.7, 0.68, 0.64))
        for _ in range(rng.poisson(gap / 6.0)):
            self._tree(self.place(road, s + rng.uniform(0, gap), side * (line + rng.uniform(2.5, 20))), small=rng.random() < 0.35)
        if rng.random() < 0.8:
            wide = rng.uniform(9, 22)
            place = self.place(road, s + gap / 2, side * (line + rng.uniform(18, 38)), rng.normal(0, 0.2) + np.pi * (side > 0))
            self.put("building", place, (wide, rng.uniform(7, 12), rng.uniform(4, 12)), 1.0, self._paint(WALL_PAINTS))

    def _tree(self, place: tuple[Array, float], small: bool, clear: float = 0.5) -> None:
        rng = self.rng
        if small:
            height, crown, free, trunk = rng.uniform(1.2, 3.5), rng.uniform(0.5, 1.4), rng.uniform(0.1, 0.5), 0.06
        else:
            height, crown, free, trunk = rng.uniform(5, 13), rng.uniform(1.5, 3.6), rng.uniform(1.8, 2.8), rng.uniform(0.10, 0.28)
        self.put("tree", place, (2 * trunk, 2 * trunk, height), clear, extra=(crown, free), margin=0.35)

    def _kerbside(self, index: int, side: int) -> None:
        """Lamps, signs, street trees, bollards and bins along the kerb."""
        road, rng = self.street.roads[index], self.rng
        u = side * (road.half_width + 0.45)
        inward = -np.pi / 2 * side
        every = rng.uniform(22, 38)
        for s in np.arange(road.start + rng.uniform(0, every), road.stop, every):
            point, heading = self.place(road, s, u)
            self.put("lamp", (point, heading + inward - np.pi / 2), (0.2, 0.2, rng.uniform(5, 8)), 0.15, extra=(0.09, 0.0))
        if rng.random() < self.style.street_trees:
            every = rng.uniform(7, 18)
            for s in np.arange(road.start + rng.uniform(0, every), road.stop, every):
                if rng.random() < 0.85:
                    self._tree(self.place(road, s + rng.normal(0, 0.4), u), small=False, clear=0.15)
        for _ in range(rng.poisson(len(road.centre) / 30)):
            s = rng.uniform(road.start, road.stop)
            kind = str(rng.choice(("sign", "sign", "bollard", "bin", "light")))
            size = {"sign": (0.12, 0.6, 2.6), "bollard": (0.2, 0.2, 0.9), "bin": (0.6, 0.6, 1.1), "light": (0.4, 0.3, 3.4)}[kind]
            turn = 0.0 if side < 0 else np.pi
            self.put(kind, self.place(road, s, u, turn), size, 0.12, (0.25, 0.3, 0.28), extra=(0.05, 0.0))

    def _row(self, kind: str, start: float, stop: float, u: float, piece: Triple, rgb: Triple = (0.6, 0.6, 0.6)) -> None:
        """Pieces (length, width, height) end to end along the main road at u."""
        road = self.street.roads[0]
        for s in np.arange(start, stop - piece[0], piece[0] + 0.03):
            self.put(kind, self.place(road, s + piece[0] / 2, u, np.pi * (u > 0)), piece, -10.0, rgb, margin=0.0)

    def _median(self) -> None:
        """What keeps the directions of a trunk road apart, and what stands between them."""
        road, rng, kind = self.street.roads[0], self.rng, self.street.median
        if kind == "rail":
            for u in (0.0,) if road.median < 2.6 else (-road.median / 2 + 0.7, road.median / 2 - 0.7):
                self._row("rail", road.start, road.stop, u, (4.0, 0.36, 0.75))
        elif kind == "barrier":
            self._row("barrier", road.start, road.stop, 0.0, (6.0, 0.6, float(rng.uniform(0.8, 1.1))))
        elif kind == "hedge":
            self._row("hedge", road.start, road.stop, 0.0, (5.0, min(1.6, road.median - 1.2), float(rng.uniform(0.8, 2.0))))
        elif rng.random() < 0.6:
            for s in np.arange(road.start + rng.uniform(0, 20), road.stop, rng.uniform(6, 25)):
                self._tree(self.place(road, s + rng.normal(0, 1), rng.normal(0, 0.1 * road.median)), small=rng.random() < 0.6, clear=-10.0)
        if kind != "barrier" and rng.random() < 0.3:
            every = rng.uniform(35, 50)
            for s in np.arange(road.start + rng.uniform(0, every), road.stop, every):
                self.put("lamp", self.place(road, s, 0.3), (0.22, 0.22, rng.uniform(9, 12)), -10.0, extra=(0.11, 0.0), margin=0.0)

    def _verge(self, side: int) -> None:
        """Beside a trunk road: rail, posts, signs, lamps, and in stretches noise walls, trees and bushes, houses or open land behind them."""
        road, rng = self.street.roads[0], self.rng
        edge = road.half_width
        leafy = rng.uniform(0.2, 1.6)
        lamps = rng.random() < 0.4
        every = rng.uniform(35, 50)
        s = road.start
        while s < road.stop:
            stop = min(s + rng.uniform(60, 220), road.stop)
            walled = rng.random() < 0.45
            if walled:
                tint = rng.uniform(0.35, 0.7)
                size = (4.5, 0.3, float(rng.uniform(2.0, 4.0)))
                self._row("noisewall", s, stop, side * (edge + rng.uniform(1.6, 3.0)), size, (tint, tint * rng.uniform(0.9, 1.1), 0.9 * tint))
            if rng.random() < (0.5 if walled else 0.8):
                self._row("rail", s, stop, side * (edge + 0.6), (4.0, 0.36, 0.75))
            else:
                for at in np.arange(s + 5, stop, 25.0):
                    self.put("bollard", self.place(road, at, side * (edge + 0.5)), (0.2, 0.2, 1.0), -10.0, (0.9, 0.9, 0.9))
            dense = leafy * rng.uniform(0.3, 1.3)
            nearest = edge + (5.5 if walled else rng.uniform(1.7, 4.5))
            for _ in range(rng.poisson(0.6 * dense * (stop - s))):
                u = nearest + rng.exponential(6.0)
                self._tree(self.place(road, rng.uniform(s, stop), side * u), small=u < nearest + 2.5 or rng.random() < 0.5, clear=1.5)
            s = stop
        for s in np.arange(road.start + rng.uniform(0, every), road.stop if lamps else road.start, every):
            point, heading = self.place(road, s, side * (edge + 1.15))
            self.put("lamp", (point, heading - np.pi / 2 * (side + 1)), (0.22, 0.22, rng.uniform(8, 12)), 0.5, extra=(0.11, 0.0), margin=0.05)
        for _ in range(rng.poisson(len(road.centre) / 90)):
            place = self.place(road, rng.uniform(road.start, road.stop), side * (edge + 1.25), np.pi * (side > 0))
            self.put("sign", place, (0.12, 0.6, rng.uniform(2.4, 3.4)), 0.5, extra=(0.06, 0.0), margin=0.05)

    def _close_ends(self) -> None:
        """What closes the view: a building or trees across each road's end."""
        rng = self.rng
        for road in self.street.roads:
            for s, out in ((road.start, -1), (road.stop, 1)):
                if min(abs(s), 1e9) < 1:  # the end that lies in the junction
                    continue
                for u in np.arange(-24, 25, 4.0):
                    self._tree(self.place(road, s + out * rng.uniform(2, 9), u + rng.normal(0, 1)), small=rng.random() < 0.25, clear=-20)
                if rng.random() < 0.5:
                    size = (rng.uniform(18, 34), 9.0, rng.uniform(6, 14))
                    self.put("building", self.place(road, s + out * 14, rng.normal(0, 4), np.pi / 2), size, 0.5, self._paint(WALL_PAINTS))

    def _far_off(self) -> None:
        """Groups of trees and houses farther out."""
        rng, main = self.rng, self.street.roads[0]
        for _ in range(90):
            s, u = rng.uniform(main.start, main.stop), rng.uniform(28, 105) * rng.choice((-1, 1))
            if rng.random() < 0.45:
                size = (rng.uniform(8, 24), rng.uniform(7, 13), rng.uniform(4, 13))
                self.put("building", self.place(main, s, u, rng.uniform(0, 2 * np.pi)), size, 2.5, self._paint(WALL_PAINTS))
            else:
                for _ in range(int(rng.integers(3, 9))):
                    point, heading = self.place(main, s, u)
                    self._tree((point + rng.normal(0, 5, 2), heading), small=rng.random() < 0.2, clear=2.0)
