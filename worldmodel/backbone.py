"""A pretrained encoder for a training loop of your own, with the conventions of timm: `worldmodel.load(folder, features_only=True)`.

    encoder(clouds)                     # [(B,C,H,W), ...], a map of each block
    encoder.forward_features(clouds)    # (B,num_features,H,W): the blocks' maps brought to one grid and joined; what leaves in an export
    encoder.feature_info.channels()     # of the maps; .reduction(): their cells in pillars of the input; .module_name(): where they come from

Parameters are trainable and the module is in train mode, as torch makes modules: call `.eval()` for frozen features. Parameters have the
names that OpenPCDet gives them (`vfe.*`, `backbone_2d.*`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sensors.errors import UsageError, WmError, one_line
from sensors.files import JSON_BYTES, MANIFEST, check_folder, parse_json, read_whole
from worldmodel.config import Encoder, encoder_of
from worldmodel.encoders.contract import Clouds
from worldmodel.encoders.pillars import PillarEncoder
from worldmodel.handover.checkpoints import read_tensors
from worldmodel.trained import Trained

MOST_SLOTS = 1024
HELD = ("config.json", "model.safetensors", "sample.safetensors")
SAME = 1e-4  # of the largest value of the stored map: another machine adds up in another order


class FeatureInfo:
    """What is known of the maps. Without an index, of those that `forward` gives; with one, of that block; with several, of those."""

    def __init__(self, info: Sequence[Mapping[str, Any]], out_indices: Sequence[int]) -> None:
        self.info, self.out_indices = tuple(info), tuple(out_indices)

    def channels(self, index: int | Sequence[int] | None = None) -> Any:
        return self._get("num_chs", index)

    def reduction(self, index: int | Sequence[int] | None = None) -> Any:
        return self._get("reduction", index)

    def module_name(self, index: int | Sequence[int] | None = None) -> Any:
        return self._get("module", index)

    def get_dicts(self) -> list[dict[str, Any]]:
        return [dict(self.info[i]) for i in self.out_indices]

    def __len__(self) -> int:
        return len(self.info)

    def _get(self, key: str, index: int | Sequence[int] | None) -> Any:
        if isinstance(index, int):
            return self.info[index][key]
        return [self.info[i][key] for i in (self.out_indices if index is None else index)]


class Backbone(PillarEncoder):
    """Clouds -> a list of maps (B,C,H,W), rows along y and columns along x from `config.low` upwards; map i has cells of
    `feature_info.reduction(i)` times `config.voxel`.

    Clouds are B tensors (N,F) f32, or a `Clouds`. Columns are those that `config.features` names, in the LiDAR's frame turned about z by
    `config.input_yaw_deg`: metres, intensity 0..1, dt in seconds >= 0 before the newest sweep. Points outside are dropped."""

    def __init__(self, config: Encoder, out_indices: Sequence[int] | None = None) -> None:
        super().__init__(config)
        count = len(config.widths)
        asked = range(count) if out_indices is None else out_indices
        if not len(asked) or any(not isinstance(i, int) or not -count <= i < count for i in asked):
            raise UsageError(f"out_indices {one_line(list(asked), 80)}: the encoder has blocks 0 to {count - 1}")
        self.out_indices = tuple(sorted({i % count for i in asked}))
        info, reduction = [], 1
        for i, (width, stride) in enumerate(zip(config.widths, config.strides, strict=True)):
            reduction *= stride
            info.append({"num_chs": width, "reduction": reduction, "module": f"backbone_2d.blocks.{i}", "index": i})
        self.feature_info = FeatureInfo(info, self.out_indices)
        self.num_features = self.channels

    def forward(self, clouds: Clouds | Sequence[Tensor]) -> list[Tensor]:  # type: ignore[override]
        x, maps = self.canvas(self._clouds(clouds)), []
        for i, block in enumerate(self.backbone_2d.blocks[: self.out_indices[-1] + 1]):
            x = block(x)
            if i in self.out_indices:
                maps.append(x)
        return maps

    def forward_features(self, clouds: Clouds | Sequence[Tensor]) -> Tensor:
        return super().forward(self._clouds(clouds))

    def _clouds(self, clouds: Clouds | Sequence[Tensor]) -> Clouds:
        device, features = self.vfe.pfn_layers[0].linear.weight.device, self.config.features
        if isinstance(clouds, Clouds):
            return Clouds(clouds.points.to(device), clouds.sizes)
        for at, points in enumerate(clouds):
            if points.ndim != 2 or points.shape[1] != len(features):
                raise ValueError(f"cloud {at} is {tuple(points.shape)}, expected (N,{len(features)}): {', '.join(features)}")
        if not len(clouds):
            raise ValueError("no clouds: give a list of (N,F) tensors")
        return Clouds(torch.cat([points.to(device, torch.float32) for points in clouds]), tuple(len(points) for points in clouds))


def is_export(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def of_run(trained: Trained, out_indices: Sequence[int] | None = None) -> Backbone:
    """The encoder of a run."""
    config = trained.config.encoder
    if config.build:
        raise UsageError(f"features_only: the run's encoder is {one_line(config.build)}, your own; take .model.encoder of what load gives without it")
    return _with(config, trained.model.encoder.state_dict(), out_indices, one_line(trained.run))


def of_export(folder: Path, out_indices: Sequence[int] | None = None) -> Backbone:
    """The encoder of an export, from its configuration and tensors alone, after checking every digest: no code that lies in the folder is run,
    nothing is made that its weights do not fill, and it gives the map that the export stores. WmError names the file and what is wrong."""
    shown = one_line(folder)
    manifest = check_folder(folder)
    if not set(HELD) <= {entry["path"] for entry in manifest["files"]}:
        raise UsageError(f"{shown}: an export --to {one_line(manifest.get('target'))}; load takes the run, or an export --to torch, hf or features")
    tree = parse_json(read_whole(folder / HELD[0], JSON_BYTES), f"{shown}/{HELD[0]}")
    if not isinstance(tree, dict):
        raise WmError(f"{shown}/{HELD[0]}: holds no configuration; export the run again")
    names = {field.name for field in dataclasses.fields(Encoder)}
    config = encoder_of({key: value for key, value in tree.items() if key in names}, f"{shown}/{HELD[0]}")
    weights, sample = (read_tensors(folder / name) for name in HELD[1:])
    if config.build or config.max_points_per_pillar > MOST_SLOTS or sum(config.layers) + len(config.layers) > len(weights):
        raise WmError(f"{shown}/{HELD[0]}: describes something other than the pillar encoder whose weights lie beside it; export the run again")
    module = _with(config, weights, out_indices, shown)
    if not _gives(module, sample):
        raise WmError(f"{shown}: its encoder does not give the map that is stored beside it; export the run again")
    return module


def _gives(module: Backbone, sample: Mapping[str, Tensor]) -> bool:
    """Whether the module computes the stored map; of the size that its configuration says, so that no more is made than was stored."""
    config, stored = module.config, sample.get("map")
    try:
        height, width = (round((config.high[i] - config.low[i]) / module.cell_m) for i in (1, 0))
        if "points" not in sample or stored is None or tuple(stored.shape) != (1, module.num_features, height, width):
            return False
        with torch.no_grad():
            found = module.eval().forward_features([sample["points"]])
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
        return False
    finally:
        module.train()
    return found.shape == stored.shape and bool((found - stored).abs().max() <= SAME * max(1.0, float(stored.abs().max())))


def _with(config: Encoder, weights: Mapping[str, Tensor], out_indices: Sequence[int] | None, what: str) -> Backbone:
    """The module of a configuration, without a byte or a random number spent on values that are replaced, and with these weights: all of them."""
    try:
        with torch.device("meta"):
            module = Backbone(config, out_indices)
    except (RuntimeError, ValueError, TypeError, IndexError, OverflowError, ZeroDivisionError) as error:
        raise WmError(f"{what}: its configuration describes no encoder ({one_line(error, 120)}); export the run again") from error
    own = module.state_dict()
    wrong = sorted(own.keys() ^ weights.keys())
    wrong += [k for k in sorted(own.keys() & weights.keys()) if own[k].shape != weights[k].shape or own[k].dtype != weights[k].dtype]
    wrong += [k for k in sorted(weights) if not wrong and weights[k].is_floating_point() and not torch.isfinite(weights[k]).all()]
    if wrong:
        raise WmError(f"{what}: {len(wrong)} tensors are missing, unknown, of another shape or not finite, first {one_line(wrong[0])}; export again")
    module.load_state_dict(dict(weights), assign=True)
    return module
