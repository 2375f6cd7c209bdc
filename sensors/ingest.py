"""Raw logs into a store: adapter -> poses -> store. Resumable, every log exactly once, nothing dropped without being counted.

Accounts. Each log that the sources hold is *seen* and then exactly one of: *stored* now; *filtered*, because it is in the store already or
belongs to another shard; *quarantined*, with the reason in the report and in `STORE/quarantine/`. A sweep or image that is unreadable is
left out of its log and listed in the log's manifest: items seen = stored + quarantined too.

A log whose files change while it is read is quarantined, and so is one that is in the store already but was read from other files or stored
in another way than is asked now. A log is the unit of resuming: one that was begun starts from its first file again.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import multiprocessing
import os
import signal
import stat
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from sensors import files
from sensors.adapters.base import guess, open_source, unforeseen
from sensors.errors import Interrupted, UsageError, WmError, one_line
from sensors.records import Log, RecordError, reference_of
from sensors.store import format as layout
from sensors.store.writer import Reference, prepare_store, write_log

POSES = ("log", "odometry", "refined")
STOP_S = 5.0
MOST_DEATHS = 3  # of each worker's place, in a row, before a log is reached
SAY_S = 0.2  # between two messages of a worker on how far it is
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
class IngestReport:
    """Logs: seen = stored + already + other_shards + quarantined. Items (sweeps, images) of the logs stored now: items + those
    quarantined among `reasons`. bytes: what was written for them."""

    seen: int = 0
    stored: int = 0
    already: int = 0
    other_shards: int = 0
    quarantined: int = 0
    items: int = 0
    items_quarantined: int = 0
    bytes: int = 0
    references: Mapping[str, int] = field(default_factory=dict)
    reasons: tuple[Quarantined, ...] = ()
    logs: tuple[str, ...] = field(default=(), repr=False)

    @property
    def filtered(self) -> int:
        return self.already + self.other_shards

    @property
    def exit_code(self) -> int:
        return 3 if self.quarantined or self.items_quarantined else 0


def ingest(
    sources: Sequence[Path | str],
    store: Path | str,
    *,
    dataset: str | None = None,
    options: Mapping[str, str] | None = None,
    poses: str = "log",
    workers: int = 1,
    shard_index: int = 0,
    num_shards: int = 1,
    reference: bool = False,
    overwrite: bool = False,
    lossless: bool = False,
    debug: bool = False,
    report: Report | None = None,
) -> IngestReport:
    """Store every log of the sources that is not stored yet.

    poses: `log` takes the log's own and odometry where it has none (the manifest says which); `odometry`, `refined` compute them.
    workers: processes, logs in parallel. shards: this call takes the logs whose id falls to shard_index of num_shards. reference: store where
    payloads are, not copies. overwrite: also store what is stored, as its next generation. debug: print the traceback of what is quarantined.
    report(done, total, text) is called with each log and with how far the present one is. UsageError, Interrupted (the store is whole; call
    again to go on), Busy after all else is done where another process was writing one of the logs, WmError where the store cannot be written, or
    where every worker dies on a source before it reaches a log.
    """
    if poses not in POSES:
        raise UsageError(f"poses {one_line(poses)!r}: not one of {', '.join(POSES)}")
    if not 0 <= shard_index < num_shards:
        raise UsageError(f"shard {shard_index} of {num_shards}: the index counts from 0 to {num_shards - 1}")
    if workers < 1:
        raise UsageError(f"{workers} workers: at least one is needed")
    store = Path(store)
    paths = tuple(dict.fromkeys(Path(source).resolve() for source in sources))
    for path in paths:
        if store.resolve() == path or path in store.resolve().parents or store.resolve() in path.parents:
            raise UsageError(f"{one_line(store)}: store and source {one_line(path)} lie within one another; put the store elsewhere")
    named = tuple((path, dataset or guess(path)) for path in paths)
    job = _Job(store, named, dict(options or {}), poses, reference, overwrite, lossless, debug, shard_index, num_shards)
    tally = _Tally(report or (lambda done, total, text: None))
    with _stopping() as stop:
        try:
            prepare_store(store)
            if workers == 1:
                _serially(job, tally, stop)
            else:
                _in_parallel(job, workers, tally, stop)
        except (Interrupted, KeyboardInterrupt) as error:
            done = f"{tally.stored} logs were stored" if tally.stored else "no log was stored yet"
            raise Interrupted(f"{one_line(store)}: stopped, {done}; the store is whole, give the same command again to go on") from error
    if tally.busy:
        raise files.Busy(f"{tally.busy[0]} ({tally.stored} logs were stored, {len(tally.busy)} are being written by others)")
    return tally.result()


@dataclass(frozen=True)
class _Job:
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
class _Outcome:
    kind: str  # stored, already, other_shards, quarantined, busy
    log: str
    items: int = 0
    bytes: int = 0
    reference: str | None = None  # the LiDAR that frames are built on, where the log has several
    reasons: tuple[Quarantined, ...] = ()
    folder: str = ""  # that the files lie in of a log that is in the store


class _Tally:
    """Counts outcomes as they come in, and tells the terminal. folders: where this call found the logs that are in the store, by id."""

    def __init__(self, report: Report) -> None:
        self.report, self.outcomes, self.folders = report, list[_Outcome](), dict[str, str]()

    def say(self, text: str) -> None:
        self.report(len(self.outcomes), len(self.outcomes) + 1, text)

    def add(self, outcome: _Outcome, more: bool) -> None:
        self.outcomes.append(outcome)
        if outcome.kind in ("stored", "already"):
            self.folders.setdefault(outcome.log, outcome.folder)
        self.report(len(self.outcomes), len(self.outcomes) + more, f"{one_line(outcome.log, 80)} {outcome.kind}")

    @property
    def stored(self) -> int:
        return self.count("stored")

    @property
    def busy(self) -> list[str]:
        return [outcome.reasons[0].reason for outcome in self.outcomes if outcome.kind == "busy"]

    def count(self, kind: str) -> int:
        return sum(outcome.kind == kind for outcome in self.outcomes)

    def result(self) -> IngestReport:
        ordered = sorted(self.outcomes, key=lambda outcome: outcome.log)
        stored = [outcome for outcome in ordered if outcome.kind == "stored"]
        return IngestReport(
            seen=len(ordered),
            stored=len(stored),
            already=self.count("already"),
            other_shards=self.count("other_shards"),
            quarantined=self.count("quarantined"),
            items=sum(outcome.items for outcome in stored),
            items_quarantined=sum(len(outcome.reasons) for outcome in stored),
            bytes=sum(outcome.bytes for outcome in stored),
            references=dict(sorted(Counter(outcome.reference for outcome in stored if outcome.reference).items())),
            reasons=tuple(reason for outcome in ordered for reason in outcome.reasons),
            logs=tuple(outcome.log for outcome in stored),
        )


class _Stop:
    """Whether a signal asked to stop. The exception that its handler raises may be taken for another error where it strikes, so the loops
    ask again."""

    signal_name = ""

    def check(self) -> None:
        if self.signal_name:
            raise Interrupted(f"stopped by {self.signal_name}")

    def handle(self, signum: int, frame: object) -> None:
        self.signal_name = signal.Signals(signum).name
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)  # a second signal ends the process at once
        self.check()


@contextmanager
def _stopping() -> Iterator[_Stop]:
    """SIGINT and SIGTERM raise Interrupted within; elsewhere than in the main thread they are left alone."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {each: signal.signal(each, stop.handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class _Entries:
    """The logs of all sources by (source, ordinal), each source read forward only."""

    def __init__(self, job: _Job) -> None:
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


def _serially(job: _Job, tally: _Tally, stop: _Stop) -> None:
    def tell(text: str) -> None:
        stop.check()
        tally.say(text)

    entries = _Entries(job)
    for source in range(len(job.sources)):
        ordinal = 0
        while (entry := entries.get(source, ordinal)) is not None:
            stop.check()
            first = tally.folders.get(entry.id) if isinstance(entry, Log) else None
            tally.add(_take(job, source, ordinal, entry, first, tell), more=True)
            ordinal += 1
    tally.report(len(tally.outcomes), len(tally.outcomes), "")


def _take(job: _Job, source: int, ordinal: int, entry: Log | WmError, first: str | None, tell: Callable[[str], None]) -> _Outcome:
    """Store one log, or say why not. first: the folder of a log of the same id that this call found before and that is in the store."""
    place = f"{job.sources[source][0].name}#{ordinal}"
    name = entry.id if isinstance(entry, Log) else place
    if int(hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12], 16) % job.num_shards != job.shard_index:
        return _Outcome("other_shards", name)
    if isinstance(entry, WmError):
        return _quarantine(job, place, one_line(entry), entry)
    try:
        there = files.generations(layout.log_folder(job.store, entry.id))
        if there and (first is not None or not job.overwrite):
            outcome = _already(job, entry, first)
        else:
            outcome = _store(job, job.sources[source], entry, tell)
    except files.Busy as error:
        return _Outcome("busy", entry.id, reasons=(Quarantined(entry.id, str(error)),))
    except files.Exists:
        outcome = _already(job, entry, first)
    except RecordError as error:
        return _quarantine(job, entry.id, one_line(error), error)
    except MemoryError:
        return _quarantine(job, entry.id, "out of memory while it was read; give it to a machine with more, or use fewer workers")
    except WmError:
        raise
    except Exception as error:
        found = f"log {one_line(entry.id)}: {unforeseen(error, job.sources[source][1])}"
        tell(found)  # an adapter may have made an error of its own of the signal to stop: telling raises it again
        return _quarantine(job, entry.id, found, error)
    if outcome.kind != "quarantined":
        for key in (place, entry.id):
            files.remove(layout.quarantine_path(job.store, key))
    return outcome


def _quarantine(job: _Job, name: str, reason: str, error: Exception | None = None) -> _Outcome:
    if job.debug and error is not None:
        traceback.print_exception(error)
    files.write_json(layout.quarantine_path(job.store, name), {"log": name, "reason": reason})
    return _Outcome("quarantined", name, reasons=(Quarantined(name, reason),))


def _already(job: _Job, log: Log, first: str | None) -> _Outcome:
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
        return _quarantine(job, log.id, f"log {one_line(log.id)}: {one_line(reason)}")
    return _Outcome("already", log.id, folder=folder)


def _asked(poses: str, lossless: bool, reference: bool) -> str:
    """The options that decide what is stored. Where payloads stay where they are, none can lose anything."""
    return f"--poses {poses}" + (" --reference" if reference else " --lossless" if lossless else "")


def _way_of(job: _Job, log: Log, manifest: Mapping[str, Any]) -> str:
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


def _store(job: _Job, source: tuple[Path, str], log: Log, tell: Callable[[str], None]) -> _Outcome:
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
    return _Outcome("stored", log.id, items, sum(row["bytes"] for row in manifest["files"]), reference, reasons, _folder_of(before))


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


@dataclass
class _Worker:
    process: Any
    connection: Connection
    task: tuple[int, int] | None = None
    log: str = ""
    waits: bool = False  # to be let on with the log


def _in_parallel(job: _Job, workers: int, tally: _Tally, stop: _Stop) -> None:
    """Tasks (source, ordinal) go out in order; every worker opens the sources by itself and steps forward to its task. A worker that dies
    costs the log it was at, and is replaced."""
    crew: list[_Worker] = []
    tasks = _Tasks(len(job.sources), MOST_DEATHS * workers)
    try:
        crew = [_hire(job) for _ in range(workers)]
        while True:
            for worker in crew:
                if worker.task is None and (task := tasks.next()) is not None:
                    worker.task, worker.log, worker.waits = task, "", False
                    with suppress(OSError):  # it has died meanwhile, which is heard below
                        worker.connection.send(task)
            at_work = [worker for worker in crew if worker.task is not None]
            if not at_work:
                break
            for ready in wait([worker.connection for worker in at_work], timeout=1.0):
                worker = next(worker for worker in at_work if worker.connection is ready)
                if not _hear(worker, job, tally, tasks):
                    crew[crew.index(worker)] = _hire(job)
            _let_on(crew, tally)
            stop.check()
    finally:
        _dismiss(crew)
    tally.report(len(tally.outcomes), len(tally.outcomes), "")


def _let_on(crew: Sequence[_Worker], tally: _Tally) -> None:
    """Answer workers that reached a log with the folder that this call found the log in before, those that reached one and the same one by one."""
    at_work = {worker.log for worker in crew if worker.task is not None and not worker.waits}
    for worker in crew:
        if worker.task is not None and worker.waits and worker.log not in at_work:
            at_work.add(worker.log)
            worker.waits = False
            with suppress(OSError):  # it has died meanwhile, which is heard next
                worker.connection.send(tally.folders.get(worker.log))


class _Tasks:
    """The next (source, ordinal) to hand out: a source is over once a worker found nothing at an ordinal. lost: where workers died in a
    row before they reached a log, at most most_lost: while all of them do, none finds that the source is over."""

    def __init__(self, sources: int, most_lost: int) -> None:
        self.sources, self.source, self.ordinal = sources, 0, -1
        self.most_lost, self.lost = most_lost, list[str]()

    def next(self) -> tuple[int, int] | None:
        self.ordinal += 1
        return (self.source, self.ordinal) if self.source < self.sources else None

    def over(self, source: int) -> None:
        if source == self.source:
            self.source, self.ordinal = source + 1, -1


def _hear(worker: _Worker, job: _Job, tally: _Tally, tasks: _Tasks) -> bool:
    """Take one message of a worker; False where it died."""
    assert worker.task is not None
    try:
        kind, value = worker.connection.recv()
    except (EOFError, OSError) as error:
        worker.process.join(STOP_S)
        code = worker.process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"code {code}"
        path, place = job.sources[worker.task[0]][0], worker.task[1]
        log = worker.log or f"{path.name}#{place}"
        reason = f"{one_line(log)}: the worker that read it ended with {how} (out of memory?); use fewer workers, or look at this log alone"
        tally.add(_quarantine(job, log, reason), more=True)
        if not worker.log:
            tasks.lost.append(log)
        if len(tasks.lost) >= tasks.most_lost:
            for log in tasks.lost:  # there may be no logs at these places
                files.remove(layout.quarantine_path(job.store, log))
            raise WmError(f"{one_line(path)}: {len(tasks.lost)} workers in a row ended before they reached a log of it, the last with {how} "
                          f"(out of memory?); {tally.stored} logs were stored; use fewer, or --workers 1 to see it fail") from error  # fmt: skip
        return False
    tasks.lost.clear()
    if kind == "at":
        worker.log, worker.waits = value, True
        return True
    if kind == "says":
        tally.say(value)
        return True
    source, worker.task = worker.task[0], None
    if kind == "failed":
        raise value
    if kind == "over":
        tasks.over(source)
    else:
        tally.add(value, more=True)
    return True


def _hire(job: _Job) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(job, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _dismiss(crew: Sequence[_Worker]) -> None:
    """End workers: those without a task by closing their line, the others by SIGTERM, on which they drop the log that they were at."""
    for worker in crew:
        worker.connection.close()
        if worker.task is not None:
            worker.process.terminate()
    for worker in crew:
        worker.process.join(STOP_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _work(job: _Job, connection: Connection) -> None:
    """A worker process: tasks in, outcomes out, until the line closes."""
    stop = _Stop()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and sends SIGTERM
    signal.signal(signal.SIGTERM, stop.handle)
    entries, said = _Entries(job), 0.0

    def tell(text: str) -> None:
        nonlocal said
        stop.check()
        if time.monotonic() - said > SAY_S:
            said = time.monotonic()
            try:
                connection.send(("says", text))
            except OSError as error:
                raise Interrupted("nobody listens any more") from error

    try:
        while True:
            source, ordinal = connection.recv()
            entry = entries.get(source, ordinal)
            stop.check()
            if entry is None:
                connection.send(("over", None))
                continue
            first = None
            if isinstance(entry, Log):
                connection.send(("at", entry.id))
                first = connection.recv()
            connection.send(("done", _take(job, source, ordinal, entry, first, tell)))
    except (EOFError, BrokenPipeError, Interrupted):
        return
    except Exception as error:
        connection.send(("failed", error if isinstance(error, WmError) else RuntimeError(traceback.format_exc())))
