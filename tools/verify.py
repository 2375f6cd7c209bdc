"""`wm verify`: does an export hold what it says, and does it compute what our encoder computes; and what of it would arrive in a model of yours."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

HELP = "read an export as its target would and compare what comes out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a folder made by `wm export`")
    parser.add_argument(
        "--against",
        metavar="MODEL",
        default=None,
        help="what would load into your own model: a checkpoint of it (.pth, .safetensors), or module:function that builds it, which is imported",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def show(folder: str, report: dict[str, Any]) -> None:
    from sensors.errors import one_line

    arrived = f"{report['loaded']} of {report['tensors']} {report.get('unit', 'tensors')}"
    absolute = f" ({report['absolute']:.1e} in a map up to {report['largest']:.3g})" if report.get("largest", 0.0) > 1 else ""
    print(f"{folder}: {arrived}, largest difference {report['difference']:.1e}{absolute}, licence {report['licence']}")
    if real := report.get("real"):
        print(f"real {real['package']} {one_line(real['version'], 40)}: {real['loaded']} of {real['tensors']} tensors, "
              f"largest difference {real['difference']:.1e}")  # fmt: skip
    for kind in ("missing", "unexpected", "mismatched", "reasons", "notes"):
        _list(kind.removesuffix("s"), report.get(kind, ()))
    print("everything arrived" if report["passed"] else "NOT everything arrived: do not train from this")


def show_against(folder: str, report: dict[str, Any]) -> None:
    from sensors.errors import one_line

    print(f"{folder} into {one_line(report['theirs'])}: {report['loaded']} of {report['tensors']} tensors would arrive, "
          f"{report['untouched']} of other parts stay as they are")  # fmt: skip
    for kind in ("missing", "unexpected", "mismatched"):
        _list(kind, report[kind])
    for kind in ("traps", "hints", "notes"):
        _list(kind.removesuffix("s"), report[kind])
    print("everything would arrive" if report["passed"] else "NOT everything would arrive as it is meant: do not train from this")


def _list(kind: str, lines: Sequence[str]) -> None:
    from sensors.errors import one_line

    for line in lines[:10]:
        print(f"  {kind}: {one_line(line)}")
    if len(lines) > 10:
        print(f"  {kind}: and {len(lines) - 10} more")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from worldmodel.export.verify import verify
    from worldmodel.handover.against import against
    from worldmodel.tools.terminal import print_json

    report = against(Path(args.folder), args.against) if args.against else verify(Path(args.folder))
    if args.json:
        print_json("verify", folder=args.folder, **report)
    elif args.against:
        show_against(args.folder, report)
    else:
        show(args.folder, report)
    return 0 if report["passed"] else 1
