"""Who takes the logs into the store: this process, or workers beside it, one log each; and when they stop."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from sensors import files
from sensors.errors import Interrupted, WmError, one_line
from sensors.intake import Entries, Job, Outcome, Report, quarantine, take
from sensors.records import Log
from sensors.store import format as layout

STOP_S = 5.0
MOST_DEATHS = 3  # of each worker's place, in a row, before a log is reached
SAY_S = 0.2  # between two messages of a worker on how far it is


class Tally:
    """Counts outcomes as they come in, and tells the terminal. folders: where this call found the logs that are in the store, by id."""

    def __init__(self, report: Report) -> None:
        self.report, self.outcomes, self.folders = report, list[Outcome](), dict[str, str]()

    def say(self, text: str) -> None:
        self.report(len(self.outcomes), len(self.outcomes) + 1, text)

    def add(self, outcome: Outcome, more: bool) -> None:
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


class Stop:
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
def stopping() -> Iterator[Stop]:
    """SIGINT and SIGTERM raise Interrupted within; elsewhere than in the main thread they are left alone."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {each: signal.signal(each, stop.handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def serially(job: Job, tally: Tally, stop: Stop) -> None:
    def tell(text: str) -> None:
        stop.check()
        tally.say(text)

    entries = Entries(job)
    for source in range(len(job.sources)):
        ordinal = 0
        while (entry := entries.get(source, ordinal)) is not None:
            stop.check()
            first = tally.folders.get(entry.id) if isinstance(entry, Log) else None
            tally.add(take(job, source, ordinal, entry, first, tell), more=True)
            ordinal += 1
    tally.report(len(tally.outcomes), len(tally.outcomes), "")


@dataclass
class _Worker:
    process: Any
    connection: Connection
    task: tuple[int, int] | None = None
    log: str = ""
    waits: bool = False  # to be let on with the log


def in_parallel(job: Job, workers: int, tally: Tally, stop: Stop) -> None:
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


def _let_on(crew: Sequence[_Worker], tally: Tally) -> None:
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


def _hear(worker: _Worker, job: Job, tally: Tally, tasks: _Tasks) -> bool:
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
        tally.add(quarantine(job, log, reason), more=True)
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


def _hire(job: Job) -> _Worker:
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


def _work(job: Job, connection: Connection) -> None:
    """A worker process: tasks in, outcomes out, until the line closes."""
    stop = Stop()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and sends SIGTERM
    signal.signal(signal.SIGTERM, stop.handle)
    entries, said = Entries(job), 0.0

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
            connection.send(("done", take(job, source, ordinal, entry, first, tell)))
    except (EOFError, BrokenPipeError, Interrupted):
        return
    except Exception as error:
        connection.send(("failed", error if isinstance(error, WmError) else RuntimeError(traceback.format_exc())))
