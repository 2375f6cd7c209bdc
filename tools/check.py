"""`wm check PATH`: can this recording be trusted? One HTML page."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sensors.records import Log

HELP = "see on one page whether to trust a store or raw log: timelines, skews, gaps, trajectory, LiDAR over image"

# logs whose payloads are looked at, and logs that are opened at all
IN_FULL, OPENED = 6, 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", type=Path, help="a store, or recordings as `wm ingest` takes them")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="the page (default: check.html; with --json none)")
    parser.add_argument("--dataset", metavar="NAME", help="which adapter reads a raw log (guessed where only one can)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of that adapter; may be repeated")
    parser.add_argument(
        "--log", action="append", default=[], metavar="ID", help=f"show this log in full; may be repeated (default: the first {IN_FULL})"
    )
    parser.add_argument("--deep", action="store_true", help="compare every byte of a store with its digests")
    parser.add_argument("--overwrite", action="store_true", help="replace the page if it is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from sensors.adapters.base import guarded
    from sensors.alignment.survey import survey
    from sensors.alignment.timing import timing
    from sensors.errors import UsageError, one_line
    from sensors.files import check_output, write_file
    from sensors.store.format import STORE_FILE
    from worldmodel.drawing.check_page import Checked, check_page
    from worldmodel.tools.terminal import print_json, print_references, print_table, reporter

    output = args.output if args.output is not None or args.json else Path("check.html")
    if output is not None:
        check_output(output, overwrite=args.overwrite)
    stored = (args.path / STORE_FILE).is_file()
    if args.deep and not stored:
        raise UsageError(f"{one_line(args.path)}: not a store, so there are no digests to compare; leave out --deep")
    logs, problems, not_opened = _open_store(args.path, args.log) if stored else _open_raw(args.path, args.dataset, args.option, args.log)
    notes = []
    if args.deep:
        from sensors.store.reader import open_store

        damaged = open_store(args.path, strict=False).verify(deep=True)
        problems = list(dict.fromkeys(problems + damaged))
        notes.append(
            f"Every byte was compared with its digest: {len(damaged)} problems."
            if damaged
            else "Every byte was compared with its digest: all as written."
        )
    report = reporter("check")
    checked = []
    for number, log in enumerate(map(guarded, logs)):
        report(number, len(logs), one_line(log.id, 60))
        checked.append(Checked(log, timing(log), survey(log, labels=stored) if number < IN_FULL or log.id in args.log else None))
    report(len(logs), max(len(logs), 1), "")
    if output is not None:
        page = check_page(one_line(args.path, 200), checked, problems, not_opened=not_opened, notes=notes)
        write_file(output, page.encode(), new=not args.overwrite)
    code = 1 if problems else 0
    if args.json:
        rows = [one.timing.as_json() | {"survey": one.survey.as_json() if one.survey else None, "warnings": list(one.warnings)} for one in checked]
        rows = [row | {"ok": not row["warnings"]} for row in rows]
        print_json("check", path=str(args.path), store=stored, deep=args.deep, logs=rows, problems=problems, not_opened=not_opened,
                   page=None if output is None else str(output))  # fmt: skip
        return code
    print_table(
        f"{one_line(args.path)}: {len(checked)} logs",
        ("log", "s", "way, m", "poses", "warnings"),
        [
            (
                one_line(one.log.id, 60), f"{one.timing.duration_s:.1f}", f"{one.timing.poses.distance_m:.1f}" if one.timing.poses else "-",
                one.timing.poses.source if one.timing.poses else "none",
                f"{len(one.warnings)}" if one.survey else f"{len(one.warnings)}, by stamps alone",
            )
            for one in checked
        ],
    )  # fmt: skip
    for one in checked:
        for line in one.warnings:
            print(f"{one_line(one.log.id, 60)}: {one_line(line)}")
    print_references(Counter(log.reference_lidar for log in logs if len(log.lidars) > 1))
    for line in problems:
        print(f"problem: {one_line(line)}")
    for note in notes:
        print(note)
    if not_opened:
        print(f"{not_opened} further logs were not opened; name those to look at with --log")
    print(f"page: {one_line(output)}")
    return code


def _open_store(path: Path, wanted: list[str]) -> tuple[list[Log], list[str], int]:
    """Logs (those named first), lines about what does not open, and how many were left unopened."""
    from sensors.errors import UsageError, WmError, one_line
    from sensors.store.reader import open_store

    store = open_store(path, strict=False)
    if missing := [name for name in wanted if name not in store.ids]:
        raise UsageError(f"log {one_line(missing[0], 120)!r}: not in {one_line(path)}; `wm info` lists what is")
    problems = list(store.problems) + [f"not part of the store: {name}" for name in store.strangers()]
    ids = list(dict.fromkeys([*wanted, *store.ids]))
    logs = []
    for log_id in ids[:OPENED]:
        try:
            logs.append(store.open_log(log_id))
        except WmError as error:
            problems.append(str(error))
    return logs, problems, max(len(ids) - OPENED, 0)


def _open_raw(path: Path, dataset: str | None, options: list[str], wanted: list[str]) -> tuple[list[Log], list[str], int]:
    from sensors.adapters.base import open_source, options_of
    from sensors.errors import UsageError, WmError, one_line

    logs, problems, not_opened = [], [], 0
    for entry in open_source(path, dataset, options_of(options)):
        if isinstance(entry, WmError):
            problems.append(str(entry))
        elif len(logs) < OPENED or entry.id in wanted:
            logs.append(entry)
        else:
            not_opened += 1
    if missing := set(wanted) - {log.id for log in logs}:
        raise UsageError(f"log {one_line(min(missing), 120)!r}: not in {one_line(path)}; `wm info` lists what is")
    return sorted(logs, key=lambda log: log.id not in wanted), problems, not_opened
