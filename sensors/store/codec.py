"""One sweep as bytes, and back: every coordinate within 2.1 mm, everything else exact, in the recorded order.

A record is a header (`HEADER`, little-endian), the compressed length of each column (u32 each), and the columns, each a Blosc2 chunk
(zstd, bitshuffle). Coordinates are integers of `step_m`; points follow one another along a walk, and a column holds the differences along
it as zigzag u32 (modulo 2^32). The walk is what makes differences small: with `walk` = L the points 0, L, 2L, .., 1, L+1, .. (L = 1: as
recorded; a sensor that writes a column of L beams at a time walks along its beams), with `walk` = 0 all points of the lowest ring in
recorded order, then those of the next. Decoding sums along the walk and puts each point back in its place.

Columns, in this order: x, y, z; intensity; ring (u16, recorded order); time (i32, differences along the walk, zigzag); escaped: the u32
indices of points, and three f32 for each. The flags say which are there. Points farther than 1.6 km out on an axis, where the rounding of
float32 on top of half a step would pass 2.1 mm, are escaped: stored as they are.

Exactness. ``lossless`` takes the coarsest step of which all but a few points are multiples to the last bit (KITTI: 1 mm) and escapes
those, else stores the float32 themselves. Intensity is stored as numerators, with the denominator in the header, where all values are
k/255, k/100 (KITTI), k/1000 or k/65535 to the last bit; otherwise as k/65535 rounded (error below 8e-6), or as float32 where lossless.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from sensors.records import MAX_POINTS, PointLabels, RecordError, Sweep

Array = NDArray[Any]

VERSION = 1
STEP_M = 0.004
MAX_ERROR_M = 0.0021
HEADER = struct.Struct("<4sBBHIIdI")  # magic, version, flags, walk, points, escaped, step_m (0: float32), intensity denominator (0: float32)
MAGIC = b"wmS\x89"
LABEL_HEADER = struct.Struct("<4sBI")  # magic, version, points
LABEL_MAGIC = b"wmL\x89"
ARRAYS_HEADER = struct.Struct("<4sBB")  # magic, version, arrays
ARRAYS_MAGIC = b"wmA\x89"
ARRAY_TYPES = ("u1", "u2", "i4", "f4")
DESKEWED, RING, TIME, ESCAPES = 1, 2, 4, 8
FAR_M = 1600.0
EXACT_STEPS_M = (0.01, 0.005, 0.002, 0.001)
DENOMINATORS = (255, 100, 1000, 65535)
SAMPLE = 1 << 14
WALKS = (1, 16, 32, 40, 64, 128)
# zstd level 3: higher ones take longer and save a percent
LEVEL = 2


class CodecError(RecordError):
    """Bytes that are no sweep."""


@dataclass(frozen=True)
class Columns:
    """A decoded record without its stamp and sensor: as in `sensors.records.Sweep`."""

    points: Array
    intensity: Array
    ring: Array | None
    time_ns: Array | None
    deskewed: bool


def encode(sweep: Sweep, *, lossless: bool = False) -> bytes:
    """The record of a sweep; the stamp and the name of the LiDAR are not in it."""
    points, count = sweep.points, len(sweep.points)
    if not np.isfinite(points).all() or not np.isfinite(sweep.intensity).all():
        raise CodecError(f"sweep of {sweep.lidar} at {sweep.stamp_ns}: not finite; drop such points where the log is read")
    step_m, escaped = _exact_step(points) if lossless else (STEP_M, np.flatnonzero((np.abs(points) > FAR_M).any(1)))
    if step_m:
        near = points.astype(np.float64)
        near[escaped] = 0
        steps = np.rint(near / step_m).astype(np.int32)
        walk = _best_walk(steps, sweep.ring)
        order = _order(count, walk, sweep.ring)
        columns = [_differences(_taken(steps[:, axis], order)) for axis in range(3)]
    else:
        walk = 1
        order = _order(count, walk, None)
        columns = [_differences(points[:, axis].copy().view(np.int32)) for axis in range(3)]
    denominator, numerators = _numerators(sweep.intensity, lossless)
    columns.append(_taken(numerators, order))
    flags = DESKEWED * sweep.deskewed
    if sweep.ring is not None:
        flags |= RING
        columns.append(sweep.ring)
    if sweep.time_ns is not None:
        flags |= TIME
        columns.append(_differences(_taken(sweep.time_ns, order)))
    if len(escaped):
        flags |= ESCAPES
        columns += [escaped.astype("<u4"), points[escaped].reshape(-1)]
    header = HEADER.pack(MAGIC, VERSION, flags, walk, count, len(escaped), step_m, denominator)
    return header + (_joined(columns) if count else b"")


def decode(record: bytes, what: str = "sweep") -> Columns:
    """The sweep in a record. CodecError where a declared size and the bytes disagree; nothing is allocated before they were compared."""
    if len(record) < HEADER.size:
        raise CodecError(f"{what}: {len(record)} bytes, a header has {HEADER.size}; restore the file or ingest the log again")
    magic, version, flags, walk, count, escapes, step_m, denominator = HEADER.unpack_from(record)
    if magic != MAGIC or version != VERSION:
        raise CodecError(f"{what}: not a sweep of codec version {VERSION} (found {version}); read it with a later release")
    steps_ok = step_m == 0 or 1e-6 <= step_m <= 1
    sizes_ok = count <= MAX_POINTS and escapes <= count and (escapes > 0) == bool(flags & ESCAPES)
    if not (steps_ok and sizes_ok) or flags & ~15 or (walk == 0 and not flags & RING):
        raise CodecError(f"{what}: the header contradicts itself ({count} points, {escapes} escaped, flags {flags}); restore the file")
    types = [np.dtype("<u4")] * 3 + [_intensity_type(denominator)]
    types += [np.dtype("<u2")] * bool(flags & RING) + [np.dtype("<u4")] * bool(flags & TIME)
    sizes = [count * kind.itemsize for kind in types]
    if flags & ESCAPES:
        types += [np.dtype("<u4"), np.dtype("<f4")]
        sizes += [escapes * 4, escapes * 12]
    columns = _split(record[HEADER.size :], types, sizes, what) if count else [np.zeros(0, kind) for kind in types]

    ring = columns[4] if flags & RING else None
    order = _order(count, walk, ring)
    points = np.empty((count, 3), np.float32)
    for axis in range(3):
        summed = _summed(columns[axis])
        values = (summed * step_m).astype(np.float32) if step_m else summed.view(np.float32)
        _put(points[:, axis], order, values)
    intensity = np.empty(count, np.float32)
    _put(intensity, order, (columns[3] / float(denominator)).astype(np.float32) if denominator else columns[3])
    time_ns = None
    if flags & TIME:
        time_ns = np.empty(count, np.int32)
        _put(time_ns, order, _summed(columns[4 + bool(flags & RING)]))
    if flags & ESCAPES:
        index = columns[-2]
        if index.max() >= count:
            raise CodecError(f"{what}: an escaped point beyond the last one; restore the file or ingest the log again")
        points[index] = columns[-1].reshape(-1, 3)
    return Columns(points, intensity, ring, time_ns, bool(flags & DESKEWED))


def _exact_step(points: Array) -> tuple[float, Array]:
    """The coarsest of EXACT_STEPS_M that gives all but a few points back to the bit, and the indices of those (a negative zero is one);
    step 0 where none does."""
    wide = np.where(np.abs(points) <= FAR_M, points, 0).astype(np.float64)
    for step_m in EXACT_STEPS_M:
        again = (np.rint(wide / step_m).astype(np.int32) * step_m).astype(np.float32)
        wrong = np.flatnonzero((again.view(np.uint32) != points.view(np.uint32)).any(1))
        if len(wrong) <= len(points) // 50:
            return step_m, wrong
    return 0.0, np.zeros(0, np.int64)


def _same_bits(a: Array, b: Array) -> bool:
    return bool((a.view(np.uint32) == b.view(np.uint32)).all())


def _numerators(intensity: Array, lossless: bool) -> tuple[int, Array]:
    """(denominator, numerators u8 or u16), or (0, the float32 themselves)."""
    wide = intensity.astype(np.float64)
    for denominator in DENOMINATORS:
        numerators = np.rint(wide * denominator)
        if _same_bits((numerators / denominator).astype(np.float32), intensity):
            return denominator, numerators.astype(_intensity_type(denominator))
    if lossless:
        return 0, intensity
    return 65535, np.rint(wide * 65535).astype(np.uint16)


def _intensity_type(denominator: int) -> np.dtype[Any]:
    return np.dtype("<f4" if denominator == 0 else "<u1" if denominator < 256 else "<u2")


def _order(count: int, walk: int, ring: Array | None) -> Array | None:
    """The points in the order of the walk: indices (N,), None for the recorded order."""
    if walk == 0:
        assert ring is not None
        return np.argsort(ring, kind="stable")
    if walk == 1:
        return None
    index = np.arange(-(-count // walk) * walk).reshape(-1, walk).T.reshape(-1)
    return index[index < count]


def _best_walk(steps: Array, ring: Array | None) -> int:
    """The walk along which the differences of steps (N,3) need the fewest bits, judged by a stretch of points; ties go to the first."""
    start = max(0, len(steps) // 2 - SAMPLE // 2)
    steps, ring = steps[start : start + SAMPLE], None if ring is None else ring[start : start + SAMPLE]
    walks = [walk for walk in WALKS if walk == 1 or 2 * walk <= len(steps)] + ([0] if ring is not None else [])
    if len(walks) == 1:
        return walks[0]

    def bits(walk: int) -> float:
        order = _order(len(steps), walk, ring)
        return float(np.log2(1 + np.abs(np.diff(_taken(steps, order), axis=0).astype(np.float64))).sum())

    return min(walks, key=bits)


def _differences(column: Array) -> Array:
    """zigzag(column[i] - column[i - 1]) of i32 (N,) as u32 (N,), modulo 2^32; the first against 0."""
    unsigned = np.ascontiguousarray(column).view(np.uint32)
    difference = unsigned.copy()
    difference[1:] -= unsigned[:-1]
    signed = difference.view(np.int32)
    return ((signed << 1) ^ (signed >> 31)).view(np.uint32)


def _summed(zigzag: Array) -> Array:
    """What `_differences` was made of, i32 (N,)."""
    difference = (zigzag >> 1) ^ (~(zigzag & 1) + np.uint32(1))
    return np.cumsum(difference, dtype=np.uint32).view(np.int32)


def _taken(values: Array, order: Array | None) -> Array:
    return values if order is None else values[order]


def _put(target: Array, order: Array | None, values: Array) -> None:
    if order is None:
        target[:] = values
    else:
        target[order] = values


def _joined(columns: Sequence[Array]) -> bytes:
    """The lengths of the compressed columns, and the columns."""
    packed = [_compress(column) for column in columns]
    return b"".join((struct.pack(f"<{len(packed)}I", *map(len, packed)), *packed))


def _compress(column: Array) -> bytes:
    filters = [blosc2.Filter.NOFILTER] * 5 + [blosc2.Filter.BITSHUFFLE]
    packed = blosc2.compress2(column, typesize=column.dtype.itemsize, clevel=LEVEL, codec=blosc2.Codec.ZSTD, filters=filters, nthreads=1)
    return bytes(packed)


def _split(packed: bytes, types: Sequence[np.dtype[Any]], sizes: Sequence[int], what: str) -> list[Array]:
    """Undo `_joined`, when the declared sizes agree with those given and with the length."""
    again = "restore the file or ingest the log again"
    start = 4 * len(types)
    if len(packed) < start:
        raise CodecError(f"{what}: ends within its header; {again}")
    lengths = struct.unpack_from(f"<{len(types)}I", packed)
    if start + sum(lengths) != len(packed):
        raise CodecError(f"{what}: {len(packed)} bytes of columns, {start + sum(lengths)} declared; {again}")
    columns = []
    for kind, size, length in zip(types, sizes, lengths, strict=True):
        chunk = packed[start : start + length]
        start += length
        try:
            declared = blosc2.get_cbuffer_sizes(chunk)[:2]
            plain = blosc2.decompress2(chunk, nthreads=1) if declared == (size, length) else b""
        except (RuntimeError, ValueError, TypeError) as error:
            raise CodecError(f"{what}: a column cannot be decompressed ({error}); {again}") from error
        if len(plain) != size:
            raise CodecError(f"{what}: a column declares {declared[0]} bytes, {size} expected; {again}")
        columns.append(np.frombuffer(plain, kind))
    return columns


def encode_labels(labels: PointLabels) -> bytes:
    """Point labels as `LABEL_HEADER` (magic, version, points) and the columns category u8, instance i32, moving u8, as in a sweep."""
    columns = [labels.category, labels.instance, labels.moving.view(np.uint8)]
    return LABEL_HEADER.pack(LABEL_MAGIC, VERSION, len(labels.category)) + (_joined(columns) if len(labels.category) else b"")


def decode_labels(record: bytes, stamp_ns: int, what: str = "point labels") -> PointLabels:
    if len(record) < LABEL_HEADER.size or record[:5] != LABEL_MAGIC + bytes([VERSION]):
        raise CodecError(f"{what}: not point labels of codec version {VERSION}; restore the file or read it with a later release")
    count = LABEL_HEADER.unpack_from(record)[2]
    types: list[np.dtype[Any]] = [np.dtype("<u1"), np.dtype("<i4"), np.dtype("<u1")]
    if count > MAX_POINTS:
        raise CodecError(f"{what}: {count} points, more than {MAX_POINTS}; restore the file or ingest the log again")
    columns = [np.zeros(0, kind) for kind in types]
    if count:
        columns = _split(record[LABEL_HEADER.size :], types, [count, 4 * count, count], what)
    return PointLabels(stamp_ns, columns[0], columns[1], columns[2] != 0)


def encode_arrays(arrays: Sequence[Array]) -> bytes:
    """Arrays of up to three dimensions as `ARRAYS_HEADER` (magic, version, number of arrays), for each its kind (place in ARRAY_TYPES), its
    dimensions u8 and their lengths u32, and the columns as in a sweep; empty arrays have no column."""
    shapes = b"".join(struct.pack(f"<BB{a.ndim}I", ARRAY_TYPES.index(a.dtype.str[1:]), a.ndim, *a.shape) for a in arrays)
    columns = [np.ascontiguousarray(a).reshape(-1) for a in arrays if a.size]
    return ARRAYS_HEADER.pack(ARRAYS_MAGIC, VERSION, len(arrays)) + shapes + _joined(columns)


def decode_arrays(record: bytes, kinds: Sequence[str], what: str = "labels") -> list[Array]:
    """What `encode_arrays` was given, when these are arrays of the kinds and dimensions expected, written ``u1:1`` or ``f4:2``."""
    try:
        magic, version, count = ARRAYS_HEADER.unpack_from(record)
        at, shapes, found = ARRAYS_HEADER.size, [], []
        for _ in range(min(count, 8)):
            kind, dimensions = struct.unpack_from("<BB", record, at)
            shapes.append(struct.unpack_from(f"<{min(dimensions, 3)}I", record, at + 2))
            found.append(f"{ARRAY_TYPES[kind]}:{dimensions}")
            at += 2 + 4 * len(shapes[-1])
    except (struct.error, IndexError) as error:
        raise CodecError(f"{what}: ends within its header; restore the file or ingest the log again") from error
    if magic != ARRAYS_MAGIC or version != VERSION or found != list(kinds):
        raise CodecError(f"{what}: not {', '.join(kinds)} of codec version {VERSION} (found {', '.join(found)}, {version}); restore the file")
    sizes = [math.prod(shape) for shape in shapes]
    if max(sizes) > MAX_POINTS:
        raise CodecError(f"{what}: {max(sizes)} values, more than {MAX_POINTS}; restore the file or ingest the log again")
    types = [np.dtype(f"<{name[:2]}") for name in found]
    there = [i for i, size in enumerate(sizes) if size]
    columns = _split(record[at:], [types[i] for i in there], [sizes[i] * types[i].itemsize for i in there], what)
    by_place = dict(zip(there, columns, strict=True))
    return [by_place[i].reshape(shape) if i in by_place else np.zeros(shape, types[i]) for i, shape in enumerate(shapes)]
