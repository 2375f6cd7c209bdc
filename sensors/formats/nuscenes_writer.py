"""Any log as nuScenes: 13 tables, `samples/`, `sweeps/`, for the devkit and every tool that reads nuScenes.

What the format asks for and a log may not have: keyframes every 0.5 s are chosen among the reference LiDAR's sweeps (LIDAR_TOP) with each
camera's nearest image; cameras get the names of nuScenes' six by where they look; categories and attributes are translated where they have a
counterpart and keep their own name otherwise (the devkit's evaluation passes over those); the map is plain grey; `splits.json` names all
scenes as split `all`, which the devkit's evaluation takes (1.2 and newer). Sweeps that are not motion-compensated but have times are
compensated to their stamp, as nuScenes' are; those without times are written as recorded. A scene's description names the log, its licence, and
what was left out. The ego frame stays the log's, though nuScenes has its at the ground.
"""

from __future__ import annotations

import hashlib
import io
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.alignment.deskew import deskew
from sensors.errors import UsageError, one_line
from sensors.files import safe_name, write_json
from sensors.geometry import from_rotation_translation, pose_at, quaternion_from_rotation, rotation_z, transform_points
from sensors.records import Box, Labels, Log, RecordError, Sweep

Array = NDArray[Any]

KEYFRAME_NS = 500_000_000
MOVING_MPS = 0.5
TABLES = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample", "sample_annotation", "sample_data", "scene",
    "sensor", "visibility",
)  # fmt: skip
# where nuScenes' cameras look, degrees counter-clockwise from ahead
CAMERA_YAW_DEG = {
    "CAM_FRONT": 0,
    "CAM_FRONT_LEFT": 55,
    "CAM_BACK_LEFT": 110,
    "CAM_BACK": 180,
    "CAM_BACK_RIGHT": -110,
    "CAM_FRONT_RIGHT": -55,
}
ATTRIBUTES = (
    "vehicle.moving", "vehicle.stopped", "vehicle.parked", "cycle.with_rider", "cycle.without_rider", "pedestrian.sitting_lying_down",
    "pedestrian.standing", "pedestrian.moving",
)  # fmt: skip
VISIBILITY = {"1": "v0-40", "2": "v40-60", "3": "v60-80", "4": "v80-100"}
# the classes of nuScenes-lidarseg in the order of their index
CATEGORIES = (
    "noise", "animal", "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.construction_worker",
    "human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.stroller", "human.pedestrian.wheelchair",
    "movable_object.barrier", "movable_object.debris", "movable_object.pushable_pullable", "movable_object.trafficcone",
    "static_object.bicycle_rack", "vehicle.bicycle", "vehicle.bus.bendy", "vehicle.bus.rigid", "vehicle.car", "vehicle.construction",
    "vehicle.emergency.ambulance", "vehicle.emergency.police", "vehicle.motorcycle", "vehicle.trailer", "vehicle.truck",
    "flat.driveable_surface", "flat.other", "flat.sidewalk", "flat.terrain", "static.manmade", "static.other", "static.vegetation", "vehicle.ego",
)  # fmt: skip
COUNTERPART = {
    "car": "vehicle.car", "van": "vehicle.car", "vehicle": "vehicle.car", "regular_vehicle": "vehicle.car", "truck": "vehicle.truck",
    "box_truck": "vehicle.truck", "truck_cab": "vehicle.truck", "bus": "vehicle.bus.rigid", "articulated_bus": "vehicle.bus.bendy",
    "trailer": "vehicle.trailer", "vehicular_trailer": "vehicle.trailer", "construction_vehicle": "vehicle.construction",
    "motorcycle": "vehicle.motorcycle", "motorcyclist": "vehicle.motorcycle", "bicycle": "vehicle.bicycle", "cyclist": "vehicle.bicycle",
    "bicyclist": "vehicle.bicycle", "pedestrian": "human.pedestrian.adult", "person": "human.pedestrian.adult",
    "person_sitting": "human.pedestrian.adult", "stroller": "human.pedestrian.stroller", "wheelchair": "human.pedestrian.wheelchair",
    "barrier": "movable_object.barrier", "traffic_cone": "movable_object.trafficcone", "construction_cone": "movable_object.trafficcone",
    "cone": "movable_object.trafficcone", "animal": "animal", "road": "flat.driveable_surface", "ground": "flat.driveable_surface",
    "sidewalk": "flat.sidewalk", "terrain": "flat.terrain", "grass": "flat.terrain", "building": "static.manmade", "wall": "static.manmade",
    "fence": "static.manmade", "pole": "static.manmade", "sign": "static.manmade", "clutter": "static.other",
    "tree": "static.vegetation", "bush": "static.vegetation",
    "hedge": "static.vegetation", "vegetation": "static.vegetation",
}  # fmt: skip


def write_logs(root: Path, logs: Iterable[Log], version: str = "v1.0-mini") -> Path:
    """Write `logs` with what labels they have under `root`, tables under `root`/`version`; gives `root`.

    UsageError where the version is there already or no log is given; RecordError for a log that nuScenes cannot express: without LiDAR or
    poses, or with a camera that is not a pinhole. Images and sweeps that are unreadable or have no pose are left out, which the scene's description
    says. Tables are written last, so that what was cut off does not open."""
    if (root / version).exists():
        raise UsageError(f"{one_line(root / version)}: is there already; give an empty folder or another version")
    tables = _Tables(root, version)
    for log in logs:
        _Scene(tables, log).write()
    tables.finish()
    return root


def _token(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _wxyz(rotation: Array) -> list[float]:
    return [float(number) for number in quaternion_from_rotation(rotation)]


def category_of(name: str) -> str:
    """nuScenes' category for one of any dataset; a name without counterpart stays as it is."""
    return name if name in CATEGORIES else COUNTERPART.get(name.lower().replace(" ", "_").replace("-", "_"), name)


class _Tables:
    """The rows of all scenes, and what scenes share."""

    def __init__(self, root: Path, version: str) -> None:
        self.root, self.version = root, version
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
        self.point_labels: list[dict[str, Any]] = []
        self.sensors: dict[str, str] = {}
        self.scene_names: list[str] = []
        self.categories = dict.fromkeys(CATEGORIES)

    def sensor(self, channel: str, modality: str) -> str:
        if channel not in self.sensors:
            self.sensors[channel] = _token("sensor", channel)
            self.rows["sensor"].append({"token": self.sensors[channel], "channel": channel, "modality": modality})
        return self.sensors[channel]

    def category(self, name: str) -> str:
        self.categories.setdefault(name)
        return _token("category", name)

    def write(self, name: str, data: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def finish(self) -> None:
        if not self.rows["scene"]:
            raise UsageError(f"{one_line(self.root)}: no log was given; a nuScenes folder holds one at least")
        from PIL import Image as Pillow

        picture = io.BytesIO()
        Pillow.new("L", (64, 64), 128).save(picture, "PNG")
        grey = f"maps/{_token('map', self.version)}.png"
        self.write(grey, picture.getvalue())
        logs = [row["token"] for row in self.rows["log"]]
        self.rows["map"] = [{"token": _token("map", self.version), "log_tokens": logs, "category": "semantic_prior", "filename": grey}]
        self.rows["attribute"] = [{"token": _token("attribute", name), "name": name, "description": ""} for name in ATTRIBUTES]
        self.rows["visibility"] = [{"token": token, "level": level, "description": ""} for token, level in VISIBILITY.items()]
        self.rows["category"] = [
            {"token": _token("category", name), "name": name, "description": "", "index": index} for index, name in enumerate(self.categories)
        ]
        tables: dict[str, Any] = dict(self.rows)
        # the devkit refuses point labels beside categories that it has no colour for
        if self.point_labels and len(self.categories) == len(CATEGORIES):
            for row in self.point_labels:
                self.write(row["filename"], row.pop("labels"))
            tables["lidarseg"] = self.point_labels
        tables["splits"] = {"all": self.scene_names}
        for name, rows in tables.items():
            write_json(self.root / self.version / f"{name}.json", rows)


class _Scene:
    """One log on its way into the tables."""

    def __init__(self, tables: _Tables, log: Log) -> None:
        self.tables, self.log = tables, log
        if log.poses is None:
            raise RecordError(f"log {log.id}: no poses, and nuScenes has none without; ingest it with --poses odometry first")
        bent = one_line(", ".join(name for name, camera in log.cameras.items() if camera.model != "pinhole" or camera.distortion.any()))
        if bent:
            raise RecordError(f"log {log.id}: camera {bent} is no pinhole, and nuScenes knows no other; undistort its images first")
        self.lidar = log.reference_lidar
        self.slug = safe_name(log.id)
        self.name = log.id.split("/")[1] if log.id.split("/")[1] not in tables.scene_names else self.slug
        if self.name in tables.scene_names:
            raise RecordError(f"log {log.id}: given twice")
        self.counts: Counter[str] = Counter()
        self.keyframes: list[int] = []  # stamps, ns
        self.inside: dict[tuple[int, str], int] = {}  # points in a box, by its stamp and track
        self.first_ns, self.last_ns = int(log.poses.stamps_ns[0]) - 10**8, int(log.poses.stamps_ns[-1]) + 10**8

    def token(self, *parts: object) -> str:
        return _token(self.tables.version, self.log.id, *parts)

    def write(self) -> None:
        log, rows = self.log, self.tables.rows
        labels = log.open_labels()
        boxes: dict[int, list[Box]] = defaultdict(list)
        for box in labels.boxes if labels is not None else ():
            boxes[box.stamp_ns].append(box)
        self._lidar(self.lidar, "LIDAR_TOP", labels, boxes)
        if not self.keyframes:
            raise RecordError(f"log {log.id}: no sweep of {self.lidar} is readable and has a pose")
        for name in sorted(set(log.lidars) - {self.lidar}):
            self._lidar(name, f"LIDAR_{safe_name(name).upper()}", None, {})
        self._cameras()
        self._annotations(boxes)
        samples = [self.token("sample", stamp) for stamp in self.keyframes]
        for index, (stamp, token) in enumerate(zip(self.keyframes, samples, strict=True)):
            around = ["", *samples, ""]
            row = {"token": token, "timestamp": stamp // 1000, "scene_token": self.token("scene")}
            rows["sample"].append(row | {"prev": around[index], "next": around[index + 2]})
        dropped = "; ".join(f"{what} {count}" for what, count in sorted(self.counts.items()))
        rows["scene"].append({
            "token": self.token("scene"),
            "name": self.name,
            "description": one_line(f"log {log.id}, licence {log.licence}" + (f"; left out: {dropped}" if dropped else "")),
            "log_token": self.token("log"),
            "nbr_samples": len(samples),
            "first_sample_token": samples[0],
            "last_sample_token": samples[-1],
        })  # fmt: skip
        row = {"token": self.token("log"), "logfile": one_line(log.id), "vehicle": log.dataset, "date_captured": "", "location": log.dataset}
        rows["log"].append(row)
        self.tables.scene_names.append(self.name)

    def _calibrated(self, channel: str, modality: str, ego_from_sensor: Array, intrinsic: list[list[float]]) -> str:
        token = self.token("calibrated_sensor", channel)
        self.tables.rows["calibrated_sensor"].append({
            "token": token,
            "sensor_token": self.tables.sensor(channel, modality),
            "translation": [float(number) for number in ego_from_sensor[:3, 3]],
            "rotation": _wxyz(ego_from_sensor[:3, :3]),
            "camera_intrinsic": intrinsic,
        })  # fmt: skip
        return token

    def _posed(self, sensor: str, stamps: Sequence[int]) -> list[int]:
        """Indices of the stamps that the trajectory covers."""
        covered = [index for index, stamp in enumerate(stamps) if self.first_ns <= stamp <= self.last_ns]
        self.counts[f"{sensor} without pose"] += len(stamps) - len(covered)
        self.counts = +self.counts
        return covered

    def _lidar(self, name: str, channel: str, labels: Labels | None, boxes: dict[int, list[Box]]) -> None:
        """Files and rows of one LiDAR. The reference's keyframes are chosen here, as its sweeps turn out readable."""
        log, lidar = self.log, self.log.lidars[name]
        # nuScenes' axes: its x is our -y, its y our x
        lidar_from_native = from_rotation_translation(np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]]), np.zeros(3))
        calibrated = self._calibrated(channel, "lidar", lidar.ego_from_lidar @ lidar_from_native, [])
        stamps = [int(stamp) for stamp in log.sweep_stamps_ns[name]]
        choosing, half_ns = name == self.lidar, int(0.5e9 / lidar.rate_hz)
        due: int | None = None
        rows = []
        for index in self._posed(name, stamps):
            stamp = stamps[index]
            try:
                sweep = log.read_sweep(name, index)
                points = self._compensated(name, sweep)
            except RecordError:
                self.counts[f"{name} unreadable"] += 1
                continue
            if choosing and (due is None or stamp + half_ns >= due):
                self.keyframes.append(stamp)
                due = (stamp if due is None else due) + KEYFRAME_NS
                while due <= stamp:
                    due += KEYFRAME_NS
            key = stamp in self.keyframes
            ring = np.zeros(len(points), np.uint16) if sweep.ring is None else sweep.ring
            table = np.column_stack((-points[:, 1], points[:, 0], points[:, 2], sweep.intensity * np.float32(255), ring)).astype("<f4")
            file = self._file(channel, stamp, key, ".pcd.bin", table.tobytes())
            rows.append(self._data_row(channel, calibrated, stamp, key, file, "pcd", 0, 0))
            if choosing and key:
                self._count_inside(boxes.get(stamp, ()), transform_points(lidar.ego_from_lidar, points))
                self._point_labels(labels, name, index, str(rows[-1]["token"]), len(points))
        self._chain(rows)

    def _compensated(self, name: str, sweep: Sweep) -> Array:
        if sweep.deskewed or sweep.time_ns is None or self.log.poses is None:
            return sweep.points
        try:
            return deskew(sweep.points, sweep.time_ns, self.log.lidars[name].ego_from_lidar, self.log.poses, sweep.stamp_ns)[0]
        except RecordError:
            self.counts[f"motion compensation of {name}"] += 1
            return sweep.points

    def _count_inside(self, boxes: Sequence[Box], points: Array) -> None:
        """num_lidar_pts of each box: what its record says, else counted in the sweep as it is written."""
        for box in boxes:
            local = (points.astype(np.float64) - box.centre) @ rotation_z(box.yaw_rad)[:3, :3]
            counted = int((np.abs(local) <= box.size / 2).all(axis=1).sum())
            self.inside[box.stamp_ns, box.track] = counted if box.points_inside is None else box.points_inside

    def _point_labels(self, labels: Labels | None, name: str, index: int, token: str, count: int) -> None:
        found = labels.read_point_labels(name, index) if labels is not None else None
        if labels is None or found is None or len(found.category) != count:
            return
        number = {category: CATEGORIES.index(category_of(category)) if category_of(category) in CATEGORIES else 0 for category in labels.categories}
        lookup = np.zeros(256, np.uint8)
        lookup[: len(labels.categories)] = [number[category] for category in labels.categories]
        file = f"lidarseg/{self.tables.version}/{token}_lidarseg.bin"
        row = {"token": token, "sample_data_token": token, "filename": file, "labels": lookup[found.category].tobytes()}
        self.tables.point_labels.append(row)

    def _file(self, channel: str, stamp_ns: int, key: bool, suffix: str, data: bytes) -> str:
        name = f"{'samples' if key else 'sweeps'}/{channel}/{self.slug}__{channel}__{stamp_ns // 1000}{suffix}"
        self.tables.write(name, data)
        return name

    def _data_row(
        self, channel: str, calibrated: str, stamp_ns: int, key: bool, file: str, kind: str, width: int, height: int, sample_ns: int | None = None
    ) -> dict[str, Any]:
        """A row of sample_data with its ego_pose; it belongs to the next keyframe (the devkit interpolates boxes from the one before it)."""
        assert self.log.poses is not None
        token = self.token("sample_data", channel, stamp_ns)
        world_from_ego = pose_at(self.log.poses, np.array([stamp_ns]))[0]
        self.tables.rows["ego_pose"].append({
            "token": token,
            "timestamp": stamp_ns // 1000,
            "translation": [float(number) for number in world_from_ego[:3, 3]],
            "rotation": _wxyz(world_from_ego[:3, :3]),
        })  # fmt: skip
        return {
            "token": token,
            "sample_ns": sample_ns if sample_ns is not None else stamp_ns,
            "ego_pose_token": token,
            "calibrated_sensor_token": calibrated,
            "filename": file,
            "fileformat": kind,
            "width": width,
            "height": height,
            "timestamp": stamp_ns // 1000,
            "is_key_frame": key,
        }

    def _chain(self, rows: list[dict[str, Any]]) -> None:
        """prev and next along a channel, and the sample that each row belongs to, now that all keyframes are known."""
        tokens = ["", *(row["token"] for row in rows), ""]
        for index, row in enumerate(rows):
            at = min(bisect_left(self.keyframes, row.pop("sample_ns")), len(self.keyframes) - 1)
            row |= {"sample_token": self.token("sample", self.keyframes[at]), "prev": tokens[index], "next": tokens[index + 2]}
            self.tables.rows["sample_data"].append(row)

    def _channels(self) -> dict[str, str]:
        """Channel of each camera: nuScenes' name for where it looks, its own name where two look the same way."""
        channels: dict[str, str] = {}
        free = dict(CAMERA_YAW_DEG)
        for name in sorted(self.log.cameras):
            if (same := "CAM_" + name.upper().removeprefix("CAM_")) in free:
                channels[name] = same
                del free[same]
        for name in sorted(set(self.log.cameras) - set(channels)):
            axis = self.log.cameras[name].ego_from_camera[:3, 2]
            yaw = np.degrees(np.arctan2(axis[1], axis[0]))
            away = {channel: abs((yaw - known + 180) % 360 - 180) for channel, known in free.items()}
            best = min(away, key=lambda channel: away[channel], default="")
            channels[name] = best if best and away[best] < 28 else f"CAM_{safe_name(name).upper()}"
            free.pop(channels[name], None)
        return channels

    def _cameras(self) -> None:
        for name, channel in self._channels().items():
            camera, stamps = self.log.cameras[name], [int(stamp) for stamp in self.log.image_stamps_ns[name]]
            intrinsic = [[float(number) for number in row] for row in camera.k_px]
            calibrated = self._calibrated(channel, "camera", camera.ego_from_camera, intrinsic)
            images = {}
            for index in self._posed(name, stamps):
                try:
                    images[stamps[index]] = self.log.read_image(name, index)
                except RecordError:
                    self.counts[f"{name} unreadable"] += 1
            key_of = self._nearest(sorted(images), int(0.5e9 / camera.rate_hz))
            rows = []
            for stamp, image in images.items():
                jpeg = image.encoded[:3] == b"\xff\xd8\xff"
                file = self._file(channel, stamp, stamp in key_of, ".jpg" if jpeg else ".png", image.encoded)
                kind = "jpg" if jpeg else "png"
                row = self._data_row(channel, calibrated, stamp, stamp in key_of, file, kind, image.width, image.height, key_of.get(stamp))
                rows.append(row)
            self._chain(rows)

    def _nearest(self, stamps: list[int], within_ns: int) -> dict[int, int]:
        """Stamp of the image nearest to each keyframe, at most half a period away, with that keyframe's stamp."""
        key_of: dict[int, int] = {}
        for keyframe in self.keyframes:
            at = bisect_left(stamps, keyframe)
            around = [stamp for stamp in stamps[max(at - 1, 0) : at + 1] if stamp not in key_of]
            nearest = min(around, key=lambda stamp: abs(stamp - keyframe), default=None)
            if nearest is not None and abs(nearest - keyframe) <= within_ns:
                key_of[nearest] = keyframe
        return key_of

    def _annotations(self, boxes: dict[int, list[Box]]) -> None:
        tracks: dict[str, list[Box]] = defaultdict(list)
        for stamp in self.keyframes:
            for box in boxes.get(stamp, ()):
                tracks[box.track].append(box)
        for track, found in sorted(tracks.items()):
            tokens = [self.token("sample_annotation", track, box.stamp_ns) for box in found]
            around = ["", *tokens, ""]
            instance = self.token("instance", track)
            self.tables.rows["instance"].append({
                "token": instance,
                "category_token": self.tables.category(category_of(found[0].category)),
                "nbr_annotations": len(found),
                "first_annotation_token": tokens[0],
                "last_annotation_token": tokens[-1],
            })  # fmt: skip
            for index, box in enumerate(found):
                row = {"token": tokens[index], "instance_token": instance, "prev": around[index], "next": around[index + 2]}
                self.tables.rows["sample_annotation"].append(row | self._annotation(box))

    def _annotation(self, box: Box) -> dict[str, Any]:
        assert self.log.poses is not None
        world_from_ego = pose_at(self.log.poses, np.array([box.stamp_ns]))[0]
        length, width, height = (float(number) for number in box.size)
        return {
            "sample_token": self.token("sample", box.stamp_ns),
            "attribute_tokens": [_token("attribute", name) for name in _attribute(box)],
            "visibility_token": "",
            "translation": [float(number) for number in world_from_ego[:3, :3] @ box.centre + world_from_ego[:3, 3]],
            "size": [width, length, height],
            "rotation": _wxyz(world_from_ego[:3, :3] @ rotation_z(box.yaw_rad)[:3, :3]),
            "num_lidar_pts": self.inside[box.stamp_ns, box.track],
            "num_radar_pts": 0,
        }


def _attribute(box: Box) -> list[str]:
    """Moving, or stopped or standing, for what has a velocity; nothing where that is unknown or the class has no such attribute."""
    kind = category_of(box.category)
    if box.velocity is None or not np.isfinite(box.velocity).all():
        return []
    moving = float(np.hypot(*box.velocity)) > MOVING_MPS
    if kind.startswith("human.pedestrian."):
        return ["pedestrian.moving" if moving else "pedestrian.standing"]
    if kind.startswith("vehicle.") and kind not in ("vehicle.bicycle", "vehicle.motorcycle", "vehicle.ego"):
        return ["vehicle.moving" if moving else "vehicle.stopped"]
    return []
