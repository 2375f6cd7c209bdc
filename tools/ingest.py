"""`wm ingest SRC... STORE`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "turn raw logs into a store: clean, synchronized, resumable"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SRC", type=Path, help="folders or files with recordings")
    parser.add_argument("store", metavar="STORE", type=Path, help="the store; made if it is not there")
    parser.add_argument("--dataset", metavar="NAME", help="which adapter reads the sources (guessed where only one can)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of that adapter; may be repeated")
    parser.add_argument(
        "--poses",
        choices=("log", "odometry", "refined"),
        default="log",
        help="log: its own, odometry where it has none (default); odometry: from its sweeps; refined: registration that starts from its own",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="logs read at the same time (default: %(default)s)")
    parser.add_argument(
        "--shard-index", type=int, default=0, metavar="I", help="take this one of --num-shards shares of the logs, from 0 on (default: %(default)s)"
    )
    parser.add_argument(
        "--num-shards", type=int, default=1, metavar="N", help="shares that the logs are divided into, for several machines (default: %(default)s)"
    )
    parser.add_argument("--reference", action="store_true", help="refer to the original files instead of copying them")
    parser.add_argument("--lossless", action="store_true", help="keep coordinates to the bit (default: within 2.1 mm)")
    parser.add_argument("--overwrite", action="store_true", help="store again what is stored already, as the next generation")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from sensors.adapters.base import options_of
    from sensors.errors import one_line
    from sensors.ingest import ingest
    from worldmodel.tools.terminal import print_json, print_references, reporter

    found = ingest(
        args.sources,
        args.store,
        dataset=args.dataset,
        options=options_of(args.option),
        poses=args.poses,
        workers=args.workers,
        shard_index=args.shard_index,
        num_shards=args.num_shards,
        reference=args.reference,
        overwrite=args.overwrite,
        lossless=args.lossless,
        debug=args.debug,
        report=reporter("logs"),
    )
    if args.json:
        fields = {key: value for key, value in vars(found).items() if key not in ("reasons", "logs")}
        print_json("ingest", store=str(args.store), filtered=found.filtered, **fields, reasons=[vars(row) for row in found.reasons], logs=found.logs)
        return found.exit_code
    filtered = f"{found.filtered} filtered ({found.already} stored before, {found.other_shards} of other shards)"
    print(f"{found.seen} logs seen = {found.stored} stored + {found.quarantined} quarantined + {filtered}")
    if found.stored:
        seen = found.items + found.items_quarantined
        print(f"{seen} sweeps and images seen = {found.items} stored + {found.items_quarantined} quarantined; {found.bytes / 1e6:.1f} MB")
    if found.labels_quarantined:
        print(f"{found.labels_quarantined} labels quarantined")
    print_references(found.references)
    for row in found.reasons[:20]:
        where = row.log if row.sensor is None else f"{row.log}, {row.sensor}" + (f" at {row.stamp_ns}" if row.stamp_ns is not None else "")
        print(f"quarantined: {one_line(where, 160)}: {one_line(row.reason)}")
    if len(found.reasons) > 20:
        print(f"and {len(found.reasons) - 20} more; --json prints all")
    return found.exit_code
