"""Read a store: `open_store(path).open_log(id)` is a `Log` like any other.

A store is pinned when it is opened: logs that are replaced or added afterwards are seen by opening it again. A manifest is compared with
its own digest and every table with the manifest's when it is read; each sweep or image is one ranged read whose length and checksum are
compared. `Store.verify` compares everything. A log is picklable, holds no open file, and may be read from several threads.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sensors import files
from sensors.adapters.base import open_source
from sensors.errors import UsageError, one_line
from sensors.records import Box, Image, Labels, Log, PointLabels, RecordError, Sweep, Trajectory
from sensors.store import format as layout
from sensors.store.codec import decode, decode_arrays, decode_labels
from sensors.store.writer import check_store, reference_bytes

Array = NDArray[Any]
Item = TypeVar("Item", Sweep, Image)


def open_store(path: Path | str, *, strict: bool = True) -> Store:
    """Open a store at its current generations. A log whose newest manifest is not whole raises BadFile, which names the generation before it;
    with strict=False it is left out and told in `Store.problems`."""
    root = Path(path)
    check_store(root)
    folders = sorted((root / "logs").iterdir()) if (root / "logs").is_dir() else []
    logs: dict[str, _Entry] = {}
    problems = []
    for folder in folders:
        numbers = files.generations(folder) if folder.is_dir() and not folder.is_symlink() else []
        if not numbers:
            continue
        try:
            entry = _read_entry(folder, numbers[-1])
        except files.BadFile as error:
            older = f"; generation {numbers[-2]} is there too: remove the newer file to return to it" if len(numbers) > 1 else ""
            if strict:
                raise files.BadFile(f"{error}{older}") from error
            problems.append(f"{error}{older}")
            continue
        logs[entry.manifest["id"]] = entry
    return Store(root, dict(sorted(logs.items())), tuple(problems))


@dataclass(frozen=True)
class _Entry:
    folder: Path
    manifest: Mapping[str, Any]
    files: Mapping[str, files.Entry]


def _read_entry(folder: Path, number: int) -> _Entry:
    path = files.generation_path(folder, number)
    manifest = files.unseal(files.read_whole(path, files.JSON_BYTES), one_line(path))
    entries = layout.check_manifest(manifest, one_line(path))
    if files.safe_name(manifest["id"]) != folder.name or manifest["generation"] != number:
        raise files.BadFile(f"{one_line(path)}: is the manifest of {one_line(manifest['id'])}, generation {manifest['generation']}; move it back")
    data = folder / manifest["folder"]
    if data.is_symlink() or not data.is_dir():
        raise files.BadFile(f"{one_line(data)}: is not there as a folder; restore it or ingest the log again")
    return _Entry(data, manifest, {entry.path: entry for entry in entries})


@dataclass(frozen=True, eq=False)
class Store:
    """A store as it was when it was opened."""

    path: Path
    _logs: Mapping[str, _Entry] = field(repr=False)
    problems: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._logs)

    def _entry(self, log_id: str) -> _Entry:
        if log_id not in self._logs:
            known = ", ".join(one_line(known, 60) for known in self.ids[:5])
            raise UsageError(f"log {one_line(log_id, 120)!r}: not in {one_line(self.path)}; there are {len(self._logs)}: {known}")
        return self._logs[log_id]

    def manifest(self, log_id: str) -> dict[str, Any]:
        return dict(self._entry(log_id).manifest)

    def open_log(self, log_id: str) -> Log:
        """The log, payloads lazy. BadFile where a file is missing, of another length, or a table is not whole."""
        entry = self._entry(log_id)
        for file in entry.files.values():
            files.check_entry(entry.folder, file, digests=False)
        return StoredLog(entry).log()

    def data_folder(self, log_id: str) -> Path:
        return self._entry(log_id).folder

    def verify(self, *, deep: bool = True) -> list[str]:
        """What is wrong, one line each; an empty list where all is well. deep: read every byte and compare it with the digests, for older
        generations too; otherwise names and lengths of the current ones."""
        found = list(self.problems)
        for folder in sorted({entry.folder.parent for entry in self._logs.values()}):
            for number in files.generations(folder) if deep else files.generations(folder)[-1:]:
                try:
                    entry = _read_entry(folder, number)
                except files.BadFile as error:
                    found.append(str(error))
                    continue
                for file in entry.files.values():
                    try:
                        files.check_entry(entry.folder, file, digests=deep)
                    except files.BadFile as error:
                        found.append(str(error))
        return list(dict.fromkeys(found))

    def strangers(self) -> list[str]:
        """Files and folders that no manifest names (left by an interrupted writer, or put there): they are never read."""
        return sorted(str(path.relative_to(self.path)) for path in self._strangers())

    def _strangers(self) -> Iterator[Path]:
        top = {layout.STORE_FILE, "logs", "quarantine", ".locks"}
        yield from (path for path in self.path.iterdir() if path.name not in top)
        for folder in (self.path / "logs").iterdir() if (self.path / "logs").is_dir() else ():
            named: set[Path] = set()
            for number in files.generations(folder):
                named.add(files.generation_path(folder, number))
                try:
                    entry = _read_entry(folder, number)
                except files.BadFile:
                    continue
                named.add(entry.folder)
                used = {entry.folder / name for name in entry.files}
                yield from (path for path in entry.folder.rglob("*") if path not in used and not path.is_dir())
            yield from (path for path in (folder.iterdir() if folder.is_dir() else [folder]) if path not in named)


class StoredLog:
    """The payloads of one log in a store, by stateless ranged reads."""

    def __init__(self, entry: _Entry) -> None:
        self._entry = entry
        self._manifest = entry.manifest
        self._what = f"log {one_line(entry.manifest['id'])}"
        self._rows: dict[str, dict[str, Array]] = {}
        for kind, types in (("lidars", layout.SWEEP_COLUMNS), ("cameras", layout.IMAGE_COLUMNS)):
            for name, row in self._manifest[kind].items():
                self._rows[name] = self._index(row, types, f"{self._what}, {one_line(name)}")

    def log(self) -> Log:
        m = self._manifest
        try:
            return Log(
                id=m["id"],
                dataset=m["dataset"],
                licence=m["licence"],
                ego_frame=m["ego_frame"],
                lidars={name: layout.lidar_of(name, row) for name, row in m["lidars"].items()},
                cameras={name: layout.camera_of(name, row) for name, row in m["cameras"].items()},
                poses=self._poses(),
                sweep_stamps_ns={name: self._rows[name]["stamp_ns"] for name in m["lidars"]},
                image_stamps_ns={name: self._rows[name]["stamp_ns"] for name in m["cameras"]},
                read_sweep=self.read_sweep,
                read_image=self.read_image,
                open_labels=self.open_labels,
                stamps=m["stamps"],
                measured_speed=self._speed(),
                intensity_scale=m["intensity_scale"],
                ego_box=tuple(m["ego_box"]),
                files=tuple(self._entry.folder / name for name in self._entry.files),
                counts=Counter(m["counts"]),
                notes=tuple(m["notes"]),
            )
        except RecordError as error:
            raise files.BadFile(f"{self._what}: {error}") from error

    def _table(self, name: str, types: Mapping[str, str], what: str) -> Any:
        """A table of the log, read whole and compared with its digest."""
        entry = self._entry.files[name]
        data = files.read_whole(self._entry.folder / name, entry.bytes)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise files.BadFile(f"{what}: {one_line(name)} changed (sha256); restore it or ingest the log again")
        return layout.table_of(data, types, f"{what}, {one_line(name)}")

    def _index(self, row: Mapping[str, Any], types: Mapping[str, str], what: str) -> dict[str, Array]:
        table = self._table(row["index"], types, what)
        layout.checked_offsets(table, self._entry.files[row["pack"]].bytes if row["pack"] else None, what)
        return {name: table.column(name).fill_null(-1).to_numpy() for name in types}

    def _poses(self) -> Trajectory | None:
        if self._manifest["poses"] is None:
            return None
        table = self._table(self._manifest["poses"], layout.POSE_TABLE, self._what)
        poses = np.tile(np.eye(4), (table.num_rows, 1, 1))
        poses[:, :3] = np.stack([layout.numbers(table, name) for name in layout.POSE_COLUMNS], 1).reshape(-1, 3, 4)
        return Trajectory(layout.numbers(table, "stamp_ns"), poses, self._manifest["pose_source"])

    def _speed(self) -> tuple[Array, Array] | None:
        if self._manifest["measured_speed"] is None:
            return None
        table = self._table(self._manifest["measured_speed"], layout.SPEED_TABLE, self._what)
        return layout.numbers(table, "stamp_ns"), layout.numbers(table, "forward_mps")

    def _record(self, name: str, index: int, kind: str) -> bytes:
        """The bytes of one item: one ranged read, its checksum compared."""
        rows = self._rows[name]
        what = f"{self._what}, {one_line(name)}, row {index}"
        record = files.read_range(self._entry.folder / self._manifest[kind][name]["pack"], int(rows["offset"][index]), int(rows["length"][index]))
        if zlib.crc32(record) != rows["crc32"][index]:
            raise files.BadFile(f"{what}: its bytes changed (crc32); restore the file or ingest the log again")
        return record

    def _known(self, kind: str, name: str, index: int) -> None:
        """RecordError where there is no such sensor, or no such item of it."""
        there = len(self._rows[name]["stamp_ns"]) if name in self._manifest[kind] else 0
        if not 0 <= index < there:
            raise RecordError(f"{self._what}: no item {index} of {one_line(name, 60)}; there are {there}")

    def read_sweep(self, lidar: str, index: int) -> Sweep:
        self._known("lidars", lidar, index)
        stamp = int(self._rows[lidar]["stamp_ns"][index])
        if self._manifest["lidars"][lidar]["pack"] is None:
            sweep = self._source.read_sweep(lidar, int(self._rows[lidar]["source_index"][index]))
            return self._unchanged(sweep, reference_bytes(sweep), lidar, index)
        columns = decode(self._record(lidar, index, "lidars"), f"{self._what}, {one_line(lidar)}, row {index}")
        return Sweep(lidar, stamp, columns.points, columns.intensity, columns.ring, columns.time_ns, columns.deskewed)

    def read_image(self, camera: str, index: int) -> Image:
        self._known("cameras", camera, index)
        rows = self._rows[camera]
        if self._manifest["cameras"][camera]["pack"] is None:
            image = self._source.read_image(camera, int(rows["source_index"][index]))
            return self._unchanged(image, image.encoded, camera, index)
        exposure = int(rows["exposure_ns"][index])
        size = int(rows["width"][index]), int(rows["height"][index])
        encoded = self._record(camera, index, "cameras")
        return Image(camera, int(rows["stamp_ns"][index]), encoded, *size, exposure if exposure >= 0 else None)

    def _unchanged(self, item: Item, data: bytes, name: str, index: int) -> Item:
        rows = self._rows[name]
        if item.stamp_ns != rows["stamp_ns"][index] or zlib.crc32(data) != rows["crc32"][index]:
            path = one_line(self._manifest["reference"]["path"])
            raise files.BadFile(f"{self._what}, {one_line(name)}, row {index}: the original in {path} changed; ingest the log again")
        return item

    @functools.cached_property
    def _source(self) -> Log:
        """The log that this one refers to, opened by its adapter."""
        reference = self._manifest["reference"]
        path = Path(reference["path"])
        if not path.exists():
            raise files.BadFile(f"{self._what}: refers to {one_line(path)}, which is not there; put it back or ingest the log again")
        for found in open_source(path, reference["dataset"], reference.get("options", {})):
            if isinstance(found, Log) and found.id == self._manifest["id"]:
                return found
        raise files.BadFile(f"{self._what}: is no longer in {one_line(path)}; put it back or ingest the log again")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_source"}

    def open_labels(self) -> Labels | None:
        row = self._manifest["labels"]
        if row is None:
            return None
        table = self._table(row["boxes"], layout.BOX_TABLE, self._what)
        packs = {kind: {name: self._label_index(name, pack) for name, pack in row.get(kind, {}).items()} for kind in layout.LABEL_KINDS}
        stored = _StoredLabels(self, packs)
        boxes = tuple(_boxes(table))
        readers = stored.read_point_labels, stored.read_camera_truth, stored.read_missing_rays
        return Labels(boxes, tuple(row["categories"]), row["complete_fov_rad"], *readers)

    def _label_index(self, name: str, row: Mapping[str, Any]) -> dict[int, tuple[int, int, int, int]]:
        """By the item's index: stamp, offset, length, crc32 of its label."""
        columns = self._index(row, layout.LABEL_COLUMNS, f"{self._what}, labels of {one_line(name)}")
        rows = zip(*(columns[key].tolist() for key in ("stamp_ns", "offset", "length", "crc32")), strict=True)
        return dict(zip(columns["index"].tolist(), rows, strict=True))

    def label_record(self, kind: str, sensor: str, row: tuple[int, int, int, int]) -> tuple[bytes, str]:
        """The bytes of one label, their checksum compared, and what to call them in an error."""
        stamp_ns, offset, length, crc32 = row
        what = f"{self._what}, labels ({kind}) of {one_line(sensor)} at {stamp_ns}"
        record = files.read_range(self._entry.folder / self._manifest["labels"][kind][sensor]["pack"], offset, length)
        if zlib.crc32(record) != crc32:
            raise files.BadFile(f"{what}: their bytes changed (crc32); restore the file or ingest the log again")
        return record, what


@dataclass(frozen=True, eq=False)
class _StoredLabels:
    """The labels of items: rows by kind, sensor and index."""

    stored: StoredLog
    rows: Mapping[str, Mapping[str, Mapping[int, tuple[int, int, int, int]]]]

    def _arrays(self, kind: str, sensor: str, index: int, kinds: tuple[str, ...]) -> list[Array] | None:
        row = self.rows[kind].get(sensor, {}).get(index)
        if row is None:
            return None
        record, what = self.stored.label_record(kind, sensor, row)
        return decode_arrays(record, kinds, what)

    def read_point_labels(self, lidar: str, index: int) -> PointLabels | None:
        row = self.rows["points"].get(lidar, {}).get(index)
        if row is None:
            return None
        record, what = self.stored.label_record("points", lidar, row)
        return decode_labels(record, row[0], what)

    def read_missing_rays(self, lidar: str, index: int) -> Array | None:
        found = self._arrays("missing", lidar, index, ("f4:2",))
        return None if found is None else found[0]

    def read_camera_truth(self, camera: str, index: int) -> tuple[Array, Array] | None:
        found = self._arrays("truth", camera, index, ("f4:2", "u1:2"))
        return None if found is None else (found[0], found[1])


def _boxes(table: Any) -> Iterator[Box]:
    for row in table.to_pylist():
        velocity = None if row["vx_mps"] is None or row["vy_mps"] is None else np.array([row["vx_mps"], row["vy_mps"]])
        centre = np.array([row["x_m"], row["y_m"], row["z_m"]], np.float64)
        size = np.array([row["length_m"], row["width_m"], row["height_m"]], np.float64)
        yield Box(row["stamp_ns"], row["track"], row["category"], centre, size, row["yaw_rad"], velocity, row["points_inside"])
