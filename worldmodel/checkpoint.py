"""Checkpoints: `checkpoints/step_000300/` holds the weights, the optimizers and what else a resume needs, as safetensors and JSON, no pickle;
a manifest with the sha256 of each file is written last. `latest` and `best` are text files that name one."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from sensors.errors import UsageError, WmError, one_line
from sensors.files import BadFile, check_folder, commit_folder, parse_json, read_whole, write_file
from worldmodel.optimizer import Muon

KEEP = 3
LIMIT_BYTES = 1 << 33
_NAME = re.compile(r"step_[0-9]{6,9}")


@dataclass(frozen=True)
class Checkpoint:
    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """The optimizers' tensors by ``parameter/field``."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    out = {}
    for parameter, fields in (item for optimizer in optimizers for item in optimizer.state.items()):
        for field, value in fields.items():
            out[f"{name_of[id(parameter)]}/{field}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return out


def restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, tensors: dict[str, Tensor]) -> None:
    by_name = dict(model.named_parameters())
    of = {parameter: optimizer for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        if name not in by_name:
            raise WmError(f"checkpoint: the optimizer knows {one_line(name)}, the model does not; was the configuration changed?")
        parameter = by_name[name]
        if (field == "momentum") != isinstance(of[parameter], Muon):
            raise WmError(f"checkpoint: the optimizer of {one_line(name)} is of another version of this program; train the run again")
        of[parameter].state[parameter][field] = value.to("cpu" if field == "step" else parameter.device)


def save(run: Path, step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] | None, state: dict[str, Any]) -> Path:
    """Write `checkpoints/step_STEP`, point `latest` at it (and `best` where ``state["best"]`` says so), and drop old ones."""
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}  # shared ones are stored twice
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise WmError(f"checkpoint at step {step}: {name} holds values that are not finite; lower train.lr and resume from the one before")
    files = {"model.safetensors": save_tensors(weights, metadata={"format": "pt"}), "state.json": _json({**state, "step": step})}
    if optimizers is not None:
        files["optimizer.safetensors"] = save_tensors(optimizer_tensors(optimizers, model))
    folder = run / "checkpoints"
    final = folder / f"step_{step:06d}"
    if final.exists():
        try:
            check_folder(final)
        except WmError:
            shutil.rmtree(final)
    if not final.exists():
        commit_folder(final, files)
    write_file(folder / "latest", final.name.encode())
    if state.get("best"):
        write_file(folder / "best", final.name.encode())
    _drop_old(folder)
    return final


def _json(state: dict[str, Any]) -> bytes:
    import json

    return json.dumps(state, allow_nan=False, sort_keys=True).encode()


def _named(folder: Path, pointer: str) -> str | None:
    try:
        name = read_whole(folder / pointer, 64).decode("ascii", "replace").strip()
    except WmError:
        return None
    if not _NAME.fullmatch(name):
        raise BadFile(f"{one_line(folder / pointer)}: names {one_line(repr(name))}, not a checkpoint; delete it and resume")
    return name


def _in_order(folder: Path) -> list[str]:
    """The names of checkpoints, oldest first: by number, since from a million steps on they are longer."""
    return sorted((p.name for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=lambda name: int(name.partition("_")[2]))


def _drop_old(folder: Path) -> None:
    keep = {_named(folder, "best"), _named(folder, "latest")}
    steps = _in_order(folder)
    for name in steps[:-KEEP]:
        if name not in keep:
            shutil.rmtree(folder / name)


def load(run: Path, which: str = "best") -> Checkpoint:
    """The checkpoint that `best` (falling back to `latest`) or `latest` names, or a step's own name; every digest is checked. UsageError for
    another word, and for a step that is not there."""
    folder = run / "checkpoints"
    name = _named(folder, which) if which in ("best", "latest") else which
    name = name or _named(folder, "latest")
    if name is None:
        raise WmError(f"{one_line(run)}: no checkpoint yet; is it a run folder, and did `wm pretrain` get far enough?")
    if which == name and not (_NAME.fullmatch(which) and (folder / which).is_dir()):
        there = ", ".join(_in_order(folder)) if folder.is_dir() else "none"
        raise UsageError(f"{one_line(run)}: checkpoint {one_line(which, 40)!r} is not best, latest, or one of those kept ({there})")
    return read(folder / name)


def mend_best(run: Path) -> float:
    """The loss of the newest whole checkpoint that was the best when it was saved, at which `best` is pointed: a stop between the two, or damage, may
    have left it at another. Infinity, and no `best`, where there is none."""
    folder = run / "checkpoints"
    for name in reversed(_in_order(folder)):
        try:
            check_folder(folder / name)
            state = parse_json(read_whole(folder / name / "state.json", 1 << 26), f"{name}/state.json")
        except WmError:
            continue
        if state.get("best"):
            write_file(folder / "best", name.encode())
            return float(state["best_loss"])
    (folder / "best").unlink(missing_ok=True)
    return math.inf


def latest_whole(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    folder = run / "checkpoints"
    bad: list[str] = []
    for name in reversed(_in_order(folder)) if folder.is_dir() else []:
        try:
            return read(folder / name), bad
        except WmError as error:
            bad.append(str(error))
    return None, bad


def fill(model: nn.Module, found: Checkpoint, run: Path) -> None:
    """Give the model the weights of a run's checkpoint; WmError where they are those of another model, as another version may have made it."""
    try:
        model.load_state_dict(found.weights)
    except RuntimeError as error:
        said = one_line(error, 160)
        raise WmError(
            f"{one_line(run)}: step {found.step} does not fit its config.yaml ({said}); where another version made it, train anew"
        ) from error


def read(folder: Path) -> Checkpoint:
    check_folder(folder)
    state = parse_json(read_whole(folder / "state.json", 1 << 26), f"{folder.name}/state.json")
    try:
        weights = load_tensors(read_whole(folder / "model.safetensors", LIMIT_BYTES))
        path = folder / "optimizer.safetensors"
        optimizer = load_tensors(read_whole(path, LIMIT_BYTES)) if path.exists() else {}
    except SafetensorError as error:
        raise BadFile(f"{one_line(folder)}: {one_line(error)}; resume falls back to the checkpoint before") from error
    return Checkpoint(int(state["step"]), weights, optimizer, state)
