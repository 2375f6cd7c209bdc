"""Write one log into a store. A log is there whole or not at all; a second writer of it is told who the first is."""

from __future__ import annotations

import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors import files
from sensors.clips import nearest_index
from sensors.errors import UsageError, WmError, one_line
from sensors.formats.images import sized
from sensors.geometry import pose_at
from sensors.records import Image, Item, Labels, Log, RecordError, Sweep, announced, boxes_astray, labels_of, reference_of
from sensors.store import format as layout
from sensors.store.codec import encode, encode_arrays, encode_labels

Array = NDArray[Any]

POSE_SLACK_NS = 100_000_000
UNREADABLE = object()


@dataclass(frozen=True)
class Reference:
    """Where the originals are that a store refers to instead of copying: the path given to the adapter, the adapter's name and its options."""

    path: Path
    dataset: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Index:
    """The rows of an index while a pack is written."""

    columns: dict[str, list[int | None]] = field(default_factory=dict)

    def add(self, **values: int | None) -> None:
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)

    def bytes(self, types: Mapping[str, str]) -> bytes:
        return layout.table_bytes({name: self.columns.get(name, []) for name in types}, types)


def prepare_store(store: Path) -> None:
    """Make `store` a store if it is absent or an empty folder; UsageError where it is something else."""
    marker = store / layout.STORE_FILE
    if marker.exists():
        check_store(store)
        return
    known = {layout.STORE_FILE, "logs", "quarantine", ".locks"}
    if store.exists() and not store.is_dir():
        raise UsageError(f"{one_line(store)}: not a folder; give another place for the store")
    if store.is_dir() and any(entry.name not in known and not entry.name.startswith(files.TEMPORARY) for entry in store.iterdir()):
        raise UsageError(f"{one_line(store)}: neither empty nor a store; give a new folder")
    files.make_folder(store)
    with files.lock(store / ".locks" / "store.lock", f"store {one_line(store)}", wait=True):
        if not marker.exists():
            for leftover in store.glob(f"{files.TEMPORARY}*"):
                files.remove(leftover)
            files.write_json(marker, {"format": layout.STORE_FORMAT, "version": layout.VERSION}, new=True)
    check_store(store)


def check_store(store: Path) -> None:
    """BadFile unless `store` is a store that this release reads."""
    if not (store / layout.STORE_FILE).is_file():
        raise UsageError(f"{one_line(store)}: not a store (no {layout.STORE_FILE}); make one with `wm ingest`")
    found = files.read_json(store / layout.STORE_FILE)
    if not isinstance(found, dict) or found.get("format") != layout.STORE_FORMAT or type(found.get("version")) is not int:
        raise files.BadFile(f"{one_line(store / layout.STORE_FILE)}: is not the mark of a store; give another folder")
    if found["version"] != layout.VERSION:
        raise files.BadFile(f"{one_line(store)}: store version {found['version']}, this release reads version {layout.VERSION}")


def write_log(
    store: Path,
    log: Log,
    *,
    labels: bool = True,
    lossless: bool = False,
    reference: Reference | None = None,
    overwrite: bool = False,
    options: Mapping[str, str | int | bool] | None = None,
    source: Mapping[str, str | int] | None = None,
    step: Callable[[str], None] | None = None,
    before_commit: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Store a log and give its manifest. What cannot be read is left out and listed in the manifest under `quarantined`.

    labels: also what `log.open_labels` gives, apart. lossless: coordinates to the bit. reference: no payloads, only where they are.
    overwrite: where the log is stored already, write its next generation (else `files.Exists`). options and source
    ({digest, files, bytes}) go into the manifest. step(text) is called before each item; before_commit() last, and either may raise to give up.
    """
    prepare_store(store)
    folder = layout.log_folder(store, log.id)
    with files.lock(layout.lock_path(store, log.id), f"log {one_line(log.id)}"):
        numbers = files.generations(folder)
        if numbers and not overwrite:
            raise files.Exists(f"log {one_line(log.id)}: in the store already; --overwrite replaces it")
        try:
            files.make_folder(folder, root=store)
            _remove_leftovers(folder, numbers)
            generation = max(numbers, default=0) + 1
            with files.new_folder(folder) as new:
                manifest = _Writer(new, log, lossless, reference, step or (lambda text: None)).write(labels)
                manifest["generation"] = generation
                manifest["options"] = {"lossless": lossless, "labels": labels} | dict(options or {})
                manifest["source"] = None if source is None else dict(source)
                manifest["files"] = [vars(entry) for entry in new.entries()]
                manifest["folder"] = f"{generation:06d}-{files.digest_of({'files': manifest['files']})[:16]}"
                sealed = files.seal(manifest)
                layout.check_manifest(files.unseal(sealed, log.id), f"log {one_line(log.id)}, manifest")
                if before_commit is not None:
                    before_commit()
                new.publish(manifest["folder"])
            files.write_file(files.generation_path(folder, generation), sealed, new=True)
        except OSError as error:
            free = shutil.disk_usage(store).free if store.exists() else 0
            raise WmError(
                f"{one_line(store)}: log {one_line(log.id)} could not be written ({error.strerror or error}; {free >> 20} MiB free); "
                "logs stored before are untouched; mend that and run again"
            ) from error
    return files.unseal(sealed, log.id)


def _remove_leftovers(folder: Path, numbers: list[int]) -> None:
    """Remove what an interrupted writer of this log left: temporary names, and data folders newer than every manifest."""
    for entry in sorted(folder.iterdir()):
        number, _, _ = entry.name.partition("-")
        newer = entry.is_dir() and number.isascii() and number.isdigit() and int(number) > max(numbers, default=0)
        if entry.name.startswith(files.TEMPORARY) or newer:
            files.remove(entry)


class _Writer:
    """Fills the folder of one log."""

    def __init__(self, new: files.NewFolder, log: Log, lossless: bool, reference: Reference | None, step: Callable[[str], None]) -> None:
        self.new, self.log, self.lossless, self.reference, self.step = new, log, lossless, reference, step
        self.quarantined: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()  # beside the log's own
        self.kept: dict[str, Array] = {}
        self.labels: Labels | None = None
        self.label_packs: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in layout.LABEL_KINDS}

    def write(self, labels: bool) -> dict[str, Any]:
        log = self.log
        opened = self._read("labels", None, lambda: labels_of(log, log.open_labels)) if labels else None
        self.labels = opened if isinstance(opened, Labels) else None
        lidars = {name: layout.lidar_json(lidar) | self._sweeps(name) for name, lidar in log.lidars.items()}
        cameras = {name: layout.camera_json(camera) | self._images(name) for name, camera in log.cameras.items()}
        if not any(len(stamps) for stamps in self.kept.values()):
            # the adapter's counts say what became of the files
            counted = [f"{what}: {count}" for what, count in log.counts.items() if count > 0]
            none = "; ".join(("it holds none, fetch its files", *counted))
            reason = self.quarantined[0]["reason"] if self.quarantined else one_line(none, 240)
            raise RecordError(f"log {one_line(log.id)}: not one readable sweep or image ({reason})")
        manifest = layout.log_json(log) | {"lidars": lidars, "cameras": cameras, "labels": self._labels(), "frames": self._frames()}
        manifest |= {"poses": self._poses(), "measured_speed": self._speed()}
        from_ = self.reference
        manifest["reference"] = from_ and {"path": str(from_.path.resolve()), "dataset": from_.dataset, "options": dict(from_.options)}
        counts = Counter({key: int(count) for key, count in (Counter(log.counts) + self.counts).items()})
        counts.update(f"{row['sensor']}: unreadable, quarantined" for row in self.quarantined)
        return manifest | {"counts": dict(counts), "quarantined": self.quarantined}

    def _read(self, sensor: str, stamp_ns: int | None, read: Callable[[], Any]) -> Any:
        """What `read` gives, or UNREADABLE, with the reason put on record."""
        self.step(f"{self.log.id} {sensor}")
        try:
            return read()
        except (RecordError, OSError) as error:
            self.quarantined.append({"sensor": sensor, "stamp_ns": stamp_ns, "reason": one_line(error)})
            return UNREADABLE

    def _sweeps(self, name: str) -> dict[str, Any]:
        index, points = _Index(), 0

        def record_of(sweep: Sweep) -> tuple[bytes, dict[str, int | None]]:
            nonlocal points
            points += len(sweep.points)
            self.counts[f"{name}: sweeps without a point"] += not len(sweep.points)
            if self.reference is not None:
                return reference_bytes(sweep), {"points": len(sweep.points)}
            return encode(sweep, lossless=self.lossless), {"points": len(sweep.points)}

        row = self._pack("lidar", Sweep, name, index, self.log.sweep_stamps_ns[name], self.log.read_sweep, record_of, layout.SWEEP_COLUMNS)
        return row | {"sweeps": len(self.kept[name]), "points": points}

    def _images(self, name: str) -> dict[str, Any]:
        camera = self.log.cameras[name]

        def record_of(image: Image) -> tuple[bytes, dict[str, int | None]]:
            if (image.width, image.height) != (camera.width, camera.height):
                self.counts[f"{name}: images of another size than its calibration, {camera.width}x{camera.height}"] += 1
            return image.encoded, {"width": image.width, "height": image.height, "exposure_ns": image.exposure_ns}

        def read(name: str, index: int) -> object:
            image = self.log.read_image(name, index)
            return sized(image) if isinstance(image, Image) else image

        row = self._pack("camera", Image, name, _Index(), self.log.image_stamps_ns[name], read, record_of, layout.IMAGE_COLUMNS)
        return row | {"images": len(self.kept[name])}

    def _pack(
        self,
        kind: str,
        record_type: type[Item],
        name: str,
        index: _Index,
        stamps: Array,
        read: Callable[[str, int], object],
        record_of: Callable[[Item], tuple[bytes, dict[str, int | None]]],
        types: Mapping[str, str],
    ) -> dict[str, Any]:
        """Every readable item of one sensor, one after the other, and their index."""
        stem = f"{kind}-{files.safe_name(name)}"
        kept: list[int] = []
        beside = [_LabelPack(self.new, what, name, encoded) for what, encoded in self._label_readers(kind)]
        out = None if self.reference else self.new.create(f"{stem}.pack")
        for i, stamp in enumerate(stamps.tolist()):
            item = self._read(name, stamp, partial(read, name, i))
            if item is UNREADABLE:
                continue
            record, columns = record_of(announced(self.log, record_type, name, i, item))
            offset = out.append(record) if out else 0
            index.add(stamp_ns=stamp, source_index=i, offset=offset, length=len(record) if out else 0, crc32=zlib.crc32(record), **columns)
            for pack in beside:
                # read now: what made the item, a simulator or a decoder, still has it at hand
                label = self._read("labels", stamp, partial(pack.read, name, i))
                pack.add(len(kept), stamp, None if label is UNREADABLE else label)
            kept.append(stamp)
        if out:
            out.close()
        self.new.write(f"{stem}.parquet", index.bytes(types))
        for pack in beside:
            if row := pack.close():
                self.label_packs[pack.what][name] = row
        self.kept[name] = np.array(kept, np.int64)
        return {"pack": f"{stem}.pack" if out else None, "index": f"{stem}.parquet"}

    def _poses(self) -> str | None:
        if self.log.poses is None:
            return None
        table = {"stamp_ns": self.log.poses.stamps_ns} | _pose_columns(self.log.poses.world_from_ego)
        self.new.write("poses.parquet", layout.table_bytes(table, layout.POSE_TABLE))
        return "poses.parquet"

    def _speed(self) -> str | None:
        if self.log.measured_speed is None:
            return None
        stamps, forward = self.log.measured_speed
        self.new.write("speed.parquet", layout.table_bytes({"stamp_ns": stamps, "forward_mps": forward}, layout.SPEED_TABLE))
        return "speed.parquet"

    def _reference(self) -> str | None:
        lidars = self.log.lidars
        return reference_of(lidars, {name: len(self.kept[name]) for name in lidars}) if lidars else None

    def _frames(self) -> str | None:
        """The frame table: for each sweep of the reference LiDAR the nearest item of every other sensor within half its period, and the pose."""
        log, reference = self.log, self._reference()
        if reference is None:
            return None
        stamps = self.kept[reference]
        table: dict[str, Any] = {"stamp_ns": stamps}
        types = {"stamp_ns": "int64"}
        rates = {name: sensor.rate_hz for name, sensor in log.lidars.items()} | {name: sensor.rate_hz for name, sensor in log.cameras.items()}
        for name, rate_hz in rates.items():
            known = self.kept[name]
            if name == reference or not len(known):
                continue
            nearest = nearest_index(known, stamps)
            skew = known[nearest] - stamps
            near = np.abs(skew) <= 0.5e9 / rate_hz
            for column, values in ((f"{name}: index", nearest), (f"{name}: skew_ns", skew)):
                table[column] = [int(value) if ok else None for value, ok in zip(values, near, strict=True)]
                types[column] = "int64"
        if log.poses is not None:
            inside = (stamps >= log.poses.stamps_ns[0] - POSE_SLACK_NS) & (stamps <= log.poses.stamps_ns[-1] + POSE_SLACK_NS)
            poses = np.full((len(stamps), 4, 4), np.nan)
            poses[inside] = pose_at(log.poses, stamps[inside]) if inside.any() else 0
            table |= _pose_columns(poses)
            types |= dict.fromkeys(layout.POSE_COLUMNS, "double")
        self.new.write("frames.parquet", layout.table_bytes(table, types))
        return "frames.parquet"

    def _label_readers(self, kind: str) -> list[tuple[str, Callable[[str, int], bytes | None]]]:
        """For the sensors of a kind: what sort of label there may be, and a function of (sensor, index) that gives its record."""
        labels = self.labels
        if labels is None:
            return []

        def points(name: str, index: int) -> bytes | None:
            found = labels.read_point_labels(name, index)
            return None if found is None else encode_labels(found)

        def missing(name: str, index: int) -> bytes | None:
            found = labels.read_missing_rays(name, index)
            return None if found is None else encode_arrays([np.asarray(found, np.float32)])

        def truth(name: str, index: int) -> bytes | None:
            found = labels.read_camera_truth(name, index)
            return None if found is None else encode_arrays([np.asarray(found[0], np.float32), np.asarray(found[1], np.uint8)])

        return [("points", points), ("missing", missing)] if kind == "lidar" else [("truth", truth)]

    def _labels(self) -> dict[str, Any] | None:
        labels = self.labels
        if labels is None:
            return None
        self.new.write("labels/boxes.parquet", _box_table(labels))
        if reference := self._reference():
            self.counts[f"labels: boxes at the stamp of no sweep of {reference}, of no use"] += boxes_astray(labels, self.kept[reference])
        about = {"boxes": "labels/boxes.parquet", "box_count": len(labels.boxes), "categories": list(labels.categories)}
        return about | {"complete_fov_rad": float(labels.complete_fov_rad)} | self.label_packs


class _LabelPack:
    """The labels of one sensor's items, in a pack that is made when there is a first one."""

    def __init__(self, new: files.NewFolder, what: str, sensor: str, read: Callable[[str, int], bytes | None]) -> None:
        self.new, self.what, self.read = new, what, read
        self.stem = f"labels/{what}-{files.safe_name(sensor)}"
        self.index = _Index()
        self.out: files.Output | None = None

    def add(self, place: int, stamp: int, record: bytes | None) -> None:
        """The label of the item that is stored at `place`."""
        if record is not None:
            self.out = self.out or self.new.create(f"{self.stem}.pack")
            offset = self.out.append(record)
            self.index.add(index=place, stamp_ns=stamp, offset=offset, length=len(record), crc32=zlib.crc32(record))

    def close(self) -> dict[str, Any] | None:
        if self.out is None:
            return None
        self.out.close()
        self.new.write(f"{self.stem}.parquet", self.index.bytes(layout.LABEL_COLUMNS))
        return {"pack": f"{self.stem}.pack", "index": f"{self.stem}.parquet"}


def reference_bytes(sweep: Sweep) -> bytes:
    """What the checksum of a sweep is taken over that a store refers to: points and intensity as float32."""
    return sweep.points.tobytes() + sweep.intensity.tobytes()


def _pose_columns(poses: Array) -> dict[str, Array]:
    return dict(zip(layout.POSE_COLUMNS, poses[:, :3].reshape(-1, 12).T, strict=True))


def _box_table(labels: Labels) -> bytes:
    boxes = labels.boxes
    rows = [
        (b.stamp_ns, b.track, b.category, *b.centre, *b.size, b.yaw_rad, *((None, None) if b.velocity is None else b.velocity), b.points_inside)
        for b in boxes
    ]
    columns: list[Any] = [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in layout.BOX_TABLE]
    return layout.table_bytes(dict(zip(layout.BOX_TABLE, columns, strict=True)), layout.BOX_TABLE)
