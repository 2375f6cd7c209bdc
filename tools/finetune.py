"""`wm finetune`: does a pretrained encoder pay for a task with labels."""

from __future__ import annotations

import argparse

HELP = "train a labelled task from a run's encoder, beside scratch and frozen encoders"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", required=True, dest="source", metavar="RUN", help="a run folder of `wm pretrain`")
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="D", help="stores, or YAML files of parts of stores, with labelled logs to train on"
    )
    parser.add_argument("--test", nargs="+", metavar="D", default=None, help="the same to test on (default: a quarter of the logs of --data)")
    parser.add_argument("--task", metavar="NAME", default="bev_segmentation", help="what to learn (default: %(default)s: vehicles seen from above)")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", default=None, help="of scratch, pretrained, pretrained_frozen, random_frozen (default: all)"
    )
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="how many seeds (default: %(default)s)")
    parser.add_argument(
        "--fractions", metavar="F", type=float, nargs="+", default=[1.0], help="shares of the training logs, e.g. 0.02 1.0 (default: 1.0)"
    )
    parser.add_argument(
        "--steps", metavar="N", type=int, default=None, help="at most so many steps an arm (default: until it stops improving, at most 900)"
    )
    parser.add_argument("--threads", metavar="N", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("-o", "--output", metavar="FILE", default=None, help="write every result with its curve, as JSON")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    import dataclasses
    from pathlib import Path

    from sensors.data import open_data
    from sensors.errors import UsageError
    from sensors.files import write_json
    from worldmodel import finetune
    from worldmodel.tools.terminal import print_json, print_table, reporter

    train = [part for path in args.data for part in open_data(path)]
    if args.test:
        test = [part for path in args.test for part in open_data(path)]
    else:
        labelled = sorted({part.log.id for part in train})
        if len(labelled) < 4:
            raise UsageError(f"--data holds {len(labelled)} logs: too few to set some apart; give --test")
        out = set(labelled[3::4])
        train, test = [p for p in train if p.log.id not in out], [p for p in train if p.log.id in out]
    plan = finetune.Plan(threads=args.threads)
    if args.steps is not None:
        plan = dataclasses.replace(plan, most_steps=args.steps, every=max(1, min(40, args.steps // 4)))
    results = finetune.finetune(Path(args.source), train, test, task_name=args.task, arms=args.arms or finetune.ARMS, seeds=range(args.seeds),
                                fractions=args.fractions, plan=plan, report=reporter("trial"))  # fmt: skip
    rows = finetune.summary(results)
    if args.output:
        write_json(Path(args.output), {"rows": rows, "results": finetune.as_json(results)})
    if args.json:
        print_json("finetune", task=args.task, run=args.source, rows=rows)
        return 0
    number = lambda value: "" if value is None else f"{value:+.3f}"  # noqa: E731
    print_table(
        f"{args.task}: IoU on {len({p.log.id for p in test})} test logs, mean over seeds",
        ["labels", "arm", "logs", "frames", "IoU", "std", "minus scratch", "std", "steps"],
        [(f"{r['fraction']:.0%}", r["arm"], r["logs"], r["frames"], f"{r['iou_mean']:.3f}", "" if r["iou_std"] is None else f"{r['iou_std']:.3f}",
          number(r["minus_scratch"]), "" if r["minus_scratch_std"] is None else f"{r['minus_scratch_std']:.3f}",
          f"{r['steps_mean']:.0f}") for r in rows],
    )  # fmt: skip
    return 0
