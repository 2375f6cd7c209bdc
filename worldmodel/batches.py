"""Clips -> tensors: the only place where records and torch meet.

A clip is *prepared* once: its past sweeps in the state frame, rays drawn from the present and every future sweep, their evidence. What a
step sees of it (which rays, turned and mirrored how, what is withheld) is a function of (seed, epoch, position) alone, so that
workers, caches and restarts do not matter.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensors import evidence as past_evidence
from sensors.geometry import inverse, project, rotation_z, transform_points
from sensors.motion import motion_of
from sensors.rays import History, Rays, history_of, rays_of
from sensors.records import Clip, Frame
from worldmodel.config import Config, Encoder
from worldmodel.encoders.contract import Clouds
from worldmodel.heads.rays import NEAR_ENOUGH_RAD, RayInput
from worldmodel.model import Batch
from worldmodel.scene import AGE, PAST, Scene, scene_of

Array = NDArray[Any]

CHANGED_M = 0.5  # a ray counts as changed where the newest sweep's nearest reading is farther off
CHANGED_SHARE = 0.25
BORDER_RAD = float(np.deg2rad(1.5))
MOVER_CELL_M, MOVER_POINTS = 0.2, 2
MASKED_SHARE, MASK_M = 0.3, 4.0  # of the ground, in squares, that a dense clip does not show
DENSE_NEWEST_SHARE = 0.5  # of the dense clips show the newest sweep alone: what may move must be told by its shape
# where the directions beside a ray lie when left and right change places
AROUND_MIRRORED = [int(np.abs(past_evidence.AROUND_RAD - other).sum(1).argmin()) for other in past_evidence.AROUND_RAD * [-1, 1]]
Role = Literal["read", "dense", "prior"]
FULL_WEIGHT_M = 15.0


def rng_of(*key: int | str) -> np.random.Generator:
    """A generator that is a function of its key."""
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else int(part) for part in key]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))


def state_from_ego(clip: Clip, encoder: Encoder) -> Array:
    """4x4: the ego frame of t = 0 in the state frame."""
    return rotation_z(np.deg2rad(encoder.input_yaw_deg)) @ inverse(clip.log.lidars[clip.lidar].ego_from_lidar)


@dataclass(frozen=True, eq=False)
class RayTable:
    """Rays of several instants as arrays, row by row as `RayInput` has them, and their truth."""

    columns: dict[str, Array]

    def __len__(self) -> int:
        return len(self.columns["origin"])

    def take(self, rows: Array) -> RayTable:
        return RayTable({name: column[rows] for name, column in self.columns.items()})


RAY_COLUMNS = ("origin", "direction", "step", "horizon_s", "bearing", *past_evidence.FIELDS)


def ray_table(history: History, rays: Sequence[Rays], state_from_present: Array, steps: Sequence[int]) -> RayTable:
    """The rays of several instants with their evidence, in the state frame; steps: 0 for the present, k for the k-th future instant. The
    present has no evidence: the newest sweep would be the answer."""
    parts: dict[str, list[Array]] = {name: [] for name in RAY_COLUMNS}
    for asked, step in zip(rays, steps, strict=True):
        found = past_evidence.gather(history, asked) if step else past_evidence.nothing(history, len(asked.directions))
        pose = state_from_present @ asked.present_from_sensor
        d = asked.directions.astype(np.float64)
        count = len(d)
        flat = np.maximum(np.hypot(d[:, 0], d[:, 1]), 1e-9)
        parts["origin"].append(np.repeat(pose[None, :3, 3], count, 0).astype(np.float32))
        parts["direction"].append((d @ pose[:3, :3].T).astype(np.float32))
        parts["step"].append(np.full(count, step, np.int64))
        parts["horizon_s"].append(np.full(count, asked.horizon_s, np.float32))
        parts["bearing"].append(np.stack((np.arctan2(d[:, 2], flat), d[:, 1] / flat, d[:, 0] / flat), 1).astype(np.float32))
        for name, column in _near_enough(found).items():
            parts[name].append(column)
    return RayTable({name: np.concatenate(columns) for name, columns in parts.items()})


def _near_enough(found: past_evidence.Evidence) -> dict[str, Array]:
    """Evidence without readings that are too far off in angle to say anything; offsets and seen-through in half precision."""
    far = ~(found.angle < NEAR_ENOUGH_RAD)
    nearest, interpolated = found.nearest.copy(), found.interpolated.copy()
    nearest[far] = np.nan
    interpolated[far & np.isnan(found.quadrants).all(2)] = np.nan
    angle = np.where(far, np.nan, found.angle)
    half = np.float16
    return {"quadrants": found.quadrants, "interpolated": interpolated, "nearest": nearest, "offsets": found.offsets.astype(half),
            "angle": angle.astype(half), "seen": found.seen.astype(half), "along": found.along.astype(half),
            "around": found.around.astype(half), "paced": found.paced}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Prepared:
    """A clip ready for training: past clouds (N,5) x y z intensity dt in the state frame, newest first, as `latent_sweeps` asks; times_s (K,)
    of the future frames; clouds (N,5) of those future sweeps that `instants` (1..K) names; the ray table of the present and of these instants, with
    range, intensity, colour and weight beside it; scene: what the detail is made of; movers (M,5), zeros beside x y z: where things that were
    found to move are at t = 0, a point in each cube of MOVER_CELL_M."""

    id: str
    past: tuple[Array, ...]
    future: tuple[Array, ...]
    times_s: Array
    instants: tuple[int, ...]
    rays: RayTable
    scene: Scene
    movers: Array

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.past, *self.future, self.scene.still, self.scene.moving, self.movers, *self.rays.columns.values()))


def past_clouds(clip: Clip, history: History, config: Config) -> tuple[Array, ...]:
    """Clouds (N,5) f32 x y z intensity dt of the sweeps that the encoder sees, in the state frame, newest first, thinned to max_points."""
    to_state = state_from_ego(clip, config.encoder)
    clouds = []
    for back in config.model.latent_sweeps:
        at = len(history.points) - 1 - back
        cloud = with_dt(transform_points(to_state, history.points[at]), history.intensity[at], -history.times_s[at])
        most = config.encoder.max_points
        clouds.append(thinned(cloud, -(-most // 2) if back else most, rng_of("thin", clip.id, back)))
    return tuple(clouds)


def with_dt(points: Array, intensity: Array, dt_s: float) -> Array:
    """(N,5) f32: x y z, intensity, and for all of them dt_s, the time before the newest sweep."""
    return np.concatenate((points, intensity[:, None], np.full((len(points), 1), dt_s)), 1).astype(np.float32)


def joined(clouds: Sequence[Array], config: Config) -> tuple[Array, ...]:
    """What the encoder is shown: the clouds in one with join_sweeps, else as they are."""
    return (np.concatenate(clouds),) if config.model.join_sweeps else tuple(clouds)


def thinned(points: Array, most: int, rng: np.random.Generator) -> Array:
    """At most `most` of the points (0: all), in their order; near ones, which lie close together, are the first to go: a point's weight
    in the draw grows with its distance up to FULL_WEIGHT_M (Efraimidis & Spirakis, 2006)."""
    if not most or len(points) <= most:
        return points
    weight = np.clip(np.hypot(points[:, 0], points[:, 1]) / FULL_WEIGHT_M, 0.1, 1.0)
    keys = np.log(rng.random(len(points))) / weight
    return points[np.sort(np.argpartition(keys, -most)[-most:])]


def prepare(clip: Clip, config: Config) -> Prepared:
    """Everything about a clip that does not depend on epoch or augmentation."""
    shake = _PoseErrors(config, clip.id)
    history = shake(history_of(clip))
    to_state = state_from_ego(clip, config.encoder)
    past = past_clouds(clip, history, config)
    asked, truth, future = [], [], []
    chosen = rng_of("instants", config.seed, clip.id).permutation(len(clip.future))[: config.train.instants] + 1
    steps = [0, *sorted(chosen.tolist())]
    for step in steps:
        frame = clip.future[step - 1] if step else clip.past[-1]
        everything = rays_of(clip, frame, None)
        if step:
            everything = dataclasses.replace(everything, present_from_sensor=shake.error() @ everything.present_from_sensor)
        drawn, weight = _stratified(history, everything, config.train.stored_rays, rng_of("rays", config.seed, clip.id, step))
        asked.append(drawn)
        truth.append({"range": drawn.ranges, "intensity": drawn.intensity, "colour": _colours(clip, frame, drawn), "weight": weight})
        if step:
            local = everything.directions * everything.ranges[:, None]
            points = transform_points(to_state @ everything.present_from_sensor, local)
            future.append(thinned(with_dt(points, everything.intensity, 0.0), config.encoder.max_points, rng_of("thin future", clip.id, step)))
    table = ray_table(history, asked, to_state, steps)
    table.columns.update({name: np.concatenate([t[name] for t in truth]) for name in truth[0]})
    times = np.array([(frame.stamp_ns - clip.stamp_ns) / 1e9 for frame in clip.future])
    scene, movers = scene_of(history, to_state, config.encoder), _movers(history, to_state)
    return Prepared(clip.id, past, tuple(future), times, tuple(steps[1:]), table, scene, movers)


def _movers(history: History, state_from_present: Array) -> Array:
    """(M,5): see `Prepared`; cells with fewer than MOVER_POINTS of a mover's points are left out."""
    places = transform_points(state_from_present, motion_of(history).movers)
    cells, counts = np.unique(np.floor(places / MOVER_CELL_M).astype(np.int32), axis=0, return_counts=True)
    middles = (cells[counts >= MOVER_POINTS] + 0.5) * MOVER_CELL_M
    return np.concatenate((middles, np.zeros((len(middles), 2))), 1).astype(np.float32)


class _PoseErrors:
    """Small rigid errors for a clip's poses, as registration leaves them: of a size drawn per clip, one error per past sweep but the newest and
    one per future frame. Without them a model that learned on a simulator's exact poses is too sure on a road."""

    def __init__(self, config: Config, clip: str) -> None:
        self.rng = rng_of("poses", config.seed, clip)
        size = self.rng.random()
        self.metres, self.radians = config.train.pose_error_m * size, np.deg2rad(config.train.pose_error_deg) * size

    def error(self) -> Array:
        """4x4, present from present."""
        out = rotation_z(self.rng.normal(0, self.radians))
        tilt = self.rng.normal(0, self.radians, 2)
        out[:3, :3] = out[:3, :3] @ np.array([[1, 0, tilt[0]], [0, 1, tilt[1]], [-tilt[0], -tilt[1], 1]])
        out[:3, 3] = self.rng.normal(0, self.metres, 3)
        return out

    def __call__(self, history: History) -> History:
        if not self.metres and not self.radians:
            return history
        errors = [self.error() for _ in history.points[:-1]] + [np.eye(4)]
        points = tuple(transform_points(e, p) for e, p in zip(errors, history.points, strict=True))
        return dataclasses.replace(history, points=points, present_from_sensor=np.stack(errors) @ history.present_from_sensor, memo={})


def _stratified(history: History, rays: Rays, count: int, rng: np.random.Generator) -> tuple[Rays, Array]:
    """count of the rays, CHANGED_SHARE of them (if there are so many) where the newest sweep says something else, and weights that undo it."""
    few = rays.take(np.sort(rng.permutation(len(rays.directions))[: 3 * count]))
    if len(few.directions) <= count:
        return few, np.ones(len(few.directions), np.float32)
    sensor_from_present = inverse(rays.present_from_sensor)
    reading = past_evidence.newest_view(history, sensor_from_present, rays.horizon_s).nearest(few.directions)[0]
    changed = ~(np.abs(reading - few.ranges) < CHANGED_M)
    taken = min(int(changed.sum()), max(int(CHANGED_SHARE * count), round(count * changed.mean())))
    groups = ((changed, taken), (~changed, count - taken))
    rows = np.concatenate([rng.permutation(np.flatnonzero(group))[:most] for group, most in groups])
    share = np.concatenate([np.full(min(most, group.sum()), group.mean() * count / max(most, 1), np.float32) for group, most in groups])
    return few.take(rows), share


def _colours(clip: Clip, frame: Frame, rays: Rays) -> Array:
    """(R,3) f32 0..1 of the pixels in which cameras saw the returns; NaN where none did. Decoded at the image's own size."""
    from sensors.errors import WmError
    from sensors.formats.images import decode

    colours = np.full((len(rays.ranges), 3), np.nan, np.float32)
    ego_points = transform_points(clip.log.lidars[clip.lidar].ego_from_lidar, rays.directions * rays.ranges[:, None])
    for name, (index, _) in frame.images.items():
        camera = clip.log.cameras[name]
        try:
            pixels = decode(clip.log.read_image(name, index))
        except WmError:
            clip.log.counts[f"{name}: images unreadable, colour left out"] += 1
            continue
        if pixels.shape[:2] != (camera.height, camera.width):
            clip.log.counts[f"{name}: images of another size than its calibration, colour left out"] += 1
            continue
        places, _, inside = project(camera, transform_points(inverse(camera.ego_from_camera), ego_points))
        at = np.rint(places[inside]).astype(np.int64)
        colours[inside] = pixels[at[:, 1], at[:, 0]].astype(np.float32) / 255
    return colours


@dataclass(frozen=True, eq=False)
class Visit:
    """One clip in one step, after drawing, augmenting and withholding; newest: its newest past sweep without anything withheld;
    future_origin (2,3): the sensor at the future sweep and at this one. role: `read` has everything; `dense` no rays, `prior` no clouds and no rays
    that are read with the state."""

    id: str
    role: Role
    past: tuple[Array, ...]
    present: Array
    newest: Array
    movers: Array
    scene: Scene
    future: Array
    future_step: int
    future_origin: Array
    times_s: Array
    stateful: RayTable
    prior: RayTable


def visit(prepared: Prepared, config: Config, epoch: int, position: int, *, augment: bool = True, role: Role = "read") -> Visit:
    """What the step at (epoch, position) sees of a clip."""
    train = config.train
    rng = rng_of(config.seed, epoch, position, prepared.id)
    stateful, prior = [], []
    read, alone = (train.rays if role == "read" else 0), (0 if role == "dense" else train.prior_rays)
    for step in (0, *prepared.instants):
        rows = rng.permutation(np.flatnonzero(prepared.rays.columns["step"] == step))
        stateful.append(rows[:read])
        prior.append(rows[read : read + alone if step else read])  # of the present there is no evidence
    tables = [prepared.rays.take(np.concatenate(rows)) for rows in (stateful, prior)]
    nothing = np.zeros((0, 5), np.float32)
    past, pick = list(prepared.past) if role != "prior" else [nothing], int(rng.integers(max(len(prepared.future), 1)))
    future = prepared.future[pick] if prepared.future and role == "read" else nothing
    future_step = prepared.instants[pick] - 1 if prepared.future else 0
    origins = np.stack([_origin(prepared.rays, step) for step in (future_step + 1, 0)])
    present, newest, movers = np.ones(len(past), bool), past[0], prepared.movers
    scene = prepared.scene if role == "read" else Scene(np.zeros((0, 6), np.float32), np.zeros((0, 5), np.float32))
    for table in tables:
        table.columns["hidden"] = np.zeros(len(table), bool)
        table.columns["with_evidence"], table.columns["told"] = np.ones(len(table), bool), np.ones(len(table), bool)
    if augment:
        turn = _turn(rng, config)
        newest, movers, future, origins = (_turned(points, turn) for points in (newest, movers, future, origins))
        past = [_turned(points[rng.random(len(points)) >= train.point_drop * rng.random()], turn) for points in past]
        scene = _turned_scene(scene, turn)
        tables = [_turned_rays(table, turn) for table in tables]
        if config.model.join_sweeps and rng.random() < (DENSE_NEWEST_SHARE if role == "dense" else train.newest_share):
            past = past[:1]
        if role == "dense":
            past = _masked(rng, past)
        elif rng.random() < train.hidden_share:
            past, scene, present, tables = _withheld(rng, past, scene, present, tables)
        for table in tables:
            _drop_sweep(rng, table, train.sweep_drop, config.model.past)
        draw = rng.random(len(tables[0]))
        tables[0].columns["told"] = draw < train.evidence_share
        tables[0].columns["with_evidence"] &= draw < train.evidence_share + train.positions_share
    for table in tables:
        c = table.columns
        c["with_evidence"] &= ~(np.isnan(c["quadrants"]).all((1, 2)) & np.isnan(c["nearest"]).all(1))
    if config.model.join_sweeps:
        past, present = list(joined(past, config)), np.ones(1, bool)
    return Visit(prepared.id, role, tuple(past), present, newest, movers, scene, future, future_step, origins, prepared.times_s, tables[0], tables[1])


def _masked(rng: np.random.Generator, past: list[Array]) -> list[Array]:
    """The clouds without what stands on MASKED_SHARE of the ground, squares of MASK_M, the same ones for all."""
    size, shift = 64, rng.uniform(0, MASK_M, 2)  # a pattern that repeats after size squares, far outside of any map
    hidden = rng.random((size, size)) < MASKED_SHARE
    cells = [np.floor((points[:, :2] + shift) / MASK_M).astype(np.int64) % size for points in past]
    return [points[~hidden[at[:, 0], at[:, 1]]] for points, at in zip(past, cells, strict=True)]


def _origin(rays: RayTable, step: int) -> Array:
    """(3,) f32: where the rays of an instant begin; the state frame's origin where there are none."""
    found = rays.columns["origin"][rays.columns["step"] == step]
    return found[0] if len(found) else np.zeros(3, np.float32)


@dataclass(frozen=True)
class _Turn:
    """A similarity of the state frame: x -> scale * R(yaw) * diag(1, mirror, 1) * x."""

    yaw_rad: float
    mirror: float
    scale: float

    @property
    def linear(self) -> Array:
        """(3,3) without the scale."""
        return rotation_z(self.yaw_rad)[:3, :3] @ np.diag([1.0, self.mirror, 1.0])


def _turn(rng: np.random.Generator, config: Config) -> _Turn:
    train = config.train
    yaw = rng.uniform(-np.pi, np.pi) if train.rotate else 0.0
    mirror = -1.0 if train.flip and rng.random() < 0.5 else 1.0
    return _Turn(float(yaw), mirror, float(1 + train.scale * rng.uniform(-1, 1)))


def _turned(points: Array, turn: _Turn) -> Array:
    xyz = points[:, :3] @ (turn.scale * turn.linear).T.astype(np.float32)
    return np.concatenate((xyz, points[:, 3:]), 1)


def _turned_scene(scene: Scene, turn: _Turn) -> Scene:
    moving = _turned(scene.moving, turn)
    moving[:, 3:] = moving[:, 3:] @ (turn.scale * turn.linear[:2, :2]).T.astype(np.float32)
    still = _turned(scene.still, turn)
    still[:, PAST] *= np.float32(turn.scale)
    return Scene(still, moving)


def _turned_rays(table: RayTable, turn: _Turn) -> RayTable:
    """Rays, truth and evidence as a mirrored, scaled street would have given them: mirrored quadrants change sides."""
    c = dict(table.columns)
    linear = turn.linear.astype(np.float32)
    c["origin"] = c["origin"] @ (linear.T * np.float32(turn.scale))
    c["direction"] = c["direction"] @ linear.T
    for name in ("quadrants", "interpolated", "nearest", "range", "seen", "along", "around", "paced"):
        c[name] = (c[name] * turn.scale).astype(c[name].dtype)
    if turn.mirror < 0:
        other_side = [1, 0, 3, 2]
        c["quadrants"] = c["quadrants"][:, :, other_side]
        c["offsets"] = c["offsets"][:, :, other_side] * np.array([-1, 1], c["offsets"].dtype)
        c["bearing"] = c["bearing"] * np.array([1, -1, 1], np.float32)
        c["around"] = c["around"][:, AROUND_MIRRORED]
    return RayTable(c)


Inside = Callable[..., Array]  # (xy (...,2), margin, margin_m) -> (...) bool: within, or beyond the border by less than the margins


def _sector(rng: np.random.Generator) -> Inside:
    """A sector about the vehicle; margin in radians."""
    centre, half = rng.uniform(-np.pi, np.pi), np.deg2rad(rng.uniform(15, 45))

    def inside(xy: Array, margin: float = 0.0, margin_m: float = 0.0) -> Array:
        margin = margin + margin_m / np.maximum(np.hypot(xy[..., 0], xy[..., 1]), 1.0)
        return np.abs((np.arctan2(xy[..., 1], xy[..., 0]) - centre + np.pi) % (2 * np.pi) - np.pi) <= half + margin

    return inside


def _block(rng: np.random.Generator) -> Inside:
    """A round piece of the ground some way off; margin in fifths of its radius."""
    distance, bearing, radius = rng.uniform(5, 30), rng.uniform(-np.pi, np.pi), rng.uniform(2.5, 7)
    middle = distance * np.array([np.cos(bearing), np.sin(bearing)])
    return lambda xy, margin=0.0, margin_m=0.0: np.hypot(xy[..., 0] - middle[0], xy[..., 1] - middle[1]) <= radius * (1 + margin * 5) + margin_m


def _withheld(
    rng: np.random.Generator, past: list[Array], scene: Scene, present: Array, tables: list[RayTable]
) -> tuple[list[Array], Scene, Array, list[RayTable]]:
    """A sector, a block or the newest sweep taken out of all past input and of the evidence; rays that end there are marked hidden."""
    kind = rng.choice(["sector", "block", "sweep"], p=[0.55, 0.3, 0.15])
    if kind == "sweep":
        present = present.copy()
        present[0] = False
        past = [points[:0] if i == 0 else points for i, points in enumerate(past)]
        for table in tables:
            _forget(table, np.ones(len(table), bool), 0)
        still = scene.still[scene.still[:, AGE] > 0]
        still[:, PAST] = 0
        return past, Scene(still, scene.moving[:0]), present, tables
    inside = _sector(rng) if kind == "sector" else _block(rng)
    past = [points[~inside(points[:, :2])] for points in past]
    scene = Scene(*(points[~inside(points[:, :2])] for points in (scene.still, scene.moving)))
    beyond = 1 + scene.still[:, PAST] / np.maximum(np.linalg.norm(scene.still[:, :3], axis=1), 1.0)  # where the newest sweep's reading lies
    scene.still[inside(scene.still[:, :2] * beyond[:, None], BORDER_RAD), PAST] = 0
    for table in tables:
        _lose_pace(table)
        _erase(table, inside)
    return past, scene, present, tables


def _erase(table: RayTable, inside: Inside) -> None:
    """Mark rays that end inside as hidden, and take what lies there, and what tells of it, from the evidence of all."""
    c = table.columns
    o, d = c["origin"][:, None, :2], c["direction"][:, None, :2]
    c["hidden"] = inside((c["origin"] + c["direction"] * c["range"][:, None])[:, :2])
    for name in ("interpolated", "nearest"):
        place = o + d * np.nan_to_num(c[name])[:, :, None]
        c[name] = np.where(inside(place, BORDER_RAD), np.nan, c[name])
    place = o[:, :, None] + d[:, :, None] * np.nan_to_num(c["quadrants"])[..., None]
    c["quadrants"] = np.where(inside(place, BORDER_RAD), np.nan, c["quadrants"])
    nearest = c["nearest"][:, : c["seen"].shape[1]]
    gone = np.isnan(nearest)
    place = o[:, :, None] + d[:, :, None] * np.nan_to_num(nearest[:, :, None] + c["seen"])[..., None]  # of one sweep's reading towards another's
    c["seen"] = np.where(gone[:, :, None] | gone[:, None, :] | inside(place, BORDER_RAD), np.nan, c["seen"])
    place = o + d * past_evidence.ALONG_M[:, None]
    c["along"] = np.where(inside(place, BORDER_RAD, past_evidence.ALONG_LIMIT_M)[:, None], np.nan, c["along"]).astype(c["along"].dtype)
    cos, sin = np.cos(past_evidence.AROUND_RAD[:, 0]), np.sin(past_evidence.AROUND_RAD[:, 0])
    beside = np.stack((d[..., 0] * cos - d[..., 1] * sin, d[..., 0] * sin + d[..., 1] * cos), 2)
    place = o + beside * np.nan_to_num(c["around"]).astype(np.float32)[..., None]
    c["around"] = np.where(inside(place, BORDER_RAD), np.nan, c["around"]).astype(c["around"].dtype)
    c["offsets"] = np.where(np.isnan(c["quadrants"])[..., None], np.nan, c["offsets"]).astype(c["offsets"].dtype)
    c["angle"] = np.where(np.isnan(c["nearest"]), np.nan, c["angle"])


def _forget(table: RayTable, rows: Array, sweep: int) -> None:
    """Take one sweep's readings (0 = the newest, whose copies go with it) from the evidence of the given rows (R,) bool."""
    c = table.columns
    sweeps = c["seen"].shape[1]
    _clear(table, rows, [sweep, *range(sweeps, c["nearest"].shape[1])] if sweep == 0 else [sweep])
    c["seen"] = c["seen"].copy()
    c["seen"][rows, sweep] = np.nan
    c["seen"][rows, :, sweep] = np.nan
    if sweep == 0:
        c["around"] = c["around"].copy()
        c["around"][rows] = np.nan
    else:
        c["paced"] = c["paced"].copy()
        c["paced"][rows, sweep - 1] = np.nan
    if sweep % past_evidence.ALONG_EVERY == 0:
        c["along"] = c["along"].copy()
        c["along"][rows, sweep // past_evidence.ALONG_EVERY] = np.nan


def _lose_pace(table: RayTable) -> None:
    """Take out what is read as if it kept pace with the sensor: it was measured elsewhere than where the ray would meet it, maybe in a place
    that is withheld."""
    table.columns["paced"] = np.full_like(table.columns["paced"], np.nan)
    _clear(table, slice(None), [-1])


def _clear(table: RayTable, rows: Array | slice, slots: Sequence[int]) -> None:
    """Take the readings of some slots from rows (R,) bool."""
    for name in ("quadrants", "interpolated", "nearest", "offsets", "angle"):
        column = table.columns[name] = table.columns[name].copy()
        for slot in slots:
            column[rows, slot] = np.nan


def _drop_sweep(rng: np.random.Generator, table: RayTable, share: float, sweeps: int) -> None:
    which = rng.integers(sweeps, size=len(table))
    drop = rng.random(len(table)) < share
    for sweep in range(sweeps):
        if (drop & (which == sweep)).any():
            _forget(table, drop & (which == sweep), sweep)


def ray_input(table: RayTable, of: Array, device: torch.device | str = "cpu") -> RayInput:
    """The rays as tensors; of (N,): which clip of the batch each belongs to."""

    def tensor(name: str) -> Tensor:
        column = table.columns[name]
        return torch.from_numpy(np.ascontiguousarray(column, np.float32 if column.dtype.kind == "f" else None)).to(device)

    fields = {name: tensor(name) for name in RAY_COLUMNS}
    if "with_evidence" in table.columns:
        keep, told = tensor("with_evidence"), tensor("told")
    else:
        keep = ~torch.cat((fields["quadrants"].flatten(1), fields["nearest"]), 1).isnan().all(1)
        told = torch.ones_like(keep)
    return RayInput(of=torch.from_numpy(of).to(device), with_evidence=keep, told=told, **fields)


COLUMNS = ("x", "y", "z", "intensity", "dt")


def clouds_of(clouds: Sequence[Array], encoder: Encoder, device: torch.device | str = "cpu") -> Clouds:
    """Clouds (N,5) x y z intensity dt as the columns that the encoder's `features` name."""
    wanted = [COLUMNS.index(name) for name in encoder.features]
    rows = np.concatenate([np.zeros((0, len(COLUMNS)), np.float32), *clouds])[:, wanted]
    return Clouds(torch.from_numpy(np.ascontiguousarray(rows, np.float32)).to(device), tuple(len(c) for c in clouds))


def scene_clouds(scenes: Sequence[Scene], times_s: Sequence[Sequence[float]], device: torch.device | str = "cpu") -> tuple[Clouds, Clouds]:
    """What stands in B scenes, and what moves in each at each of K instants: B clouds (N,6) and B*K clouds (N,3), as `Detail` takes them."""

    def joint(parts: list[Array]) -> Clouds:
        return Clouds(torch.from_numpy(np.concatenate(parts)).to(device), tuple(map(len, parts)))

    moving = [scene.moving_at(seconds) for scene, times in zip(scenes, times_s, strict=True) for seconds in times]
    return joint([scene.still for scene in scenes]), joint(moving)


def collate(visits: Sequence[Visit], config: Config, device: torch.device | str = "cpu", *, foretell: bool = True) -> Batch:
    """Visits -> a batch. They come by role, as `Role` lists them, and rays that are read with the state before others; foretell: the latents of the
    future."""
    tables = [v.stateful for v in visits] + [v.prior for v in visits]
    seen, read = [v for v in visits if v.role != "prior"], [v for v in visits if v.role == "read"]
    of = np.concatenate([np.full(len(t), i % len(visits), np.int64) for i, t in enumerate(tables)])
    table = RayTable({name: np.concatenate([t.columns[name] for t in tables]) for name in tables[0].columns})
    encoder = config.encoder
    still, moving = scene_clouds([v.scene for v in read], [[0.0, *v.times_s] for v in read], device)
    tensor = lambda name: torch.from_numpy(np.ascontiguousarray(table.columns[name])).to(device)  # noqa: E731
    return Batch(
        clouds=clouds_of([p for v in seen for p in v.past], encoder, device),
        present=torch.from_numpy(np.stack([v.present for v in seen])).to(device),
        times_s=torch.from_numpy(np.stack([v.times_s for v in read]).astype(np.float32)).to(device),
        rays=ray_input(table, of, device),
        stateful=sum(len(v.stateful) for v in visits),
        ranges=tensor("range").float(),
        weight=tensor("weight").float(),
        hidden=tensor("hidden"),
        intensity=tensor("intensity").float(),
        colour=tensor("colour").float(),
        movers=clouds_of([v.movers for v in seen], encoder, device),
        still=still,
        moving=moving,
        newest=clouds_of([v.newest for v in seen], encoder, device),
        newest_origin=torch.from_numpy(np.stack([v.future_origin[1] for v in seen])).to(device),
        future=clouds_of([v.future for v in read], encoder, device) if len(read[0].times_s) else None,
        future_step=torch.tensor([v.future_step for v in read], device=device),
        future_origin=torch.from_numpy(np.stack([v.future_origin[0] for v in read])).to(device),
        foretell=foretell,
        clips=tuple(v.id for v in visits),
    )
