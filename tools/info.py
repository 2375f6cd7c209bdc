"""`wm info PATH`: what a store or a raw log holds."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sensors.records import Log

HELP = "list what is inside a store or a raw log"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", type=Path, help="a store, or recordings as `wm ingest` takes them")
    parser.add_argument("--dataset", metavar="NAME", help="which adapter reads a raw log (guessed where only one can)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of that adapter; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from sensors.errors import Interrupted, WmError, one_line
    from sensors.store.format import STORE_FILE
    from worldmodel.tools.terminal import print_json, print_references, print_table

    stored = (args.path / STORE_FILE).is_file()
    logs, problems, strangers = [], [], []
    if stored:
        from sensors.store.reader import open_store

        store = open_store(args.path, strict=False)
        problems, strangers = list(store.problems), store.strangers()
        for log_id in store.ids:
            manifest = store.manifest(log_id)
            facts = {key: manifest[key] for key in ("generation", "quarantined", "source", "options")}
            facts["boxes"] = manifest["labels"]["box_count"] if manifest["labels"] else None
            try:
                opened = store.open_log(log_id)
            except Interrupted:
                raise
            except WmError as error:
                problems.append(one_line(error))
                continue
            logs.append(_facts(opened) | facts | {"bytes": sum(row["bytes"] for row in manifest["files"])})
    else:
        for entry in _raw(args.path, args.dataset, args.option):
            if isinstance(entry, str):
                problems.append(entry)
            else:
                logs.append(_facts(entry) | {"boxes": None, "bytes": sum(path.stat().st_size for path in set(entry.files) if path.is_file())})
    if args.json:
        print_json("info", path=str(args.path), store=stored, logs=logs, problems=problems, strangers=strangers)
        return 1 if problems else 0
    rows = [
        (one_line(log["id"], 60), f"{log['seconds']:.1f}", f"{log['bytes'] / 1e6:.1f}", log["pose_source"] or "none",
         "-" if not stored else "none" if log["boxes"] is None else log["boxes"], log["stamps"], log["licence"])
        for log in logs
    ]  # fmt: skip
    print_table(f"{one_line(args.path)}: {len(logs)} logs", ("log", "s", "MB", "poses", "boxes", "stamps", "licence"), rows)
    sensors = [
        (one_line(log["id"], 60), one_line(name, 40), row["kind"], row["count"], f"{row['rate_hz']:.2f}", row["of"])
        for log in logs
        for name, row in log["sensors"].items()
    ]
    print_table("", ("log", "sensor", "kind", "items", "Hz", "of"), sensors)
    print_references(Counter(log["reference"] for log in logs if sum(row["kind"] == "lidar" for row in log["sensors"].values()) > 1))
    for log in logs:
        for what, count in log["counts"].items():
            print(f"{one_line(log['id'], 60)}: {one_line(what, 200)}: {count}")
        for note in log["notes"]:
            print(f"{one_line(log['id'], 60)}: {one_line(note)}")
    for line in problems:
        print(f"problem: {one_line(line)}")
    for name in strangers[:10]:
        print(f"not part of the store: {one_line(name)}")
    if len(strangers) > 10:
        print(f"and {len(strangers) - 10} more")
    return 1 if problems else 0


def _raw(path: Path, dataset: str | None, options: list[str]) -> Iterator[Log | str]:
    from sensors.adapters.base import open_source, options_of
    from sensors.errors import WmError

    for entry in open_source(path, dataset, options_of(options)):
        yield str(entry) if isinstance(entry, WmError) else entry


def _facts(log: Log) -> dict[str, Any]:
    """What can be said of a log without reading a payload."""
    stamps = [stamp for each in (*log.sweep_stamps_ns.values(), *log.image_stamps_ns.values()) for stamp in (each[:1], each[-1:]) if len(each)]
    ends = [int(stamp[0]) for stamp in stamps]
    sensors = {}
    for name, lidar in log.lidars.items():
        beams = f"{lidar.beams} beams" if lidar.beams else "beams unknown"
        sensors[name] = {"kind": "lidar", "of": beams} | _rate(log.sweep_stamps_ns[name])
    for name, camera in log.cameras.items():
        sensors[name] = {"kind": "camera", "of": f"{camera.width}x{camera.height} {camera.model}"} | _rate(log.image_stamps_ns[name])
    return {
        "id": log.id,
        "dataset": log.dataset,
        "licence": log.licence,
        "ego_frame": log.ego_frame,
        "seconds": (max(ends) - min(ends)) / 1e9 if ends else 0.0,
        "stamps": log.stamps,
        "pose_source": log.poses.source if log.poses is not None else None,
        "poses": 0 if log.poses is None else len(log.poses.stamps_ns),
        "sensors": sensors,
        "reference": log.reference_lidar if log.lidars else None,
        "counts": dict(log.counts),
        "notes": list(log.notes),
    }


def _rate(stamps: Any) -> dict[str, Any]:
    """Number of items, and the rate by the median time between them (0 where there are too few)."""
    import numpy as np

    period_s = float(np.median(np.diff(stamps))) / 1e9 if len(stamps) > 1 else 0.0
    return {"count": len(stamps), "rate_hz": 1 / period_s if period_s else 0.0}
