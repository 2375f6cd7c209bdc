"""KITTI raw: `DATE/DATE_drive_NNNN_sync` (rectified images, one index for all sensors) beside `DATE/calib_*.txt`.

The source may be a drive, a date folder, or a folder of dates. The ego frame is the OXTS unit's (x forward, y left, z up, 0.93 m above
the ground); the world is east, north, up from the first packet. Sensors are `velodyne` and `image_00` to `image_03`, as far as they are there.

What a stamp of the velodyne means: the middle of the turn, when the scanner faces forward (`timestamps.txt` is the mean of
`timestamps_start.txt` and `timestamps_end.txt`). Points are as measured: not motion-compensated, no time per point, no ring.

Drives differ from the format in ways that are normal and counted: files absent that the time stamps list, blank stamps, OXTS fields `nan`,
JPEG in place of PNG, images shrunk (intrinsics are scaled to the size the files have), no OXTS (poses None). Without stamps of the scanner the
nominal 10 Hz stand in, ``stamps="assumed"``; a camera or OXTS without stamps of its own takes the scanner's, which triggered it. Stamps that are
there and cannot be read are another thing: they cost a camera or OXTS, and those of the scanner the drive.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.adapters.base import in_order
from sensors.errors import UsageError, WmError, one_line
from sensors.formats import kitti
from sensors.formats.images import MAX_BYTES, image_size
from sensors.formats.payloads import read_beneath
from sensors.formats.points import read_bin, usable
from sensors.geometry import from_rotation_translation, inverse, pose_at
from sensors.records import Box, Camera, Image, Labels, Lidar, Log, RecordError, Sweep, Trajectory

Array = NDArray[Any]

LICENCE = "CC BY-NC-SA 3.0"
CAMERAS = ("image_00", "image_01", "image_02", "image_03")
RATE_HZ = 10.0
TEXT_BYTES = 64 << 20
# The Volkswagen Passat in the OXTS frame: rear axle below the unit, mirrors and the roof rack with the scanner included.
EGO_BOX = (-1.3, -1.1, -0.95, 3.8, 1.1, 1.0)
_DATE = re.compile(r"\d{4}_\d\d_\d\d")
_DRIVE = re.compile(r"(\d{4}_\d\d_\d\d)_drive_\d{4}_sync")


def recognise(path: Path) -> float:
    try:
        return 1.0 if _drives(path) else 0.0
    except OSError:
        return 0.0


def open_logs(path: Path, options: Mapping[str, str]) -> Iterator[Log]:
    """The drives at `path` in the order of their names, and in place of a date that cannot be listed the error that says so. No options."""
    if options:
        raise UsageError(f"kitti_raw has no option {one_line(', '.join(options))}")
    try:
        drives = _drives(path)
    except OSError as error:
        raise UsageError(f"{one_line(path)}: {error.strerror or error}; make the folder readable and run again") from error
    if not drives:
        raise UsageError(f"{one_line(path)}: no folder DATE_drive_NNNN_sync here or one level down; give a drive, a date or a folder of dates")
    return map(_open, drives)


def _drives(path: Path) -> list[Path | RecordError]:
    """Drive folders: `path` itself, its children, or the children of its dates; for a date that cannot be listed, what is wrong with it. OSError
    where `path` itself cannot be listed and is no date."""
    path = path.resolve()
    if _DRIVE.fullmatch(path.name):
        return [path]
    if not path.is_dir():
        return []
    found: dict[Path, Path | RecordError] = {}
    folders = [path]
    for folder in folders:  # grows by the dates in `path`
        try:
            children = [c for c in folder.iterdir() if (_DRIVE.fullmatch(c.name) or _DATE.fullmatch(c.name)) and c.is_dir()]
        except OSError as error:
            if not _DATE.fullmatch(folder.name):
                raise
            reason = f"{error.strerror or error}, so its drives are left out; make the folder readable and run again"
            found[folder] = RecordError(f"kitti_raw/{folder.name}: {reason}")
            continue
        found |= {child: child for child in children if _DRIVE.fullmatch(child.name)}
        folders += [child for child in children if folder == path and _DATE.fullmatch(child.name)]
    return [found[key] for key in sorted(found)]


def _open(folder: Path | RecordError) -> Log:
    if isinstance(folder, RecordError):
        raise folder
    try:
        return _Drive(folder).log
    except WmError as error:
        raise RecordError(f"kitti_raw/{folder.name}: {error}") from error


class _Drive:
    """One drive: the joined listing of its files, and the log that reads them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.date = folder, folder.parent
        self.files: list[Path] = []
        self.counts: Counter[str] = Counter()
        self.read_already: set[tuple[str, int]] = set()
        self._read_calibration()

        sweeps = self._listing("velodyne_points", (".bin",))
        recorded = self._stamps("velodyne_points")
        if recorded is None:
            self.stamp_of_index = {index: round(index * 1e9 / RATE_HZ) for index in range(max(sweeps, default=-1) + 1)}
        else:
            self.stamp_of_index = {index: stamp for index, stamp in enumerate(recorded) if stamp is not None}
        self.assumed = recorded is None
        stamps, self.sweeps = self._joined("velodyne", sweeps, self.stamp_of_index)
        cameras, image_stamps = self._open_cameras()
        poses, speed = self._poses()
        self.log = Log(
            id=f"kitti_raw/{folder.name}",
            dataset="kitti_raw",
            licence=LICENCE,
            ego_frame="OXTS inertial unit: x forward, y left, z up, 0.93 m above the ground",
            lidars={"velodyne": Lidar("velodyne", self.ego_from_velo, RATE_HZ, beams=64)},
            cameras=cameras,
            poses=poses,
            sweep_stamps_ns={"velodyne": stamps},
            image_stamps_ns=image_stamps,
            read_sweep=self.read_sweep,
            read_image=self.read_image,
            open_labels=self.open_labels,
            stamps="assumed" if self.assumed else "recorded",
            measured_speed=speed,
            ego_box=EGO_BOX,
            files=tuple(self.files),
            counts=+self.counts,
        )
        self.counts = self.log.counts

    def _read_calibration(self) -> None:
        values = {}
        for name in ("calib_imu_to_velo.txt", "calib_velo_to_cam.txt", "calib_cam_to_cam.txt"):
            try:
                text = read_beneath(self.date, name, TEXT_BYTES).decode("utf-8", "replace")
            except RecordError as error:
                raise RecordError(f"{error}: it belongs beside the drives of {self.date.name} and comes in {self.date.name}_calib.zip") from error
            values[name] = kitti.read_calibration(text, name)
            self.files.append(self.date / name)
        self.cam_to_cam = values["calib_cam_to_cam.txt"]
        self.ego_from_velo = inverse(kitti.rigid(values["calib_imu_to_velo.txt"], "calib_imu_to_velo.txt"))
        rect_from_cam0 = from_rotation_translation(kitti.matrix(self.cam_to_cam, "R_rect_00", (3, 3), "calib_cam_to_cam.txt"), np.zeros(3))
        rect_from_velo = rect_from_cam0 @ kitti.rigid(values["calib_velo_to_cam.txt"], "calib_velo_to_cam.txt")
        self.ego_from_rect = self.ego_from_velo @ inverse(rect_from_velo)

    def _listing(self, sensor: str, suffixes: tuple[str, ...]) -> dict[int, str]:
        """Names of the data files, relative to the drive, by the number that is their stem; earlier suffixes win."""
        folder = self.folder / sensor / "data"
        try:
            names = os.listdir(folder) if folder.is_dir() else []
        except OSError as error:
            raise RecordError(f"{sensor}/data: {error.strerror or error}; make the folder readable and run again") from error
        found: dict[int, tuple[int, str]] = {}
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix not in suffixes or not re.fullmatch(r"[0-9]{1,10}", stem):
                self.counts[f"{sensor}: files of other names, ignored"] += 1
                continue
            candidate = (suffixes.index(suffix), f"{sensor}/data/{name}")
            found[int(stem)] = min(candidate, found.get(int(stem), candidate))
        return {index: file for index, (_, file) in sorted(found.items())}

    def _stamps(self, sensor: str) -> list[int | None] | None:
        """Per line of timestamps.txt its stamp or None; None without such a file or without any stamp in it. RecordError where it is there and
        cannot be read: stamps assumed in its place would be wrong without a word."""
        try:
            text = read_beneath(self.folder, f"{sensor}/timestamps.txt", TEXT_BYTES).decode("utf-8", "replace")
        except RecordError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return None
            raise
        self.files.append(self.folder / sensor / "timestamps.txt")
        stamps = kitti.read_stamps(text)
        return stamps if any(stamp is not None for stamp in stamps) else None

    def _joined(self, sensor: str, names: dict[int, str], stamps: Mapping[int, int]) -> tuple[Array, list[tuple[int, str]]]:
        """Stamps (N,) and (index, file name) of the items that have both, by number; what lacks either is counted."""
        self.counts[f"{sensor}: listed, file absent"] += len(stamps.keys() - names.keys())
        self.counts[f"{sensor}: without stamp, dropped"] += len(names.keys() - stamps.keys())
        both = sorted(names.keys() & stamps.keys())
        self.files.extend(self.folder / names[index] for index in both)
        return in_order([stamps[index] for index in both], [(index, names[index]) for index in both], sensor, self.counts)

    def _own_or_scanner_stamps(self, sensor: str) -> dict[int, int]:
        recorded = None if self.assumed else self._stamps(sensor)
        if recorded is None:
            self.counts[f"{sensor}: stamps taken from the scanner"] += len(self.stamp_of_index)
            return self.stamp_of_index
        return {index: stamp for index, stamp in enumerate(recorded) if stamp is not None}

    def _open_cameras(self) -> tuple[dict[str, Camera], dict[str, Array]]:
        cameras, image_stamps = {}, {}
        self.images: dict[str, list[tuple[int, str]]] = {}
        for name in CAMERAS:
            listing = self._listing(name, (".png", ".jpg", ".jpeg"))
            if not listing:
                continue
            try:
                camera, stamps = self._camera(name, listing), self._own_or_scanner_stamps(name)
            except RecordError as error:
                self.counts[f"{name}: left out ({error})"] += 1
                continue
            cameras[name] = camera
            image_stamps[name], self.images[name] = self._joined(name, listing, stamps)
        return cameras, image_stamps

    def _camera(self, name: str, listing: dict[int, str]) -> Camera:
        """Projection of the rectified images, scaled from S_rect to the size that the files have. P = K [I | t] from the rectified camera 0."""
        number = name[-2:]
        projection = kitti.matrix(self.cam_to_cam, f"P_rect_{number}", (3, 4), "calib_cam_to_cam.txt")
        nominal = kitti.matrix(self.cam_to_cam, f"S_rect_{number}", (2,), "calib_cam_to_cam.txt")
        if min(projection[0, 0], projection[1, 1], *nominal) <= 0 or not np.allclose(projection[2, :3], (0, 0, 1)):
            raise RecordError(f"calib_cam_to_cam.txt: P_rect_{number} is no projection of a camera, or S_rect_{number} no size")
        width, height = self._size_on_disk(listing)
        k_px = projection[:, :3].copy()
        camera_from_rect = from_rotation_translation(np.eye(3), np.linalg.solve(k_px, projection[:, 3]))
        for axis, ratio in ((0, width / nominal[0]), (1, height / nominal[1])):
            k_px[axis] *= ratio
            k_px[axis, 2] += (ratio - 1) / 2  # pixel centres are integers: the image's edge, at -0.5, is what keeps its place
        return Camera(name, self.ego_from_rect @ inverse(camera_from_rect), k_px, width, height, rate_hz=RATE_HZ)

    def _size_on_disk(self, listing: dict[int, str]) -> tuple[int, int]:
        errors = []
        for name in listing.values():
            try:
                return image_size(read_beneath(self.folder, name, MAX_BYTES), name)
            except RecordError as error:
                errors.append(error)
        raise RecordError(f"none of {len(listing)} images is readable, the first: {errors[0]}")

    def _poses(self) -> tuple[Trajectory | None, tuple[Array, Array] | None]:
        """The trajectory, and the forward speed that the unit measured (stamps (N,), m/s (N,)), of the packets that are complete enough."""
        listing = self._listing("oxts", (".txt",))
        if not listing:
            return None, None
        try:
            of_index = self._own_or_scanner_stamps("oxts")
        except RecordError as error:
            self.counts[f"oxts: left out ({error})"] += 1
            return None, None
        stamps, items = self._joined("oxts", listing, of_index)
        packets, errors = [], []
        for _, name in items:
            try:
                packets.append(kitti.read_packet(read_beneath(self.folder, name, 1 << 16).decode("utf-8", "replace")))
            except RecordError as error:
                errors.append(error)
                packets.append(None)
        good = np.array([packet is not None for packet in packets], bool)
        self.counts["oxts: packets without position or attitude, dropped"] += int((~good).sum()) - len(errors)
        if errors:
            self.counts[f"oxts: packets not readable, dropped (the first: {errors[0]})"] += len(errors)
        kept = [packet for packet in packets if packet is not None]
        if not kept:
            return None, None
        forward = np.array([packet.forward_mps for packet in kept])
        known = np.isfinite(forward)
        speed = (stamps[good][known], forward[known]) if known.any() else None
        return Trajectory(stamps[good], kitti.poses_of_packets(kept), "gnss"), speed

    def _count_once(self, sensor: str, index: int, found: Counter[str]) -> None:
        if (sensor, index) not in self.read_already:
            self.read_already.add((sensor, index))
            self.counts.update(found)

    def read_sweep(self, lidar: str, index: int) -> Sweep:
        name = self.sweeps[index][1]
        table = read_bin(self.folder, name, 4)
        keep, found = usable(table[:, :3], lidar)
        points, reflectance = table[keep, :3], table[keep, 3]
        inside = (reflectance >= 0) & (reflectance <= 1)
        if not len(points):
            raise RecordError(f"{self.folder.name}, {name}: no usable point among {len(table)}")
        if inside.mean() < 0.99:
            raise RecordError(f"{self.folder.name}, {name}: reflectance outside 0..1 at {(~inside).mean():.0%} of the points; not of 4 columns?")
        found[f"{lidar}: reflectance clipped to 0..1"] += int((~inside).sum())
        self._count_once(lidar, index, +found)
        return Sweep(lidar, int(self.log.sweep_stamps_ns[lidar][index]), points, np.clip(np.nan_to_num(reflectance), 0, 1))

    def read_image(self, camera: str, index: int) -> Image:
        name = self.images[camera][index][1]
        what, record = f"{self.folder.name}, {name}", self.log.cameras[camera]
        encoded = read_beneath(self.folder, name, MAX_BYTES)
        width, height = image_size(encoded, what)
        if (width, height) != (record.width, record.height):
            raise RecordError(f"{what}: {width}x{height} pixels, the camera has {record.width}x{record.height}; dropped")
        return Image(camera, int(self.log.image_stamps_ns[camera][index]), encoded, width, height)

    def open_labels(self) -> Labels | None:
        """Boxes of `tracking_label_02.txt` beside the data, seen by camera 02 only: complete in its view and nowhere else."""
        file = "tracking_label_02.txt"
        if not (self.folder / file).exists() or "image_02" not in self.log.cameras:
            return None
        tracked, _, unreadable = kitti.read_tracking_labels(read_beneath(self.folder, file, TEXT_BYTES).decode("utf-8", "replace"))
        stamps = {index: int(stamp) for (index, _), stamp in zip(self.sweeps, self.log.sweep_stamps_ns["velodyne"], strict=True)}
        boxes = [self._box(box, stamps[box.frame]) for box in tracked if box.frame in stamps]
        found = Counter({"labels: unreadable lines": unreadable, "labels: of frames without sweep": len(tracked) - len(boxes)})
        self._count_once("labels", 0, +found)
        camera = self.log.cameras["image_02"]
        half_width_px = min(camera.k_px[0, 2], camera.width - 1 - camera.k_px[0, 2])
        categories = tuple(sorted({box.category for box in boxes}))
        return Labels(tuple(self._with_velocities(boxes)), categories, complete_fov_rad=float(np.arctan(half_width_px / camera.k_px[0, 0])))

    def _box(self, box: kitti.TrackedBox, stamp_ns: int) -> Box:
        centre = np.array(box.bottom) - (0, box.size[2] / 2, 0)
        heading = self.ego_from_rect[:3, :3] @ (np.cos(box.turn_rad), 0, -np.sin(box.turn_rad))
        in_ego = self.ego_from_rect[:3, :3] @ centre + self.ego_from_rect[:3, 3]
        return Box(stamp_ns, box.track, box.category, in_ego, np.array(box.size), float(np.arctan2(heading[1], heading[0])))

    def _with_velocities(self, boxes: list[Box]) -> Iterator[Box]:
        """Velocity in the world, turned into the ego frame: central difference of a track's positions, at most 0.35 s apart."""
        tracks: dict[str, list[Box]] = defaultdict(list)
        for box in boxes:
            tracks[box.track].append(box)
        for track in tracks.values():
            track.sort(key=lambda box: box.stamp_ns)
            if self.log.poses is None:
                yield from track
                continue
            stamps = np.array([box.stamp_ns for box in track])
            known = self.log.poses.covers(stamps)  # packets may end before the labels do
            yield from (box for box, posed in zip(track, known, strict=True) if not posed)
            track = [box for box, posed in zip(track, known, strict=True) if posed]
            if not track:
                continue
            stamps = stamps[known]
            world_from_ego = pose_at(self.log.poses, stamps)
            place = np.einsum("nij,nj->ni", world_from_ego[:, :3, :3], [box.centre for box in track]) + world_from_ego[:, :3, 3]
            for i, box in enumerate(track):
                a, b = max(i - 1, 0), min(i + 1, len(track) - 1)
                seconds = (stamps[b] - stamps[a]) / 1e9
                velocity = None
                if 0 < seconds <= 0.35:
                    velocity = (world_from_ego[i, :3, :3].T @ (place[b] - place[a]) / seconds)[:2]
                yield Box(box.stamp_ns, box.track, box.category, box.centre, box.size, box.yaw_rad, velocity)


def write_sample(root: Path) -> Path:
    """Drive 0001 of a made-up day: four turns in front of a wall, camera 02, OXTS; the second image is absent. Gives the drive's folder."""
    import io

    from PIL import Image as Pillow

    date = root / "2011_09_26"
    drive = date / "2011_09_26_drive_0001_sync"
    for sensor in ("velodyne_points", "image_02", "oxts"):
        (drive / sensor / "data").mkdir(parents=True)
        stamps = "".join(f"2011-09-26 13:02:25.{offset:09d}\n" for offset in range(100_000_007, 500_000_000, 100_000_000))
        (drive / sensor / "timestamps.txt").write_text(stamps)
    (date / "calib_imu_to_velo.txt").write_text("R: 1 0 0 0 1 0 0 0 1\nT: -0.81 0.32 -0.80\n")
    (date / "calib_velo_to_cam.txt").write_text("R: 0 -1 0 0 0 -1 1 0 0\nT: 0 -0.08 -0.27\n")
    camera = "S_rect_02: 124 38\nR_rect_02: 1 0 0 0 1 0 0 0 1\nP_rect_02: 72 0 61 4.3 0 72 17 0 0 0 1 0\n"
    (date / "calib_cam_to_cam.txt").write_text("calib_time: 09-Jan-2012 13:57:47\nR_rect_00: 1 0 0 0 1 0 0 0 1\n" + camera)
    picture = io.BytesIO()
    Pillow.new("RGB", (62, 19), (90, 120, 150)).save(picture, "PNG")
    side, up = np.meshgrid(np.linspace(-8, 8, 40), np.linspace(-1.5, 2, 12))
    for index in range(4):
        wall = np.stack((np.full(side.size, 20.0 - index), side.ravel(), up.ravel(), np.full(side.size, 0.3)), 1)
        wall.astype("<f4").tofile(drive / "velodyne_points" / "data" / f"{index:010d}.bin")
        packet = [49.0, 8.4 + index * 1.0 / (EARTH_DEGREE_M * np.cos(np.radians(49.0))), 112.0, 0, 0, 0, 0, 0, 10.0] + [0] * 21
        (drive / "oxts" / "data" / f"{index:010d}.txt").write_text(" ".join(map(repr, map(float, packet))))
        if index != 1:
            (drive / "image_02" / "data" / f"{index:010d}.png").write_bytes(picture.getvalue())
    return drive


EARTH_DEGREE_M = 6378137.0 * np.pi / 180
