"""The most similar moments across logs, by the distance of their latents: what `wm export --to features` wrote, searched.

Each frame has a summary, a vector; every dimension is divided by its deviation over all frames searched. The distance of two moments is the
root mean square of their differences: 1 is one standard deviation in every dimension. Moments of one log less than WINDOW_S apart count as
one, of which the nearest is told, and those around the one asked for are left out.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.data import Part
from sensors.errors import UsageError, WmError, one_line
from sensors.files import check_folder, read_whole, write_file
from sensors.geometry import transform_points

Array = NDArray[Any]

WINDOW_S = 2.0
BLOCK = 1 << 16
FIRST_ASKED = 64
INDEX_BYTES = 1 << 36


@dataclass(frozen=True, eq=False)
class Moments:
    """N frames of a folder of features: logs, the ids of L logs; log (N,) which of them; stamps_ns (N,) i64; vectors (N,D) f32, standardised.
    files: one per log, rows (N,) the frame's row in it; digest: of the folder's manifest."""

    logs: tuple[str, ...]
    log: Array
    stamps_ns: Array
    vectors: Array
    files: tuple[Path, ...]
    rows: Array
    digest: str

    def clip(self, at: int) -> str:
        return f"{self.logs[self.log[at]]}@{self.stamps_ns[at]}"

    def find(self, clip: str) -> int:
        """Which frame a clip's id `LOG@STAMP_NS` names; UsageError with the nearest where there is none."""
        log, _, stamp = clip.rpartition("@")
        if log not in self.logs or not stamp.isdecimal() or len(stamp) > 19:
            some = ", ".join(one_line(name, 80) for name in self.logs[:3])
            raise UsageError(f"--clip {one_line(clip)}: give LOG@STAMP_NS with one of the {len(self.logs)} logs here ({some} ...)")
        of_log = np.flatnonzero(self.log == self.logs.index(log))
        nearest = int(of_log[np.argmin(np.abs(self.stamps_ns[of_log] - int(stamp)))])
        if self.stamps_ns[nearest] != int(stamp):
            raise UsageError(f"--clip {one_line(clip)}: no frame at this stamp; the nearest is {one_line(self.clip(nearest))}")
        return nearest


@dataclass(frozen=True)
class Hit:
    """A moment: its frame among `Moments`, its clip's id, and how far it is from the one asked for."""

    at: int
    clip: str
    distance: float


def read(folder: Path) -> Moments:
    """The moments of a folder that `wm export --to features` wrote. Lengths of files and the checksums of the pages read are checked, not the
    digests of whole files: that is `wm verify`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    manifest = check_folder(folder, digests=False)
    if manifest.get("target") != "features":
        raise UsageError(f"{one_line(folder)}: an export to {one_line(repr(manifest.get('target')))}; give one of `wm export --to features`")
    files = [folder / entry["path"] for entry in manifest["files"] if entry["path"].startswith("features/")]
    logs: list[str] = []
    stamps, vectors, log, rows = [], [], [], []
    for path in files:
        try:
            table = pq.ParquetFile(path, page_checksum_verification=True).read(["log", "stamp_ns", "summary"])
            names = table["log"].unique().to_pylist()
            stamps.append(table["stamp_ns"].to_numpy().astype(np.int64))
            values = np.concatenate([np.asarray(chunk.flatten(), np.float32) for chunk in table["summary"].chunks])
            vectors.append(values.reshape(len(table), -1))
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise WmError(f"{one_line(path)}: not features as they were written ({one_line(error, 120)}); export the run again") from error
        if len(names) != 1 or names[0] in logs or not np.isfinite(vectors[-1]).all() or vectors[-1].shape[1] != vectors[0].shape[1]:
            raise WmError(f"{one_line(path)}: not the finite features of one log of its own; export the run again")
        log.append(np.full(len(table), len(logs)))
        rows.append(np.arange(len(table)))
        logs.append(names[0])
    if not files:
        raise WmError(f"{one_line(folder)}: holds no features; export the run again")
    return Moments(tuple(logs), np.concatenate(log), np.concatenate(stamps), standardised(np.concatenate(vectors)), tuple(files),
                   np.concatenate(rows), str(manifest["digest"]))  # fmt: skip


def standardised(vectors: Array) -> Array:
    """(N,D) f32 with mean 0 and deviation 1 in each dimension; a dimension that never changes is 0."""
    deviation = vectors.std(0, dtype=np.float64)
    moved = vectors - vectors.mean(0, dtype=np.float64)
    return np.ascontiguousarray(np.where(deviation > 1e-9, moved / np.maximum(deviation, 1e-9), 0), np.float32)


def distances(vectors: Array, query: Array) -> Array:
    """(N,) f32 root mean square differences of vectors (N,D) from a query (D,): by differences, so that equal ones are at 0."""
    out = np.empty(len(vectors), np.float32)
    for first in range(0, len(vectors), BLOCK):
        out[first : first + BLOCK] = np.square(vectors[first : first + BLOCK] - query).mean(1)
    return np.sqrt(out)


def nearest(moments: Moments, at: int, count: int, index: Any = None) -> list[Hit]:
    """The count moments nearest to frame `at`, nearest first; fewer where there are no more. index: of `approximate_index`, None: all frames
    are compared."""
    if index is None:
        found = distances(moments.vectors, moments.vectors[at])
        return _apart(moments, at, count, np.lexsort((moments.stamps_ns, moments.log, found)), found)
    asked = min(FIRST_ASKED, len(moments.vectors))
    while True:
        rows = np.sort(np.asarray(index.search(moments.vectors[at], asked).keys, np.int64))
        found = np.full(len(moments.vectors), np.inf, np.float32)
        found[rows] = distances(moments.vectors[rows], moments.vectors[at])
        hits = _apart(moments, at, count, rows[np.argsort(found[rows], kind="stable")], found)
        if len(hits) == count or asked == len(moments.vectors):
            return hits
        asked = min(4 * asked, len(moments.vectors))


def _apart(moments: Moments, at: int, count: int, order: Iterable[int], found: Array) -> list[Hit]:
    window_ns = int(WINDOW_S * 1e9)
    taken: dict[int, list[int]] = {int(moments.log[at]): [int(moments.stamps_ns[at])]}
    hits: list[Hit] = []
    for row in order:
        if len(hits) == count:
            break
        stamp, of_log = int(moments.stamps_ns[row]), taken.setdefault(int(moments.log[row]), [])
        if all(abs(stamp - other) >= window_ns for other in of_log):
            of_log.append(stamp)
            hits.append(Hit(int(row), moments.clip(int(row)), float(found[row])))
    return hits


def approximate_index(moments: Moments) -> Any:
    """An HNSW graph over the vectors (Malkov & Yashunin, 2018), by usearch; kept in the user's cache, where only this program writes, since
    reading a graph trusts its bytes. UsageError without the extra."""
    from platformdirs import user_cache_path

    try:
        import usearch
        from usearch.index import Index
    except ImportError as error:
        raise UsageError("--approximate: usearch is not installed; pip install 'driving-worldmodel[search]'") from error
    path = user_cache_path("driving-worldmodel") / "similar" / f"{moments.digest}-{usearch.__version__}.usearch"
    if path.is_file():
        kept = Index.restore(bytearray(read_whole(path, INDEX_BYTES)))
        if kept is not None and len(kept) == len(moments.vectors):
            return kept
    index = Index(ndim=moments.vectors.shape[1], metric="l2sq", dtype="f32", expansion_search=256)
    index.add(np.arange(len(moments.vectors)), moments.vectors)
    write_file(path, bytes(index.save()))
    return index


def page(moments: Moments, at: int, hits: Sequence[Hit], parts: Sequence[Part]) -> str:
    """One HTML page with a picture per moment from above: its sweep where `parts` hold the log, else how strong its latent is where."""
    from worldmodel.drawing.report import Section, picture, report_page

    logs = {part.log.id: part.log for part in parts}

    def figure(row: int, caption: str) -> Any:
        image, what = _thumbnail(moments, row, logs.get(moments.logs[moments.log[row]]))
        return picture(_png(image), f"{caption}{what}", 300)

    found = [figure(hit.at, f"{rank}. {hit.clip}, distance {hit.distance:.3f}") for rank, hit in enumerate(hits, 1)]
    lead = f"{len(moments.vectors)} frames of {len(moments.logs)} logs searched. Forward is up, left is left; a cloud's colour is height."
    return report_page(
        f"Similar to {moments.clip(at)}",
        lead,
        [Section("Asked for", parts=[figure(at, moments.clip(at))]), Section("Most similar", parts=found)],
    )


def _thumbnail(moments: Moments, row: int, log: Any) -> tuple[Array, str]:
    from worldmodel.drawing.bev import cloud_image, map_image

    if log is not None:
        lidar = log.reference_lidar
        index = np.flatnonzero(log.sweep_stamps_ns[lidar] == moments.stamps_ns[row])
        if len(index):
            return cloud_image(transform_points(log.lidars[lidar].ego_from_lidar, log.read_sweep(lidar, int(index[0])).points)), ""
    strength = np.sqrt(np.square(latent(moments, row).astype(np.float32)).mean(0))
    image = map_image(strength)
    return image.repeat(-(-300 // len(image)), 0).repeat(-(-300 // len(image)), 1), " (latent)"


def latent(moments: Moments, row: int) -> Array:
    """(C,H,W) f16: the pooled map of a frame."""
    import pyarrow.parquet as pq

    file, left = pq.ParquetFile(moments.files[moments.log[row]], page_checksum_verification=True), int(moments.rows[row])
    for group in range(file.num_row_groups):
        if left < file.metadata.row_group(group).num_rows:
            table = file.read_row_group(group, ["map", "shape"])
            return np.frombuffer(table["map"][left].as_py(), "<f2").reshape(table["shape"][left].as_py())
        left -= file.metadata.row_group(group).num_rows
    raise WmError(f"{one_line(moments.files[moments.log[row]])}: has fewer rows than it had; export the run again")


def _png(image: Array) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", optimize=True)
    return out.getvalue()
