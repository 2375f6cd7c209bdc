"""A street and its traffic as triangles, and the casting of rays into them (Open3D's RaycastingScene, which is Embree).

What stands still is one scene, built once. Each road user is a small scene of its own in which it stands still too: the rays that may meet
it are moved into its frame at their own instants, so a turning scanner sees it where it was when the ray left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.simulator import shapes
from sensors.simulator.shapes import MATERIAL_INDEX, Mesh
from sensors.simulator.streets import KERB_M, Street, Thing
from sensors.simulator.traffic import MOVERS, Traffic, rotations

Array = NDArray[Any]

CATEGORIES = (*MOVERS, "road", "sidewalk", "terrain", "building", "vegetation", "fence", "pole", "clutter")
CATEGORY_INDEX = {name: index for index, name in enumerate(CATEGORIES)}
SKY = 255
FIRST_MOVER = 5001
SIGHT_M = 122.0
# Whose windows the LiDAR looks through, which share of the light a pane lets pass, how many panes a ray passes, and where behind one it goes on
WINDOWED = ("car", "van", "truck")
CLEAR = (0.6, 1.0)
MIRRORS_FROM = 0.93  # cosine of incidence
PANES, PANE_M = 4, 0.01

# kind of thing -> (category, mesh)
KINDS: dict[str, tuple[str, Callable[[Thing, np.random.Generator], Mesh]]] = {
    "car": ("car", lambda t, rng: shapes.car(t.length, t.width, t.height, rng)),
    "van": ("van", lambda t, rng: shapes.van(t.length, t.width, t.height, rng)),
    "truck": ("truck", lambda t, rng: shapes.truck(t.length, t.width, t.height, rng)),
    "building": ("building", lambda t, rng: shapes.building(t.length, t.width, t.height, rng)),
    "tree": ("vegetation", lambda t, rng: shapes.tree(t.height, t.width / 2, t.extra[0], t.extra[1], rng)),
    "hedge": ("vegetation", lambda t, rng: shapes.hedge(t.length, t.width, t.height, rng)),
    "fence": ("fence", lambda t, rng: shapes.fence(t.length, t.width, t.height, rng)),
    "rail": ("fence", lambda t, rng: shapes.rail(t.length, t.height)),
    "barrier": ("fence", lambda t, rng: shapes.barrier(t.length, t.width, t.height)),
    "noisewall": ("fence", lambda t, rng: shapes.noise_wall(t.length, t.width, t.height)),
    "lamp": ("pole", lambda t, rng: shapes.pole(t.height, t.extra[0], "lamp")),
    "sign": ("pole", lambda t, rng: shapes.pole(t.height, t.extra[0], "sign")),
    "light": ("pole", lambda t, rng: shapes.pole(t.height, t.extra[0], "light")),
    "bollard": ("clutter", lambda t, rng: shapes.column(0.09, t.height, "metal")),
    "bin": ("clutter", lambda t, rng: shapes.box(t.length, t.width, t.height, "metal")),
}
_SHAPES = {"car": shapes.car, "van": shapes.van, "truck": shapes.truck, "cyclist": shapes.cyclist, "pedestrian": shapes.pedestrian}


@dataclass(frozen=True, eq=False)
class Hits:
    """What N rays met first. range_m (N,) f32, infinite where nothing; material, category (N,) u8 (SKY for nothing); instance (N,) i32;
    item (N,) i32: number of the thing or actor for colours, -1 for the ground; normal (N,3) f32 towards the ray's origin;
    facing (N,) f32 cosine of the incidence; place (N,3) f32 where, in the world (movers: in their own frame)."""

    range_m: Array
    material: Array
    category: Array
    instance: Array
    item: Array
    normal: Array
    facing: Array
    place: Array


@dataclass(frozen=True, eq=False)
class _Ground:
    """The triangles of the ground: for the markings, road coordinates (V,2) of the vertices and the road of each triangle (-1: none)."""

    vertices: Array
    triangles: Array
    material: Array
    category: Array
    road: Array
    on_road: Array


def _grid(x: Array, y: Array) -> tuple[Array, Array]:
    """Vertices (V,2) and triangles of a grid over the coordinates given."""
    gx, gy = np.meshgrid(x, y, indexing="ij")
    index = np.arange(gx.size).reshape(gx.shape)
    a, b, c, d = (i.ravel() for i in (index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]))
    return np.stack((gx.ravel(), gy.ravel()), 1), np.concatenate((np.stack((a, b, c), 1), np.stack((a, c, d), 1)))


def _ground(street: Street, way: Array) -> _Ground:
    """A grid of 1 m near roads that the ego comes near to (its way (N,2)), of 4 m elsewhere, and pavements with kerbs on it."""
    from scipy.spatial import cKDTree

    low, high = np.floor((way.min(0) - SIGHT_M) / 8) * 8, np.ceil((way.max(0) + SIGHT_M) / 8) * 8
    tree = cKDTree(way)
    coarse, ctri = _grid(np.arange(low[0], high[0] + 1, 4.0), np.arange(low[1], high[1] + 1, 4.0))
    edge = street.edge_distance(coarse, 40.0)[0]
    tiles = np.stack(np.meshgrid(np.arange(low[0], high[0], 8), np.arange(low[1], high[1], 8), indexing="ij"), -1).reshape(-1, 2)
    tile_edge = street.edge_distance(tiles + 4, 60.0)[0]
    tile_way = tree.query(tiles + 4)[0]
    fine_tile = (tile_edge < 9.0) & (tile_way < 75.0)
    fine_set = np.zeros((int((high[0] - low[0]) / 8), int((high[1] - low[1]) / 8)), bool)
    fine_set[((tiles[fine_tile] - low) / 8).astype(int)[:, 0], ((tiles[fine_tile] - low) / 8).astype(int)[:, 1]] = True
    # below everything a coarse copy closes the cracks where the two grids meet
    middle = coarse[ctri].mean(1)
    under = fine_set[((middle - low) / 8).astype(int)[:, 0], ((middle - low) / 8).astype(int)[:, 1]]
    height = street.profile(coarse, edge)
    vertices = [np.c_[coarse, height], np.c_[coarse, height - 0.35]]
    triangles = [ctri[~under], ctri[under] + len(coarse)]
    fvert, ftri = _grid(np.arange(low[0], high[0] + 0.5, 1.0), np.arange(low[1], high[1] + 0.5, 1.0))
    fmid = fvert[ftri].mean(1)
    ftri = ftri[fine_set[((fmid - low) / 8).astype(int)[:, 0], ((fmid - low) / 8).astype(int)[:, 1]]]
    used, ftri = np.unique(ftri, return_inverse=True)
    ftri, fvert = ftri.reshape(-1, 3), fvert[used]
    fedge, froad, fs, fu, fon = street.edge_distance(fvert, 30.0)
    fz = street.profile(fvert, fedge, kerb=KERB_M - 0.03)
    first = 2 * len(coarse)
    vertices.append(np.c_[fvert, fz])
    triangles.append(ftri + first)
    same = (froad[ftri] == froad[ftri][:, :1]).all(1) & (fon[ftri] <= 1).all(1) & (np.ptp(fu[ftri], axis=1) < 4) & (np.ptp(fs[ftri], axis=1) < 4)
    depth = fedge[ftri].mean(1)
    far_road = edge[ctri].mean(1) < 0
    material = [np.where(far_road, MATERIAL_INDEX["asphalt"], MATERIAL_INDEX["grass"])[~under], np.full(int(under.sum()), MATERIAL_INDEX["asphalt"])]
    category = [np.where(far_road, CATEGORY_INDEX["road"], CATEGORY_INDEX["terrain"])[~under], np.full(int(under.sum()), CATEGORY_INDEX["road"])]
    paved = depth < 0.35
    if street.median in ("hedge", "grass"):
        paved &= np.abs(fu[ftri]).mean(1) > street.roads[0].median / 2 - 0.3
    material.append(np.where(paved, MATERIAL_INDEX["asphalt"], MATERIAL_INDEX["grass"]))
    category.append(np.where(paved, CATEGORY_INDEX["road"], CATEGORY_INDEX["terrain"]))
    road = [np.full(len(ctri), -1), np.where(same & (fedge[ftri] < 0.5).all(1), froad[ftri[:, 0]], -1)]
    on_road = [np.zeros((2 * len(coarse), 2)), np.stack((fs, fu), 1)]
    for index in (i for i, r in enumerate(street.roads) if r.sidewalk > 0):
        v, t = _pavement(street, index, way, tree)
        triangles.append(t + sum(len(x) for x in vertices))
        vertices.append(v)
        material.append(np.full(len(t), MATERIAL_INDEX["pavement"]))
        category.append(np.full(len(t), CATEGORY_INDEX["sidewalk"]))
        road.append(np.full(len(t), -1))
        on_road.append(np.zeros((len(v), 2)))
    return _Ground(
        np.concatenate(vertices), np.concatenate(triangles), np.concatenate(material).astype(np.uint8), np.concatenate(category).astype(np.uint8),
        np.concatenate(road), np.concatenate(on_road),
    )  # fmt: skip


def _pavement(street: Street, index: int, way: Array, tree: Any) -> tuple[Array, Array]:
    """Kerb and pavement on both sides of a road, left out where another road's carriageway is."""
    road = street.roads[index]
    s = np.arange(road.start, road.stop + 0.1, 2.0)
    vertices: list[Array] = []
    triangles: list[Array] = []
    count = 0
    for side in (-1.0, 1.0):
        inner, outer = road.at(s, side * road.half_width)[0], road.at(s, side * (road.half_width + road.sidewalk))[0]
        middle = (inner[1:] + inner[:-1] + outer[1:] + outer[:-1]) / 4
        keep = tree.query(middle)[0] < SIGHT_M
        for i, other in enumerate(street.roads):
            if i != index:
                for at in (middle, inner[1:], inner[:-1], outer[1:]):
                    keep &= np.abs(other.locate(at, 30.0)[1]) - other.half_width > 0.2
        level = street.land(inner)
        rows = np.stack((np.c_[inner, level - 0.10], np.c_[inner, level + KERB_M], np.c_[outer, street.land(outer) + KERB_M + 0.01]))  # (3,N,3)
        n = len(s)
        kept = np.flatnonzero(keep)
        for low in (0, 1):
            a, b = low * n + kept + count, (low + 1) * n + kept + count
            triangles += [np.stack((a, a + 1, b + 1), 1), np.stack((a, b + 1, b), 1)]
        vertices.append(rows.reshape(-1, 3))
        count += 3 * n
    return np.concatenate(vertices), np.concatenate(triangles)


def standing_on(street: Street, things: tuple[Thing, ...]) -> Array:
    """Height (N,) of the ground that things stand on: at their middle, without small unevenness."""
    if not things:
        return np.zeros(0)
    places = np.array([(t.x, t.y) for t in things])
    edge = street.edge_distance(places)[0]
    return street.land(places) + np.where(edge > 0, KERB_M, 0.025 * np.clip(-edge, 0, 6.0)) + street.banked(edge)


class Scene:
    """Everything that can be seen of a street and its traffic during a log. Made in a second, then quick to ask."""

    def __init__(self, street: Street, traffic: Traffic) -> None:
        from scipy.spatial import cKDTree

        self.street, self.actors = street, traffic.actors
        way = traffic.world_from_ego[::10, :2, 3]
        self.ground = _ground(street, way)
        tree = cKDTree(way)
        things = [t for t in street.things if tree.query((t.x, t.y))[0] < SIGHT_M + max(t.length, t.width) / 2]
        self.things = tuple(things)
        self.base = standing_on(street, self.things)
        meshes, item = [], []
        for i, t in enumerate(things):
            mesh = KINDS[t.kind][1](t, np.random.default_rng([street.seed, 3, t.number])).moved(t.x, t.y, float(self.base[i]), t.yaw)
            meshes.append(mesh)
            item.append(np.full(len(mesh.triangles), i))
        solid = shapes.join(meshes)
        self.ground_count = len(self.ground.triangles)
        vertices = np.concatenate((self.ground.vertices, solid.vertices))
        triangles = np.concatenate((self.ground.triangles, solid.triangles + len(self.ground.vertices)))
        of = np.concatenate([np.zeros(0, np.int64), *item])
        categories = np.array([CATEGORY_INDEX[KINDS[t.kind][0]] for t in things], np.uint8)
        instances = np.array([t.number + 1 if t.kind in MOVERS else 0 for t in things], np.int32)
        self.triangle_material = np.concatenate((self.ground.material, solid.material))
        self.triangle_category = np.concatenate((self.ground.category, categories[of] if len(things) else np.zeros(0, np.uint8)))
        self.triangle_instance = np.concatenate((np.zeros(self.ground_count, np.int32), instances[of] if len(things) else np.zeros(0, np.int32)))
        self.triangle_item = np.concatenate((np.full(self.ground_count, -1), of)).astype(np.int32)
        self.triangle_count = len(triangles)
        self.still = _embree(vertices, triangles)
        self.movers: dict[int, tuple[Any, Mesh]] = {}
        # what tells one house, car or coat from the next: colour, and how much it reflects
        self.rgb = np.array([*(t.rgb for t in things), *(a.rgb for a in self.actors), (1.0, 1.0, 1.0)], np.float32)
        self.gain = np.concatenate((np.random.default_rng([street.seed, 4]).uniform(0.75, 1.25, len(self.rgb) - 1), [1.0])).astype(np.float32)
        painted = 0.35 + 0.9 * self.rgb.mean(1)
        vehicle = np.array([*(t.kind in WINDOWED for t in things), *(a.kind != "pedestrian" for a in self.actors), False], bool)
        self.gain = np.where(vehicle, self.gain * painted, self.gain).astype(np.float32)
        windows = np.array([*(t.kind in WINDOWED for t in things), *(a.kind in WINDOWED for a in self.actors), False], bool)
        self.clear = np.where(windows, np.random.default_rng([street.seed, 6]).uniform(*CLEAR, len(self.rgb)), 0.0).astype(np.float32)

    def cast(self, origins: Array, directions: Array, times_s: Array) -> Hits:
        """The first thing on each of N rays from origins (N,3) in directions (N,3) of unit length at their times (N,)."""
        import open3d as o3d

        n = len(directions)
        rays = np.empty((n, 6), np.float32)
        rays[:, :3], rays[:, 3:] = origins, directions
        found = self.still.cast_rays(o3d.core.Tensor.from_numpy(rays), nthreads=1)
        distance = found["t_hit"].numpy()
        primitive = found["primitive_ids"].numpy()
        uv = found["primitive_uvs"].numpy()
        hit = np.isfinite(distance)
        index = np.where(hit, primitive, 0).astype(np.int64)
        material, category = self.triangle_material[index], self.triangle_category[index]
        instance, item = self.triangle_instance[index], self.triangle_item[index]
        normal = found["primitive_normals"].numpy()
        with np.errstate(invalid="ignore"):
            place = rays[:, :3] + rays[:, 3:] * np.where(hit, distance, 0)[:, None]
        self._mark(material, index, uv, hit)
        self._windows(material, item, normal, place, hit)
        category = np.where(hit, category, SKY).astype(np.uint8)
        instance, item = np.where(hit, instance, 0).astype(np.int32), item.copy()
        self._cast_movers(rays, np.asarray(times_s, np.float64), distance, material, category, instance, item, normal, place)
        facing = np.einsum("ij,ij->i", normal, rays[:, 3:])
        normal *= -np.sign(facing)[:, None]
        return Hits(distance, material, category, instance, item, normal, np.abs(facing), place)

    def cast_through(self, origins: Array, directions: Array, times_s: Array, rng: np.random.Generator) -> tuple[Hits, Array]:
        """As `cast`, but what looks through the windows of vehicles meets what is behind them; and (N,) f32 how much of the light comes back
        through the panes. Panes mirror what meets them head-on and let pass what comes at a slant."""
        hits = self.cast(origins, directions, times_s)
        light = np.ones(len(directions), np.float32)
        rows = np.arange(len(directions))
        for _ in range(PANES):
            rows = rows[hits.material[rows] == MATERIAL_INDEX["glass"]]
            clear = self.clear[hits.item[rows]]
            passing = clear / (1 + np.exp((hits.facing[rows] - MIRRORS_FROM) / 0.05))
            passes = rng.random(len(rows)) < passing
            rows, clear = rows[passes], clear[passes]
            if not len(rows):
                break
            reach = hits.range_m[rows] + PANE_M
            behind = self.cast(origins[rows] + directions[rows] * reach[:, None], directions[rows], times_s[rows])
            hits.range_m[rows] = reach + behind.range_m
            for name in ("material", "category", "instance", "item", "normal", "facing", "place"):
                getattr(hits, name)[rows] = getattr(behind, name)
            light[rows] *= clear**2  # there and back
        return hits, light

    def _cast_movers(self, rays: Array, times: Array, distance: Array, material: Array, category: Array, instance: Array, item: Array, normal: Array,
                     place: Array) -> None:  # fmt: skip
        import open3d as o3d

        middle_time = float((times.min() + times.max()) / 2)
        half_span = float(times.max() - times.min()) / 2
        middle = (rays[:, :3].min(0) + rays[:, :3].max(0)) / 2
        spread = float(np.linalg.norm(np.ptp(rays[:, :3], axis=0))) / 2
        for number, actor in enumerate(self.actors):
            x, y, z, _, pitch, speed = (float(v) for v in actor.at(middle_time))
            l, w, h = actor.size
            towards = np.array((x, y, z + h / 2)) - middle
            away = float(np.linalg.norm(towards))
            radius = float(np.sqrt(l * l + w * w + h * h)) / 2 + spread + speed * half_span + 0.3
            if away > SIGHT_M + radius:
                continue
            if away > radius:
                wide = np.sqrt(1 - (radius / away) ** 2)
                index = np.flatnonzero(rays[:, 3:] @ (towards / away).astype(np.float32) > wide)
            else:
                index = np.arange(len(rays))
            if not len(index):
                continue
            ax, ay, az, yaw, _, _ = actor.at(times[index])
            c, s = np.cos(yaw), np.sin(yaw)
            local = np.empty((len(index), 6))
            near, direction = rays[index, :3] - np.stack((ax, ay, az), 1), rays[index, 3:]
            for column, v in ((0, near), (3, direction)):
                along, across = c * v[:, 0] + s * v[:, 1], -s * v[:, 0] + c * v[:, 1]
                cp, sp = np.cos(pitch), np.sin(pitch)
                local[:, column], local[:, column + 1], local[:, column + 2] = cp * along + sp * v[:, 2], across, -sp * along + cp * v[:, 2]
            scene, mesh = self._mover(number)
            cast = np.ascontiguousarray(local, np.float32)
            found = scene.cast_rays(o3d.core.Tensor.from_numpy(cast), nthreads=1)
            t = found["t_hit"].numpy()
            nearer = np.flatnonzero(t < distance[index])
            if not len(nearer):
                continue
            at, triangle = index[nearer], found["primitive_ids"].numpy()[nearer].astype(np.int64)
            distance[at], material[at], category[at] = t[nearer], mesh.material[triangle], CATEGORY_INDEX[actor.kind]
            instance[at], item[at] = FIRST_MOVER + number, len(self.things) + number
            turned = rotations(yaw[nearer], np.full(len(nearer), pitch), np.zeros(len(nearer)))
            normal[at] = np.einsum("nij,nj->ni", turned, found["primitive_normals"].numpy()[nearer])
            place[at] = cast[nearer, :3] + cast[nearer, 3:] * t[nearer, None]

    def shaded(self, places: Array, sun: Array, time_s: float) -> Array:
        """Whether something stands between each of places (N,3) and the sun, in whose direction (3,) it lies."""
        import open3d as o3d

        rays = np.empty((len(places), 6), np.float32)
        rays[:, :3], rays[:, 3:] = places, sun
        dark = self.still.test_occlusions(o3d.core.Tensor.from_numpy(rays), nthreads=1).numpy()
        for number, actor in enumerate(self.actors):
            x, y, z, yaw, _, _ = (float(v) for v in actor.at(time_s))
            away = rays[:, :3] - np.array((x, y, z), np.float32)
            # the shadow is a cylinder around the line from the actor away from the sun
            off = away - (away @ sun)[:, None] * sun
            index = np.flatnonzero((np.einsum("ij,ij->i", off, off) < (actor.size[0] / 2 + actor.size[2]) ** 2) & ~dark)
            if not len(index):
                continue
            c, s = np.cos(yaw), np.sin(yaw)
            turn = np.array(((c, s, 0), (-s, c, 0), (0, 0, 1)), np.float32)
            local = np.concatenate((away[index] @ turn.T, np.broadcast_to(turn @ sun, (len(index), 3))), 1)
            scene = self._mover(number)[0]
            dark[index] = scene.test_occlusions(o3d.core.Tensor.from_numpy(np.ascontiguousarray(local, np.float32)), nthreads=1).numpy()
        return np.asarray(dark)

    def _mover(self, number: int) -> tuple[Any, Mesh]:
        if number not in self.movers:
            actor = self.actors[number]
            mesh = _SHAPES[actor.kind](*actor.size, np.random.default_rng([self.street.seed, 5, actor.number]))
            self.movers[number] = (_embree(mesh.vertices, mesh.triangles), mesh)
        return self.movers[number]

    def _mark(self, material: Array, index: Array, uv: Array, hit: Array) -> None:
        """Turns asphalt into paint where the road's markings are: centre and lane lines, edge lines, zebra crossings."""
        at = np.flatnonzero(hit & (index < self.ground_count))
        at = at[self.ground.road[index[at]] >= 0]
        if not len(at):
            return
        triangle = index[at]
        corners = self.ground.on_road[self.ground.triangles[triangle]]  # (K,3,2)
        u, v = uv[at, 0, None], uv[at, 1, None]
        s, offset = ((1 - u - v) * corners[:, 0] + u * corners[:, 1] + v * corners[:, 2]).T
        road = self.ground.road[triangle]
        painted = np.zeros(len(at), bool)
        for i, r in enumerate(self.street.roads):
            mine = road == i
            if not mine.any():
                continue
            o = np.abs(offset) - r.median / 2
            dashed = np.mod(s, 7.5) < 3.0
            lines = (np.abs(o) < 0.07) & (dashed | (r.lanes > 1))
            for lane in range(1, r.lanes):
                lines |= (np.abs(o - lane * r.lane_width) < 0.07) & dashed
            if i == 0:
                lines |= np.abs(o - r.lanes * r.lane_width) < 0.07
                for j in self.street.junctions:
                    for way in (-1, 1):
                        zebra = np.abs(s - (j.s + way * (self.street.roads[j.road].half_width + 3.0))) < 1.6
                        lines |= zebra & (np.mod(offset, 1.0) < 0.5) & (j.road % 2 == 0)
            painted |= mine & lines
        material[at[painted]] = MATERIAL_INDEX["marking"]

    def _windows(self, material: Array, item: Array, normal: Array, place: Array, hit: Array) -> None:
        """Turns walls of buildings into glass where their windows are."""
        at = np.flatnonzero(hit & (material == MATERIAL_INDEX["wall"]))
        at = at[np.abs(normal[at, 2]) < 0.3]
        kinds = np.array([t.kind == "building" for t in self.things] + [False])
        at = at[kinds[item[at]]]
        if not len(at):
            return
        along, up, number = self.on_wall(item[at], normal[at], place[at])
        wide = 2.2 + (number * 0.37) % 1.3
        glass = (np.mod(along, wide) > 0.55 * wide) & (np.mod(up, 2.9) > 1.0) & (np.mod(up, 2.9) < 2.3) & (number % 7 > 0)
        material[at[glass]] = MATERIAL_INDEX["glass"]

    def on_wall(self, item: Array, normal: Array, place: Array) -> tuple[Array, Array, Array]:
        """Metres along a wall from its building's middle, metres above its base, and the building's number, for hits (N,) on buildings."""
        x = np.array([t.x for t in self.things])
        y = np.array([t.y for t in self.things])
        number = np.array([t.number for t in self.things])
        along = -normal[:, 1] * (place[:, 0] - x[item]) + normal[:, 0] * (place[:, 1] - y[item])
        return along, place[:, 2] - self.base[item], number[item]


def _embree(vertices: Array, triangles: Array) -> Any:
    import open3d as o3d

    scene = o3d.t.geometry.RaycastingScene(nthreads=1)
    scene.add_triangles(
        o3d.core.Tensor.from_numpy(np.ascontiguousarray(vertices, np.float32)), o3d.core.Tensor.from_numpy(np.ascontiguousarray(triangles, np.uint32))
    )
    return scene
