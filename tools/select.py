"""`wm select STORE EXPR`: clips by what is in them, without labels."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "find the clips of a store that meet a condition, and write them as data for the other commands"

MEASURES = ("speed", "acceleration", "turn", "movers", "moving", "fastest", "returns", "far", "brightness")  # of sensors.selection
SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", type=Path, help="a store")
    parser.add_argument("condition", metavar="EXPR", help=f"e.g. 'speed > 5 and movers >= 3', over {', '.join(MEASURES)}")
    parser.add_argument("--every", type=float, metavar="S", default=0.5, help="look at a clip each S seconds (default: %(default)s)")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write a YAML that --data of the other commands takes")
    parser.add_argument("--overwrite", action="store_true", help="replace that file if it is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    import os

    import yaml

    from sensors.clips import clips_of
    from sensors.data import YAML_BYTES, open_data
    from sensors.errors import UsageError, one_line
    from sensors.files import check_output, write_file
    from sensors.selection import condition, ranges, select
    from sensors.store.writer import check_store
    from worldmodel.tools.terminal import print_json, print_table, reporter

    wanted = condition(args.condition)
    check_store(args.store)
    if args.output is not None:
        check_output(args.output, overwrite=args.overwrite)
    if not 0.001 <= args.every <= 1e6:
        raise UsageError(f"--every {args.every:g}: give seconds, 0.001 to 1e6")
    report, logs = reporter("logs"), [part.log for part in open_data(args.store)]
    looked_at, found, unreadable = 0, [], list[str]()
    for done, log in enumerate(logs):
        for hit in select(clips_of(log, every_s=args.every), wanted, unreadable):
            looked_at += 1
            found += [hit] if hit else []
            report(done, len(logs), f"{len(found)} of {looked_at} clips")
    report(len(logs), max(len(logs), 1))
    if not looked_at:
        raise UsageError(f"{one_line(args.store)}: no log gives a clip; `wm check` says why")
    parts = ranges(found)
    if args.output is not None:
        root = os.path.relpath(args.store.resolve(), args.output.parent.resolve())
        rows = [{"store": root, "log": log, "from_ns": first, "to_ns": last} for log, first, last in parts]
        text = f"# wm select: {one_line(wanted.text, 1000)}\n" + yaml.safe_dump(rows, sort_keys=False, allow_unicode=True)
        if not rows or len(text.encode()) > YAML_BYTES:
            raise UsageError(f"{len(rows)} stretches {'found: nothing to write' if not rows else 'are more than one file may list; ask for fewer'}")
        write_file(args.output, text.encode(), new=not args.overwrite)
    seconds = sum(last - first for _, first, last in parts) / 1e9
    if args.json:
        rows = [{"clip": hit.clip.id, **hit.values} for hit in found]
        print_json("select", store=str(args.store), condition=wanted.text, looked_at=looked_at, unreadable=unreadable, seconds=seconds, clips=rows,
                   parts=[{"log": log, "from_ns": first, "to_ns": last} for log, first, last in parts],
                   output=None if args.output is None else str(args.output))  # fmt: skip
        return 0
    print_table(
        f"{len(found)} of {looked_at} clips, {seconds:.1f} s of {len({hit.clip.log.id for hit in found})} logs",
        ("clip", *wanted.names),
        [(one_line(hit.clip.id, 80), *(f"{hit.values[name]:.3g}" if name in hit.values else "-" for name in wanted.names)) for hit in found[:SHOWN]],
    )
    if len(found) > SHOWN:
        print(f"and {len(found) - SHOWN} more; --json prints all")
    if unreadable:
        print(f"{len(unreadable)} clips cannot be read; the first: {unreadable[0]}")
    if args.output is not None:
        print(f"data: {one_line(args.output)}")
    return 0
