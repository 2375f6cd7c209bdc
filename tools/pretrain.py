"""`wm pretrain`: a run folder with weights, curves and a table, from unlabelled data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "learn from the clips of a store, without labels, into a run folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", action="extend", nargs="+", metavar="D", help="stores, or YAML files of parts of stores (with --resume default: those of the run)"
    )
    parser.add_argument("--config", metavar="NAME", default="default", help="a configuration by name, or a YAML file (default: %(default)s)")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override single keys, e.g. train.steps=400 train.seconds=1200",
    )
    parser.add_argument("--encoder", default=None, metavar="PKG.MOD:BUILD", help="an encoder of your own: a function that builds it")
    parser.add_argument("-o", "--output", metavar="RUN", default=None, help="the run folder to make (default: runs/NAME)")
    parser.add_argument("--resume", default=None, metavar="RUN", help="go on with a run from its newest whole checkpoint")
    parser.add_argument("--device", metavar="DEV", default="auto", help="cpu, cuda, cuda:N or auto (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="stop where the health alarm sounds or a checkpoint is damaged")
    parser.add_argument(
        "--probe", action="extend", nargs="+", metavar="D", default=[], help="labelled stores: probe the frozen latent on them after the training"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    import dataclasses
    import os

    from sensors.errors import Interrupted, UsageError

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would take the core that prepares the next batch
    import torch

    from sensors.data import open_data
    from sensors.files import lock, read_json, remove, write_json
    from worldmodel import pretrain, rundir, validation
    from worldmodel.config import load_config
    from worldmodel.tools.terminal import print_json, print_table, reporter

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = validation.device_of(args.device)
    if world > 1:
        # its functions take the group of all ranks as a default: imported later, they would hold the group, and its threads, to the end of
        # the process, where a thread that outlives the interpreter aborts it
        import torch.distributed.nn

        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what names no GPU, a barrier or a synchronisation, means this one
    if bool(args.resume) and (args.output or args.config != "default" or args.overrides or args.encoder):
        raise UsageError("--resume goes on with the run's own configuration; leave out --output, --config, --set and --encoder")
    folder = Path(args.resume or args.output or f"runs/{Path(args.config).stem}")
    data = args.data
    if args.resume:
        config = rundir.read_config(folder)
        data = data or read_json(folder / "data.json")["data"]
    else:
        if not data:
            raise UsageError("--data is needed: a store made by `wm ingest`, or a YAML file of parts")
        config = load_config(args.config, args.overrides)
        if args.encoder:
            config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, build=args.encoder))
        autocast, channels_last = validation.probe_bf16(config, device)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, autocast=autocast, channels_last=channels_last))
    parts = [part for path in data for part in open_data(path)]
    probed_on = [part for path in args.probe for part in open_data(path)]
    if args.resume:
        rundir.check_same_data(folder, parts)
    elif rank == 0:
        rundir.create(folder, config, parts)
        write_json(folder / "data.json", {"data": [str(Path(d).resolve()) for d in data]})
    if world > 1:
        torch.distributed.barrier()
        config = rundir.read_config(folder)
    say = reporter("step" if rank == 0 else f"process {rank}")
    report = say if rank == 0 else lambda done, total, text: say(done, total, text) if not total else None
    if rank == 0:
        with lock(folder / ".lock", f"run {folder}"):
            try:
                pretrain.train(parts, config, folder, device=device, resume=bool(args.resume), strict=args.strict, report=report)
            except Interrupted:
                raise
            except Exception:
                if not args.resume and not (folder / "checkpoints").exists():  # it never began: the corrected command may have the folder
                    remove(folder / "config.yaml")
                raise
            pretrain.fit_point_scales(parts, folder)
    else:
        pretrain.train(parts, config, folder, device=device, resume=bool(args.resume), strict=args.strict, report=report)
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank:
        return 0
    names = ("val/nll_model", "val/nll_evidence_only", "val/nll_model@no_evidence", "val/median_model", "health/rank", "health/skill")
    curves = {name: rundir.curve(folder, name)[1] for name in names}
    last = {name: values[-1] for name, values in curves.items() if values}
    probed = _probed(folder, probed_on, str(device))
    if args.json:
        print_json("pretrain", run=str(folder), steps=config.train.steps, validation=last, probe=probed)
        return 0
    if last:
        print_table(f"{folder} (held-out clips)", ["measure", "value"], [(name, f"{value:.3f}") for name, value in last.items()])
    else:
        print(f"{folder}: nothing was held out, so nothing was validated; give more or longer logs")
    if probed:
        tasks = list(dict.fromkeys(row["task"] for row in probed))
        kinds = list(dict.fromkeys(row["features"] for row in probed))
        ap = {(row["features"], row["task"]): row["ap"] for row in probed}
        title = f"linear probe, average precision per cell ({probed[0]['clips']} clips of {probed[0]['logs']} logs)"
        shown = {key: "-" if value is None else f"{value:.3f}" for key, value in ap.items()}
        print_table(title, ["features", *tasks], [(kind, *(shown[kind, task] for task in tasks)) for kind in kinds])
    return 0


def _probed(folder: Path, parts: list[Any], device: str) -> list[dict[str, Any]]:
    """Rows of the probe on labelled logs, also written to probe.json; empty where none were given, or too few."""
    if not parts:
        return []
    import sys

    import worldmodel
    from sensors.files import write_json
    from worldmodel.probe import probe

    rows = probe(worldmodel.load(folder, device=device), parts)
    write_json(folder / "probe.json", rows)
    if not rows:
        print("nothing was probed: --probe wants two logs at least, with labels all round; --resume RUN --probe D asks again", file=sys.stderr)
    return rows
