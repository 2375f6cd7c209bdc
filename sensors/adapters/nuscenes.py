"""nuScenes: the 13 JSON tables of `VERSION/` (v1.0-mini, v1.0-trainval, v1.0-test or somebody's own), with `samples/` and `sweeps/` beside it.

One log a scene. The source is the folder that holds `VERSION/`, or that folder itself; option ``version=v1.0-mini`` where there are several.
Sensors are all of modality `lidar` and `camera`, by channel; radar is left out and counted. The ego frame is the middle of the rear axle at
the ground, x forward, y left, z up. Rows are joined by token; `next` and `prev` are only ever followed where a loop ends the walk.

LIDAR_TOP's own axes are x right, y forward, z up. Points are turned to x forward, y left once, here, and `ego_from_lidar` with them.

A LiDAR's stamp is the **end** of its turn, a camera's the trigger of the exposure (the authors, nuscenes-devkit issues 180 and 1004).
**Sweeps are motion-compensated to their stamp**, which the format nowhere says and the data show: rings of the real keyframe (scene-0061,
about 9 m/s) scatter by 0.37 degrees in elevation, and by 0.02 degrees once 0.44 m forward over 50 ms are undone, latest column unmoved; with the
first or the middle column unmoved they scatter by 0.2. Whether turning was compensated too, and in every scene, one keyframe cannot say.
Misses are kept in the files as points at the origin, so that points lie in firing order: where rings run 0..31 over and over, each point's time
follows from its column (46.08 microseconds a firing of the HDL-32E). Elsewhere a point has no time.

Poses: every item has its own `ego_pose`, and the trajectory is all of them; where LiDAR and camera differ at one stamp, the LiDAR's stays. In
the original data they are planar (z = 0). Velocities of boxes are central differences over at most 1.5 s a step, as in the devkit.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sensors.adapters.base import in_order
from sensors.errors import UsageError, WmError, one_line
from sensors.formats.images import MAX_BYTES, image_size
from sensors.formats.payloads import locate_beneath, read_beneath
from sensors.formats.points import read_bin, usable
from sensors.geometry import from_rotation_translation, inverse, points_in, pose_at, rotation_from_quaternion, transform_points
from sensors.records import MAX_POINTS, Box, Camera, Image, Labels, Lidar, Log, PointLabels, RecordError, Sweep, Trajectory

Array = NDArray[Any]

LICENCE = "CC BY-NC-SA 4.0"
SIMULATED = "CC0-1.0"  # of tables that `wm synth` wrote, whose vehicle is called synthetic
TABLE_BYTES = 8 << 30
LIDAR_RATE_HZ, CAMERA_RATE_HZ = 20.0, 12.0
# our points (x forward, y left) of points on the sensor's axes (x right, y forward)
LIDAR_FROM_NATIVE = np.array([[0, 1.0, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
BEAMS, FIRING_NS, MAX_COLUMNS = 32, 46_080, 1500
# The Renault Zoe from its rear axle at the ground: 4.08 x 1.73 m, overhangs 0.66 and 0.84 m, mirrors and the roof rack with the sensors.
EGO_BOX = (-0.75, -1.0, -0.1, 3.5, 1.0, 2.0)
MAX_STEP_S = 1.5
MOVING_MPS = 0.5
_VERSION = re.compile(r"v1\.0-[A-Za-z0-9_-]{1,64}")
_MARKS = ("scene.json", "sample_data.json", "calibrated_sensor.json")
_SPACE = re.compile(r"[ \t\r\n]*")


def recognise(path: Path) -> float:
    return 1.0 if _versions(path) else 0.0


def open_logs(path: Path, options: Mapping[str, str]) -> Iterator[Log]:
    """The scenes at `path` in the order of their names. Option: version, needed where the folder holds several."""
    folder = tables_of(path, options)
    try:
        tables = _Tables(folder)
    except RecordError as error:
        return map(_refuse, [RecordError(f"nuscenes/{folder.name}: {error}")])
    return map(tables.open_scene, sorted(tables.scenes, key=lambda scene: (scene.name, scene.token)))


def tables_of(path: Path, options: Mapping[str, str]) -> Path:
    """The folder VERSION/ that `path` and the option version mean; UsageError where that is none or not one."""
    if unknown := set(options) - {"version"}:
        raise UsageError(f"nuscenes has no option {one_line(', '.join(sorted(unknown)))}; it has: version")
    versions = _versions(path)
    wanted = options.get("version")
    chosen = [folder for folder in versions if wanted in (None, folder.name)]
    if len(chosen) != 1:
        found = ", ".join(folder.name for folder in versions) or "none"
        what = "holds several versions" if chosen else "has no tables of that version" if wanted else "has no folder v1.0-* with tables"
        raise UsageError(f"{one_line(path)}: {what} (found: {one_line(found)}); give the folder that holds VERSION/ and samples/, or VERSION/ itself")
    return chosen[0]


class Keyframe(NamedTuple):
    """A sample: its token, its stamp (the LiDAR's), and world_from_ego (4,4) then, as the tables have it."""

    token: str
    stamp_ns: int
    world_from_ego: Array


def keyframes(folder: Path, logs: Set[str]) -> dict[str, tuple[Keyframe, ...]]:
    """By id of `open_logs` the samples of those scenes of VERSION/ that `logs` names, in order of time: what results for the tables refer to.
    RecordError where a table is unreadable or a sample has no pose."""
    tables = _Tables(folder)
    found = {}
    for scene in tables.scenes:
        if f"nuscenes/{scene.name}" in logs:
            recording = _Recording(tables, scene)
            if recording.log.poses is None:
                raise RecordError(f"nuscenes/{one_line(scene.name)}: no poses; results are given in the world")
            stamps = sorted((stamp * 1000, token) for token, stamp in recording.sample_stamps.items())
            poses = pose_at(recording.log.poses, np.array([stamp for stamp, _ in stamps]))
            found[recording.log.id] = tuple(Keyframe(token, stamp, pose) for (stamp, token), pose in zip(stamps, poses, strict=True))
    return found


def _refuse(error: RecordError) -> Log:
    raise error


def _versions(path: Path) -> list[Path]:
    try:
        path = path.resolve()
        folders = [path] if _VERSION.fullmatch(path.name) else list(path.iterdir()) if path.is_dir() else []
        return sorted(f for f in folders if _VERSION.fullmatch(f.name) and all((f / mark).is_file() for mark in _MARKS))
    except OSError:
        return []


# ---- tables ----


class _Scene(NamedTuple):
    token: str
    name: str
    log_token: str
    first_sample_token: str


class _Sample(NamedTuple):
    token: str
    scene_token: str
    timestamp: int
    next: str


class _Data(NamedTuple):
    token: str
    sample_token: str
    ego_pose_token: str
    calibrated_sensor_token: str
    filename: str
    timestamp: int
    width: int
    height: int


class _Calibration(NamedTuple):
    token: str
    sensor_token: str
    translation: tuple[float, ...]
    rotation: tuple[float, ...]
    camera_intrinsic: tuple[float, ...]


class _Sensor(NamedTuple):
    token: str
    channel: str
    modality: str


class _Pose(NamedTuple):
    token: str
    timestamp: int
    translation: tuple[float, ...]
    rotation: tuple[float, ...]


class _Drive(NamedTuple):
    token: str
    vehicle: str
    location: str


class _Annotation(NamedTuple):
    token: str
    sample_token: str
    instance_token: str
    translation: tuple[float, ...]
    size: tuple[float, ...]
    rotation: tuple[float, ...]
    num_lidar_pts: int
    next: str
    prev: str


class _Instance(NamedTuple):
    token: str
    category_token: str


class _Category(NamedTuple):
    token: str
    name: str
    index_: int  # a tuple has an `index` already


class _PointFile(NamedTuple):
    token: str
    sample_data_token: str
    filename: str


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 4096:
        raise ValueError
    return value


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < 2**62 // 1000:
        raise ValueError
    return value


def _optional_integer(value: object) -> int:
    return -1 if value is None else _integer(value)


def _numbers(count: int) -> Callable[[object], tuple[float, ...]]:
    def check(value: object) -> tuple[float, ...]:
        if not isinstance(value, list) or len(value) != count or any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
            raise ValueError
        numbers = tuple(map(float, value))
        if not np.isfinite(numbers).all() or max(map(abs, numbers)) > 1e7:
            raise ValueError
        return numbers

    return check


def _intrinsic(value: object) -> tuple[float, ...]:
    """Nine numbers of a 3x3 list of lists, none of an empty list (not a camera)."""
    if not isinstance(value, list) or any(not isinstance(row, list) for row in value):
        raise ValueError
    return _numbers(9)([number for row in value for number in row]) if value else ()


_FIELDS: dict[str, Callable[[object], Any]] = {
    "timestamp": _integer,
    "translation": _numbers(3),
    "rotation": _numbers(4),
    "size": _numbers(3),
    "camera_intrinsic": _intrinsic,
    "width": _optional_integer,
    "height": _optional_integer,
    "num_lidar_pts": _integer,
    "index": _optional_integer,
}
_TABLES: dict[str, type[tuple[Any, ...]]] = {
    "scene": _Scene,
    "log": _Drive,
    "sample": _Sample,
    "sample_data": _Data,
    "calibrated_sensor": _Calibration,
    "sensor": _Sensor,
    "ego_pose": _Pose,
    "sample_annotation": _Annotation,
    "instance": _Instance,
    "category": _Category,
    "lidarseg": _PointFile,
}


def _rows(text: str, file: str) -> Iterator[object]:
    """The elements of a JSON list one after the other: a table of millions of rows is never held as objects of Python's as a whole."""

    def constant(name: str) -> object:
        raise ValueError(f"{name} is no number")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(row := dict(items)) != len(items):
            raise ValueError("a key twice in one row")
        return row

    decoder = json.JSONDecoder(parse_constant=constant, object_pairs_hook=pairs)

    def space(position: int) -> int:
        match = _SPACE.match(text, position)
        return match.end() if match else position

    at = space(0)
    try:
        if text[at : at + 1] != "[":
            raise ValueError("no list")
        at = space(at + 1)
        more = text[at : at + 1] != "]"
        while more:
            row, at = decoder.raw_decode(text, at)
            yield row
            at = space(at)
            more = text[at : at + 1] == ","
            at = space(at + 1) if more else at
        if text[at : at + 1] != "]" or space(at + 1) != len(text):
            raise ValueError("cut off, or something after the list")
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{file}: not a JSON list of rows ({one_line(error, 80)}, near character {at}); fetch it again") from error


def _table(folder: Path, name: str, counts: Counter[str]) -> Iterator[Any]:
    """Rows of the table `name`, checked; a row with a field absent or of another type, or with a token that was there before, is counted."""
    kind = _TABLES[name]
    fields = [field.rstrip("_") for field in kind._fields]  # type: ignore[attr-defined]
    checks = [_FIELDS.get(field, _text) for field in fields]
    try:
        text = read_beneath(folder, f"{name}.json", TABLE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"{name}.json: not UTF-8 ({one_line(error, 80)}); fetch it again") from error
    seen = set()
    for row in _rows(text, f"{name}.json"):
        try:
            if not isinstance(row, dict):
                raise ValueError
            checked = kind(*(check(row.get(field)) for check, field in zip(checks, fields, strict=True)))
        except (ValueError, OverflowError):
            counts[f"table {name}: unreadable rows"] += 1
            continue
        if checked[0] in seen:
            counts[f"table {name}: same token again"] += 1
            continue
        seen.add(checked[0])
        yield checked


class _Tables:
    """All tables but those of labels, grouped by scene."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: Counter[str] = Counter()

        def by_token(name: str) -> dict[str, Any]:
            return {row.token: row for row in _table(folder, name, self.counts)}

        self.sensors: dict[str, _Sensor] = by_token("sensor")
        self.calibrations: dict[str, _Calibration] = by_token("calibrated_sensor")
        self.drives: dict[str, _Drive] = by_token("log")
        self.scenes: list[_Scene] = list(_table(folder, "scene", self.counts))
        if not self.scenes:
            raise RecordError("scene.json: no readable row; fetch it again")
        self.samples: dict[str, dict[str, _Sample]] = {scene.token: {} for scene in self.scenes}
        scene_of_sample = {}
        for sample in _table(folder, "sample", self.counts):
            if sample.scene_token not in self.samples:
                self.counts["table sample: token of a scene that is not there"] += 1
                continue
            self.samples[sample.scene_token][sample.token] = sample
            scene_of_sample[sample.token] = sample.scene_token
        self.poses: dict[str, _Pose] = by_token("ego_pose")
        self.data: dict[str, list[_Data]] = defaultdict(list)
        for data in _table(folder, "sample_data", self.counts):
            if data.sample_token in scene_of_sample:
                self.data[scene_of_sample[data.sample_token]].append(data)
            else:
                self.counts["table sample_data: token of a sample that is not there"] += 1

    def open_scene(self, scene: _Scene) -> Log:
        try:
            return _Recording(self, scene).log
        except WmError as error:
            raise RecordError(f"nuscenes/{one_line(scene.name)}: {error}") from error


class _Item(NamedTuple):
    """A payload: its sample_data token and its file beneath the root."""

    token: str
    name: str


class _Recording:
    """One scene: what its rows say, and the log that reads its files. It keeps nothing of other scenes, so that it travels light."""

    def __init__(self, tables: _Tables, scene: _Scene) -> None:
        self.folder, self.root, self.scene = tables.folder, tables.folder.parent, scene
        self.counts: Counter[str] = Counter(tables.counts)
        self.read_already: set[tuple[str, int]] = set()
        self.sample_stamps = {token: sample.timestamp for token, sample in tables.samples[scene.token].items()}
        self._check_chain(tables.samples[scene.token])
        drive = tables.drives.get(scene.log_token)
        if drive is None:
            self.counts["table log: token of the scene's log is not there"] += 1

        by_channel: dict[str, list[_Data]] = defaultdict(list)
        modality: dict[str, str] = {}
        for row in tables.data[scene.token]:
            calibration = tables.calibrations.get(row.calibrated_sensor_token)
            sensor = tables.sensors.get(calibration.sensor_token) if calibration else None
            if sensor is None:
                self.counts["sample_data: token of a calibrated_sensor or sensor that is not there, dropped"] += 1
                continue
            by_channel[sensor.channel].append(row)
            modality[sensor.channel] = sensor.modality
        poses = self._poses(tables, by_channel, modality)

        self.items: dict[str, list[_Item]] = {}
        lidars, cameras, sweep_stamps, image_stamps = {}, {}, {}, {}
        files = [self.folder / f"{name}.json" for name in ("scene", "log", "sample", "sample_data", "calibrated_sensor", "sensor", "ego_pose")]
        for channel in sorted(by_channel):
            if modality[channel] not in ("lidar", "camera"):
                self.counts[f"{one_line(channel)}: not a LiDAR or camera, left out"] += len(by_channel[channel])
                continue
            try:
                calibration, rows = self._calibrated(tables, channel, by_channel[channel])
                stamps = self._listed(channel, rows)
                if modality[channel] == "lidar":
                    lidars[channel] = self._lidar(channel, calibration, _rate(stamps, LIDAR_RATE_HZ))
                    sweep_stamps[channel] = stamps
                else:
                    cameras[channel] = self._camera(channel, calibration, rows, _rate(stamps, CAMERA_RATE_HZ))
                    image_stamps[channel] = stamps
            except RecordError as error:
                self.counts[f"{one_line(channel)}: left out ({error})"] += 1
                continue
            files += [self.root / item.name for item in self.items[channel]]
        notes = [f"recorded by {one_line(drive.vehicle, 80)} in {one_line(drive.location, 80)}"] if drive else []
        if poses is not None and not poses.world_from_ego[:, 2, 3].any():
            notes.append("poses are planar: their z is always 0")
        self.log = Log(
            id=f"nuscenes/{scene.name}",
            dataset="nuscenes",
            licence=SIMULATED if drive and drive.vehicle == "synthetic" else LICENCE,
            ego_frame="middle of the rear axle, at the ground: x forward, y left, z up",
            lidars=lidars,
            cameras=cameras,
            poses=poses,
            sweep_stamps_ns=sweep_stamps,
            image_stamps_ns=image_stamps,
            read_sweep=self.read_sweep,
            read_image=self.read_image,
            open_labels=self.open_labels,
            intensity_scale=255.0,
            ego_box=EGO_BOX,
            files=tuple(files),
            counts=+self.counts,
            notes=tuple(notes),
        )
        self.counts = self.log.counts

    def _check_chain(self, samples: Mapping[str, _Sample]) -> None:
        """Samples are taken by their scene token; a chain of `next` that says otherwise (cut, looped, into another scene) is counted."""
        visited: set[str] = set()
        at = self.scene.first_sample_token
        while at in samples and at not in visited:
            visited.add(at)
            at = samples[at].next
        self.counts["samples: not reached by the chain of next"] += len(samples) - len(visited)
        self.counts["samples: chain of next does not end"] += at != ""

    def _poses(self, tables: _Tables, by_channel: Mapping[str, Sequence[_Data]], modality: Mapping[str, str]) -> Trajectory | None:
        """The ego poses of all items; of several at one stamp a LiDAR's stays."""
        found: dict[int, _Pose] = {}
        for channel in sorted(by_channel, key=lambda channel: (modality[channel] != "lidar", channel)):
            for row in by_channel[channel]:
                pose = tables.poses.get(row.ego_pose_token)
                if pose is None:
                    self.counts[f"{one_line(channel)}: token of an ego_pose that is not there"] += 1
                    continue
                self.counts[f"{one_line(channel)}: ego_pose of another stamp"] += pose.timestamp != row.timestamp
                found.setdefault(pose.timestamp, pose)
        rotations = np.array([pose.rotation for pose in found.values()]).reshape(-1, 4)
        norms = np.linalg.norm(rotations, axis=1)
        good = (norms > 0.9) & (norms < 1.1) & (np.array(list(found)) >= 0)
        self.counts["poses: no rotation, or stamp below zero, dropped"] += int((~good).sum())
        self.counts["poses: quaternion normalised"] += int((good & (np.abs(norms - 1) > 1e-3)).sum())
        if not good.any():
            return None
        world_from_ego = np.tile(np.eye(4), (int(good.sum()), 1, 1))
        world_from_ego[:, :3, :3] = rotation_from_quaternion(rotations[good])
        world_from_ego[:, :3, 3] = np.array([pose.translation for pose in found.values()])[good]
        stamps = np.array(list(found), np.int64)[good] * 1000
        order = np.argsort(stamps)
        return Trajectory(stamps[order], world_from_ego[order], "log")

    def _calibrated(self, tables: _Tables, channel: str, rows: Sequence[_Data]) -> tuple[_Calibration, list[_Data]]:
        """The calibration that most rows of a channel name, and those rows."""
        token, _ = Counter(row.calibrated_sensor_token for row in rows).most_common(1)[0]
        kept = [row for row in rows if row.calibrated_sensor_token == token]
        self.counts[f"{one_line(channel)}: calibrated otherwise than the most, dropped"] += len(rows) - len(kept)
        return tables.calibrations[token], kept

    def _listed(self, channel: str, rows: Sequence[_Data]) -> Array:
        """Stamps (N,) of the rows whose file is there; the files are kept in `items`."""
        present, errors = [], []
        for row in rows:
            try:
                path = locate_beneath(self.root, row.filename)
            except RecordError as error:
                errors.append(error)
                continue
            if not os.path.isfile(path):
                self.counts[f"{one_line(channel)}: listed, file absent"] += 1
            elif row.timestamp < 0:
                self.counts[f"{one_line(channel)}: stamp below zero, dropped"] += 1
            else:
                present.append(row)
        if errors:
            self.counts[f"{one_line(channel)}: not opened (the first: {errors[0]})"] += len(errors)
        stamps, kept = in_order([row.timestamp * 1000 for row in present], present, one_line(channel), self.counts)
        self.items[channel] = [_Item(row.token, row.filename) for row in kept]
        if not kept:
            raise RecordError(f"none of {len(rows)} files is there")
        return stamps

    def _lidar(self, channel: str, calibration: _Calibration, rate_hz: float) -> Lidar:
        """Beams and their elevations (the median of each ring) from the first sweep that is readable."""
        native = from_rotation_translation(rotation_from_quaternion(np.array(calibration.rotation)), np.array(calibration.translation))
        beams, elevations = None, None
        for item in self.items[channel][:3]:
            try:
                table = read_bin(self.root, item.name, 5)
            except RecordError:
                continue
            keep = usable(table[:, :3], channel)[0]
            rings = _rings(table)
            if rings is not None:
                beams = int(rings.max()) + 1
                angles = np.arctan2(table[:, 2], np.hypot(table[:, 0], table[:, 1]))
                by_ring = [angles[keep & (rings == ring)] for ring in range(beams)] if beams <= 256 else []
                elevations = np.array([np.median(a) for a in by_ring], np.float64) if by_ring and all(map(len, by_ring)) else None
            break
        return Lidar(channel, native @ inverse(LIDAR_FROM_NATIVE), rate_hz, beams, elevations)

    def _camera(self, channel: str, calibration: _Calibration, rows: Sequence[_Data], rate_hz: float) -> Camera:
        """A camera of the size that most rows say. Images are published undistorted."""
        if not calibration.camera_intrinsic:
            raise RecordError("calibrated_sensor without camera_intrinsic")
        (width, height), _ = Counter((row.width, row.height) for row in rows).most_common(1)[0]
        pose = from_rotation_translation(rotation_from_quaternion(np.array(calibration.rotation)), np.array(calibration.translation))
        return Camera(channel, pose, np.array(calibration.camera_intrinsic).reshape(3, 3), width, height, rate_hz=rate_hz)

    def _count_once(self, sensor: str, index: int, found: Counter[str]) -> None:
        if (sensor, index) not in self.read_already:
            self.read_already.add((sensor, index))
            self.counts.update(found)

    def _points(self, lidar: str, index: int) -> tuple[Array, Array, Counter[str]]:
        """The table (N,5) of one file, the mask of what is kept of it, and counts of what is not."""
        name = self.items[lidar][index].name
        table = read_bin(self.root, name, 5)
        keep, found = usable(table[:, :3], lidar)
        if not keep.any():
            raise RecordError(f"{self.scene.name}, {one_line(name)}: no usable point among {len(table)}")
        return table, keep, found

    def read_sweep(self, lidar: str, index: int) -> Sweep:
        table, keep, found = self._points(lidar, index)
        rings = _rings(table)
        intensity = table[:, 3]
        inside = (intensity >= 0) & (intensity <= 255)
        if inside[keep].mean() < 0.99 or (rings is None and table[keep, 4].any()):
            name = one_line(self.items[lidar][index].name)
            raise RecordError(f"{self.scene.name}, {name}: columns 4 and 5 are not intensity 0..255 and ring; not of 5 float32 a point?")
        found[f"{lidar}: intensity clipped to 0..255"] += int((~inside[keep]).sum())
        self._count_once(lidar, index, +found)
        points = table[keep, :3] @ LIDAR_FROM_NATIVE[:3, :3].T.astype(np.float32)
        time_ns = _times(rings)
        return Sweep(
            lidar,
            int(self.log.sweep_stamps_ns[lidar][index]),
            points,
            np.clip(np.nan_to_num(intensity[keep]), 0, 255) / np.float32(255),
            None if rings is None else rings[keep],
            None if time_ns is None else time_ns[keep],
            deskewed=True,
        )

    def read_image(self, camera: str, index: int) -> Image:
        name = self.items[camera][index].name
        what, record = f"{self.scene.name}, {one_line(name)}", self.log.cameras[camera]
        encoded = read_beneath(self.root, name, MAX_BYTES)
        width, height = image_size(encoded, what)
        if (width, height) != (record.width, record.height):
            raise RecordError(f"{what}: {width}x{height} pixels, the camera has {record.width}x{record.height}; dropped")
        return Image(camera, int(self.log.image_stamps_ns[camera][index]), encoded, width, height)

    # ---- labels ----

    def open_labels(self) -> Labels | None:
        """The boxes of the scene's keyframes, at the stamp of their sample (the LiDAR's), and lidarseg's point labels where there are some.

        None without annotations. A point's instance and whether it moves are those of the box that it lies in (faster than 0.5 m/s)."""
        if not (self.folder / "sample_annotation.json").exists():
            return None
        book = _annotations(str(self.folder), (self.folder / "sample_annotation.json").stat().st_mtime_ns)
        boxes = [box for token in self.sample_stamps for row in book.of_sample.get(token, ()) if (box := self._box(row, book)) is not None]
        boxes.sort(key=lambda box: (box.stamp_ns, box.track))
        self._count_once("labels", 0, book.counts)
        if not boxes and not book.point_files:
            return None
        self.boxes, self.category_count = boxes, len(book.categories)
        tokens = {item.token for channel in self.log.lidars for item in self.items[channel]}
        self.point_files = {token: name for token, name in book.point_files.items() if token in tokens}
        return Labels(tuple(boxes), book.categories, read_point_labels=self.read_point_labels)

    def _box(self, row: _Annotation, book: _Annotations) -> Box | None:
        stamp_ns = self.sample_stamps[row.sample_token] * 1000
        category = book.category_of_instance.get(row.instance_token)
        try:
            if self.log.poses is None or category is None:
                raise RecordError("no pose, or a token of an instance or category that is not there")
            world_from_ego = pose_at(self.log.poses, np.array([stamp_ns]))[0]
            ego_from_world = inverse(world_from_ego)
            heading = ego_from_world[:3, :3] @ rotation_from_quaternion(np.array(row.rotation))[:, 0]
            centre = ego_from_world[:3, :3] @ np.array(row.translation) + ego_from_world[:3, 3]
            width, length, height = row.size
            in_world = self._velocity(row, book)
            velocity = None if in_world is None else (ego_from_world[:3, :3] @ in_world)[:2]
            yaw_rad = float(np.arctan2(heading[1], heading[0]))
            size = np.array((length, width, height))
            return Box(stamp_ns, row.instance_token, category, centre, size, yaw_rad, velocity, max(row.num_lidar_pts, 0))
        except RecordError as error:
            self._count_once("box " + row.token, 0, Counter({f"labels: boxes dropped ({error})": 1}))
            return None

    def _velocity(self, row: _Annotation, book: _Annotations) -> Array | None:
        """(3,) m/s in the world: from the annotation before to the one after, or from or to this one at the ends of a track."""
        first, last = book.of_token.get(row.prev, row), book.of_token.get(row.next, row)
        stamps = [self.sample_stamps.get(end.sample_token) for end in (first, last)]
        if stamps[0] is None or stamps[1] is None:
            return None
        seconds = (stamps[1] - stamps[0]) / 1e6
        if not 0 < seconds <= MAX_STEP_S * (2 if first is not row and last is not row else 1):
            return None
        velocity: Array = (np.array(last.translation) - np.array(first.translation)) / seconds
        return velocity

    def read_point_labels(self, lidar: str, index: int) -> PointLabels | None:
        name = self.point_files.get(self.items[lidar][index].token)
        if name is None:
            return None
        table, keep, _ = self._points(lidar, index)
        category = np.frombuffer(read_beneath(self.root, name, MAX_POINTS), np.uint8)
        if len(category) != len(table):
            raise RecordError(f"{self.scene.name}, {one_line(name)}: {len(category)} labels for {len(table)} points; fetch it again")
        category = np.where(category < self.category_count, category, 255)[keep]
        stamp_ns = int(self.log.sweep_stamps_ns[lidar][index])
        native_to_ego = self.log.lidars[lidar].ego_from_lidar @ LIDAR_FROM_NATIVE
        points = transform_points(native_to_ego, table[keep, :3])
        instance, moving = np.zeros(len(points), np.int32), np.zeros(len(points), bool)
        numbers = {track: number for number, track in enumerate(sorted({box.track for box in self.boxes}), 1)}
        for box in self.boxes:
            if box.stamp_ns == stamp_ns:
                inside = points_in(box, points)
                instance[inside] = numbers[box.track]
                moving[inside] = box.velocity is not None and float(np.hypot(*box.velocity)) > MOVING_MPS
        return PointLabels(stamp_ns, category, instance, moving)


def _rate(stamps_ns: Array, nominal_hz: float) -> float:
    """The nominal rate, or the median one where it is another by a fifth (tables that were not recorded by nuScenes' car)."""
    median_hz = 1e9 / float(np.median(np.diff(stamps_ns))) if len(stamps_ns) > 2 else nominal_hz
    return nominal_hz if abs(median_hz / nominal_hz - 1) < 0.2 else min(median_hz, 1000.0)


def _rings(table: Array) -> Array | None:
    """Ring (N,) u16 of the fifth column; None where it is all zero (nothing was said) or not small integers. Rows whose point is not finite are
    dropped and counted by `usable`: they have no say, and the ring 0 where theirs is none."""
    ring, finite = table[:, 4], np.isfinite(table[:, :3]).all(axis=1)
    with np.errstate(invalid="ignore"):
        whole = (ring >= 0) & (ring < 1024) & (ring == np.floor(ring))
    rings: Array = np.where(whole, ring, 0).astype(np.uint16)
    return rings if whole[finite].all() and rings[finite].any() else None


def _times(rings: Array | None) -> Array | None:
    """Offsets (N,) i32 ns from the end of the turn, where rings 0..31 follow each other from first to last as they are fired; else None."""
    if rings is None or len(rings) % BEAMS or len(rings) > BEAMS * MAX_COLUMNS or (rings != np.arange(len(rings)) % BEAMS).any():
        return None
    columns = np.arange(len(rings)) // BEAMS
    offsets: Array = ((columns - columns[-1]) * FIRING_NS).astype(np.int32)
    return offsets


@dataclass(frozen=True)
class _Annotations:
    """The label tables: annotations by sample and by token, category of each instance, names of categories by index, lidarseg files."""

    of_sample: dict[str, list[_Annotation]]
    of_token: dict[str, _Annotation]
    category_of_instance: dict[str, str]
    categories: tuple[str, ...]
    point_files: dict[str, str]
    counts: Counter[str]


@lru_cache(maxsize=1)
def _annotations(folder_name: str, modified_ns: int) -> _Annotations:
    """Kept for the next scene: one table holds the labels of all. modified_ns tells one state of the file from another."""
    folder = Path(folder_name)
    counts: Counter[str] = Counter()
    categories: list[_Category] = list(_table(folder, "category", counts))
    name_of = {row.token: row.name for row in categories}
    indexed = {row.index_: row.name for row in categories if 0 <= row.index_ < 255}
    names = [indexed.get(i, f"unnamed-{i}") for i in range(max(indexed) + 1)] if indexed else []
    names += sorted({row.name for row in categories} - set(names))
    category_of_instance = {row.token: name_of[row.category_token] for row in _table(folder, "instance", counts) if row.category_token in name_of}
    of_token = {row.token: row for row in _table(folder, "sample_annotation", counts)}
    of_sample: dict[str, list[_Annotation]] = defaultdict(list)
    for row in of_token.values():
        of_sample[row.sample_token].append(row)
    point_files = {}
    if indexed and (folder / "lidarseg.json").exists():
        point_files = {row.sample_data_token: row.filename for row in _table(folder, "lidarseg", counts)}
    return _Annotations(dict(of_sample), of_token, category_of_instance, tuple(names), point_files, +counts)


def write_sample(root: Path) -> Path:
    """Scene 1 of a made-up town: 13 turns of a scanner before a wall and a parked car, two cameras, lidarseg; one image is absent. Gives `root`."""
    import io

    from PIL import Image as Pillow

    from sensors.formats.nuscenes_writer import write_logs
    from sensors.geometry import rotation_z

    start_ns = 1_532_402_927_000_000_000
    offsets = {"LIDAR_TOP": np.arange(13) * 50_000_000, "CAM_FRONT": np.arange(7) * 80_000_000, "CAM_BACK": np.arange(7) * 80_000_000 + 20_000_000}
    stamps = {name: start_ns + offset for name, offset in offsets.items()}
    knots = start_ns + np.arange(14) * 50_000_000
    world_from_ego = np.stack([rotation_z(0.02 * i) for i in range(14)])
    world_from_ego[:, 0, 3], world_from_ego[:, 1, 3] = 400 + 0.3 * np.arange(14), 1100
    ahead = np.array([[0, 0, 1.0, 1.7], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])
    k_px = np.array([[120, 0, 79.5], [0, 120, 44.5], [0, 0, 1.0]])
    picture = io.BytesIO()
    Pillow.new("RGB", (160, 90), (90, 120, 150)).save(picture, "JPEG")
    # fired column by column from the left, clockwise; rays into the sky find nothing and stay as points at the origin
    column, ring = (grid.ravel() for grid in np.meshgrid(np.arange(60), np.arange(32), indexing="ij"))
    azimuth, elevation = np.pi / 2 - column * 2 * np.pi / 60, np.radians(-30.67 + ring * 4 / 3)
    direction = np.stack((np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)), 1)
    reach = np.where(elevation < -0.09, 1.84 / np.maximum(np.sin(-elevation), 1e-3), np.where(elevation < 0.1, 22.0, 0.0))
    points = (direction * reach[:, None]).astype(np.float32)
    parked = world_from_ego[0] @ (6.0, 2.0, 0.7, 1)

    def read_sweep(lidar: str, index: int) -> Sweep:
        return Sweep(lidar, int(stamps[lidar][index]), points, np.linspace(0, 1, len(points)), ring, deskewed=True)

    def read_image(camera: str, index: int) -> Image:
        return Image(camera, int(stamps[camera][index]), picture.getvalue(), 160, 90)

    def point_labels(lidar: str, index: int) -> PointLabels:
        low = points[:, 2] < -1.5
        return PointLabels(int(stamps[lidar][index]), low, np.zeros(len(low)), np.zeros(len(low)))

    def box(index: int) -> Box:
        centre = (inverse(world_from_ego[index]) @ parked)[:3]
        return Box(int(knots[index]), "car", "vehicle.car", centre, np.array([4.4, 1.8, 1.6]), 0.3 - 0.02 * index, np.zeros(2))

    categories = ("static.manmade", "flat.driveable_surface")
    log = Log(
        id="sample/scene-0001",
        dataset="sample",
        licence="CC0",
        ego_frame="rear axle",
        lidars={"LIDAR_TOP": Lidar("LIDAR_TOP", from_rotation_translation(np.eye(3), np.array([0.94, 0, 1.84])), LIDAR_RATE_HZ)},
        cameras={
            "CAM_FRONT": Camera("CAM_FRONT", ahead, k_px, 160, 90, rate_hz=CAMERA_RATE_HZ),
            "CAM_BACK": Camera("CAM_BACK", rotation_z(np.pi) @ ahead, k_px, 160, 90, rate_hz=CAMERA_RATE_HZ),
        },
        poses=Trajectory(knots, world_from_ego),
        sweep_stamps_ns={"LIDAR_TOP": stamps["LIDAR_TOP"]},
        image_stamps_ns={name: stamps[name] for name in ("CAM_FRONT", "CAM_BACK")},
        read_sweep=read_sweep,
        read_image=read_image,
        open_labels=lambda: Labels(tuple(map(box, range(13))), categories, read_point_labels=point_labels),
    )
    write_logs(root, [log])
    min((root / "sweeps" / "CAM_BACK").iterdir()).unlink()
    return root
