"""`wm export`: the encoder of a run, for use elsewhere, verified as it leaves."""

from __future__ import annotations

import argparse

HELP = "hand the encoder of a run over to other code, with proof that all of it arrived"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder of `wm pretrain`")
    parser.add_argument("--to", metavar="TARGET", default="torch", help="what it is for (default: %(default)s)")
    parser.add_argument("-o", "--output", metavar="DIR", default=None, help="the folder to make (default: RUN/export-TARGET)")
    parser.add_argument(
        "--data",
        nargs="*",
        metavar="D",
        default=[],
        help="stores or YAML files to take the cloud from that the proof is made on (default: a made-up one)",
    )
    parser.add_argument(
        "--intensity",
        type=float,
        metavar="MAX",
        default=None,
        help="largest intensity that the target's loader gives, 1 or 255, to be folded into the weights (default: as its dataset has it)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    import importlib
    from pathlib import Path

    from sensors.data import open_data
    from worldmodel.export.verify import export
    from worldmodel.tools.terminal import print_json
    from worldmodel.tools.verify import show

    source = Path(args.run)
    folder = Path(args.output) if args.output else source / f"export-{args.to}"
    report = export(source, args.to, folder, [part for path in args.data for part in open_data(path)], intensity=args.intensity)
    if args.json:
        print_json("export", folder=str(folder), **report)
    else:
        show(str(folder), report)
        print(importlib.import_module(f"worldmodel.export.{args.to}").snippet(folder.resolve()))
    return 0 if report["passed"] else 1
