"""What a command is given as ``--data``: a store, or a YAML file that lists parts of stores.

    - {store: ../kitti, log: kitti_raw/2011_09_26_drive_0005_sync, from_frame: 0, to_frame: 100}
    - {store: ../nuscenes, weight: 0.5, every_s: 1.0}

`store` is relative to the YAML file; without `log` every log of the store is meant. A range is from_ns <= stamp < to_ns; from_frame and
to_frame are the same counted in sweeps of the reference LiDAR as stored (frame 100 is not part of the first entry). Nothing of a clip
leaves its range. weight: how often its clips are drawn in training; every_s: how far apart they are cut there, instead of `train.every_s`.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sensors.errors import UsageError, one_line
from sensors.records import Log
from sensors.store.reader import Store, open_store

KEYS = ("store", "log", "from_ns", "to_ns", "from_frame", "to_frame", "weight", "every_s")
YAML_BYTES = 4 << 20
MAX_ENTRIES = 100_000


@dataclass(frozen=True, eq=False)
class Part:
    """A stretch of a log: from_ns <= stamp < to_ns (None: open), how much its clips count in training, the digest of the stored log's manifest,
    and how far apart clips are cut in training (None: as everywhere)."""

    log: Log
    from_ns: int | None = None
    to_ns: int | None = None
    weight: float = 1.0
    digest: str | None = None
    every_s: float | None = None


def open_data(path: Path | str) -> list[Part]:
    """The parts that `path` (a store, or a YAML file) names, in its order. UsageError names the file, the entry and the key that is wrong."""
    path = Path(path)
    if path.is_dir():
        store = open_store(path)
        return [Part(store.open_log(log_id), digest=_digest(store, log_id)) for log_id in store.ids]
    stores: dict[Path, Store] = {}
    parts = []
    for number, entry in enumerate(_entries(path), 1):
        what = f"{one_line(path)}, entry {number}"
        _check(entry, what)
        root = path.parent / entry["store"]
        store = stores.setdefault(root, stores.get(root) or open_store(root))
        for log_id in [entry["log"]] if entry.get("log") is not None else store.ids:
            parts.append(_part(store.open_log(log_id), entry, what, _digest(store, log_id)))
    return parts


class _PlainLoader(yaml.SafeLoader):
    """YAML without what makes data files surprising: no aliases, no key twice, no merge keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: an alias (*{event.anchor}); write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, times in keys.items() if times > 1]:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: key {one_line(twice[0], 40)!r} twice")
        if "<<" in keys:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a merge key; write the values out")
        return super().construct_mapping(node, deep)


def _entries(path: Path) -> list[Any]:
    shown = one_line(path)
    try:
        if path.stat().st_size > YAML_BYTES:
            raise UsageError(f"{shown}: larger than {YAML_BYTES >> 20} MiB; give a store or a shorter list")
        text = path.read_text("utf-8")
        found = yaml.load(text, _PlainLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"{shown}: {reason}; give a store or a YAML list of {{store, log, from_ns, to_ns, weight}}") from error
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{shown}: not YAML that can be used: {one_line(str(error) or 'nested too deeply', 200)}") from error
    if not isinstance(found, list) or not found:
        raise UsageError(f"{shown}: holds no list of entries {{store, log, from_ns, to_ns, weight}}")
    if len(found) > MAX_ENTRIES:
        raise UsageError(f"{shown}: {len(found)} entries, more than {MAX_ENTRIES}; name whole stores instead")
    return found


def _check(entry: Any, what: str) -> None:
    if not isinstance(entry, dict):
        raise UsageError(f"{what}: {one_line(repr(entry), 60)} is not an entry {{store, log, from_ns, to_ns, weight}}")
    for key in entry:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(KEYS)}"
            raise UsageError(f"{what}: unknown key {one_line(repr(key), 60)}; {hint}")
    if not isinstance(entry.get("store"), str) or not entry["store"] or "\0" in entry["store"]:
        raise UsageError(f"{what}: store is {one_line(repr(entry.get('store')), 60)}, not a path as text")
    if entry.get("log") is not None and not isinstance(entry["log"], str):
        raise UsageError(f"{what}: log is {one_line(repr(entry['log']), 60)}, not an id as text; quote it")
    for key in ("from_ns", "to_ns", "from_frame", "to_frame"):
        if entry.get(key) is not None and (type(entry[key]) is not int or not 0 <= entry[key] < 2**62):
            raise UsageError(f"{what}: {key} is {one_line(repr(entry[key]), 60)}, not a whole number from 0 on")
    for end in ("from", "to"):
        if entry.get(f"{end}_ns") is not None and entry.get(f"{end}_frame") is not None:
            raise UsageError(f"{what}: both {end}_ns and {end}_frame; give one of them")
    for key in ("weight", "every_s"):
        value = entry.get(key, 1.0)
        if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value <= 1e6:
            raise UsageError(f"{what}: {key} is {one_line(repr(value), 60)}, not a number above 0")


def _digest(store: Store, log_id: str) -> str:
    return str(store.manifest(log_id)["digest"])


def _part(log: Log, entry: dict[str, Any], what: str, digest: str) -> Part:
    from_ns = entry.get("from_ns")
    to_ns = entry.get("to_ns")
    if entry.get("from_frame") is not None:
        from_ns = _stamp_of_frame(log, entry["from_frame"], what)
    if entry.get("to_frame") is not None:
        to_ns = _stamp_of_frame(log, entry["to_frame"], what)
    if from_ns is not None and to_ns is not None and from_ns >= to_ns:
        raise UsageError(f"{what}: the range {from_ns}..{to_ns} ns is empty; from comes before to")
    every_s = float(entry["every_s"]) if "every_s" in entry else None
    return Part(log, from_ns, to_ns, float(entry.get("weight", 1.0)), digest, every_s)


def _stamp_of_frame(log: Log, frame: int, what: str) -> int:
    """Stamp of a sweep of the reference LiDAR; that of the frame after the last one lies just behind the last."""
    stamps = log.sweep_stamps_ns[log.reference_lidar]
    if frame > len(stamps) or not len(stamps):
        raise UsageError(f"{what}: frame {frame} is beyond the {len(stamps)} sweeps of log {one_line(log.id)}")
    return int(stamps[frame]) if frame < len(stamps) else int(stamps[-1]) + 1
