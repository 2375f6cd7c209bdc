"""`wm evaluate`: a trained model and every baseline on the same rays, as tables or JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

HELP = "tables of a model and the baselines: how far off, how sure, on what"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folder", metavar="RUN", nargs="?", default="none", help="a run folder of `wm pretrain` (none or left out: only baselines)"
    )
    parser.add_argument("--data", action="extend", nargs="+", required=True, metavar="D", help="stores, or YAML files of parts of stores")
    parser.add_argument("--protocol", metavar="NAME", default="native", help="native: 0.2 .. 1.0 s; native3: 0.6 .. 3.0 s (default: %(default)s)")
    parser.add_argument("--methods", metavar="A,B", help="only these baselines and arms of the model, separated by commas")
    parser.add_argument("--baselines-only", action="store_true", help="leave the model out; the run still lends its scales for the baselines' NLL")
    parser.add_argument("--hidden-sector", action="store_true", help="also: a sector of 60 degrees withheld from all past sweeps")
    parser.add_argument("--max-clips", type=int, metavar="N", help="so many clips, spread evenly over the data (default: all)")
    parser.add_argument("--all-rays", action="store_true", help="every return in place of 16384 a sweep")
    parser.add_argument("--per-log", action="store_true", help="a block for every log too (--json always has them)")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of the draw of rays and of hidden sectors (default: %(default)s)")
    parser.add_argument("--checkpoint", metavar="NAME", default="best", help="best, latest or a checkpoint's name (default: %(default)s)")
    parser.add_argument("--device", metavar="DEV", default="cpu", help="cpu, cuda, cuda:N or auto (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sensors.data import open_data
    from sensors.errors import UsageError, one_line
    from sensors.rays import RAYS_PER_SWEEP
    from worldmodel.tools.terminal import print_json, reporter

    if args.max_clips is not None and args.max_clips < 1:
        raise UsageError(f"--max-clips {args.max_clips}: give a number above 0, or leave it out for all")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: give 0 or more")
    from worldmodel.evaluate import PROTOCOLS, evaluate

    if args.protocol not in PROTOCOLS:
        raise UsageError(f"--protocol {one_line(args.protocol)}: not one of {', '.join(PROTOCOLS)}")
    methods = None if args.methods is None else [name.strip() for name in args.methods.split(",") if name.strip()]
    if methods == []:
        raise UsageError("--methods: names none; give some, separated by commas, or leave it out for all")
    folder = None if args.run_folder == "none" else Path(args.run_folder)
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{one_line(folder)}: no such run folder; make one with `wm pretrain`, or give none for the baselines alone")
    parts = [part for path in args.data for part in open_data(path)]
    model, scales = None, None
    if folder is not None:
        from worldmodel import load

        model = load(folder, args.checkpoint, args.device)
        scales = model.point_scales
    table = evaluate(
        parts,
        None if args.baselines_only else model,
        protocol=args.protocol,
        all_rays=args.all_rays,
        max_clips=args.max_clips,
        methods=methods,
        hidden_sector=args.hidden_sector,
        seed=args.seed,
        scales=scales,
        report=reporter("evaluate"),
    )
    if args.json:
        print_json("evaluate", protocol=args.protocol, run=None if folder is None else str(folder), checkpoint=model.checkpoint if model else None,
                   data=[str(path) for path in args.data], logs=table.logs, clips=table.clips, seconds=table.seconds, poses=list(table.poses),
                   unreadable_clips=table.unreadable, rows=[row.as_json() for row in table])  # fmt: skip
        return 0
    for log in [None, *(dict.fromkeys(row.log for row in table if row.log is not None) if args.per_log else ())]:
        _print_block([row for row in table if row.log == log], "all logs" if log is None else one_line(log))
    rays = "all rays" if args.all_rays else f"{RAYS_PER_SWEEP} rays a sweep"
    left_out = f"; {table.unreadable} clips left out: unreadable, or a sweep without returns" if table.unreadable else ""
    print(f"Logs: {table.logs}; clips: {table.clips}, of {table.seconds:.0f} s of recording; poses: {', '.join(table.poses)}; {rays}{left_out}.\n"
          f"That a return lies on a ray at 2..56 m is given, the true future poses too; its range is asked. Protocol {args.protocol}; metres, "
          "Chamfer in m2; a ray without an answer counts as the farther bound.")  # fmt: skip
    return 0


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _print_block(rows: Sequence[Any], title: str) -> None:
    from worldmodel.tools.terminal import print_table

    every = [row for row in rows if row.subset == "all"]
    methods = list(dict.fromkeys(row.method for row in every))
    at = {(row.method, row.subset, row.horizon_s): row for row in rows}
    seconds = sorted({row.horizon_s for row in every if row.horizon_s is not None})
    shown = [*dict.fromkeys((seconds[0], seconds[len(seconds) // 2], seconds[-1])), None] if seconds else []
    lines = []
    for method in methods:
        line = [method]
        for h in shown:
            r = at[method, "all", h]
            line.append(" / ".join((_number(r.l1_mean), _number(r.l1_median), _number(r.within_02, 2), _number(r.chamfer, 2))))
        lines.append([*line, f"{at[method, 'all', None].missing / at[method, 'all', None].rays:.1%}"])
    columns = ["method", *("mean" if h is None else f"{h:g} s" for h in shown), "missing"]
    print_table(f"{title}: L1 / median / share within 0.2 m / Chamfer of all rays", columns, lines)
    print()
    subsets = list(dict.fromkeys(row.subset for row in rows))
    lines = [["share of rays", *(_share(at, methods[0], s) for s in subsets)]]
    for method in methods:
        found = [at.get((method, subset, None)) for subset in subsets]
        lines.append([method, *("-" if r is None else f"{_number(r.l1_mean, 2)} / {_number(r.l1_median)}" for r in found)])
    print_table(f"{title}: L1 / median by subset, mean of the horizons", ["method", *subsets], lines)
    print()
    gained = {(row.subset, row.horizon_s): row for row in rows if row.method == methods[0] and row.l1_over_evidence_only is not None}
    if gained:
        lines = [[subset, *(_with_interval(gained.get((subset, h))) for h in shown)] for subset in subsets]
        print_table(f"{title}: L1 of {methods[0]} over that of evidence_only, and 95 % of such draws of clips", ["subset", *columns[1:-1]], lines)
        print()
    probable = [at[method, "all", None] for method in methods if at[method, "all", None].nll is not None]
    if probable:
        lines = [[r.method, *(_number(v) for v in (r.nll, r.crps, r.ece, r.coverage80, r.width80))] for r in probable]
        print_table(f"{title}: how sure, mean of the horizons", ["method", "NLL", "CRPS", "ECE", "coverage of 80 %", "its width"], lines)
        print()


def _with_interval(row: Any) -> str:
    if row is None:
        return "-"
    low, high = row.intervals.get("l1_over_evidence_only", (None, None))
    return f"{_number(row.l1_over_evidence_only)}" + (f" ({low:.3f} .. {high:.3f})" if low is not None else "")


def _share(at: dict[Any, Any], method: str, subset: str) -> str:
    row, everything = at.get((method, subset, None)), at[method, "all", None]
    return "-" if row is None or subset == "hidden" else f"{row.rays / everything.rays:.1%}"
