"""`wm demo`: everything once, in ten minutes on two cores."""

from __future__ import annotations

import argparse

HELP = "simulate, learn, forecast, measure, probe and export in ten minutes; ends with report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", default="demo", help="the folder to make (default: demo)")
    parser.add_argument("--logs", nargs="+", default=[], help="recordings of your own to use as well")
    parser.add_argument("--config", default="demo", help="an overlay for the training (default: demo)")
    parser.add_argument("--streets", type=int, default=None, help="simulated logs to train on")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    import dataclasses
    import os
    from pathlib import Path

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from worldmodel.demo import Size, demo
    from worldmodel.tools.terminal import print_json, reporter

    size = dataclasses.replace(
        Size(), config=args.config, **({} if args.streets is None else {"train_logs": args.streets, "test_logs": 2, "clips": 2})
    )
    reporters = {}

    def report(stage: str, done: int, total: int, text: str) -> None:
        reporters.setdefault(stage, reporter(stage))(done, total, text)

    output = Path(args.output)
    result = demo(output, [Path(p) for p in args.logs], size, report)
    if args.json:
        print_json("demo", folder=str(output), seconds=result["seconds"], export=result["export"])
    else:
        print(f"{output / 'report.html'}: open it in a browser ({sum(result['seconds'].values()):.0f} s in all)")
    return 0
