"""Triangle meshes of what stands and moves in a street: plain arrays, a few dozen triangles each.

A mesh lies in its own frame: x along its length, y to the left, z up, the origin below its middle on the ground. Every triangle says what
it is made of (an index into MATERIALS); what it belongs to is added when the scene is put together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Material:
    """How a surface looks: reflectivity for the LiDAR (0..1, the mean return at normal incidence), the share of rays that are lost on it
    whatever the range, whether it throws light back to where it came from, and its colour."""

    reflectivity: float
    lost: float
    rgb: tuple[float, float, float]
    retro: bool = False


MATERIALS: dict[str, Material] = {
    "asphalt": Material(0.34, 0.002, (0.30, 0.30, 0.31)),
    "pavement": Material(0.38, 0.002, (0.55, 0.53, 0.50)),
    "grass": Material(0.40, 0.01, (0.32, 0.42, 0.20)),
    "wall": Material(0.38, 0.004, (1.0, 1.0, 1.0)),
    "glass": Material(0.09, 0.25, (0.16, 0.20, 0.25)),
    "roof": Material(0.25, 0.02, (0.42, 0.22, 0.17)),
    "leaves": Material(0.42, 0.02, (0.22, 0.38, 0.14)),
    "bark": Material(0.30, 0.02, (0.30, 0.24, 0.18)),
    "wood": Material(0.40, 0.02, (0.50, 0.38, 0.26)),
    "metal": Material(0.35, 0.05, (0.55, 0.56, 0.58)),
    "paint": Material(0.36, 0.03, (1.0, 1.0, 1.0)),
    "tyre": Material(0.10, 0.10, (0.08, 0.08, 0.09)),
    "cloth": Material(0.30, 0.02, (1.0, 1.0, 1.0)),
    "skin": Material(0.40, 0.01, (0.80, 0.60, 0.48)),
    "plate": Material(0.85, 0.0, (0.90, 0.90, 0.85), retro=True),
    "lamp": Material(0.70, 0.05, (0.85, 0.15, 0.12), retro=True),
    "marking": Material(0.55, 0.01, (0.85, 0.85, 0.82)),
}
MATERIAL_NAMES = tuple(MATERIALS)
MATERIAL_INDEX = {name: index for index, name in enumerate(MATERIAL_NAMES)}


@dataclass(frozen=True, eq=False)
class Mesh:
    """vertices (V,3) f64, triangles (T,3) i64 into them, material (T,) u8."""

    vertices: Array
    triangles: Array
    material: Array

    def moved(self, x: float, y: float, z: float, yaw: float) -> Mesh:
        c, s = np.cos(yaw), np.sin(yaw)
        v = self.vertices
        turned = np.stack((c * v[:, 0] - s * v[:, 1] + x, s * v[:, 0] + c * v[:, 1] + y, v[:, 2] + z), 1)
        return Mesh(turned, self.triangles, self.material)


def join(meshes: list[Mesh]) -> Mesh:
    if not meshes:
        return Mesh(np.zeros((0, 3)), np.zeros((0, 3), np.int64), np.zeros(0, np.uint8))
    offsets = np.cumsum([0] + [len(m.vertices) for m in meshes[:-1]])
    return Mesh(
        np.concatenate([m.vertices for m in meshes]),
        np.concatenate([m.triangles + o for m, o in zip(meshes, offsets, strict=True)]),
        np.concatenate([m.material for m in meshes]),
    )


def _of(vertices: Array, triangles: Array, material: str) -> Mesh:
    return Mesh(np.asarray(vertices, np.float64), triangles, np.full(len(triangles), MATERIAL_INDEX[material], np.uint8))


def loft(first: Array, second: Array, material: str) -> Mesh:
    """The solid between two polygons of K corners each (K,3), both ends closed (they should be convex)."""
    k = len(first)
    i = np.arange(k)
    j = (i + 1) % k
    sides = np.concatenate((np.stack((i, j, j + k), 1), np.stack((i, j + k, i + k), 1)))
    fan = np.stack((np.zeros(k - 2, np.int64), np.arange(1, k - 1), np.arange(2, k)), 1)
    return _of(np.concatenate((first, second)), np.concatenate((sides, fan, fan + k)), material)


def box(length: float, width: float, height: float, material: str, at: tuple[float, float, float] = (0, 0, 0)) -> Mesh:
    """A box standing on `at`."""
    x, y = np.array((-1, 1, 1, -1)) * length / 2 + at[0], np.array((-1, -1, 1, 1)) * width / 2 + at[1]
    low = np.stack((x, y, np.full(4, float(at[2]))), 1)
    return loft(low, low + np.array((0, 0, height)), material)


def column(radius: float, height: float, material: str, at: tuple[float, float, float] = (0, 0, 0), top: float = 1.0, sides: int = 7) -> Mesh:
    """An upright prism; its upper radius is `top` times the lower."""
    a = np.arange(sides) * 2 * np.pi / sides
    ring = np.stack((np.cos(a), np.sin(a), np.zeros(sides)), 1)
    return loft(ring * radius + at, ring * radius * top + at + np.array((0, 0, height)), material)


def _profile(outline: list[tuple[float, float]], half_width: float, material: str, upper: float = 1.0) -> Mesh:
    """A side view (x, z), drawn across the width; corners above the lowest are drawn in to `upper` times the half width."""
    o = np.array(outline)
    low = o[:, 1].min()
    y = half_width * np.where(o[:, 1] > low + 1e-6, upper, 1.0)
    return loft(np.stack((o[:, 0], y, o[:, 1]), 1), np.stack((o[:, 0], -y, o[:, 1]), 1), material)


def _wheels(xs: tuple[float, ...], half_width: float, radius: float, thick: float = 0.22) -> list[Mesh]:
    a = np.arange(8) * np.pi / 4 + np.pi / 8
    circle = np.stack((np.cos(a) * radius, np.zeros(8), np.sin(a) * radius + radius), 1)
    place = np.array
    return [loft(circle + place((x, s * half_width, 0)), circle + place((x, s * (half_width - thick), 0)), "tyre") for x in xs for s in (-1, 1)]


def car(length: float, width: float, height: float, rng: np.random.Generator) -> Mesh:
    """A saloon, estate or hatchback: body, cabin with windows all round, wheels, plates and lamps. Inside its box."""
    l, w, h = length, width / 2, height
    belt, back = 0.57 * h, float(rng.choice((-0.47, -0.40, -0.33)))
    body = [(-0.5 * l, 0.20), (0.5 * l, 0.22), (0.5 * l, 0.40 * h), (0.47 * l, 0.48 * h), (0.26 * l, belt), (-0.46 * l, belt), (-0.5 * l, 0.5 * h)]
    cabin = [(back * l, belt), (0.27 * l, belt - 0.02), (0.08 * l, 0.97 * h), (-0.02 * l, h), ((back + 0.12) * l, 0.97 * h)]
    roof = [((back + 0.13) * l, 0.965 * h), (0.07 * l, 0.965 * h), (0.02 * l, h), (-0.05 * l, h)]
    parts = [_profile(body, w, "paint", 0.98), _profile(cabin, 0.92 * w, "glass", 0.80), _profile(roof, 0.76 * w, "paint")]
    parts += _seats(((0.02 * l, 0.36), ((0.5 * back - 0.02) * l, 0.40)), w, belt - 0.05, 0.80 * h)
    parts += _wheels((-0.30 * l, 0.31 * l), w - 0.01, min(0.33, 0.23 * h))
    parts += [box(0.02, 0.50, 0.12, "plate", (s * (0.5 * l - 0.01), 0, 0.42)) for s in (-1, 1)]
    parts += [box(0.03, 0.30, 0.14, "lamp", (s * (0.5 * l - 0.015), t * 0.72 * w, 0.36 * h)) for s in (-1, 1) for t in (-1, 1)]
    return join(parts)


def _seats(rows: tuple[tuple[float, float], ...], half_width: float, low: float, high: float) -> list[Mesh]:
    """Backs of two seats in each row (x, middle of a seat as a share of the half width), from `low` to `high`, headrests on top."""
    parts = []
    for x, out in rows:
        for side in (-1, 1):
            parts.append(box(0.12, 0.46, 0.7 * (high - low), "cloth", (x, side * out * half_width, low)))
            parts.append(box(0.09, 0.24, 0.3 * (high - low), "cloth", (x, side * out * half_width, low + 0.7 * (high - low))))
    return parts


def van(length: float, width: float, height: float, rng: np.random.Generator) -> Mesh:
    """A panel van, with windows around the driver, or a bus with windows all round."""
    l, w, h = length, width / 2, height
    nose, rear = float(rng.uniform(0.30, 0.38)), float(rng.choice((-0.46, 0.06)))
    low = [(-0.5 * l, 0.22), (0.5 * l, 0.24), (0.5 * l, 0.45 * h), (nose * l, 0.58 * h), (-0.49 * l, 0.58 * h)]
    glass = [(rear * l, 0.58 * h), (nose * l, 0.58 * h), (0.235 * l, 0.93 * h), (rear * l, 0.93 * h)]
    roof = [(-0.48 * l, 0.93 * h), (0.235 * l, 0.93 * h), (0.215 * l, 0.97 * h), (-0.48 * l, h)]
    load = rear + 0.48
    parts = [_profile(low, w - 0.02, "paint"), _profile(glass, 0.975 * w, "glass", 0.97), _profile(roof, 0.95 * w, "paint", 0.97)]
    parts.append(box(load * l, 1.94 * w, 0.35 * h, "paint", ((rear - load / 2) * l, 0, 0.58 * h)))
    parts += _seats(tuple((x * l, 0.45) for x in (0.10, -0.10, -0.28) if x > rear), w, 0.55 * h, 0.85 * h)
    parts += _wheels((-0.30 * l, 0.32 * l), w, 0.34)
    parts += [box(0.02, 0.52, 0.12, "plate", (s * (0.5 * l - 0.01), 0, 0.45)) for s in (-1, 1)]
    parts += [box(0.03, 0.16, 0.30, "lamp", (-(0.5 * l - 0.015), t * 0.86 * w, 0.40 * h)) for t in (-1, 1)]
    return join(parts)


def truck(length: float, width: float, height: float, rng: np.random.Generator) -> Mesh:
    l, w, h = length, width / 2, height
    cab = float(rng.uniform(1.7, 2.3))
    nose = [(0.5 * l - cab, 0.5), (0.5 * l, 0.45), (0.5 * l, 0.48 * h), (0.5 * l - cab, 0.48 * h)]
    pane = [(0.5 * l, 0.48 * h), (0.5 * l - 0.14, 0.74 * h), (0.5 * l - 1.1, 0.74 * h), (0.5 * l - 1.1, 0.48 * h)]
    roof = [(0.5 * l - 0.14, 0.74 * h), (0.5 * l - 0.17, 0.80 * h), (0.5 * l - cab, 0.82 * h), (0.5 * l - cab, 0.74 * h)]
    load = l - cab - 0.25
    parts = [_profile(nose, w - 0.05, "paint"), _profile(pane, w - 0.05, "glass"), _profile(roof, w - 0.05, "paint")]
    parts.append(box(cab - 1.1, 2 * w - 0.1, 0.26 * h, "paint", (0.5 * l - (cab + 1.1) / 2, 0, 0.48 * h)))
    parts += _seats(((0.5 * l - 0.95, 0.5),), w, 0.46 * h, 0.66 * h)
    parts.append(box(load, 2 * w, h - 1.0, "wall", (-0.5 * l + load / 2, 0, 1.0)))
    parts.append(box(l - 0.6, 0.9, 0.45, "metal", (-0.1, 0, 0.55)))
    parts += _wheels((-0.36 * l, -0.22 * l, 0.5 * l - 1.1), w - 0.02, 0.48, 0.3)
    parts.append(box(0.02, 0.52, 0.12, "plate", (-(0.5 * l - 0.01), 0, 0.80)))
    return join(parts)


def _body(x: float, height: float, foot: float, lean: float, stride: float) -> list[Mesh]:
    """A person from `foot` above the ground to `height`, around x."""
    h = height - foot
    hip, neck = foot + 0.48 * h, foot + 0.84 * h
    ring = np.array([(0.13, 0.0), (0.09, 0.16), (-0.09, 0.16), (-0.13, 0.0), (-0.09, -0.16), (0.09, -0.16)])
    torso = loft(np.c_[ring * (0.9, 1.0) + (x, 0), np.full(6, hip)], np.c_[ring * (1.0, 1.35) + (x + lean, 0), np.full(6, neck)], "cloth")
    legs = []
    for side in (-1, 1):
        s = np.array([(0.07, 0.07), (-0.07, 0.07), (-0.07, -0.07), (0.07, -0.07)])
        below, above = s + np.array((x + side * stride, side * 0.10)), s * 1.2 + np.array((x, side * 0.09))
        legs.append(loft(np.c_[below, np.full(4, foot)], np.c_[above, np.full(4, hip + 0.02)], "cloth"))
    return [torso, *legs, column(0.105, 0.145 * h, "skin", (x + lean * 1.1, 0, neck + 0.01), 0.9)]


def pedestrian(length: float, width: float, height: float, rng: np.random.Generator) -> Mesh:
    return join(_body(0.0, height, 0.0, float(rng.uniform(0.0, 0.05)), float(rng.uniform(0.05, 0.5 * length - 0.10))))


def cyclist(length: float, width: float, height: float, rng: np.random.Generator) -> Mesh:
    """A person on a bicycle: two wheels, a frame, handlebars, a rider who leans forward."""
    a = np.arange(10) * np.pi / 5
    r = 0.34
    circle = np.stack((np.cos(a) * r, np.zeros(10), np.sin(a) * r + r), 1)
    thick = np.array((0, 0.025, 0))
    middles = [circle + np.array((x, 0, 0)) for x in (-0.5 * length + r, 0.5 * length - r)]
    wheels = [loft(m + thick, m - thick, "tyre") for m in middles]
    bars = ((0.95, 0.05, 0.06, (0, 0, 0.45)), (0.05, 0.05, 0.45, (0.45, 0, 0.5)), (0.06, 0.52, 0.05, (0.42, 0, 0.95)))
    frame = [box(l, w, h, "metal", at) for l, w, h, at in bars]
    return join(wheels + frame + _body(-0.15, height, 0.30, float(rng.uniform(0.15, 0.32)), 0.10))


def leaves(centres: Array, size: Array, rng: np.random.Generator) -> Mesh:
    """One random triangle of the size given (N,) at each centre (N,3)."""
    n = len(centres)
    corners = rng.normal(size=(n, 3, 3))
    corners -= corners.mean(1, keepdims=True)
    corners *= (size / np.maximum(np.linalg.norm(corners, axis=2).max(1), 1e-6))[:, None, None]
    return _of((centres[:, None] + corners).reshape(-1, 3), np.arange(3 * n).reshape(n, 3), "leaves")


def tree(height: float, trunk: float, crown: float, clear: float, rng: np.random.Generator) -> Mesh:
    """A trunk of radius `trunk`, and from `clear` up to `height` a crown of clumps of leaves within radius `crown`."""
    clumps = int(rng.integers(4, 9))
    middle = (clear + height) / 2
    where = rng.normal(size=(clumps, 3)) * (0.45 * crown, 0.45 * crown, 0.26 * (height - clear)) + (0, 0, middle)
    count = int(np.clip(36 * crown * max(height - clear, 1.0), 90, 600))
    of = rng.integers(0, clumps, count)
    shell = rng.normal(size=(count, 3))
    shell *= (rng.uniform(0.55, 1.0, count) / np.linalg.norm(shell, axis=1))[:, None]
    reach = np.array((0.62 * crown, 0.62 * crown, 0.30 * (height - clear) + 0.2))
    centres = where[of] + shell * reach
    centres[:, 2] = np.clip(centres[:, 2], clear, height)
    lean = rng.normal(0, 0.02, 2) * clear
    a = np.arange(7) * 2 * np.pi / 7
    ring = np.stack((np.cos(a), np.sin(a)), 1) * trunk
    stem = loft(np.c_[ring, np.full(7, -0.5)], np.c_[ring * 0.75 + lean, np.full(7, middle)], "bark")
    return join([stem, leaves(centres, rng.uniform(0.18, 0.50, count), rng)])


def hedge(length: float, width: float, height: float, rng: np.random.Generator) -> Mesh:
    """A core that the eye does not pass, grown over with leaves on all sides."""
    count = int(np.clip(14 * length * height, 20, 380))
    side = rng.integers(0, 3, count)
    x, y = rng.uniform(-0.5, 0.5, count) * length, np.where(side == 0, -0.5, 0.5) * width
    y = np.where(side == 2, rng.uniform(-0.5, 0.5, count) * width, y)
    z = np.where(side == 2, height, rng.uniform(0.05, 1.0, count) * height)
    centres = np.stack((x, y * 0.9, z - 0.08), 1)
    core = loft(*_slab(length, 0.75 * width, height * 0.9), "leaves")
    return join([core, leaves(centres, rng.uniform(0.12, 0.30, count), rng)])


def _slab(length: float, width: float, height: float) -> tuple[Array, Array]:
    x, y = np.array((-1, 1, 1, -1)) * length / 2, np.array((-1, -1, 1, 1)) * width / 2
    return np.stack((x, y, np.full(4, -0.4)), 1), np.stack((x, 0.85 * y, np.full(4, height)), 1)


def fence(length: float, width: float, height: float, rng: np.random.Generator) -> Mesh:
    """A wall, or pickets on two rails between posts."""
    if rng.random() < 0.45:
        return join([box(length, width, height + 0.5, "wall", (0, 0, -0.5))])
    posts = max(2, round(length / 2.2) + 1)
    parts = [box(0.09, 0.09, height + 0.4, "wood", (x, 0, -0.4)) for x in np.linspace(-0.5 * length + 0.05, 0.5 * length - 0.05, posts)]
    parts += [box(length, 0.04, 0.08, "wood", (0, 0, z * height)) for z in (0.2, 0.8)]
    gap = float(rng.choice((0.12, 0.16, 0.22)))
    xs = np.arange(-0.5 * length, 0.5 * length - 0.1, gap)
    corners = np.array([(0, 0, 0.08), (0.09, 0, 0.08), (0.09, 0, height), (0, 0, height)])
    quads = (np.stack((xs, np.full(len(xs), 0.03), np.zeros(len(xs))), 1)[:, None] + corners).reshape(-1, 3)
    first = np.arange(len(xs)) * 4
    parts.append(_of(quads, np.concatenate((first[:, None] + (0, 1, 2), first[:, None] + (0, 2, 3))), "wood"))
    return join(parts)


def rail(length: float, height: float) -> Mesh:
    """A guard rail: a beam on both sides of posts every 2 m."""
    posts = [box(0.10, 0.14, height + 0.4, "metal", (x, 0, -0.4)) for x in np.arange(-0.5 * length + 0.1, 0.5 * length, 2.0)]
    return join(posts + [box(length, 0.08, 0.31, "metal", (0, y, height - 0.32)) for y in (-0.13, 0.13)])


def barrier(length: float, width: float, height: float) -> Mesh:
    """A concrete barrier: a broad foot, and a wall that narrows upwards."""
    y = np.array((-0.5, 0.5, 0.48, 0.3, 0.2, -0.2, -0.3, -0.48)) * width
    z = np.array((-0.4, -0.4, 0.1, 0.35, height, height, 0.35, 0.1))
    near, far = (np.stack((np.full(8, x), y, z), 1) for x in (-0.5 * length, 0.5 * length))
    return loft(near, far, "pavement")


def noise_wall(length: float, width: float, height: float) -> Mesh:
    """Panels between posts at both ends."""
    posts = [box(0.16, width, height + 0.5, "metal", (s * (0.5 * length - 0.08), 0, -0.5)) for s in (-1, 1)]
    return join([*posts, box(length - 0.3, 0.5 * width, height + 0.4, "wall", (0, 0, -0.5))])


def pole(height: float, radius: float, kind: str) -> Mesh:
    """A post in the ground with what its kind carries: ``lamp`` an arm, ``sign`` a plate, ``light`` a traffic light, else nothing."""
    parts = [column(radius, height + 0.5, "metal", (0, 0, -0.5), 0.7)]
    if kind == "lamp":
        parts += [box(0.08, 1.6, 0.08, "metal", (0, 0.8, height - 0.1)), box(0.25, 0.6, 0.12, "metal", (0, 1.5, height - 0.15))]
    elif kind == "sign":
        parts.append(box(0.03, 0.60, 0.60, "plate", (-0.06, 0, height - 0.62)))
    elif kind == "light":
        parts.append(box(0.25, 0.30, 0.90, "metal", (-0.2, 0, height - 0.95)))
    return join(parts)


def building(length: float, width: float, height: float, rng: np.random.Generator) -> Mesh:
    """A block with a flat or gabled roof and relief on the side that faces the street (-y): steps, bays, balconies, cornice, down-pipes."""
    l, w, h = length, width, height
    parts = [box(l, w, h + 3.0, "wall", (0, 0, -3.0))]
    if rng.random() < 0.6:
        rise = float(rng.uniform(0.25, 0.5)) * min(w, 10.0)
        half = np.array((0.52 * l, 0, 0))
        gable = np.array([(0.0, -0.53 * w, h), (0.0, 0.53 * w, h), (0.0, 0.0, h + rise)])
        parts.append(loft(gable - half, gable + half, "roof"))
    else:
        parts.append(box(l + 0.3, w + 0.3, 0.3, "wall", (0, 0, h)))
    for x in np.arange(-0.5 * l + 2.0, 0.5 * l - 2.0, float(rng.uniform(2.8, 4.5))):
        draw = rng.random()
        if draw < 0.12:
            parts.append(box(1.6, 0.9, 0.4, "pavement", (x, -0.5 * w - 0.45, -0.2)))
        elif draw < 0.30:
            parts.append(box(2.0, 0.6, h * 0.8, "wall", (x, -0.5 * w - 0.3, -0.5)))
        elif draw < 0.50 and h > 5:
            parts += [box(2.2, 0.9, 1.1, "wall", (x, -0.5 * w - 0.45, z)) for z in np.arange(3.0, h - 2.0, 3.0)]
        elif draw < 0.62:
            parts.append(column(0.07, h, "metal", (x, -0.5 * w - 0.09, -0.3)))
    return join(parts)
