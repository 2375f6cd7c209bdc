"""`simulate(seed)`: a street, its traffic and the ego vehicle's sensors as a log like any other, rendered when it is read.

Ego frame: x forward, y left, z up, above the middle of the rear axle and 0.93 m above the ground, where KITTI has its inertial unit. Stamps
of the scanner are the middle of its turn, when it faces forward. Rendering is a function of the seed and the index alone: the same
bytes however often and in whatever order, in any process.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.errors import UsageError
from sensors.geometry import inverse, pose_at
from sensors.records import Box, Image, Labels, Lidar, Log, PointLabels, RecordError, Sweep, Trajectory
from sensors.simulator import camera as cameras_module
from sensors.simulator.lidar import MODELS, Measurement, column_times, measure
from sensors.simulator.scene import CATEGORIES, FIRST_MOVER, Scene, standing_on
from sensors.simulator.streets import build_street
from sensors.simulator.traffic import EGO_BOX, drive, parked

Array = NDArray[Any]

LICENCE = "CC0-1.0"
EPOCH_NS, APART_NS = 1_700_000_000_000_000_000, 1_000_000_000_000  # stamps of seed 0, and from one seed to the next
MOST_SEED = 2_900_000  # stamps end at 2^62
TOP_SPEED_MPS = 22.0
BOXED_M = 120.0
MOVING_MPS = 0.2
KEPT_SWEEPS = 2
KEPT_TRUTHS = 160  # a few hundred kilobytes each; whoever stores a log asks for them after the payloads


def simulate(
    seed: int, *, seconds: float = 4.0, lidar: str = "hdl64", cameras: str | Sequence[str] = (), rate_hz: float = 10.0, every: int = 1
) -> Log:
    """The log of a seed. lidar: ``hdl64`` or ``hdl32``; cameras: ``none``, ``front``, ``six``, or names of single ones; the scanner turns
    rate_hz times a second, and each `every`-th turn is kept (with its pictures). UsageError for a name or number that makes no sense."""
    check(seed, seconds, lidar, cameras, rate_hz, every)
    return _Simulation(int(seed), float(seconds), lidar, cameras_module.chosen(cameras), float(rate_hz), int(every)).log


def check(seed: int, seconds: float, lidar: str, cameras: str | Sequence[str], rate_hz: float = 10.0, every: int = 1) -> None:
    """UsageError for what `simulate` would refuse."""
    if isinstance(seed, bool) or not 0 <= int(seed) <= MOST_SEED:
        raise UsageError(f"simulator: seed {seed!r} is not an integer of 0 .. {MOST_SEED}")
    if lidar not in MODELS:
        raise UsageError(f"simulator: lidar {lidar!r} is not one of {', '.join(MODELS)}")
    if not 0.2 <= seconds <= 120 or not 1 <= rate_hz <= 50 or every < 1:
        raise UsageError(f"simulator: {seconds} s at {rate_hz} Hz, every {every}: give 0.2 .. 120 s, 1 .. 50 Hz, every >= 1")
    cameras_module.chosen(cameras)


class _Simulation:
    """A log's street, traffic and sensors. Pickles as its arguments and what was planned; scenes are built anew where it is opened."""

    def __init__(self, seed: int, seconds: float, lidar: str, cameras: tuple[str, ...], rate_hz: float, every: int) -> None:
        self.seed = seed
        self.model = MODELS[lidar]()
        self.street, self.traffic = drive(build_street(seed, TOP_SPEED_MPS * seconds), seconds)
        self.period_ns = round(1e9 / rate_hz)
        self.start_ns = EPOCH_NS + seed * APART_NS
        turns = np.arange(0, int(np.floor(seconds * rate_hz + 1e-9)), every)
        jitter = np.random.default_rng([seed, 6]).integers(-200_000, 200_001, len(turns))  # clocks are good to 0.2 ms
        self.stamps = self.start_ns + turns * self.period_ns + jitter
        grid_ns = self.start_ns + np.round(self.traffic.times_s * 1e9).astype(np.int64)
        self.trajectory = Trajectory(grid_ns, self.traffic.world_from_ego, "log")
        self.cameras = {c.name: c for c in (cameras_module.build(name, rate_hz / every) for name in cameras)}
        self.image_stamps = {
            name: self.stamps + cameras_module.trigger_ns(camera, self.model.ego_from_lidar, self.period_ns) for name, camera in self.cameras.items()
        }
        wheel = np.arange(0, len(grid_ns), 5)
        rng = np.random.default_rng([seed, 7])
        measured = np.maximum(self.traffic.speed[wheel] * (1 + rng.normal(0, 0.003)) + rng.normal(0, 0.02, len(wheel)), 0.0)
        name = self.model.name
        scanner = Lidar(name, self.model.ego_from_lidar, rate_hz / every, len(self.model.elevations_rad), self.model.elevations_rad)
        self.log = Log(
            id=f"synthetic/street-{seed:06d}",
            dataset="synthetic",
            licence=LICENCE,
            ego_frame="above the middle of the rear axle, 0.93 m above the ground: x forward, y left, z up",
            lidars={name: scanner},
            cameras=self.cameras,
            poses=self.trajectory,
            sweep_stamps_ns={name: self.stamps},
            image_stamps_ns=self.image_stamps,
            read_sweep=self.read_sweep,
            read_image=self.read_image,
            open_labels=self.open_labels,
            measured_speed=(grid_ns[wheel], measured),
            ego_box=(EGO_BOX[0], EGO_BOX[1], EGO_BOX[2] + 0.15, EGO_BOX[3], EGO_BOX[4], EGO_BOX[5]),
            notes=(
                f"{self.street.style} street, {len(self.street.junctions)} junctions, {len(self.traffic.actors)} road users"
                + (", dense traffic" if self.street.density else ""),
            ),
        )
        self._recent: dict[int, Measurement] = {}
        self._truths: dict[tuple[str, int], tuple[Array, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "scene"} | {"_recent": {}, "_truths": {}}

    @cached_property
    def scene(self) -> Scene:
        return Scene(self.street, self.traffic)

    def _seconds(self, stamps_ns: Array | int) -> Array:
        return np.asarray((np.asarray(stamps_ns, np.int64) - self.start_ns) / 1e9)

    def _measure(self, lidar: str, index: int) -> Measurement:
        if lidar != self.model.name or not 0 <= index < len(self.stamps):
            raise RecordError(f"{self.log.id}: no sweep {index} of {lidar}; there are {len(self.stamps)} of {self.model.name}")
        if index not in self._recent:
            offsets = column_times(self.model, self.period_ns)
            stamps = self.stamps[index] + offsets
            rng = np.random.default_rng([self.seed, 8, index])
            found = measure(self.scene, self.model, pose_at(self.trajectory, stamps), self._seconds(stamps), offsets, rng)
            while len(self._recent) >= KEPT_SWEEPS:
                self._recent.pop(next(iter(self._recent)))
            self._recent[index] = found
            self._keep((lidar, index), (found.category, found.instance.astype(np.int16), found.missing))
        return self._recent[index]

    def _keep(self, key: tuple[str, int], truth: tuple[Array, ...]) -> None:
        while len(self._truths) >= KEPT_TRUTHS:
            self._truths.pop(next(iter(self._truths)))
        self._truths[key] = truth

    def _scanned(self, lidar: str, index: int) -> tuple[Array, ...]:
        """category (N,), instance (N,), missing (M,3) of a sweep."""
        if (lidar, index) not in self._truths:
            self._recent.pop(index, None)
            self._measure(lidar, index)
        return self._truths[lidar, index]

    def read_sweep(self, lidar: str, index: int) -> Sweep:
        m = self._measure(lidar, index)
        return Sweep(lidar, int(self.stamps[index]), m.points, m.intensity, m.ring, m.time_ns)

    def read_image(self, camera: str, index: int) -> Image:
        picture = self._picture(camera, index)
        record = self.cameras[camera]
        return Image(camera, int(self.image_stamps[camera][index]), cameras_module.encode(picture), record.width, record.height)

    def _picture(self, camera: str, index: int) -> Array:
        if camera not in self.cameras or not 0 <= index < len(self.stamps):
            there = f"{len(self.stamps)} of {', '.join(self.cameras)}" if self.cameras else "no cameras"
            raise RecordError(f"{self.log.id}: no image {index} of {camera}; there are {there}")
        stamp = self.image_stamps[camera][index]
        world_from_camera = pose_at(self.trajectory, stamp)[0] @ self.cameras[camera].ego_from_camera
        picture, depth, category = cameras_module.render(self.scene, self.cameras[camera], world_from_camera, float(self._seconds(stamp)))
        self._keep((camera, index), (depth, category))
        return picture

    def open_labels(self) -> Labels:
        """Boxes of everything on wheels or feet within 120 m at every sweep's stamp, in front of what hides it or behind."""
        return Labels(tuple(self._boxes()), CATEGORIES, np.pi, self.read_point_labels, self.read_camera_truth, self.read_missing_rays)

    def read_point_labels(self, lidar: str, index: int) -> PointLabels:
        category, instance, _ = self._scanned(lidar, index)
        speed = np.array([float(a.at(self._seconds(self.stamps[index]))[5]) for a in self.traffic.actors] + [0.0])
        which = np.where(instance >= FIRST_MOVER, instance - FIRST_MOVER, -1)
        return PointLabels(int(self.stamps[index]), category, instance, speed[which] > MOVING_MPS)

    def read_camera_truth(self, camera: str, index: int) -> tuple[Array, Array]:
        if (camera, index) not in self._truths:
            self._picture(camera, index)
        depth, category = self._truths[camera, index]
        return depth, category

    def read_missing_rays(self, lidar: str, index: int) -> Array:
        return self._scanned(lidar, index)[2]

    def _boxes(self) -> list[Box]:
        boxes = []
        ego_from_world = inverse(pose_at(self.trajectory, self.stamps))
        still = parked(self.street)
        ground = standing_on(self.street, still)
        moving = [a.at(self._seconds(self.stamps)) for a in self.traffic.actors]
        for i, stamp in enumerate(self.stamps):
            turn = ego_from_world[i]
            for thing, z in zip(still, ground, strict=True):
                centre = turn[:3, :3] @ (thing.x, thing.y, z + thing.height / 2) + turn[:3, 3]
                if np.hypot(centre[0], centre[1]) < BOXED_M:
                    size = np.array((thing.length, thing.width, thing.height))
                    boxes.append(self._box(int(stamp), f"{thing.kind}-parked-{thing.number:04d}", thing.kind, centre, size, thing.yaw, turn, 0.0))
            for actor, (x, y, z, yaw, pitch, speed) in zip(self.traffic.actors, moving, strict=True):
                up = actor.size[2] / 2
                lean = np.array((-np.sin(pitch[i]) * np.cos(yaw[i]), -np.sin(pitch[i]) * np.sin(yaw[i]), np.cos(pitch[i]))) * up
                centre = turn[:3, :3] @ (np.array((x[i], y[i], z[i])) + lean) + turn[:3, 3]
                if np.hypot(centre[0], centre[1]) < BOXED_M:
                    boxes.append(self._box(int(stamp), actor.track, actor.kind, centre, np.array(actor.size), float(yaw[i]), turn, float(speed[i])))
        return boxes

    def _box(self, stamp: int, track: str, kind: str, centre: Array, size: Array, yaw: float, ego_from_world: Array, speed: float) -> Box:
        heading = ego_from_world[:3, :3] @ (np.cos(yaw), np.sin(yaw), 0.0)
        return Box(stamp, track, kind, centre, size, float(np.arctan2(heading[1], heading[0])), heading[:2] * speed)
