"""`wm demo`: everything once, in ten minutes on two cores."""

from __future__ import annotations

import argparse

HELP = "simulate, learn, forecast, measure, probe and export in ten minutes; ends with report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="DIR", default="demo", help="the folder to make (default: %(default)s)")
    parser.add_argument("--logs", action="extend", nargs="+", metavar="LOG", default=[], help="recordings of your own to train and test on as well")
    parser.add_argument("--config", metavar="NAME", default="demo", help="configuration to train with, a name or a YAML file (default: %(default)s)")
    parser.add_argument(
        "--streets", metavar="N", type=int, default=None, help="try it on so many simulated streets, with less of everything else too"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    import dataclasses
    import os
    import sys
    from pathlib import Path

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from worldmodel.demo import Size, demo
    from worldmodel.tools.terminal import print_json, reporter

    size = dataclasses.replace(
        Size(), config=args.config, **({} if args.streets is None else {"train_logs": args.streets, "test_logs": 2, "clips": 2})
    )
    reporters = {}

    def report(stage: str, done: int, total: int, text: str) -> None:
        if total == 1:
            print(f"{stage}: {text}", file=sys.stderr, flush=True)
        else:
            reporters.setdefault(stage, reporter(stage))(done, total, text)

    output = Path(args.output)
    result = demo(output, [Path(p) for p in args.logs], size, report)
    if args.json:
        print_json("demo", folder=str(output), seconds=result["seconds"], export=result["export"])
    else:
        print(f"{output / 'report.html'}: open it in a browser ({sum(result['seconds'].values()):.0f} s in all)")
    return 0
