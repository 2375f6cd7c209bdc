"""Which clips a training sees, and in which order: a function of (seed, rank, step) alone, so that workers, caches and restarts do not matter.

Preparing a clip costs as much as training on it some eight times. Where all of them fit in memory, each is prepared once and an epoch is a
shuffle of them. Where they do not, they lie on a ring, and the visits come from a window that moves along it: what is in the window is in
memory, and a clip is visited VISITS times on its way through.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.clips import clips_of
from sensors.data import Part
from sensors.errors import UsageError, WmError, one_line
from sensors.records import Clip
from worldmodel.batches import Prepared, Role, collate, prepare, rng_of, visit
from worldmodel.config import Config
from worldmodel.model import Batch

Array = NDArray[Any]

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
# threads that prepare clips; of many cores most, shared by the ranks of this machine
LOADERS = max(2, min(16, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))
PREFETCH = LOADERS + 1
ORDERS_KEPT = 3
FORETELL_EVERY = 4  # steps from one with the future sweep's latent to the next: encoding it costs as much as encoding the input
VISITS = 16
WINDOW = 0.8  # of what memory holds: clips differ in size, and loaders run ahead
FEWEST_BATCHES = 8  # that a window has to hold


def clips_of_parts(parts: Sequence[Part], config: Config) -> tuple[list[Clip], list[float]]:
    """Every clip of the data, in order, with the weight of its part."""
    clips: list[Clip] = []
    weights: list[float] = []
    m = config.model
    for part in parts:
        found = clips_of(part.log, past=m.past, future=m.future, rate_hz=m.rate_hz, every_s=part.every_s or config.train.every_s,
                         from_ns=part.from_ns, to_ns=part.to_ns)  # fmt: skip
        clips += found
        weights += [part.weight] * len(found)
    if not clips:
        raise UsageError(f"the data hold no clip of {m.past} past and {m.future} future frames at {m.rate_hz:g} Hz: logs are too short, have fewer "
                         "sweeps a second, gaps, or no poses at least every 0.5 s; `wm check` says which")  # fmt: skip
    return clips, weights


def without_clips(parts: Sequence[Part], clips: Sequence[Clip]) -> list[str]:
    """Ids of the logs that gave none of the clips, in order."""
    giving = {clip.log.id for clip in clips}
    return [log for log in dict.fromkeys(part.log.id for part in parts) if log not in giving]


def split(clips: Sequence[Clip], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the clips to train on and of those held out. Datasets of four logs and more give whole logs; others the end of each
    log, without the clips that overlap it."""
    by_dataset: dict[str, dict[str, list[int]]] = {}
    for index, clip in enumerate(clips):
        by_dataset.setdefault(clip.log.dataset, {}).setdefault(clip.log.id, []).append(index)
    train: list[int] = []
    held: list[int] = []
    for dataset, logs in by_dataset.items():
        if len(logs) >= 4:
            names = sorted(logs)
            out = set(rng_of(seed, "split", dataset).choice(names, max(1, round(share * len(names))), replace=False).tolist()) if share > 0 else set()
            for name, indices in logs.items():
                (held if name in out else train).extend(indices)
            continue
        for named in logs.values():
            indices = sorted(named, key=lambda i: clips[i].stamp_ns)  # parts of a log may be given in any order
            count = max(1, round(share * len(indices))) if share > 0 and len(indices) > 3 else 0
            kept, ending = indices[: len(indices) - count], indices[len(indices) - count :]
            held += ending
            first = clips[ending[0]].past[0].stamp_ns if ending else 2**62
            train += [i for i in kept if (clips[i].future or clips[i].past)[-1].stamp_ns < first]
    return train, held


class Source:
    """Batches as a function of the step: prepared clips are kept while memory lasts, and drawn anew at each visit. Of several ranks each has
    clips of its own, every world-th, so that what it keeps is what it is asked for."""

    def __init__(self, clips: Sequence[Clip], weights: Sequence[float], config: Config, *, rank: int = 0, world: int = 1) -> None:
        shared = slice(rank, None, world) if len(clips) >= world else slice(None)
        self.clips, self.weights, self.config = clips[shared], np.asarray(weights, float)[shared], config
        self.rank = rank
        train = config.train
        self.roles: tuple[Role, ...] = ("read",) * train.clips + ("dense",) * train.dense_clips + ("prior",) * train.prior_clips
        self.kept: dict[int, Prepared] = {}
        self.bytes = 0
        self.unreadable: dict[str, str] = {}
        self.orders: dict[int, Array] = {}
        self.ends: list[int] = []  # of the epochs, as positions in the endless stream
        self.lock = threading.Lock()
        self.memory, self.room = train.cache_gb * 2**30, len(self.clips)
        self.room = self._room()

    def prepared(self, index: int) -> Prepared:
        with self.lock:
            found = self.kept.pop(index, None)
            if found is not None:
                self.kept[index] = found  # behind all others: the one that was not asked for the longest is the first to go
                return found
        found = prepare(self.clips[index], self.config)
        with self.lock:
            while self.room < len(self.clips) and self.kept and self.bytes + found.nbytes >= self.memory:
                self.bytes -= self.kept.pop(next(iter(self.kept))).nbytes
            if index not in self.kept and self.bytes + found.nbytes < self.memory:
                self.kept[index] = found
                self.bytes += found.nbytes
        return found

    def _room(self) -> int:
        """How many clips of the size of the first readable one memory holds; all of them where it holds too few for a window."""
        for index in range(len(self.clips)):
            with suppress(WmError):
                room = int(self.memory / self.prepared(index).nbytes)
                return room if room >= FEWEST_BATCHES * len(self.roles) else len(self.clips)
        return len(self.clips)

    def fill(self, report: Callable[[int, int, str], None] | None = None, stop: Callable[[], bool] = lambda: False) -> None:
        """Prepare clips, in the order of their first visit, until all are kept or those of a window: beside the training this would take twice
        as long, since both want all cores."""
        most = min(self.config.train.steps * len(self.roles), self.room if self.room >= len(self.clips) else int(WINDOW * self.room))
        todo = self.order(0)[np.sort(np.unique(self.order(0), return_index=True)[1])][:most].tolist()
        done = 0

        def one(index: int) -> None:
            nonlocal done
            if self.bytes < self.memory and not stop():
                with suppress(WmError):  # an unreadable clip is counted when its turn comes
                    self.prepared(index)
            done += 1
            if report:
                report(done, len(todo), "")

        with ThreadPoolExecutor(LOADERS) as pool:
            list(pool.map(one, todo))

    def order(self, epoch: int) -> Array:
        """(K,) i64: every clip floor(weight) times, and once more with the chance that is left, shuffled; where memory does not hold them all,
        VISITS times as often, each while the window passes it. A function of (seed, rank, epoch)."""
        found = self.orders.get(epoch)
        if found is None:
            rng, count = rng_of(self.config.seed, "order", epoch, self.rank), len(self.clips)
            times = np.floor(self.weights + rng.random(count)).astype(int)
            if self.room >= count:
                found = rng.permutation(np.repeat(np.arange(count), times))
            else:
                place = rng_of(self.config.seed, "ring", self.rank).permutation(count)
                found = np.repeat(np.arange(count), times * VISITS)
                found = found[np.argsort((place[found] + rng.random(len(found)) * WINDOW * self.room) % count, kind="stable")]
            found = found if len(found) else np.array([int(np.argmax(self.weights))])
            self.orders[epoch] = found
            if len(self.orders) > ORDERS_KEPT:
                del self.orders[next(iter(self.orders))]
        return found

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, clip index) of a position in the endless stream."""
        with self.lock:
            while not self.ends or position >= self.ends[-1]:
                self.ends.append((self.ends[-1] if self.ends else 0) + len(self.order(len(self.ends))))
            epoch = bisect_right(self.ends, position)
            return epoch, int(self.order(epoch)[position - (self.ends[epoch - 1] if epoch else 0)])

    def batch(self, step: int) -> Batch:
        """The batch of a step on this rank. A clip that turns out unreadable is counted and the next one in the list takes its place."""
        visits = []
        for slot, role in enumerate(self.roles):
            position = step * len(self.roles) + slot
            epoch, index = self.at(position)
            for attempt in range(len(self.clips)):
                at = (index + attempt) % len(self.clips)
                if self.clips[at].id in self.unreadable:
                    continue
                try:
                    visits.append(visit(self.prepared(at), self.config, epoch, position, role=role))
                    break
                except WmError as error:
                    self.unreadable[self.clips[at].id] = one_line(error)
            else:
                raise WmError("no clip of the data is readable; run `wm check` on the store")
        return collate(visits, self.config, foretell=step % FORETELL_EVERY == 0)

    def stream(self, first: int, last: int) -> Iterator[Batch]:
        """Batches first..last-1, the next ones made in threads meanwhile (the kernels release the interpreter's lock)."""
        with ThreadPoolExecutor(LOADERS) as pool:
            waiting: list[Future[Batch]] = [pool.submit(self.batch, s) for s in range(first, min(first + PREFETCH, last))]
            for step in range(first, last):
                batch = waiting.pop(0).result()
                if step + PREFETCH < last:
                    waiting.append(pool.submit(self.batch, step + PREFETCH))
                try:
                    yield batch
                except GeneratorExit:
                    for future in waiting:
                        future.cancel()
                    raise
