"""`wm finetune`: does a pretrained encoder pay for a task with labels."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "train a labelled task from a run's encoder, beside scratch and frozen encoders"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", required=True, dest="source", metavar="RUN", help="a run folder of `wm pretrain`, or an export of `wm export --to torch`"
    )
    parser.add_argument(
        "--data",
        required=True,
        action="extend",
        nargs="+",
        metavar="D",
        help="stores, or YAML files of parts of stores, with labelled logs to train on",
    )
    parser.add_argument(
        "--test", action="extend", nargs="+", metavar="D", default=None, help="the same to test on (default: a quarter of the logs of --data)"
    )
    parser.add_argument(
        "--task", metavar="NAME", default="bev_segmentation", help="what to learn: detection, or bev_segmentation (default), vehicles seen from above"
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        default=None,
        help="of scratch, pretrained, pretrained_frozen, random_frozen (default: all)",
    )
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="how many seeds (default: %(default)s)")
    parser.add_argument(
        "--fractions",
        metavar="F",
        type=float,
        nargs="+",
        default=[1.0],
        help="shares of the training logs, e.g. 0.02 1.0 (default: 1.0)",
    )
    parser.add_argument(
        "--steps", metavar="N", type=int, default=None, help="at most so many steps an arm (default: until it stops improving, at most 3000)"
    )
    parser.add_argument("--device", metavar="DEV", default="auto", help="cpu, cuda, cuda:N or auto (default: %(default)s)")
    parser.add_argument("--threads", metavar="N", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument(
        "--results",
        metavar="DIR",
        default=None,
        help="write what each trained detector finds on the test data, as nuScenes, KITTI and SemanticKITTI have it, into a new folder",
    )
    parser.add_argument(
        "--tables",
        metavar="DIR",
        default=None,
        help="the nuScenes folder that the test logs come from: results are written for its samples, and scored by nuScenes' development kit",
    )
    parser.add_argument("-o", "--output", metavar="FILE", default=None, help="write every result with its curve, as JSON, after every trial")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    import dataclasses
    from pathlib import Path

    from sensors.data import open_data
    from sensors.errors import UsageError
    from sensors.files import check_output, write_json
    from worldmodel import finetune, validation
    from worldmodel.tools.terminal import print_json, reporter

    if args.output:
        check_output(Path(args.output), overwrite=True)
    train = [part for path in args.data for part in open_data(path)]
    if args.test:
        test = [part for path in args.test for part in open_data(path)]
    else:
        labelled = sorted({part.log.id for part in train if part.log.open_labels() is not None})
        if not labelled:
            raise UsageError(
                "--data holds no log with labels: `open_labels` of their adapter gave none; without any there is nothing to fine-tune on"
            )
        if len(labelled) < 4:
            raise UsageError(f"--data holds {len(labelled)} logs with labels: too few to set some apart; give --test")
        out = set(labelled[3::4])
        train, test = [p for p in train if p.log.id not in out], [p for p in train if p.log.id in out]
    plan = finetune.Plan(threads=args.threads, device=validation.device_of(args.device))
    if args.steps is not None:
        plan = dataclasses.replace(plan, most_steps=args.steps, every=max(1, min(40, args.steps // 4)))
    finished, scores = _results(args, test, plan.every_s)
    done: list[Any] = []

    def kept(trial: Any, result: Any) -> None:
        finished(trial, result)
        done.append(result)
        if args.output:  # after every trial: hours of work outlive what stops the next one
            write_json(Path(args.output), {"rows": finetune.summary(done), "results": finetune.as_json(done), "devkit": scores})

    results = finetune.finetune(Path(args.source), train, test, task_name=args.task, arms=args.arms or finetune.ARMS, seeds=range(args.seeds),
                                fractions=args.fractions, plan=plan, report=reporter("trial"), finished=kept)  # fmt: skip
    rows = finetune.summary(results)
    if args.json:
        print_json("finetune", task=args.task, run=args.source, rows=rows, devkit=scores)
    else:
        _show(args.task, len({p.log.id for p in test}), rows, scores)
    return 0


def _results(args: argparse.Namespace, test: list[Any], every_s: float) -> tuple[Any, list[dict[str, Any]]]:
    """What is done with each finished trial, and the list that the devkit's scores will stand in."""
    from pathlib import Path

    from sensors.adapters.nuscenes import keyframes, tables_of
    from sensors.errors import UsageError, one_line
    from worldmodel import results
    from worldmodel.devkit import Devkit

    scores: list[dict[str, Any]] = []
    if args.results is None:
        if args.tables is not None:
            raise UsageError("--tables: what is scored are the files of --results; give that too")
        return lambda trial, result: None, scores
    folder, logs = Path(args.results), [part.log.id for part in test]
    if twice := [log for i, log in enumerate(logs) if log in logs[:i]]:
        raise UsageError(f"--results: log {one_line(twice[0])} is twice in the test data, and its files can be written once")
    tables, devkit = {}, None
    if args.tables is not None:
        version = tables_of(Path(args.tables), {})
        tables = keyframes(version, {part.log.id for part in test})
        if not tables:
            raise UsageError(f"--tables {args.tables}: has no scene of the test logs (nuscenes/NAME); give the folder they were ingested from")
        devkit = Devkit(version)
    results.check(folder, args.task, test, tables)

    def finished(trial: Any, result: Any) -> None:
        about = {"arm": result.arm, "fraction": result.fraction, "seed": result.seed, "task": args.task, "from": Path(args.source).name}
        own = folder / f"{result.arm}-{result.fraction:g}-{result.seed}"
        results.write(own, trial, test, tables, every_s, about)
        if devkit is not None:
            scenes = {log.removeprefix("nuscenes/") for log in tables}
            scores.append({**about, "results": str(own), **devkit.score(own / "nuscenes.json", scenes)})

    return finished, scores


def _show(task: str, logs: int, rows: list[dict[str, Any]], scores: list[dict[str, Any]]) -> None:
    import importlib

    from worldmodel.tools.terminal import print_table

    name = importlib.import_module(f"worldmodel.downstream.{task}").SCORE
    number = lambda value: "" if value is None else f"{value:+.3f}"  # noqa: E731
    spread = lambda value: "" if value is None else f"{value:.3f}"  # noqa: E731
    print_table(
        f"{task}: {name} on {logs} test logs, mean over seeds",
        ["labels", "arm", "logs", "frames", name, "std", "minus scratch", "std", "steps"],
        [(f"{100 * r['fraction']:g}%", r["arm"], r["logs"], r["frames"], spread(r["score_mean"]), spread(r["score_std"]),
          number(r["minus_scratch"]), spread(r["minus_scratch_std"]), f"{r['steps_mean']:.0f}") for r in rows],
    )  # fmt: skip
    if scores:
        classes = sorted({c for row in scores for c in row["classes"]})
        print_table(
            "nuScenes development kit: mAP and NDS over its ten classes; AP of those that the test logs hold",
            ["arm", "labels", "seed", "mAP", "NDS", *classes],
            [(r["arm"], f"{100 * r['fraction']:g}%", r["seed"], f"{r['mAP']:.3f}", f"{r['NDS']:.3f}", *(f"{r['AP'][c]:.3f}" for c in classes))
             for r in scores],
        )  # fmt: skip
