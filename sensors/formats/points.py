"""Point files of bare float32 columns, and what every reader drops from a cloud."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.formats.payloads import read_beneath
from sensors.records import MAX_POINTS, RecordError

Array = NDArray[Any]

MIN_RANGE_M, MAX_RANGE_M = 1e-3, 1000.0


def read_bin(root: Path, name: str, columns: int) -> Array:
    """(N, columns) f32 of a headerless little-endian file beneath `root`. The width has to be known: a file of other width often divides
    evenly too, so that callers check a column of known range as well."""
    data = read_beneath(root, name, MAX_POINTS * 4 * columns)
    if not data:
        raise RecordError(f"{name}: empty; fetch it again")
    if len(data) % (4 * columns):
        raise RecordError(f"{name}: {len(data)} bytes, not a multiple of {4 * columns} ({columns} float32 a point); cut off or of another width")
    return np.frombuffer(data, "<f4").reshape(-1, columns)


def usable(points: Array, sensor: str) -> tuple[Array, Counter[str]]:
    """Mask (N,) of the points (N,3) to keep, and counts of those that are not finite, at the sensor itself (no return: LiDARs write the
    origin) or farther than MAX_RANGE_M."""
    finite = np.isfinite(points).all(axis=1)
    farthest = np.abs(np.where(finite[:, None], points, 0)).max(axis=1) if len(points) else np.zeros(0)
    miss, beyond = finite & (farthest < MIN_RANGE_M), farthest > MAX_RANGE_M
    counts = Counter({
        f"{sensor}: points not finite, dropped": int((~finite).sum()),
        f"{sensor}: points without return, dropped": int(miss.sum()),
        f"{sensor}: points beyond {MAX_RANGE_M:.0f} m, dropped": int(beyond.sum()),
    })  # fmt: skip
    return finite & ~miss & ~beyond, +counts
