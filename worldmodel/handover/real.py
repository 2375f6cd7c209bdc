"""The real modules of OpenPCDet and mmdetection3d, where they can be imported: built from what an export writes, filled by the framework's own
loader, run on the stored cloud.

Both functions give what `verify` lays beside its own report: {"real": None, or {"package", "version", "loaded", "tensors", "difference"}, "notes":
lines that say why the real modules were not tried, "reasons": lines that fail the export}. The loaders read a file written here from tensors that
our reader took out of the export, so that no pickle from outside reaches their torch.load. Voxels are ours: theirs need compiled operators.
"""

from __future__ import annotations

import copy
import importlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sensors.errors import one_line
from worldmodel.handover import mmdet3d_modules
from worldmodel.handover.openpcdet_modules import ENCODER, collated, settings_of

TOLERANCE = 1e-5


def openpcdet(trees: Mapping[str, dict[str, Any]], weights: Mapping[str, Tensor], sample: Mapping[str, Tensor]) -> dict[str, Any]:
    """trees: the parsed model YAMLs by name. weights: as under `model_state`. sample: `points` (N, columns) as their loader gives them and our
    `map` of them. Of a detector the part before its head is built, since the head's settings stand in OpenPCDet's own YAML."""
    found = _imported("pcdet", "pcdet.config", "pcdet.models.detectors.detector3d_template")
    if isinstance(found, str):
        return {"real": None, "notes": [found], "reasons": []}
    version, config, template = found
    tried, notes = [], []
    for name, tree in trees.items():
        settings = settings_of(tree, name)
        if settings.vfe == "DynPillarVFE" and not torch.cuda.is_available():
            notes.append(f"DynPillarVFE of pcdet {version} needs a GPU: {name} was compared with our restatement of its modules")
            continue
        dataset = SimpleNamespace(
            class_names=[], point_feature_encoder=SimpleNamespace(num_point_features=len(settings.used)), grid_size=np.array(settings.grid),
            point_cloud_range=np.array([*settings.low, *settings.high], np.float32), voxel_size=list(settings.voxel), depth_downsample_factor=None,
        )  # fmt: skip
        model_cfg = config.EasyDict({key: tree["MODEL"][key] for key in ("NAME", "VFE", "MAP_TO_BEV", "BACKBONE_2D")})

        def run(model_cfg: Any = model_cfg, dataset: Any = dataset, settings: Any = settings) -> tuple[nn.Module, Tensor]:
            detector = template.Detector3DTemplate(model_cfg=model_cfg, num_class=0, dataset=dataset)
            with _numpy_int():
                parts = detector.build_networks()
            _emptied(detector)
            with _saved({"model_state": dict(weights)}) as path:
                detector.load_params_from_file(filename=str(path), logger=_silent(), to_cpu=True)
            # DynPillarVFE keeps its constants on the GPU
            device = next((value.device for value in vars(detector.vfe).values() if isinstance(value, Tensor)), torch.device("cpu"))
            detector.eval().to(device)
            batch = collated([sample["points"]], settings)
            batch = {key: value.float().to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}  # as load_data_to_gpu
            for part in parts:
                batch = part(batch)
            return detector, batch["spatial_features_2d"].cpu()

        tried.append(_tried(f"real pcdet {version}, {name}", run, ENCODER, sample["map"]))
    return _report("pcdet", version, tried, notes)


def mmdet3d(model: Mapping[str, Any], prefix: str, weights: Mapping[str, Tensor], sample: Mapping[str, Tensor]) -> dict[str, Any]:
    """model: the `model` of the child configuration laid on its base. prefix: of its encoder's names. weights: as under `state_dict`."""
    found = _imported("mmdet3d", "mmdet3d.registry", "mmdet3d.models", "mmengine.runner")
    if isinstance(found, str):
        return {"real": None, "notes": [found], "reasons": []}
    version, registry, _, runner = found

    def run() -> tuple[nn.Module, Tensor]:
        detector = nn.Module()
        for name in ("voxel_encoder", "middle_encoder", "backbone", "neck"):
            detector.add_module(prefix + name, registry.MODELS.build(copy.deepcopy(model[prefix + name])))
        _emptied(detector)
        with _saved({"state_dict": dict(weights), "meta": {}}) as path:
            runner.load_checkpoint(detector, str(path), map_location="cpu", strict=False, logger=_silent())
        part = {name.removeprefix(prefix): module for name, module in detector.eval().named_children()}
        voxels, counts, coors = mmdet3d_modules.voxels_of(sample["points"], model["data_preprocessor"]["voxel_layer"])
        canvas = part["middle_encoder"](part["voxel_encoder"](voxels, counts, coors), coors, 1)
        return detector, part["neck"](part["backbone"](canvas))[0]

    return _report("mmdet3d", version, [_tried(f"real mmdet3d {version}", run, (prefix,), sample["map"])], [])


def _imported(package: str, *modules: str) -> str | tuple[Any, ...]:
    """(version, module, ...), or the line that says why there are none."""
    if find_spec(package) is None:
        return f"{package} is not installed: compared with our restatement of its modules"
    try:
        return str(importlib.import_module(package).__version__), *(importlib.import_module(name) for name in modules)
    except Exception as error:  # compiled operators that are missing, a version it refuses: its own, whatever they raise
        return f"{package} is installed and cannot be imported ({one_line(repr(error), 120)}): compared with our restatement of its modules"


def _tried(what: str, run: Callable[[], tuple[nn.Module, Tensor]], prefixes: tuple[str, ...], ours: Tensor) -> dict[str, Any]:
    """Of one detector: {"loaded", "tensors", "difference" over the map's largest value where that is above 1, "reasons"}."""
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            detector, bev = run()
    except Exception as error:  # what their code raises on our files is the answer
        return {"loaded": 0, "tensors": 0, "difference": float("inf"), "reasons": [f"{what}: {one_line(repr(error), 160)}"]}
    state = {name: value for name, value in detector.state_dict().items() if name.startswith(prefixes)}
    left = [name for name, value in state.items() if bool(_empty(value).any())]
    reasons = []
    difference = float("inf")
    if left:
        reasons.append(f"{what}: {len(left)} of {len(state)} tensors did not arrive, the first is {left[0]}")
    if bev.shape != ours.shape:
        reasons.append(f"{what}: the map is {tuple(bev.shape)}, ours {tuple(ours.shape)}")
    else:
        difference = float(torch.nan_to_num((bev - ours).abs(), nan=float("inf")).max()) / max(1.0, float(ours.abs().max()))
    if not left and difference > TOLERANCE:
        reasons.append(f"{what}: every tensor arrived and the maps differ by {difference:.1e}")
    return {"loaded": len(state) - len(left), "tensors": len(state), "difference": difference, "reasons": reasons}


def _report(package: str, version: str, tried: list[dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    real = None
    if tried:
        real = {"package": package, "version": version, "loaded": min(t["loaded"] for t in tried), "tensors": max(t["tensors"] for t in tried),
                "difference": max(t["difference"] for t in tried)}  # fmt: skip
    return {"real": real, "notes": notes, "reasons": [reason for t in tried for reason in t["reasons"]]}


def _emptied(module: nn.Module) -> None:
    """Every tensor becomes NaN or -1: what still is after loading was not loaded, whatever a log says."""
    for value in module.state_dict().values():
        value.fill_(float("nan") if value.is_floating_point() else -1)


def _empty(value: Tensor) -> Tensor:
    return value.isnan() if value.is_floating_point() else value == -1


@contextmanager
def _saved(checkpoint: dict[str, Any]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(checkpoint, Path(folder) / "checkpoint.pth")
        yield Path(folder) / "checkpoint.pth"


@contextmanager
def _numpy_int() -> Iterator[None]:
    """Lends numpy the `np.int` that BaseBEVBackbone calls for an upsample stride below 1 and that numpy has not had since 1.24."""
    lent = not hasattr(np, "int")
    if lent:
        setattr(np, "int", int)  # noqa: B010
    try:
        yield
    finally:
        if lent:
            delattr(np, "int")


def _silent() -> logging.Logger:
    return logging.Logger("loading", logging.CRITICAL)
