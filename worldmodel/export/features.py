"""`wm export RUN --to features --data D`: the encoder's latent of every frame of the data, where it lies in the world, as Parquet.

The folder: `features/LOG.parquet` with a row per frame, `manifest.json`, and the encoder itself, so that latents of other clouds can be made
(`worldmodel.handover.standalone_folder`; left out where the encoder is your own code). Its `sample.safetensors` is the cloud of the first row.

A frame is a sweep of the reference LiDAR with the full past that the encoder saw in pretraining (`sweeps` joined in one cloud, or the newest
alone, as the run did it). Columns of a row:

    log, stamp_ns               `LOG@STAMP_NS` is the id of the clip whose t = 0 this is
    world_from_ego              16 f64, row by row: the pose of the ego frame
    ego_from_map                16 f64: the frame that the map and the points of the encoder lie in
    cell_m, low_x, low_y        cell (r, c) of the map covers x from low_x + c * cell_m and y from low_y + r * cell_m, in that frame
    shape                       (C, H, W) of the map
    map                         float16, little endian, C * H * W values: means over POOL x POOL cells of the encoder's map
    summary                     2 C f32: over the cells that hold points, the mean of each channel, then the largest value of each (float32,
                                from the map before pooling); zero where no cell holds any
    points                      how many points the encoder was given

A cell of the map is thus POOL cells of the encoder's map wide; the last row and column may lie over the edge.
"""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sensors.clips import clips_at
from sensors.data import Part
from sensors.errors import UsageError, WmError, one_line
from sensors.files import MANIFEST, Output, check_folder, new_folder, safe_name, seal
from sensors.geometry import inverse
from sensors.rays import history_of
from sensors.records import Clip
from worldmodel.batches import clouds_of, joined, past_clouds, state_from_ego
from worldmodel.config import Config
from worldmodel.encoders.contract import Clouds
from worldmodel.encoders.standalone import cells_of
from worldmodel.handover import standalone_folder
from worldmodel.rundir import strictest
from worldmodel.trained import Trained

Array = NDArray[Any]

POOL = 4
ROWS_A_GROUP = 64
KEY = b"driving_worldmodel"
MOST_VALUES = 1 << 26


def export(trained: Trained, folder: Path, about: dict[str, Any], sample: Tensor, parts: Sequence[Part]) -> dict[str, Any]:
    """Write the latents of all frames of `parts` to the new folder. UsageError without data, or where no frame has a full past."""
    import pyarrow.parquet as pq

    if not parts:
        raise UsageError("--to features: give the logs whose latents are wanted, --data D")
    config = trained.config
    encoder = trained.model.encoder.float().eval().cpu()
    layout = layout_of(encoder, config)
    schema = _schema(layout)
    data, first, total = [], None, 0
    with new_folder(folder.parent) as new:
        for number, (log_id, of_log) in enumerate(_by_log(parts).items()):
            frames, name = 0, f"features/{number:05d}-{safe_name(log_id)}.parquet"
            for group in _groups(_frames(of_log, config), ROWS_A_GROUP):
                rows = []
                for clip in group:
                    points = _cloud(clip, config)
                    bev = _map_of(encoder, points)
                    first = first or (points, bev, name)
                    rows.append(_row(clip, points, bev, layout, config))
                if not frames:
                    out = new.create(name)
                    writer = pq.ParquetWriter(_Sink(out), schema, compression="zstd", write_page_checksum=True)
                writer.write_table(_table(rows, schema))
                frames += len(rows)
            if frames:
                writer.close()
                out.close()
            data.append({"log": log_id, "licence": of_log[0].log.licence, "digest": of_log[0].digest, "frames": frames})
            total += frames
        if first is None:
            raise UsageError(f"--data: none of {len(data)} logs has a frame with {config.model.past} sweeps of past at {config.model.rate_hz:g} Hz")
        points, bev, name = first
        for file, content in _encoder_files(encoder, config, points, bev).items():
            new.write(file, content)
        licence = strictest([about["licence"], *(row["licence"] for row in data)])
        manifest = {**about, "target": "features", "licence": licence, "tensors": total, "data": data, "map": layout, "first": name,
                    "files": [vars(entry) for entry in new.entries()]}  # fmt: skip
        new.write(MANIFEST, seal(manifest))
        new.publish(folder.name)
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """Read every row as a user would, and the encoder as `--to torch` is read; then make the first row again from the stored cloud.

    `tensors` and `loaded` count rows (`unit`), `encoder_tensors` what the encoder beside them got of its own. `difference` is the largest of: of
    the encoder's map outside of this package, of the first row's summary, and of its map beyond the rounding to float16; as a share of the
    largest value of the encoder's map where that is above 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    manifest = check_folder(folder)
    layout = _checked(manifest.get("map"), one_line(folder))
    names = [entry["path"] for entry in manifest["files"]]
    report: dict[str, Any] = {"missing": [], "unexpected": [], "mismatched": [], "difference": 0.0}
    if "encoder.py" in names:
        proof = standalone_folder.prove(folder)
        reasons = standalone_folder.inputs_that_differ(folder, standalone_folder.config_of(folder), manifest.get("input"))
        report |= proof | {"encoder_tensors": f"{proof['loaded']} of {proof['tensors']}", "reasons": reasons}
    rows, whole, first = 0, 0, None
    for name in (name for name in names if name.startswith("features/")):
        try:
            file = pq.ParquetFile(folder / name)
            if not file.schema_arrow.equals(_schema(layout)):
                report["mismatched"].append(f"{name}: other columns than the manifest says")
                continue
            for batch in file.iter_batches(ROWS_A_GROUP):
                maps, summaries = _values(batch.column("map"), layout), np.asarray(batch.column("summary").flatten()).reshape(len(batch), -1)
                whole += int((np.isfinite(maps).all((1, 2, 3)) & np.isfinite(summaries).all(1)).sum())
                rows += len(batch)
                if first is None and name == manifest.get("first"):
                    first = maps[0], summaries[0]
        except (pa.ArrowException, OSError, ValueError) as error:
            raise WmError(f"{one_line(folder / name)}: not readable as Parquet ({one_line(error, 120)}); export the run again") from error
    if first is None:
        raise WmError(f"{one_line(folder)}: the row that the sample belongs to is not there; export the run again")
    sample = standalone_folder.stored(folder)
    pooled, summary = pooled_and_summary(sample["points"], sample["map"], layout)
    share = 1 / max(1.0, float(sample["map"].abs().max()))
    difference = max(report["difference"], share * _beyond_rounding(pooled, first[0]), share * float(np.abs(summary - first[1]).max()))
    return {**report, "unit": "frames", "loaded": whole, "tensors": rows, "expected": int(manifest["tensors"]), "difference": difference}


def snippet(folder: Path) -> str:
    """What the user does next."""
    return (f'import numpy as np, pyarrow.parquet as pq\ntable = pq.read_table({str(folder / "features")!r})   # a row per frame\n'
            'maps = np.stack([np.frombuffer(m.as_py(), "<f2").reshape(s.as_py()) for m, s in zip(table["map"], table["shape"])])   # (N,C,H,W)\n'
            f"wm similar {shlex.quote(str(folder))} --clip LOG@STAMP_NS")  # fmt: skip


def layout_of(encoder: nn.Module, config: Config) -> dict[str, Any]:
    """What the maps are: shape (C,H,W) and cell_m after pooling, low (x, y), pool, and the cell_m, low and high of the map before it."""
    low, high, cell = config.encoder.low, config.encoder.high, float(encoder.cell_m)  # type: ignore[arg-type]
    height, width = (-(-round((high[i] - low[i]) / cell) // POOL) for i in (1, 0))
    return {"dtype": "float16", "order": "C,H,W", "shape": [int(encoder.channels), height, width], "pool": POOL, "cell_m": POOL * cell,  # type: ignore[call-overload]
            "low": list(low), "high": list(high), "cell_before_m": cell,
            "frame": "ego_from_map: rows along y, columns along x, both upwards from low"}  # fmt: skip


def pooled_and_summary(points: Tensor, bev: Tensor, layout: Mapping[str, Any]) -> tuple[Array, Array]:
    """The map (C,H/POOL,W/POOL) f32 before its rounding, and the summary (2C,) f32, of a cloud (N,F) and its map (1,C,H,W)."""
    cell = layout["cell_before_m"]
    pooled = torch.nn.functional.avg_pool2d(bev, POOL, ceil_mode=True, count_include_pad=False)[0]
    _, cells, _ = cells_of(points[:, :3], layout["low"], layout["high"], (cell, cell, layout["high"][2] - layout["low"][2]))
    seen = bev[0].flatten(1)[:, torch.unique(cells)]
    summary = torch.cat((seen.mean(1), seen.amax(1))) if seen.shape[1] else torch.zeros(2 * len(seen))
    return pooled.numpy(), summary.numpy()


def _beyond_rounding(exact: Array, rounded: Array) -> float:
    """The largest difference of values from what float16 made of them, less what rounding explains; infinite where they are not finite."""
    if not np.isfinite(rounded).all():
        return float("inf")
    half_step = np.spacing(np.abs(rounded)).astype(np.float32) / 2
    return float(np.maximum(np.abs(exact - rounded.astype(np.float32)) - half_step, 0).max())


def _by_log(parts: Sequence[Part]) -> dict[str, list[Part]]:
    logs: dict[str, list[Part]] = {}
    for part in parts:
        logs.setdefault(part.log.id, []).append(part)
    for log_id, of_log in logs.items():
        if len({part.digest for part in of_log}) > 1:
            raise UsageError(f"--data: log {one_line(log_id)} is there twice, with different content; name one of the two stores")
    return logs


def _frames(parts: Sequence[Part], config: Config) -> Iterator[Clip]:
    """One clip per sweep of the log that has a full past within its part, by time."""
    m, log = config.model, parts[0].log
    stamps = log.sweep_stamps_ns[log.reference_lidar]
    given: set[int] = set()
    for part in sorted(parts, key=lambda p: p.from_ns or 0):
        wanted = stamps[(stamps >= (part.from_ns or 0)) & (stamps < (2**62 if part.to_ns is None else part.to_ns))]
        if log.poses is None and len(wanted):
            raise WmError(f"log {one_line(log.id)}: no poses, which the sweeps of the past are joined by; ingest it with --poses odometry")
        for first in range(0, len(wanted), ROWS_A_GROUP):
            for clip in clips_at(log, wanted[first : first + ROWS_A_GROUP], past=m.past, rate_hz=m.rate_hz, from_ns=part.from_ns):
                if len(clip.past) == m.past and clip.stamp_ns not in given:
                    given.add(clip.stamp_ns)
                    yield clip


def _groups(clips: Iterator[Clip], size: int) -> Iterator[list[Clip]]:
    group: list[Clip] = []
    for clip in clips:
        group.append(clip)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _cloud(clip: Clip, config: Config) -> Tensor:
    """(N,F) f32: what the encoder sees at the clip's t = 0, as in pretraining without augmentation."""
    return clouds_of(joined(past_clouds(clip, history_of(clip), config), config)[:1], config.encoder).points


def _map_of(encoder: nn.Module, points: Tensor) -> Tensor:
    with torch.no_grad():
        return encoder(Clouds(points, (len(points),))).float()  # type: ignore[no-any-return]


def _row(clip: Clip, points: Tensor, bev: Tensor, layout: Mapping[str, Any], config: Config) -> dict[str, Any]:
    pooled, summary = pooled_and_summary(points, bev, layout)
    rounded = pooled.astype("<f2")
    if not (np.isfinite(rounded).all() and np.isfinite(summary).all()):
        raise WmError(f"clip {one_line(clip.id)}: its latent is not finite, or beyond what float16 holds; is the run sound?")
    return {
        "log": clip.log.id, "stamp_ns": clip.stamp_ns, "world_from_ego": clip.past[-1].world_from_ego.ravel(),
        "ego_from_map": inverse(state_from_ego(clip, config.encoder)).ravel(), "cell_m": layout["cell_m"], "low_x": layout["low"][0],
        "low_y": layout["low"][1], "shape": layout["shape"], "map": rounded.tobytes(), "summary": summary, "points": len(points),
    }  # fmt: skip


def _schema(layout: Mapping[str, Any]) -> Any:
    import pyarrow as pa

    channels, height, width = layout["shape"]
    matrix = pa.list_(pa.float64(), 16)
    fields = [("log", pa.string()), ("stamp_ns", pa.int64()), ("world_from_ego", matrix), ("ego_from_map", matrix), ("cell_m", pa.float64()),
              ("low_x", pa.float64()), ("low_y", pa.float64()), ("shape", pa.list_(pa.int32(), 3)), ("map", pa.binary(2 * channels * height * width)),
              ("summary", pa.list_(pa.float32(), 2 * channels)), ("points", pa.int64())]  # fmt: skip
    return pa.schema(fields, {KEY: json.dumps(dict(layout), sort_keys=True).encode()})


def _table(rows: Sequence[Mapping[str, Any]], schema: Any) -> Any:
    import pyarrow as pa

    return pa.table({name: pa.array([row[name] for row in rows], schema.field(name).type) for name in schema.names}, schema)


def _values(column: Any, layout: Mapping[str, Any]) -> Array:
    return np.frombuffer(b"".join(column.to_pylist()), "<f2").reshape(len(column), *layout["shape"])


def _checked(layout: Any, what: str) -> dict[str, Any]:
    """The layout of a manifest from outside."""
    number = lambda value: type(value) in (int, float) and np.isfinite(value)  # noqa: E731
    good = isinstance(layout, dict) and layout.get("pool") == POOL and all(number(layout.get(key)) for key in ("cell_m", "cell_before_m"))
    good = good and all(isinstance(layout.get(key), list) and len(layout[key]) == 3 for key in ("shape", "low", "high"))
    good = good and all(map(number, [*layout["low"], *layout["high"]])) and layout["cell_before_m"] > 0
    good = (
        good and all(type(size) is int and 0 < size <= 1 << 20 for size in layout["shape"]) and np.prod(layout["shape"], dtype=float) <= MOST_VALUES
    )
    if not good:
        raise WmError(f"{what}: its manifest does not say what the maps are; export the run again")
    return layout  # type: ignore[no-any-return]


def _encoder_files(encoder: nn.Module, config: Config, points: Tensor, bev: Tensor) -> dict[str, bytes]:
    from safetensors.torch import save

    if config.encoder.build:
        return {"sample.safetensors": save({"points": points.contiguous(), "map": bev.contiguous()})}
    return standalone_folder.files_of(encoder, config.encoder, points)


class _Sink(io.RawIOBase):
    """What pyarrow writes to: a file of the folder in the making."""

    def __init__(self, out: Output) -> None:
        self.out = out

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.out.size

    def write(self, data: Any) -> int:
        self.out.append(bytes(data))
        return len(data)
