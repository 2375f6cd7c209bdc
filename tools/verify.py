"""`wm verify`: does an export hold what it says, and does it compute what our encoder computes."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "read an export as its target would and compare what comes out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a folder made by `wm export`")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def show(folder: str, report: dict[str, Any]) -> None:
    print(f"{folder}: {report['loaded']} of {report['tensors']} tensors, largest difference {report['difference']:.1e}, licence {report['licence']}")
    for kind in ("missing", "unexpected", "mismatched"):
        for name in report[kind][:10]:
            print(f"  {kind}: {name}")
        if len(report[kind]) > 10:
            print(f"  {kind}: and {len(report[kind]) - 10} more")
    print("everything arrived" if report["passed"] else "NOT everything arrived: do not train from this")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from worldmodel.export.verify import verify
    from worldmodel.tools.terminal import print_json

    report = verify(Path(args.folder))
    if args.json:
        print_json("verify", folder=args.folder, **report)
    else:
        show(args.folder, report)
    return 0 if report["passed"] else 1
