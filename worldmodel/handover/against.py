"""What of an export would arrive in somebody's own model, told before they try: by the names and shapes of their checkpoint, or, given the model
itself, also by what its modules are, since equal names and shapes can mean another computation."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from sensors.errors import UsageError, one_line
from sensors.files import check_folder, read_whole
from worldmodel.encoders import standalone
from worldmodel.encoders.contract import build_encoder
from worldmodel.handover import mmdet3d_modules, openpcdet_modules, own_folder
from worldmodel.handover.checkpoints import read_tensors

SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FRAMEWORKS = {
    "openpcdet": re.compile(r"(vfe\.pfn_layers|backbone_2d)\."),
    "mmdet3d": re.compile(r"(pts_)?(voxel_encoder\.pfn_layers|neck\.deblocks)\."),
}
_FIRST = "pfn_layers.0.linear.weight"


def against(folder: Path, theirs: str) -> dict[str, Any]:
    """Compare an export with `theirs`: a checkpoint file of the user's model, or `module:name` of a function that builds it (or of the model). The
    export of an encoder of the user's own is also loaded into what `module:build` gives, as in pretraining, and run on the stored cloud.

    Gives {"target", "theirs", "passed", "loaded", "tensors" (of the export), "missing" (theirs, in the same parts of the model, that keep their
    first values), "unexpected" (ours that they have no place for), "mismatched", "untouched" (how many tensors of other parts stay as they are),
    "traps" (would load and compute something else), "hints", "notes"}. passed: all of the export would arrive and nothing is a trap."""
    manifest = check_folder(folder)
    target = str(manifest.get("target"))
    ours = _weights(folder, manifest)
    own = own_folder.config_of(folder) if target == "torch" else None
    model = None if _is_file(theirs) else _built(theirs) if own is None else build_encoder(replace(own, build=theirs))
    state = read_tensors(Path(theirs)) if model is None else model.state_dict()
    state = _without_module(state)
    if target == "mmdet3d":
        ours = {name.removeprefix("module."): value for name, value in ours.items()}
    fits = {name for name, value in ours.items() if name in state and state[name].shape == value.shape}
    parts = {name.split(".")[0] for name in ours}
    missing = [name for name in state if name not in ours and name.split(".")[0] in parts]
    traps, notes = ([], ["of a checkpoint only names and shapes show; give your model as module:function to have its modules compared"])
    if model is not None and own is None:
        traps, notes = _traps(_modules(model), _modules(_reference(folder, manifest)), fits, manifest.get("input") or {})
    elif model is not None:
        traps, notes = own_folder.compared(folder, model, ours) if len(fits) == len(ours) else [], []
    hints = _hints(ours, state, target)
    return {
        "target": target, "theirs": theirs, "passed": len(fits) == len(ours) and not traps, "loaded": len(fits), "tensors": len(ours),
        "missing": missing, "unexpected": [name for name in ours if name not in state],
        "mismatched": [f"{name} {_shape(ours[name])}, theirs {_shape(state[name])}" for name in ours if name in state and name not in fits],
        "untouched": len(state) - len(fits) - len(missing) - sum(name in state and name not in fits for name in ours),
        "traps": traps, "hints": hints, "notes": notes,
    }  # fmt: skip


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "scalar"


def _weights(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    names = [row["path"] for row in manifest["files"] if row["path"].endswith(".pth") or row["path"] == "model.safetensors"]
    if len(names) != 1:
        raise UsageError(f"{one_line(folder)}: an export for {one_line(manifest.get('target'), 40)} holds no weights for another model to load")
    return read_tensors(folder / names[0])


def _is_file(theirs: str) -> bool:
    return Path(theirs).exists() or Path(theirs).suffix in SUFFIXES or ":" not in theirs


def _built(theirs: str) -> nn.Module:
    module, _, name = theirs.partition(":")
    try:
        made: Any = importlib.import_module(module)
        for part in name.split("."):
            made = getattr(made, part)
        if not isinstance(made, nn.Module):
            made = made()
    except Exception as error:  # it is the user's code, and whatever it raises is the answer
        raise UsageError(
            f"--against {one_line(theirs)}: {one_line(repr(error), 160)}; give module:function of no arguments, importable from here"
        ) from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"--against {one_line(theirs)}: gave a {type(made).__name__}, expected a torch.nn.Module")
    return made


def _without_module(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names without the `module.` that DistributedDataParallel puts before all of them."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if tensors and all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _reference(folder: Path, manifest: Mapping[str, Any]) -> nn.Module:
    """The modules that the export is made for, as its target would build them."""
    target = manifest["target"]
    if target == "openpcdet":
        name = min(manifest["models"])
        settings = openpcdet_modules.settings_of(yaml.safe_load(read_whole(folder / name, 1 << 20)), one_line(folder / name))
        return openpcdet_modules.Detector(settings)
    if target == "mmdet3d":
        base = mmdet3d_modules.BASES[manifest["base"]]
        child = mmdet3d_modules.read_config(read_whole(folder / "wm_mmdet3d.py", 1 << 20).decode("utf-8", "replace"))
        return mmdet3d_modules.Detector(mmdet3d_modules.merged(base.model, child.get("model", {})), base.prefix)
    return standalone.Encoder(json.loads(read_whole(folder / "config.json", 1 << 20)))


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    found = dict(model.named_modules())
    if set(found) <= {"", "module"} | {name for name in found if name.startswith("module.")} and "module" in found:
        found = {name.removeprefix("module").removeprefix("."): module for name, module in found.items() if name}
    return found


def _traps(
    theirs: Mapping[str, nn.Module], ours: Mapping[str, nn.Module], fits: set[str], trained_with: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Lines for what would load and compute something else, and for what would only train otherwise."""
    traps: list[str] = []
    eps: dict[tuple[float, float], list[str]] = {}
    momentum: dict[tuple[Any, Any], list[str]] = {}
    for name in sorted({fit.rpartition(".")[0] for fit in fits}):
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None:
            continue
        if isinstance(a, nn.Conv2d | nn.ConvTranspose2d) and isinstance(b, nn.Conv2d | nn.ConvTranspose2d):
            if isinstance(a, nn.ConvTranspose2d) is not isinstance(b, nn.ConvTranspose2d):
                traps.append(
                    f"{name}: {type(a).__name__} here, {type(b).__name__} in theirs: the kernel's first two axes are exchanged, and it would load"
                )
            elif a.stride != b.stride or a.dilation != b.dilation or a.groups != b.groups:
                traps.append(f"{name}: stride {a.stride} here, {b.stride} in theirs, under the same kernel")
        elif isinstance(a, NORMS) and isinstance(b, NORMS):
            if a.eps != b.eps:
                eps.setdefault((a.eps, b.eps), []).append(name)
            if a.momentum != b.momentum:
                momentum.setdefault((a.momentum, b.momentum), []).append(name)
    traps += [f"{_some(names)}: BatchNorm eps {a:g} here, {b:g} in theirs: the maps differ" for (a, b), names in eps.items()]
    notes = [f"{_some(names)}: BatchNorm momentum {a} here, {b} in theirs: fine-tuning moves the statistics at another rate"
             for (a, b), names in momentum.items()]  # fmt: skip
    for name in sorted({fit.split(".pfn_layers.")[0] for fit in fits if ".pfn_layers." in fit}):
        if name in theirs:
            traps += _vfe_traps(name, theirs[name], trained_with)
    return traps, notes


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _vfe_traps(name: str, module: nn.Module, trained_with: Mapping[str, Any]) -> list[str]:
    """What the settings of a voxel encoder (attributes as OpenPCDet and mmdetection3d name them) do to the input of equal weights."""
    kind = type(module).__name__
    traps = []
    padded = trained_with.get("padded_slots")
    dynamic = kind.lower().startswith("dyn")
    if padded is not None and dynamic is padded and (dynamic or kind in ("PillarVFE", "PillarFeatureNet", "HardVFE")):
        rule = "hard voxels, whose empty slots compete in the maximum" if padded else "dynamic voxels, which have no empty slots"
        traps.append(f"{name}: trained for {rule}; theirs is {kind}: every tensor fits and about one value in a hundred differs")
    if getattr(module, "legacy", False) is True:
        traps.append(f"{name}: legacy=True overwrites the absolute x, y, z that the first layer reads; set legacy=False")
    if getattr(module, "use_absolute_xyz", True) is False:
        traps.append(f"{name}: USE_ABSLOTE_XYZ is False: the first layer is given other columns")
    if getattr(module, "with_distance", False) is True:
        traps.append(f"{name}: with_distance is on: the first layer is given another column")
    for i, axis in enumerate("xyz"):
        size = getattr(module, f"voxel_{axis}", getattr(module, f"v{axis}", None))
        offset = getattr(module, f"{axis}_offset", None)
        if not isinstance(size, int | float) or not isinstance(offset, int | float) or not {"voxel", "low"} <= set(trained_with):
            continue
        voxel, low = float(trained_with["voxel"][i]), float(trained_with["low"][i])
        if abs(size - voxel) > 1e-5 or abs(offset - (voxel / 2 + low)) > 1e-4:
            traps.append(f"{name}: along {axis} voxels of {voxel:g} m from {low:g} m here, of {size:g} m from {offset - size / 2:g} m in theirs")
    return traps


def _hints(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], target: str) -> list[str]:
    """What may explain that tensors would not arrive."""
    lost = [name for name in ours if name not in theirs or theirs[name].shape != ours[name].shape]
    if not lost:
        return []
    hints = []
    absent = [name for name in lost if name not in theirs]
    if absent:
        below = {name[: -len(absent[0])] for name in theirs if name.endswith(f".{absent[0]}")}
        for prefix in sorted(below):
            if sum(prefix + name in theirs for name in ours) > len(ours) / 2:
                hints.append(f"theirs has these names below `{prefix}`: load the export into that part of it, or put the prefix before its names")
        for other, pattern in _FRAMEWORKS.items():
            if other != target and not hints and any(pattern.match(name) for name in theirs) and not any(pattern.match(name) for name in ours):
                hints.append(f"theirs has the names of {other}: export with --to {other}")
    for name in lost:
        if name.endswith(_FIRST) and name in theirs and theirs[name].ndim == 2:
            a, b = ours[name].shape, theirs[name].shape
            if a[1] != b[1]:
                hints.append(
                    f"theirs reads {b[1] - 6} columns per point, the export {a[1] - 6}: take the same columns (encoder.features in pretraining)"
                )
            if 2 * b[0] == a[0]:
                hints.append("theirs has two PFN layers, the export one: pretrain with encoder.pfn_widths of two entries, or set theirs to one")
            elif 2 * a[0] == b[0]:
                hints.append("theirs has one PFN layer, the export two: pretrain with one entry in encoder.pfn_widths, or set theirs to two")
    return hints
