"""What mmdetection3d 1.4 builds and how mmengine loads it, restated in plain torch: the same module names, shapes, order and numerics of
PillarFeatureNet, PointPillarsScatter, SECOND and SECONDFPN, mmcv's hard voxelization, and the load rule of `load_from`.

`BASES` holds what the two configurations we hand over to say about them; a child configuration is laid on one of these, as mmengine does.
Shapes: N points of F columns, V voxels of P slots, C channels, H rows (y), W columns (x).
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sensors.errors import WmError, one_line

NORM = {"type": "BN", "eps": 1e-3, "momentum": 0.01}  # the classes' own default, which one base repeats and the other leaves out


@dataclass(frozen=True)
class Base:
    """A configuration of mmdetection3d: its file in `configs/`, what the names of the encoder's modules begin with, and its `model`."""

    path: str
    prefix: str
    model: dict[str, Any]


def _model(
    prefix: str, low: list[float], high: list[float], voxel: list[float], points: int, caps: tuple[int, int], **encoder: Any
) -> dict[str, Any]:
    box, grid = [*low, *high], [round((h - l) / v) for l, h, v in zip(low, high, voxel, strict=True)]
    return {
        "data_preprocessor": {"voxel_layer": {"max_num_points": points, "point_cloud_range": box, "voxel_size": voxel, "max_voxels": caps}},
        f"{prefix}voxel_encoder": {"type": "PillarFeatureNet", "feat_channels": [64], "with_distance": False, "voxel_size": voxel,
                                   "point_cloud_range": box, **encoder},
        f"{prefix}middle_encoder": {"type": "PointPillarsScatter", "in_channels": 64, "output_shape": [grid[1], grid[0]]},
        f"{prefix}backbone": {"type": "SECOND", "in_channels": 64, "out_channels": [64, 128, 256], "layer_nums": [3, 5, 5],
                              "layer_strides": [2, 2, 2]},
    }  # fmt: skip


BASES = {
    "kitti": Base("pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py", "", {
        **_model("", [0, -39.68, -3], [69.12, 39.68, 1], [0.16, 0.16, 4], 32, (16000, 40000), in_channels=4),
        "neck": {"type": "SECONDFPN", "in_channels": [64, 128, 256], "out_channels": [128, 128, 128], "upsample_strides": [1, 2, 4]},
        "bbox_head": {"in_channels": 384, "feat_channels": 384, "anchor_generator": {"ranges": [
            [0, -39.68, -0.6, 69.12, 39.68, -0.6], [0, -39.68, -0.6, 69.12, 39.68, -0.6], [0, -39.68, -1.78, 69.12, 39.68, -1.78]]}},
    }),
    "centerpoint": Base("centerpoint/centerpoint_pillar02_second_secfpn_8xb4-cyclic-20e_nus-3d.py", "pts_", {
        **_model("pts_", [-51.2, -51.2, -5], [51.2, 51.2, 3], [0.2, 0.2, 8], 20, (30000, 40000), in_channels=5, legacy=False),
        "pts_neck": {"type": "SECONDFPN", "in_channels": [64, 128, 256], "out_channels": [128, 128, 128], "upsample_strides": [0.5, 1, 2],
                     "use_conv_for_no_stride": True},
        "pts_bbox_head": {"in_channels": 384, "bbox_coder": {"pc_range": [-51.2, -51.2], "voxel_size": [0.2, 0.2], "out_size_factor": 4}},
        "train_cfg": {"pts": {"grid_size": [512, 512, 1], "voxel_size": [0.2, 0.2, 8], "out_size_factor": 4,
                              "point_cloud_range": [-51.2, -51.2, -5, 51.2, 51.2, 3]}},
        "test_cfg": {"pts": {"pc_range": [-51.2, -51.2], "voxel_size": [0.2, 0.2], "out_size_factor": 4}},
    }),
}  # fmt: skip


def _norm(kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d], width: int, norm_cfg: Mapping[str, Any]) -> nn.Module:
    if norm_cfg.get("type") not in ("BN", "BN1d", "BN2d", "SyncBN", "naiveSyncBN1d", "naiveSyncBN2d"):
        raise ValueError(f"norm_cfg is {norm_cfg}: it needs a `type`, one of batch normalisation")
    return kind(width, eps=norm_cfg.get("eps", 1e-5), momentum=norm_cfg.get("momentum", 0.1))


class PFNLayer(nn.Module):
    """Norm comes before linear in the order of the names; a layer that is not the last has half the width and hands on both."""

    def __init__(self, in_channels: int, out_channels: int, norm_cfg: Mapping[str, Any], last_layer: bool) -> None:
        super().__init__()
        self.last_vfe = last_layer
        self.units = out_channels if last_layer else out_channels // 2
        self.norm = _norm(nn.BatchNorm1d, self.units, norm_cfg)
        self.linear = nn.Linear(in_channels, self.units, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.linear(inputs).transpose(1, 2).contiguous()).transpose(1, 2))
        top = x.max(1, keepdim=True)[0]
        return top if self.last_vfe else torch.cat((x, top.repeat(1, inputs.shape[1], 1)), 2)


class PillarFeatureNet(nn.Module):
    """Slots (V,P,F), counts (V,), coordinates (V,4) as batch z y x -> (V,C). Empty slots are zeroed before the first linear layer and compete
    in the maximum. legacy, which is the target's default, moves the raw xyz themselves to the pillar's centre: absolute xyz is lost."""

    def __init__(
        self,
        in_channels: int = 4,
        feat_channels: tuple[int, ...] = (64,),
        with_distance: bool = False,
        with_cluster_center: bool = True,
        with_voxel_center: bool = True,
        voxel_size: tuple[float, ...] = (0.2, 0.2, 4),
        point_cloud_range: tuple[float, ...] = (0, -40, -3, 70.4, 40, 1),
        norm_cfg: Mapping[str, Any] = NORM,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        self.with_distance, self.with_cluster_center, self.with_voxel_center, self.legacy = (
            with_distance, with_cluster_center, with_voxel_center, legacy)  # fmt: skip
        widths = [in_channels + 3 * with_cluster_center + 3 * with_voxel_center + with_distance, *feat_channels]
        self.pfn_layers = nn.ModuleList(PFNLayer(widths[i], widths[i + 1], norm_cfg, i == len(widths) - 2) for i in range(len(widths) - 1))
        self.voxel_size = voxel_size
        self.offset = [v / 2 + low for v, low in zip(voxel_size, point_cloud_range, strict=False)]

    def forward(self, features: Tensor, num_points: Tensor, coors: Tensor) -> Tensor:
        features = features.clone()
        parts = [features]
        if self.with_cluster_center:
            parts.append(features[:, :, :3] - features[:, :, :3].sum(1, keepdim=True) / num_points.to(features.dtype)[:, None, None])
        if self.with_voxel_center:
            centre = torch.stack([coors[:, 3 - axis].to(features.dtype) * self.voxel_size[axis] + self.offset[axis] for axis in range(3)], 1)
            from_centre = features[:, :, :3] - centre[:, None]
            if self.legacy:
                features[:, :, :3] = from_centre
            parts.append(from_centre)
        if self.with_distance:
            parts.append(features[:, :, :3].norm(2, 2, keepdim=True))
        x = torch.cat(parts, 2)
        x = x * (torch.arange(x.shape[1])[None, :] < num_points[:, None])[:, :, None].to(x.dtype)
        for layer in self.pfn_layers:
            x = layer(x)
        return x.squeeze(1)


class PointPillarsScatter(nn.Module):
    """(V,C) and coordinates (V,4) -> (B,C,ny,nx); output_shape is (ny, nx)."""

    def __init__(self, in_channels: int, output_shape: tuple[int, int]) -> None:
        super().__init__()
        self.in_channels, self.ny, self.nx = in_channels, int(output_shape[0]), int(output_shape[1])

    def forward(self, voxel_features: Tensor, coors: Tensor, batch_size: int) -> Tensor:
        canvas = voxel_features.new_zeros(batch_size, self.in_channels, self.ny * self.nx)
        for index in range(batch_size):
            mine = coors[:, 0] == index
            canvas[index][:, (coors[mine, 2] * self.nx + coors[mine, 3]).long()] = voxel_features[mine].t()
        return canvas.view(batch_size, self.in_channels, self.ny, self.nx)


class SECOND(nn.Module):
    """(B,C,H,W) -> one map per block. Convolutions at 0, 3, 6 ... of a block: one less than in OpenPCDet, whose padding is a module."""

    def __init__(
        self,
        in_channels: int = 128,
        out_channels: tuple[int, ...] = (128, 128, 256),
        layer_nums: tuple[int, ...] = (3, 5, 5),
        layer_strides: tuple[int, ...] = (2, 2, 2),
        norm_cfg: Mapping[str, Any] = NORM,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for inputs, outputs, layers, stride in zip((in_channels, *out_channels[:-1]), out_channels, layer_nums, layer_strides, strict=True):
            block = [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), _norm(nn.BatchNorm2d, outputs, norm_cfg), nn.ReLU()]
            for _ in range(layers):
                block += [nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), _norm(nn.BatchNorm2d, outputs, norm_cfg), nn.ReLU()]
            self.blocks.append(nn.Sequential(*block))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out = []
        for block in self.blocks:
            x = block(x)
            out.append(x)
        return tuple(out)


class SECONDFPN(nn.Module):
    """Maps of the blocks -> one map, their channels side by side."""

    def __init__(
        self,
        in_channels: tuple[int, ...] = (128, 128, 256),
        out_channels: tuple[int, ...] = (256, 256, 256),
        upsample_strides: tuple[float, ...] = (1, 2, 4),
        norm_cfg: Mapping[str, Any] = NORM,
        use_conv_for_no_stride: bool = False,
    ) -> None:
        super().__init__()
        self.deblocks = nn.ModuleList()
        for inputs, outputs, stride in zip(in_channels, out_channels, upsample_strides, strict=True):
            lift: nn.Module
            if stride > 1 or (stride == 1 and not use_conv_for_no_stride):
                lift = nn.ConvTranspose2d(inputs, outputs, int(stride), int(stride), bias=False)
            else:
                lift = nn.Conv2d(inputs, outputs, round(1 / stride), round(1 / stride), bias=False)
            self.deblocks.append(nn.Sequential(lift, _norm(nn.BatchNorm2d, outputs, norm_cfg), nn.ReLU()))

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([deblock(x[i]) for i, deblock in enumerate(self.deblocks)], 1)


def hard_voxelize(
    points: np.ndarray, voxel_size: list[float], point_cloud_range: list[float], max_num_points: int, max_voxels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mmcv's hard voxelization of points (N,F) f32: slots (V,P,F) f32, coordinates (V,3) as z y x, counts (V,). Voxels are numbered by first
    appearance; full ones take no more points, and after max_voxels there are no new ones."""
    size, low = np.float32(voxel_size), np.float32(point_cloud_range[:3])
    grid = np.round((np.float64(point_cloud_range[3:]) - np.float64(point_cloud_range[:3])) / np.float64(voxel_size))
    with np.errstate(invalid="ignore"):
        at = np.floor((points[:, :3] - low) / size)
        inside = np.flatnonzero(((at >= 0) & (at < grid)).all(1))
    index = at[inside].astype(np.int64)
    cell = (index[:, 2] * int(grid[1]) + index[:, 1]) * int(grid[0]) + index[:, 0]
    _, first, of = np.unique(cell, return_index=True, return_inverse=True)
    number = np.argsort(np.argsort(first))[of]
    order = np.argsort(number, kind="stable")
    starts = np.searchsorted(number[order], np.arange(len(first)))
    slot = np.empty(len(order), np.int64)
    slot[order] = np.arange(len(order)) - starts[number[order]]
    keep = (number < max_voxels) & (slot < max_num_points)
    count = min(len(first), max_voxels)
    voxels = np.zeros((count, max_num_points, points.shape[1]), np.float32)
    voxels[number[keep], slot[keep]] = points[inside[keep]]
    coors = index[np.sort(first)[:count]][:, ::-1].copy()
    return voxels, coors, np.bincount(number[keep], minlength=count)[:count]


def voxels_of(points: Tensor, layer: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What `voxel_layer` makes of one cloud (N,F) in training: slots (V,P,F), counts (V,), coordinates (V,4) as batch z y x."""
    caps = layer["max_voxels"]
    most = caps[0] if isinstance(caps, list | tuple) else caps
    voxels, coors, counts = hard_voxelize(points.numpy(), layer["voxel_size"], layer["point_cloud_range"], layer["max_num_points"], most)
    batched = torch.cat((torch.zeros(len(coors), 1, dtype=torch.long), torch.from_numpy(coors)), 1)
    return torch.from_numpy(voxels), torch.from_numpy(counts), batched


class Detector(nn.Module):
    """The part of VoxelNet or CenterPoint before its head, built from a `model` configuration under the names that the checkpoint has."""

    def __init__(self, model: Mapping[str, Any], prefix: str) -> None:
        super().__init__()
        self.prefix, self.voxel_layer = prefix, dict(model["data_preprocessor"]["voxel_layer"])
        for name, kind in (("voxel_encoder", PillarFeatureNet), ("middle_encoder", PointPillarsScatter), ("backbone", SECOND), ("neck", SECONDFPN)):
            arguments = dict(model[prefix + name])
            if arguments.pop("type") != kind.__name__:
                raise WmError(f"{prefix}{name} is a {one_line(model[prefix + name]['type'])}; these weights are for {kind.__name__} alone")
            try:
                self.add_module(prefix + name, kind(**arguments))
            except (TypeError, ValueError, RuntimeError) as error:
                raise WmError(f"{prefix}{name}: mmdetection3d would not build it ({one_line(error, 160)})") from error

    def part(self, name: str) -> Any:
        return getattr(self, self.prefix + name)

    def forward(self, points: Tensor) -> Tensor:
        """One cloud (N,F) f32 -> (1,C,H,W)."""
        voxels, counts, coors = voxels_of(points, self.voxel_layer)
        values = self.part("voxel_encoder")(voxels, counts, coors)
        return self.part("neck")(self.part("backbone")(self.part("middle_encoder")(values, coors, 1)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Loaded:
    """What a load left behind: names of the model that were filled, that the file lacks, that the model lacks, and of another shape."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]


def load_checkpoint(model: nn.Module, checkpoint: Mapping[str, Any]) -> Loaded:
    """mmengine's rule for `load_from`: take `state_dict` where there is one, strip a leading `module.`, fill what has name and shape, go on
    whatever else is wrong. (It logs the rest, and keeps quiet about a missing `num_batches_tracked`.)"""
    stored = checkpoint.get("state_dict", checkpoint)
    if not isinstance(stored, Mapping):
        raise WmError("the checkpoint's `state_dict` is no mapping of names to tensors; export the run again")
    stored = {str(name).removeprefix("module."): value for name, value in stored.items()}
    own = model.state_dict()
    fits = {k for k, v in stored.items() if k in own and isinstance(v, Tensor) and v.shape == own[k].shape}
    with torch.no_grad():
        for name in fits:
            own[name].copy_(stored[name])
    return Loaded(sorted(fits), sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys()), sorted((own.keys() & stored.keys()) - fits))


def read_config(text: str) -> dict[str, Any]:
    """The names that a configuration file assigns: constants, lists, tuples, `dict(...)`, earlier names. Nothing is executed."""
    found: dict[str, Any] = {}
    try:
        for node in ast.parse(text).body:
            if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
                raise ValueError(f"line {node.lineno} is not `name = value`")
            found[node.targets[0].id] = _value(node.value, found)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise WmError(f"the configuration is not one that `wm export` writes ({one_line(error, 160)}); export the run again") from error
    return found


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        items = [_value(item, known) for item in node.elts]
        return tuple(items) if isinstance(node, ast.Tuple) else items
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _value(node.operand, known)
        if isinstance(number, int | float):
            return -number
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        names = [word.arg for word in node.keywords]
        if None in names or len(set(names)) != len(names):
            raise ValueError(f"line {node.lineno} names a key twice or unpacks one")
        return {str(word.arg): _value(word.value, known) for word in node.keywords}
    raise ValueError(f"line {node.lineno} holds more than names, numbers, texts, lists and dict(...)")


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A child configuration laid on its base: dictionaries key by key, everything else replaced."""
    out = copy.deepcopy(dict(base))
    for key, value in over.items():
        out[key] = merged(out[key], value) if isinstance(value, Mapping) and isinstance(out.get(key), Mapping) else value
    return out
