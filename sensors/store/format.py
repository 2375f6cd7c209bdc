"""What is on disk: names, versions, and the checks of a manifest that somebody else may have written. `docs/STORE.md` is the same in words.

    STORE/
      store.json                         {"format": "driving-worldmodel store", "version": 1}
      logs/NAME/generation-000001.json   the manifest of one log; the highest number is current
      logs/NAME/000001-DIGEST/           its data: packs, Parquet tables, labels/
      quarantine/NAME.json               a log that could not be ingested, and why
      .locks/                            empty meaning; see `sensors.files.lock`

NAME is `sensors.files.safe_name` of the log's id. What no manifest names does not exist.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors import files
from sensors.errors import one_line
from sensors.records import Camera, Lidar, Log, RecordError

Array = NDArray[Any]

VERSION = 1
STORE_FORMAT = "driving-worldmodel store"
LOG_FORMAT = "driving-worldmodel log"
STORE_FILE = "store.json"
MAX_ROWS = 50_000_000

POSE_COLUMNS = tuple(f"m{row}{column}" for row in range(3) for column in range(4))
SWEEP_COLUMNS = {"stamp_ns": "int64", "source_index": "int64", "offset": "int64", "length": "int64", "crc32": "int64", "points": "int64"}
IMAGE_COLUMNS = SWEEP_COLUMNS | {"width": "int64", "height": "int64", "exposure_ns": "int64"}
del IMAGE_COLUMNS["points"]
POSE_TABLE = {"stamp_ns": "int64"} | dict.fromkeys(POSE_COLUMNS, "double")
SPEED_TABLE = {"stamp_ns": "int64", "forward_mps": "double"}
BOX_TABLE = {"stamp_ns": "int64", "track": "string", "category": "string"} | dict.fromkeys(
    ("x_m", "y_m", "z_m", "length_m", "width_m", "height_m", "yaw_rad", "vx_mps", "vy_mps"), "double"
) | {"points_inside": "int64"}  # fmt: skip
# labels of a sensor's items: of points, rays of a simulated LiDAR without return, depth and category of a simulated image
LABEL_KINDS = ("points", "missing", "truth")
LABEL_COLUMNS = {"index": "int64", "stamp_ns": "int64", "offset": "int64", "length": "int64", "crc32": "int64"}


def log_folder(store: Path, log_id: str) -> Path:
    return store / "logs" / files.safe_name(log_id)


def lock_path(store: Path, log_id: str) -> Path:
    return store / ".locks" / f"{files.safe_name(log_id)}.lock"


def quarantine_path(store: Path, name: str) -> Path:
    return store / "quarantine" / f"{files.safe_name(name)}.json"


def table_bytes(columns: Mapping[str, Any], types: Mapping[str, str]) -> bytes:
    """A Parquet file of the columns (arrays, or lists with None where the value is missing)."""
    import pyarrow
    import pyarrow.parquet

    fields = [pyarrow.field(name, pyarrow.type_for_alias(kind)) for name, kind in types.items()]
    arrays = [pyarrow.array(columns[field.name], field.type) for field in fields]
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=pyarrow.schema(fields)), sink, compression="zstd")
    return sink.getvalue()


def table_of(data: bytes, types: Mapping[str, str], what: str) -> Any:
    """The pyarrow Table in a Parquet file, when it has exactly these columns and its content is valid."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        found = {field.name: str(field.type) for field in file.schema_arrow}
        if found != dict(types) or file.metadata.num_rows > MAX_ROWS:
            raise files.BadFile(f"{what}: columns {one_line(found, 200)}, {file.metadata.num_rows} rows; not what this format has there")
        table = file.read(use_threads=False)
        table.validate(full=True)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise files.BadFile(f"{what}: not a whole Parquet file ({one_line(error, 120)}); restore it or ingest the log again") from error
    return table


def numbers(table: Any, column: str) -> Array:
    """A column as int64 or float64 (N,); missing values are an error of the file, except in floats, where they are NaN."""
    return np.asarray(table.column(column).to_numpy(zero_copy_only=False))


def lidar_json(lidar: Lidar) -> dict[str, Any]:
    elevations = None if lidar.elevations_rad is None else lidar.elevations_rad.tolist()
    return {"ego_from_lidar": lidar.ego_from_lidar.tolist(), "rate_hz": float(lidar.rate_hz), "beams": lidar.beams, "elevations_rad": elevations}


def lidar_of(name: str, row: Mapping[str, Any]) -> Lidar:
    return Lidar(name, row["ego_from_lidar"], row["rate_hz"], row["beams"], row["elevations_rad"])


def camera_json(camera: Camera) -> dict[str, Any]:
    return {
        "ego_from_camera": camera.ego_from_camera.tolist(),
        "k_px": camera.k_px.tolist(),
        "width": int(camera.width),
        "height": int(camera.height),
        "model": camera.model,
        "distortion": camera.distortion.tolist(),
        "rate_hz": float(camera.rate_hz),
    }


def camera_of(name: str, row: Mapping[str, Any]) -> Camera:
    return Camera(name, row["ego_from_camera"], row["k_px"], row["width"], row["height"], row["model"], row["distortion"], row["rate_hz"])


def log_json(log: Log) -> dict[str, Any]:
    """The fields of a manifest that say what the log is, apart from its payloads."""
    return {
        "format": LOG_FORMAT,
        "version": VERSION,
        "id": log.id,
        "dataset": log.dataset,
        "licence": log.licence,
        "ego_frame": log.ego_frame,
        "ego_box": [float(v) for v in log.ego_box],
        "stamps": log.stamps,
        "intensity_scale": float(log.intensity_scale),
        "notes": list(log.notes),
        "pose_source": None if log.poses is None else log.poses.source,
    }


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 50


def _stamp(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 100_000


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _listed(check: Callable[[Any], bool], count: int | None = None) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and (count is None or len(value) == count) and all(map(check, value))


def _mapped(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _object(keys: Mapping[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(key in value and check(value[key]) for key, check in keys.items())


_MATRIX4, _MATRIX3 = _listed(_listed(_number, 4), 4), _listed(_listed(_number, 3), 3)
_PACKED = {"index": _text, "pack": _optional(_text), "rate_hz": _number}
_LIDAR = _PACKED | {
    "ego_from_lidar": _MATRIX4,
    "beams": _optional(_count),
    "elevations_rad": _optional(_listed(_number)),
    "sweeps": _count,
    "points": _count,
}
_CAMERA = _PACKED | {
    "ego_from_camera": _MATRIX4,
    "k_px": _MATRIX3,
    "width": _count,
    "height": _count,
    "model": _text,
    "distortion": _listed(_number),
    "images": _count,
}
_LABEL_PACKS = _mapped(_object({"pack": _text, "index": _text}))
_LABELS = {
    "boxes": _text,
    "box_count": _count,
    "categories": _listed(_text),
    "complete_fov_rad": _number,
    "points": _LABEL_PACKS,
}
_REFERENCE = {"path": _text, "dataset": _text}
_MANIFEST: dict[str, Callable[[Any], bool]] = {
    "generation": _count,
    "id": _text,
    "dataset": _text,
    "licence": _text,
    "ego_frame": _text,
    "ego_box": _listed(_number, 6),
    "stamps": _text,
    "intensity_scale": _number,
    "notes": _listed(_text),
    "pose_source": _optional(_text),
    "lidars": _mapped(_object(_LIDAR)),
    "cameras": _mapped(_object(_CAMERA)),
    "poses": _optional(_text),
    "measured_speed": _optional(_text),
    "frames": _optional(_text),
    "labels": _optional(_object(_LABELS)),
    "counts": _mapped(_count),
    "quarantined": _listed(_object({"sensor": _text, "stamp_ns": _optional(_stamp), "reason": _text})),
    "options": lambda value: isinstance(value, dict),
    "source": _optional(_object({"digest": _text, "files": _count, "bytes": _count})),
    "reference": _optional(lambda value: _object(_REFERENCE)(value) and _mapped(_text)(value.get("options", {}))),
    "folder": _text,
    "files": lambda value: isinstance(value, list),
    "digest": _text,
    "format": _text,
    "version": _count,
}


def check_manifest(manifest: Mapping[str, Any], what: str) -> list[files.Entry]:
    """Types, versions, names; every file that it uses must be among the files it lists. Gives the list. BadFile otherwise."""
    if manifest.get("format") != LOG_FORMAT:
        raise files.BadFile(f"{what}: its format is {one_line(repr(manifest.get('format')), 60)}, not {LOG_FORMAT!r}")
    version = manifest.get("version")
    if type(version) is not int or version != VERSION:
        raise files.BadFile(
            f"{what}: format version {one_line(repr(version), 40)}, this release reads version {VERSION}; read it with a later release"
        )
    if isinstance(manifest.get("labels"), dict) and not all(_LABEL_PACKS(manifest["labels"].get(kind, {})) for kind in LABEL_KINDS):
        raise files.BadFile(f"{what}: 'labels' are not as the format has them; ingest the log again")
    for key, check in _MANIFEST.items():
        if key not in manifest:
            raise files.BadFile(f"{what}: has no {key!r}; restore it or ingest the log again")
        if not check(manifest[key]):
            raise files.BadFile(f"{what}: {key!r} is not as the format has it ({one_line(repr(manifest[key]), 80)}); ingest the log again")
    if "/" in manifest["folder"] or not files.is_name(manifest["folder"]):
        raise files.BadFile(f"{what}: folder {one_line(repr(manifest['folder']), 80)} is not a plain name; it is not opened")
    entries = files.entries_of(manifest, what)
    known = {entry.path for entry in entries}
    labels = manifest["labels"]
    used = [row[key] for kind in ("lidars", "cameras") for row in manifest[kind].values() for key in ("index", "pack")]
    used += [manifest["poses"], manifest["measured_speed"], manifest["frames"]]
    if labels:
        used += [labels["boxes"], *(row[key] for kind in LABEL_KINDS for row in labels.get(kind, {}).values() for key in ("index", "pack"))]
    if missing := [name for name in used if name is not None and name not in known]:
        raise files.BadFile(f"{what}: uses {one_line(repr(missing[0]), 80)}, which is not among its files; ingest the log again")
    if manifest["reference"] is None and any(row["pack"] is None for kind in ("lidars", "cameras") for row in manifest[kind].values()):
        raise files.BadFile(f"{what}: a sensor has neither a pack nor a source to refer to; ingest the log again")
    return entries


def checked_offsets(table: Any, size: int | None, what: str) -> None:
    """Refuse an index whose stamps do not ascend or whose records do not fill the pack of `size` bytes (None: no pack) one after the other."""
    try:
        stamps, offsets, lengths = (numbers(table, name) for name in ("stamp_ns", "offset", "length"))
        integers = all(column.dtype == np.int64 for column in (stamps, offsets, lengths))
    except (ValueError, TypeError) as error:
        raise RecordError(f"{what}: {one_line(error, 80)}") from error
    ends = np.cumsum(lengths, dtype=np.float64) if integers else np.zeros(0)
    if not integers or (np.diff(stamps) <= 0).any() or (lengths < 0).any():
        raise files.BadFile(f"{what}: stamps or lengths are not as an index has them; restore it or ingest the log again")
    if size is not None and (float(ends[-1] if len(ends) else 0) != size or (offsets != np.append(0, ends[:-1])[: len(offsets)]).any()):
        row = int(np.flatnonzero(offsets != np.append(0, ends[:-1])[: len(offsets)])[:1].sum())
        raise files.BadFile(f"{what}, row {row}: records do not fill the pack of {size} bytes one after the other; ingest the log again")
