"""Raw logs into a store: adapter -> poses -> store. Resumable, every log exactly once, nothing dropped without being counted.

Accounts. Each log that the sources hold is *seen* and then exactly one of: *stored* now; *filtered*, because it is in the store already or
belongs to another shard; *quarantined*, with the reason in the report and in `STORE/quarantine/`. A sweep or image that is unreadable is
left out of its log and listed in the log's manifest: items seen = stored + quarantined too.

A log whose files change while it is read is quarantined, and so is one that is in the store already but was read from other files or stored
in another way than is asked now. A log is the unit of resuming: one that was begun starts from its first file again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sensors import files
from sensors.adapters.base import guess
from sensors.crew import Tally, in_parallel, serially, stopping
from sensors.errors import Interrupted, UsageError, one_line
from sensors.intake import Job, Quarantined, Report
from sensors.store.writer import prepare_store

POSES = ("log", "odometry", "refined")


@dataclass(frozen=True)
class IngestReport:
    """Logs: seen = stored + already + other_shards + quarantined. Items (sweeps, images) of the logs stored now: items +
    items_quarantined; labels_quarantined: what could not be read of their labels. bytes: what was written for them."""

    seen: int = 0
    stored: int = 0
    already: int = 0
    other_shards: int = 0
    quarantined: int = 0
    items: int = 0
    items_quarantined: int = 0
    labels_quarantined: int = 0
    bytes: int = 0
    references: Mapping[str, int] = field(default_factory=dict)
    reasons: tuple[Quarantined, ...] = ()
    logs: tuple[str, ...] = field(default=(), repr=False)

    @property
    def filtered(self) -> int:
        return self.already + self.other_shards

    @property
    def exit_code(self) -> int:
        return 3 if self.quarantined or self.items_quarantined or self.labels_quarantined else 0


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
    job = Job(store, named, dict(options or {}), poses, reference, overwrite, lossless, debug, shard_index, num_shards)
    tally = Tally(report or (lambda done, total, text: None))
    with stopping() as stop:
        try:
            prepare_store(store)
            if workers == 1:
                serially(job, tally, stop)
            else:
                in_parallel(job, workers, tally, stop)
        except (Interrupted, KeyboardInterrupt) as error:
            done = f"{tally.stored} logs were stored" if tally.stored else "no log was stored yet"
            raise Interrupted(f"{one_line(store)}: stopped, {done}; the store is whole, give the same command again to go on") from error
    if tally.busy:
        raise files.Busy(f"{tally.busy[0]} ({tally.stored} logs were stored, {len(tally.busy)} are being written by others)")
    return _account(tally)


def _account(tally: Tally) -> IngestReport:
    ordered = sorted(tally.outcomes, key=lambda outcome: outcome.log)
    stored = [outcome for outcome in ordered if outcome.kind == "stored"]
    left_out = [reason.sensor == "labels" for outcome in stored for reason in outcome.reasons]
    return IngestReport(
        seen=len(ordered),
        stored=len(stored),
        already=tally.count("already"),
        other_shards=tally.count("other_shards"),
        quarantined=tally.count("quarantined"),
        items=sum(outcome.items for outcome in stored),
        items_quarantined=left_out.count(False),
        labels_quarantined=left_out.count(True),
        bytes=sum(outcome.bytes for outcome in stored),
        references=dict(sorted(Counter(outcome.reference for outcome in stored if outcome.reference).items())),
        reasons=tuple(reason for outcome in ordered for reason in outcome.reasons),
        logs=tuple(outcome.log for outcome in stored),
    )
