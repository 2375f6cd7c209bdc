"""`docs/STORE.md` is enough to read a store: a reader written from it alone, in plain Python, gets what ours gets."""

import hashlib
import json
import struct
import zlib

import blosc2
import numpy as np
import pyarrow.parquet
import pytest

from sensors.records import Lidar, Log, Sweep
from sensors.store.reader import open_store
from sensors.store.writer import write_log


def decode_as_documented(record):
    magic, version, flags, walk, count, escaped, step_m, denominator = struct.unpack("<4sBBHIIdI", record[:28])
    assert magic.hex() == "776d5389" and version == 1
    types = ["<u4"] * 3 + ["<f4" if denominator == 0 else "<u1" if denominator <= 255 else "<u2"]
    types += (["<u2"] if flags & 2 else []) + (["<u4"] if flags & 4 else []) + (["<u4", "<f4"] if flags & 8 else [])
    lengths = struct.unpack_from(f"<{len(types)}I", record, 28)
    at, columns = 28 + 4 * len(types), []
    for kind, length in zip(types, lengths, strict=True):
        columns.append(np.frombuffer(blosc2.decompress2(record[at : at + length]), kind).tolist())
        at += length
    assert at == len(record)
    ring = columns[4] if flags & 2 else None
    walked = sorted(range(count), key=(lambda i: (i % walk, i)) if walk else (lambda i: (ring[i], i)))

    def summed(column):
        total, out = 0, [0] * count
        for place, u in zip(walked, column, strict=True):
            total = (total + ((u >> 1) ^ -(u & 1))) % 2**32
            out[place] = total - 2**32 if total >= 2**31 else total
        return out

    points = np.empty((count, 3), np.float32)
    for axis in range(3):
        sums = summed(columns[axis])
        points[:, axis] = np.array(sums, np.int32).view(np.float32) if step_m == 0 else np.array([value * step_m for value in sums])
    intensity = np.empty(count, np.float32)
    intensity[walked] = [value / denominator for value in columns[3]] if denominator else columns[3]
    if flags & 8:
        points[columns[-2]] = np.reshape(columns[-1], (escaped, 3))
    return points, intensity, ring, summed(columns[4 + (ring is not None)]) if flags & 4 else None


def sweeps(kind):
    rng = np.random.default_rng(3)
    for stamp in (10, 20):
        points = rng.normal(0, 20, (70, 3))
        if kind == "columns":
            points = np.tile(np.linspace(-5, 5, 16), 5)[:70, None] * [1, 2, 3] + rng.normal(0, 0.01, (70, 3))
        if kind == "far":
            points[5] = 9000
        intensity = rng.random(70) if kind == "near" else rng.integers(0, 256, 70) / 255
        with_ring = kind in ("rings", "far")
        ring = np.arange(70) % 5 if with_ring else None
        yield Sweep(
            "top",
            stamp,
            points if kind != "rings" else points * 0.01 + ring[:, None] * 10,
            intensity,
            ring,
            rng.integers(-9, 9, 70) if with_ring else None,
        )


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("kind", ["near", "columns", "rings", "far"])
def test_a_reader_written_from_the_document_gets_the_same_points(tmp_path, kind, lossless):
    made = list(sweeps(kind))
    log = Log(
        "made-up/log",
        "made-up",
        "CC0",
        "rear axle",
        {"top": Lidar("top", np.eye(4), 10.0)},
        {},
        None,
        {"top": [10, 20]},
        {},
        lambda lidar, i: made[i],
        None,
    )
    write_log(tmp_path, log, lossless=lossless)

    folder = tmp_path / "logs/made-up@log"
    manifest = json.loads(max(folder.glob("generation-*.json")).read_text("utf-8"))
    digest = manifest.pop("digest")
    assert hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest() == digest
    data = folder / manifest["folder"]
    for row in manifest["files"]:
        content = (data / row["path"]).read_bytes()
        assert len(content) == row["bytes"] and hashlib.sha256(content).hexdigest() == row["sha256"]
    index = pyarrow.parquet.read_table(data / manifest["lidars"]["top"]["index"]).to_pylist()
    pack = (data / manifest["lidars"]["top"]["pack"]).read_bytes()

    ours = open_store(tmp_path).open_log("made-up/log")
    for i, row in enumerate(index):
        record = pack[row["offset"] : row["offset"] + row["length"]]
        assert zlib.crc32(record) == row["crc32"] and row["stamp_ns"] == made[i].stamp_ns
        if not lossless and kind in ("columns", "rings"):
            assert struct.unpack_from("<H", record, 6)[0] == {"columns": 16, "rings": 0}[kind]
        points, intensity, ring, time = decode_as_documented(record)
        got = ours.read_sweep("top", i)
        assert points.tobytes() == got.points.tobytes() and intensity.tobytes() == got.intensity.tobytes() and len(points) == row["points"]
        assert (ring is None) == (got.ring is None) and (ring is None or ring == got.ring.tolist())
        assert (time is None) == (got.time_ns is None) and (time is None or time == got.time_ns.tolist())
