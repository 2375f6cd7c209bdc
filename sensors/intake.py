"""One log into the store: where it is found, whether it may be taken, and what is said of it where not. `sensors.ingest` has the accounts."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import os
import stat
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sensors import files
from sensors.adapters.base import open_source, unforeseen
from sensors.errors import WmError, one_line
from sensors.records import Log, RecordError, reference_of
from sensors.store import format as layout
from sensors.store.writer import Reference, write_log

# what tells recordings of one name and size apart: this many first bytes of this many files, spread over all of them
HEAD_BYTES, HEADS = 4096, 16
UNREADABLE = "unreadable"  # in place of a content, in a digest

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Quarantined:
    """What could not be taken: the log (or its place in the source), the sensor and stamp where it is one item, and why."""

    log: str
    reason: str
    sensor: str | None = None
    stamp_ns: int | None = None


@dataclass(frozen=True)
class Job:
    """Everything a worker has to know; picklable."""

    store: Path
    sources: tuple[tuple[Path, str], ...]
    options: dict[str, str]
    poses: str
    reference: bool
    overwrite: bool
    lossless: bool
    debug: bool
    shard_index: int
    num_shards: int


@dataclass(frozen=True)
class Outcome:
    kind: str  # stored, already, other_shards, quarantined, busy
    log: str
    items: int = 0
    bytes: int = 0
    reference: str | None = None  # the LiDAR that frames are built on, where the log has several
    reasons: tuple[Quarantined, ...] = ()
    folder: str = ""  # that the files lie in of a log that is in the store


class Entries:
    """The logs of all sources by (source, ordinal), each source read forward only."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.source, self.ordinal = -1, 0
        self.logs: Iterator[Log | WmError] = iter(())

    def get(self, source: int, ordinal: int) -> Log | WmError | None:
        """The log, the error in its place, or None behind the last one."""
        if source != self.source:
            path, dataset = self.job.sources[source]
            self.source, self.ordinal, self.logs = source, 0, open_source(path, dataset, self.job.options)
        found: Log | WmError | None = None
        while self.ordinal <= ordinal:
            found = next(self.logs, None)
            self.ordinal += 1
            if found is None:
                return None
        return found


def take(job: Job, source: int, ordinal: int, entry: Log | WmError, first: str | None, tell: Callable[[str], None]) -> Outcome:
    """Store one log, or say why not. first: the folder of a log of the same id that this call found before and that is in the store."""
    place = f"{job.sources[source][0].name}#{ordinal}"
    name = entry.id if isinstance(entry, Log) else place
    if int(hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12], 16) % job.num_shards != job.shard_index:
        return Outcome("other_shards", name)
    if isinstance(entry, WmError):
        return quarantine(job, place, one_line(entry), entry)
    try:
        there = files.generations(layout.log_folder(job.store, entry.id))
        if there and (first is not None or not job.overwrite):
            outcome = _already(job, entry, first)
        else:
            outcome = _store(job, job.sources[source], entry, tell)
    except files.Busy as error:
        return Outcome("busy", entry.id, reasons=(Quarantined(entry.id, str(error)),))
    except files.Exists:
        outcome = _already(job, entry, first)
    except RecordError as error:
        return quarantine(job, entry.id, one_line(error), error)
    except MemoryError:
        return quarantine(job, entry.id, "out of memory while it was read; give it to a machine with more, or use fewer workers")
    except WmError:
        raise
    except Exception as error:
        found = f"log {one_line(entry.id)}: {unforeseen(error, job.sources[source][1])}"
        tell(found)  # an adapter may have made an error of its own of the signal to stop: telling raises it again
        return quarantine(job, entry.id, found, error)
    if outcome.kind != "quarantined":
        for key in (place, entry.id):
            files.remove(layout.quarantine_path(job.store, key))
    return outcome


def quarantine(job: Job, name: str, reason: str, error: Exception | None = None) -> Outcome:
    if job.debug and error is not None:
        traceback.print_exception(error)
    files.write_json(layout.quarantine_path(job.store, name), {"log": name, "reason": reason})
    return Outcome("quarantined", name, reasons=(Quarantined(name, reason),))


def _already(job: Job, log: Log, first: str | None) -> Outcome:
    """Stored before: the same log, as far as names, sizes and some first bytes of its files tell, and in the way that is asked now."""
    stored = layout.log_folder(job.store, log.id)
    path = files.generation_path(stored, files.generations(stored)[-1])
    manifest = files.unseal(files.read_whole(path, files.JSON_BYTES), one_line(path))
    layout.check_manifest(manifest, one_line(path))
    known = _files_of(log)
    source, folder, reason = manifest["source"], _folder_of(known), None
    if source is not None and any(source.get(key, value) != value for key, value in _outline_of(known).items()):
        reason = f"is stored, but was read from other files than those in {folder}; --overwrite replaces it, another name keeps both"
        if first is not None:
            reason = f"is in {first} and with other content in {folder}; give one of them another name, or a store of its own"
    elif (was := _way_of(job, log, manifest)) != (asked := _asked(job.poses, job.lossless, job.reference)):
        reason = f"is stored with {was}, asked is {asked}; --overwrite stores it as asked now"
    if reason is not None:
        return quarantine(job, log.id, f"log {one_line(log.id)}: {one_line(reason)}")
    return Outcome("already", log.id, folder=folder)


def _asked(poses: str, lossless: bool, reference: bool) -> str:
    """The options that decide what is stored. Where payloads stay where they are, none can lose anything."""
    return f"--poses {poses}" + (" --reference" if reference else " --lossless" if lossless else "")


def _way_of(job: Job, log: Log, manifest: Mapping[str, Any]) -> str:
    """How the log was stored, as options. A log without poses got odometry, whether that was asked or its own poses."""
    options = manifest["options"]
    poses = options.get("poses", job.poses)
    if log.poses is None and manifest["pose_source"] == "odometry" and {poses, job.poses} == {"log", "odometry"}:
        poses = job.poses
    return _asked(poses, options.get("lossless", job.lossless), manifest["reference"] is not None)


def _files_of(log: Log) -> list[tuple[Path, int, int]]:
    """The log's files with size and time of change; size -1 for one that is gone or is no regular file: reading it will say why."""
    found = []
    for path in dict.fromkeys(log.files):
        try:
            status = path.stat()
            regular = stat.S_ISREG(status.st_mode)
        except OSError:
            regular = False
        found.append((path, status.st_size, status.st_mtime_ns) if regular else (path, -1, 0))
    return found


def _bytes_of(known: list[tuple[Path, int, int]]) -> int:
    return sum(max(size, 0) for _, size, _ in known)


def _folder_of(known: list[tuple[Path, int, int]]) -> str:
    """The folder that holds them all."""
    return os.path.commonpath([path.parent for path, _, _ in known]) if known else ""


def _digest_of(known: list[tuple[Path, int, int]], content: Callable[[Path], str]) -> str:
    """One sha256 over names, sizes and what `content` gives of the regular files; names relative to the folder that holds them all."""
    digest, root = hashlib.sha256(), _folder_of(known)
    for path, size, _ in sorted(known):
        found = content(path) if size >= 0 else UNREADABLE
        digest.update(f"{os.path.relpath(path, root)}\0{size}\0{found}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _outline_of(known: list[tuple[Path, int, int]]) -> dict[str, str | int]:
    """What recordings are told apart by without reading them: it stays the same where one is moved."""
    paths = sorted(path for path, _, _ in known)
    opened = set(paths[:: len(paths) // HEADS + 1])

    def head(path: Path) -> str:
        if path not in opened:
            return ""
        try:
            with open(path, "rb") as file:
                return file.read(HEAD_BYTES).hex()
        except OSError:
            return UNREADABLE

    return {"files": len(known), "bytes": _bytes_of(known), "outline": _digest_of(known, head)}


def _store(job: Job, source: tuple[Path, str], log: Log, tell: Callable[[str], None]) -> Outcome:
    def say(text: str) -> None:
        tell(f"log {one_line(log.id, 80)}: {text}")

    before = _files_of(log)
    posed = _posed(log, job.poses, lambda done, total, text: say(f"poses {done} of {total} sweeps"))
    number = itertools.count(1)

    def content(path: Path) -> str:
        say(f"digest of file {next(number)} of {len(before)}")
        try:
            return files.sha256_of(path)
        except OSError:
            return UNREADABLE

    def unchanged() -> None:
        if _files_of(log) != before:
            raise RecordError(f"log {one_line(log.id)}: its files changed while they were read; ingest it again when it is complete")

    manifest = write_log(
        job.store,
        posed,
        lossless=job.lossless,
        reference=Reference(*source, job.options) if job.reference else None,
        overwrite=job.overwrite,
        options={"poses": job.poses},
        source={"digest": _digest_of(before, content)} | _outline_of(before),
        step=_steps(log, say),
        before_commit=unchanged,
    )
    items = sum(row["sweeps"] for row in manifest["lidars"].values()) + sum(row["images"] for row in manifest["cameras"].values())
    reasons = tuple(Quarantined(log.id, row["reason"], row["sensor"], row["stamp_ns"]) for row in manifest["quarantined"])
    sweeps = {name: row["sweeps"] for name, row in manifest["lidars"].items()}
    reference = reference_of(log.lidars, sweeps) if len(sweeps) > 1 else None
    return Outcome("stored", log.id, items, sum(row["bytes"] for row in manifest["files"]), reference, reasons, _folder_of(before))


def _steps(log: Log, say: Callable[[str], None]) -> Callable[[str], None]:
    """A function for `write_log` to call before each item, that says which of how many of its sensor it is."""
    sensors = (("sweeps", log.sweep_stamps_ns), ("images", log.image_stamps_ns))
    known = {f"{log.id} {name}": (kind, len(stamps)) for kind, by_name in sensors for name, stamps in by_name.items()}
    seen, said = Counter[str](), "labels"

    def step(item: str) -> None:
        nonlocal said
        if item in known:
            seen[item] += 1
            kind, total = known[item]
            said = f"{kind} {seen[item]} of {total}"
        say(said)  # labels are read between the sweeps that they belong to

    return step


def _posed(log: Log, poses: str, report: Report) -> Log:
    """The log with the poses asked for. Where its own were asked for, it has none and odometry fails, it stays without, which its notes say."""
    if poses == "log" and (log.poses is not None or not log.lidars):
        return log
    compute = getattr(importlib.import_module("sensors.alignment.odometry"), "refined" if poses == "refined" else "odometry")
    try:
        return replace(log, poses=compute(log, report))
    except RecordError as error:
        if poses != "log":
            raise
        return replace(log, notes=(*log.notes, f"no poses: the log has none and odometry gave none ({one_line(error, 200)})"))
