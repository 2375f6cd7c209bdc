"""`wm bench`: what is quick here, each thing beside its peer."""

from __future__ import annotations

import argparse
from pathlib import Path

from worldmodel import bench
from worldmodel.tools.terminal import print_json, print_table, reporter

HELP = "time kernels, each beside its peers, on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sections", metavar="SECTION", nargs="*", help=f"of {', '.join(bench.SECTIONS)} (default: all)")
    parser.add_argument("--rounds", metavar="N", type=int, default=11, help="timed rounds, in alternating order (default: %(default)s)")
    parser.add_argument("--log", metavar="PATH", type=Path, help="a store or raw log whose first two sweeps stand in for the synthetic ones")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from sensors.errors import UsageError

    unknown = [name for name in args.sections if name not in bench.SECTIONS]
    if unknown or args.rounds < 1:
        raise UsageError(
            f"section {unknown[0]!r} is not one of {', '.join(bench.SECTIONS)}" if unknown else f"--rounds {args.rounds}: give 1 or more"
        )
    chosen = {name: section for name, section in bench.SECTIONS.items() if name in (args.sections or bench.SECTIONS)}
    rows = [row for name, section in chosen.items() for row in section(args.rounds, args.log, reporter(name))]
    where = bench.machine()
    if args.json:
        print_json("bench", machine=where, rows=[asdict(row) for row in rows])
    else:
        number = lambda value: "" if value is None else f"{value:.2f}"  # noqa: E731
        cells = [
            (row.name, row.data, row.peer, number(row.ours_ms), number(row.peer_ms), "" if row.ratio is None else f"{row.ratio:.2f}x",
             "" if row.ratio is None else f"{row.ratio_low:.2f}-{row.ratio_high:.2f}", row.answers) for row in rows
        ]  # fmt: skip
        columns = ("", "data", "peer", "ms", "peer ms", "peer/ours", "quartiles", "answers")
        print_table(f"process time, median of {args.rounds} rounds in alternating order, one thread", columns, cells)
        print(", ".join(f"{key} {value}" for key, value in where.items()))
    return 1 if any(row.answers.startswith("DIFFERENT") for row in rows) else 0
