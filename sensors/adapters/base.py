"""What an adapter is, and how one is found.

An adapter is one module in this package (or an entry point of the group ``driving_worldmodel.adapters`` in another distribution) with

    recognise(path: Path) -> float
        How sure it is, 0..1, that `path` holds its dataset. Looks at names and a few headers only, never raises, takes no time.
    open_logs(path: Path, options: Mapping[str, str]) -> Iterator[Log]
        One log after the other, payloads lazy. `next()` raises WmError for a log that cannot be opened and may then be called again for
        the log after it, which a generator cannot do and ``map(open_one, sources)`` can. An option it does not know is a UsageError. Any
        other error is one that the adapter did not foresee; it costs the log too, and is told with the adapter's line.
    write_sample(root: Path) -> Path
        A complete log of a few frames under `root` (an empty folder), written without any of the adapter's own reading code; gives the
        path to open. The contract tests run on it.

What every adapter promises: records in metres, nanoseconds and the frames of `sensors.records`; items joined by name or token, never by
their position in a listing; what is missing, dropped or mended is counted in ``log.counts`` under ``"SENSOR: what"``; a payload that turns
out unreadable raises RecordError when it is read and the log goes on; labels are not touched before `open_labels`; no path leaves the
root; the source is not written to.
"""

from __future__ import annotations

import importlib
import pkgutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import GeneratorType, ModuleType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sensors.errors import Interrupted, UsageError, WmError, one_line
from sensors.records import Image, Log, RecordError, Sweep, announced, checked_array, labels_of

Item = TypeVar("Item")

GROUP = "driving_worldmodel.adapters"


def adapters() -> dict[str, ModuleType]:
    """All adapters by dataset name: the modules beside this one, then those that other distributions announce."""
    return _found()[0]


def broken() -> dict[str, str]:
    """Adapters that other distributions announce and that cannot be used, and why: they stand in nobody's way."""
    return _found()[1]


def _found() -> tuple[dict[str, ModuleType], dict[str, str]]:
    package = importlib.import_module("sensors.adapters")
    found = {m.name: importlib.import_module(f"sensors.adapters.{m.name}") for m in pkgutil.iter_modules(package.__path__) if m.name != "base"}
    bad = {}
    for entry in entry_points(group=GROUP):
        try:
            if entry.name in found:
                raise UsageError(f"there is an adapter of this name already; announce {entry.value} under another")
            found[entry.name] = entry.load()
        except (Interrupted, MemoryError):
            raise
        except Exception as error:
            bad[entry.name] = one_line(error if isinstance(error, UsageError) else f"{type(error).__name__}: {error}", 200)
    return dict(sorted(found.items())), bad


def guess(path: Path) -> str:
    """The dataset that `path` holds; UsageError where no adapter, or more than one equally, claims it."""
    if not path.exists():
        raise UsageError(f"{one_line(path)}: does not exist; give the folder that holds the recordings")
    known, bad = _found()
    scores = {}
    for name, module in known.items():
        try:
            scores[name] = float(module.recognise(path))
        except (Interrupted, MemoryError):
            raise
        except Exception as error:
            bad[name] = str(unforeseen(error, name))
    best = max(scores.values(), default=0.0)
    names = [name for name, score in scores.items() if score == best]
    if best <= 0:
        unasked = "".join(f"; {one_line(name, 60)} could not be asked, {why}" for name, why in bad.items())
        raise UsageError(
            f"{one_line(path)}: no adapter recognises it ({', '.join(scores)}){unasked}; give --dataset, or the folder one level up or down"
        )
    if len(names) > 1:
        raise UsageError(f"{one_line(path)}: could be {' or '.join(names)}; give --dataset")
    return names[0]


def options_of(pairs: Sequence[str]) -> dict[str, str]:
    """Options of an adapter as a command line gives them, KEY=VALUE each; UsageError for what is not."""
    split = [pair.partition("=") for pair in pairs]
    if bad := [key for key, equals, _ in split if not (key and equals)]:
        raise UsageError(f"--option {one_line(bad[0])}: write it as KEY=VALUE")
    return {key: value for key, _, value in split}


def open_source(path: Path, dataset: str | None = None, options: Mapping[str, str] | None = None) -> Iterator[Log | WmError]:
    """Every log of a source; in place of one that cannot be opened, the error that says why. dataset None: guessed."""
    name = dataset or guess(path)
    known, bad = _found()
    if name not in known:
        why = f"its adapter cannot be used, {bad[name]}" if name in bad else f"not one of {', '.join(known)}"
        raise UsageError(f"dataset {one_line(name)!r}: {why}")
    try:
        logs = iter(known[name].open_logs(path, options or {}))
    except (WmError, MemoryError):
        raise
    except Exception as error:
        yield unforeseen(error, name)
        return
    none = True
    while True:
        try:
            log = next(logs)
            none = False
            yield (
                log if isinstance(log, Log) else RecordError(f"{one_line(path)}: the adapter {name} gave a {type(log).__name__} where a Log belongs")
            )
        except StopIteration:
            if none:
                raise UsageError(f"{one_line(path)}: {name} finds no log there; give the folder one level up or down, or another --dataset") from None
            return
        except (UsageError, Interrupted, MemoryError):
            raise
        except Exception as error:
            none = False
            yield error if isinstance(error, WmError) else unforeseen(error, name)
            if isinstance(logs, GeneratorType):
                why = f"{name} opens logs in a generator, which an error ends; those behind it are left out"
                yield RecordError(f"{one_line(path)}: {why}; let its open_logs give map(open_one, sources)")


def guarded(log: Log) -> Log:
    """The log with readers whose errors are all RecordErrors: what the adapter did not foresee as well, and items that it did not announce."""

    def shielded(read: Callable[..., Item], *where: Any) -> Item:
        try:
            return read(*where)
        except (WmError, MemoryError):
            raise
        except Exception as error:
            raise unforeseen(error, log.dataset) from error

    def sweep(lidar: str, index: int) -> Sweep:
        return announced(log, Sweep, lidar, index, shielded(log.read_sweep, lidar, index))

    def image(camera: str, index: int) -> Image:
        return announced(log, Image, camera, index, shielded(log.read_image, camera, index))

    return replace(log, read_sweep=sweep, read_image=image, open_labels=lambda: labels_of(log, partial(shielded, log.open_labels)))


def unforeseen(error: Exception, dataset: str) -> RecordError:
    """An error that the adapter of a dataset did not foresee, in one line with the place; its cause is the error."""
    steps = [(frame.f_globals.get("__name__"), frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    name = getattr(adapters().get(dataset), "__name__", None)
    own = [step for step in steps if step[0] == name]
    _, file, line = (own or steps)[-1]
    found = RecordError(f"{type(error).__name__}: {one_line(error, 200)} {'in the adapter ' if own else ''}at {Path(file).name}:{line}")
    found.__cause__ = error
    return found


def in_order(stamps_ns: Sequence[int], items: Sequence[Item], sensor: str, counts: Counter[str]) -> tuple[NDArray[Any], list[Item]]:
    """stamps (N,) i64 strictly ascending with their items: sorted by stamp; of items with equal stamps the first stays. Both are counted."""
    stamps = checked_array(f"{sensor}, stamps", stamps_ns, np.int64, (None,))
    order = np.argsort(stamps, kind="stable")
    fresh = np.ones(len(order), bool)
    fresh[1:] = np.diff(stamps[order]) > 0
    counts[f"{sensor}: out of order, sorted"] += int((stamps < np.maximum.accumulate(stamps)).sum())
    counts[f"{sensor}: same stamp, dropped"] += int((~fresh).sum())
    return stamps[order[fresh]], [items[i] for i in order[fresh]]
