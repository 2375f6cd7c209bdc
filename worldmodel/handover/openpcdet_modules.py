"""What OpenPCDet builds and how it loads, restated in plain torch: the same module names, shapes, order and numerics of PillarVFE, DynPillarVFE,
PointPillarScatter, BaseBEVBackbone and the tensors of three heads; the merging of its YAML files; the rule of `load_params_from_file`.

Modules take and give the `batch_dict` of theirs. Shapes: N points of F columns, V pillars of P slots, C channels, ny rows, nx columns.
BatchNorm has eps 1e-3 and momentum 0.01 in the encoder, torch's own in the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sensors.errors import WmError, one_line
from sensors.kernels.voxels import hard_voxels

EPS, MOMENTUM = 1e-3, 0.01
MOST_CELLS = 1 << 24

# the configurations, beneath tools/, whose heads are known here
POINTPILLAR = "cfgs/kitti_models/pointpillar.yaml"
MULTIHEAD = "cfgs/nuscenes_models/cbgs_pp_multihead.yaml"
CENTERPOINT = "cfgs/nuscenes_models/cbgs_dyn_pp_centerpoint.yaml"
WAYMO_PILLAR = "cfgs/waymo_models/centerpoint_pillar_1x.yaml"

Batch = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a model YAML says about the encoder. low, high, voxel: (3) metres. columns: of a point as loaded; used: those that the VFE reads, in its
    order. max_points, max_voxels: caps of the hard VFE in training (0: DynPillarVFE, which has none). base: the YAML it is laid on."""

    base: str
    detector: str
    vfe: str
    filters: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    voxel: tuple[float, ...]
    columns: tuple[str, ...]
    used: tuple[str, ...]
    max_points: int
    max_voxels: int
    layers: tuple[int, ...]
    strides: tuple[int, ...]
    widths: tuple[int, ...]
    upsample_strides: tuple[float, ...]
    upsample_widths: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cells along x, y, z, rounded as their data processor rounds."""
        nx, ny, nz = (round((h - l) / v) for l, h, v in zip(self.low, self.high, self.voxel, strict=True))
        return nx, ny, nz


def settings_of(tree: Any, source: str) -> Settings:
    """The settings in a parsed YAML; WmError names the key that is missing, of another kind, or not among what this mirror builds."""

    def get(*path: str | int) -> Any:
        value = tree
        for key in path:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                raise WmError(f"{source}: no {'.'.join(map(str, path))}; export the run again") from None
        return value

    def numbers(kind: type, low: float, high: float, count: int | None, *path: str | int) -> tuple[Any, ...]:
        value = get(*path)
        whole = isinstance(value, list) and 0 < len(value) <= 16 and (count is None or len(value) == count)
        kinds = (int,) if kind is int else (int, float)
        if not whole or any(type(v) not in kinds or not low <= v <= high for v in value):
            raise WmError(
                f"{source}: {'.'.join(map(str, path))} is {one_line(repr(value), 80)}, expected {count or 'some'} numbers {low:g}..{high:g}"
            )
        return tuple(kind(v) for v in value)

    def name(*path: str | int) -> str:
        value = get(*path)
        if not isinstance(value, str):
            raise WmError(f"{source}: {'.'.join(map(str, path))} is {one_line(repr(value), 80)}, expected a name")
        return value

    def names(*path: str | int) -> tuple[str, ...]:
        value = get(*path)
        if not isinstance(value, list) or not 3 <= len(value) <= 32 or not all(isinstance(v, str) for v in value) or value[:3] != ["x", "y", "z"]:
            raise WmError(f"{source}: {'.'.join(map(str, path))} is {one_line(repr(value), 80)}, expected names of columns, x y z first")
        return tuple(value)

    processors = get("DATA_CONFIG", "DATA_PROCESSOR")
    at = next((i for i, p in enumerate(processors if isinstance(processors, list) else [])
               if isinstance(p, dict) and str(p.get("NAME")).startswith("transform_points_to_voxels")), None)  # fmt: skip
    if at is None:
        raise WmError(f"{source}: DATA_CONFIG.DATA_PROCESSOR makes no voxels; export the run again")
    here = ("DATA_CONFIG", "DATA_PROCESSOR", at)
    hard = name(*here, "NAME") == "transform_points_to_voxels"
    vfe = name("MODEL", "VFE", "NAME")
    if vfe not in ("PillarVFE", "DynPillarVFE"):
        raise WmError(f"{source}: MODEL.VFE.NAME {one_line(vfe, 40)} is neither PillarVFE nor DynPillarVFE")
    if (vfe == "PillarVFE") != hard:
        raise WmError(f"{source}: {vfe} beside {name(*here, 'NAME')}: their loader would give it no {'points in slots' if not hard else 'points'}")
    for key, wanted in (("USE_NORM", True), ("USE_ABSLOTE_XYZ", True), ("WITH_DISTANCE", False)):
        if get("MODEL", "VFE", key) is not wanted:
            raise WmError(f"{source}: MODEL.VFE.{key} is not {wanted}: the first layer then has another input")
    box = numbers(float, -1e4, 1e4, 6, "DATA_CONFIG", "POINT_CLOUD_RANGE")
    backbone = ("MODEL", "BACKBONE_2D")
    blocks = len(get(*backbone, "LAYER_NUMS"))
    columns = names("DATA_CONFIG", "POINT_FEATURE_ENCODING", "src_feature_list")
    used = names("DATA_CONFIG", "POINT_FEATURE_ENCODING", "used_feature_list")
    if not set(used) <= set(columns):
        raise WmError(f"{source}: used_feature_list names {one_line(sorted(set(used) - set(columns)))}, which src_feature_list lacks")
    found = Settings(
        base=name("_BASE_CONFIG_"), detector=name("MODEL", "NAME"), vfe=vfe, filters=numbers(int, 1, 4096, None, "MODEL", "VFE", "NUM_FILTERS"),
        low=box[:3], high=box[3:], voxel=numbers(float, 1e-3, 1e4, 3, *here, "VOXEL_SIZE"), columns=columns, used=used,
        max_points=numbers_of(get(*here, "MAX_POINTS_PER_VOXEL"), f"{source}: MAX_POINTS_PER_VOXEL") if hard else 0,
        max_voxels=numbers_of(get(*here, "MAX_NUMBER_OF_VOXELS", "train"), f"{source}: MAX_NUMBER_OF_VOXELS.train") if hard else 0,
        layers=numbers(int, 0, 64, blocks, *backbone, "LAYER_NUMS"), strides=numbers(int, 1, 16, blocks, *backbone, "LAYER_STRIDES"),
        widths=numbers(int, 1, 4096, blocks, *backbone, "NUM_FILTERS"),
        upsample_strides=numbers(float, 1 / 16, 16, blocks, *backbone, "UPSAMPLE_STRIDES"),
        upsample_widths=numbers(int, 1, 4096, blocks, *backbone, "NUM_UPSAMPLE_FILTERS"),
    )  # fmt: skip
    nx, ny, nz = found.grid
    if nz != 1 or nx < 1 or ny < 1 or nx * ny > MOST_CELLS:
        raise WmError(f"{source}: {nx} x {ny} x {nz} cells; PointPillarScatter takes one layer of cells, this mirror at most {MOST_CELLS}")
    if get("MODEL", "MAP_TO_BEV", "NUM_BEV_FEATURES") != found.filters[-1]:
        raise WmError(f"{source}: MODEL.MAP_TO_BEV.NUM_BEV_FEATURES is not the last of MODEL.VFE.NUM_FILTERS")
    return found


def numbers_of(value: Any, what: str) -> int:
    if type(value) is not int or not 1 <= value <= 1 << 24:
        raise WmError(f"{what} is {one_line(repr(value), 40)}, expected a number above 0")
    return value


class PFNLayer(nn.Module):
    """Linear, BatchNorm1d, ReLU, maximum over the pillar. `maximum` (values, key) -> (values per pillar, the same laid beside each row)."""

    def __init__(self, inputs: int, outputs: int, last: bool) -> None:
        super().__init__()
        self.last_vfe = last
        outputs = outputs if last else outputs // 2
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs, eps=EPS, momentum=MOMENTUM)

    def lifted(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return torch.relu(self.norm(y.reshape(-1, y.shape[-1])).view_as(y))


class VFE(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        widths = (len(settings.used) + 6, *settings.filters)
        count = len(settings.filters)
        self.pfn_layers = nn.ModuleList(PFNLayer(widths[i], widths[i + 1], i == count - 1) for i in range(count))
        self.settings = settings
        self.use_norm, self.use_absolute_xyz, self.with_distance = True, True, False
        self.voxel_x, self.voxel_y, self.voxel_z = self.voxel = settings.voxel
        low = [float(np.float32(v)) for v in settings.low]  # their range is a float32 array
        self.x_offset, self.y_offset, self.z_offset = self.offset = [v / 2 + l for v, l in zip(settings.voxel, low, strict=True)]


class PillarVFE(VFE):
    """batch: voxels (V,P,F) with zeros in empty slots, voxel_num_points (V,), voxel_coords (V,4) batch, z, y, x. Gives pillar_features (V,C). Empty
    slots are zero at the first linear layer and then take part: relu(norm(0)) competes in the maximum."""

    def forward(self, batch: Batch) -> Batch:
        voxels, count, coords = batch["voxels"], batch["voxel_num_points"], batch["voxel_coords"]
        xyz = voxels[:, :, :3]
        cluster = xyz - xyz.sum(1, keepdim=True) / count.to(xyz.dtype).view(-1, 1, 1)
        centre = torch.stack([xyz[:, :, i] - (coords[:, 3 - i, None].to(xyz.dtype) * self.voxel[i] + self.offset[i]) for i in range(3)], 2)
        there = torch.arange(voxels.shape[1], device=voxels.device)[None, :, None] < count[:, None, None]
        x = torch.cat((voxels, cluster, centre), 2) * there.to(voxels.dtype)
        for layer in self.pfn_layers:
            y = layer.lifted(x)
            top = y.amax(1, keepdim=True)
            x = top if layer.last_vfe else torch.cat((y, top.expand_as(y)), 2)
        batch["pillar_features"] = x[:, 0]
        return batch


class DynPillarVFE(VFE):
    """batch: points (N,1+F), the batch index first. Gives pillar_features (V,C) and voxel_coords (V,4) batch, z, y, x. Points count by x and y
    alone: nothing here looks whether z lies in the range."""

    def forward(self, batch: Batch) -> Batch:
        points, config = batch["points"], self.settings
        nx, ny, _ = config.grid
        cell = torch.floor((points[:, 1:3] - points.new_tensor(config.low[:2])) / points.new_tensor(config.voxel[:2])).int()
        inside = ((cell >= 0) & (cell < torch.tensor([nx, ny], device=cell.device))).all(1)
        points, cell = points[inside], cell[inside]
        key = points[:, 0].int() * (nx * ny) + cell[:, 0] * ny + cell[:, 1]
        pillars, row, count = torch.unique(key, return_inverse=True, return_counts=True)
        xyz = points[:, 1:4]
        mean = xyz.new_zeros(len(pillars), 3).index_add(0, row, xyz) / count[:, None]
        centre = [xyz[:, i] - (cell[:, i].to(xyz.dtype) * self.voxel[i] + self.offset[i]) for i in range(2)]
        x = torch.cat((points[:, 1:], xyz - mean[row], torch.stack((*centre, xyz[:, 2] - self.offset[2]), 1)), 1)
        for layer in self.pfn_layers:
            y = layer.lifted(x)
            top = y.new_zeros(len(pillars), y.shape[1]).scatter_reduce(0, row[:, None].expand_as(y), y, "amax", include_self=False)
            x = top if layer.last_vfe else torch.cat((y, top[row]), 1)
        rest = pillars % (nx * ny)
        batch["pillar_features"] = x
        batch["voxel_coords"] = torch.stack((pillars // (nx * ny), torch.zeros_like(pillars), rest % ny, rest // ny), 1)
        return batch


class PointPillarScatter(nn.Module):
    """Gives spatial_features (B,C,ny,nx), zero where there is no pillar; no parameters."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.grid = settings.grid

    def forward(self, batch: Batch) -> Batch:
        values, coords = batch["pillar_features"], batch["voxel_coords"].long()
        nx, ny, _ = self.grid
        canvas = values.new_zeros(batch["batch_size"], values.shape[1], ny * nx)
        canvas[coords[:, 0], :, coords[:, 1] + coords[:, 2] * nx + coords[:, 3]] = values
        batch["spatial_features"] = canvas.view(batch["batch_size"], -1, ny, nx)
        return batch


class BaseBEVBackbone(nn.Module):
    """Gives spatial_features_2d (B, sum of NUM_UPSAMPLE_FILTERS, H, W)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.blocks, self.deblocks = nn.ModuleList(), nn.ModuleList()
        width = settings.filters[-1]
        for layers, stride, out, up, up_width in zip(settings.layers, settings.strides, settings.widths, settings.upsample_strides,
                                                     settings.upsample_widths, strict=True):  # fmt: skip
            block: list[nn.Module] = [nn.ZeroPad2d(1), nn.Conv2d(width, out, 3, stride, bias=False), _norm(out), nn.ReLU()]
            for _ in range(layers):
                block += [nn.Conv2d(out, out, 3, padding=1, bias=False), _norm(out), nn.ReLU()]
            self.blocks.append(nn.Sequential(*block))
            side = int(up) if up >= 1 else int(np.round(1 / up))
            lift: nn.Module = (nn.ConvTranspose2d if up >= 1 else nn.Conv2d)(out, up_width, side, side, bias=False)
            self.deblocks.append(nn.Sequential(lift, _norm(up_width), nn.ReLU()))
            width = out

    def forward(self, batch: Batch) -> Batch:
        x, lifted = batch["spatial_features"], []
        for block, deblock in zip(self.blocks, self.deblocks, strict=True):
            x = block(x)
            lifted.append(deblock(x))
        batch["spatial_features_2d"] = torch.cat(lifted, 1)
        return batch


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=EPS, momentum=MOMENTUM)


def _anchor_head_single(inputs: int) -> nn.Module:
    """kitti_models/pointpillar.yaml: 3 classes, 2 anchors each."""
    head = nn.Module()
    for name, outputs in (("conv_cls", 18), ("conv_box", 42), ("conv_dir_cls", 12)):
        head.add_module(name, nn.Conv2d(inputs, outputs, 1))
    return head


def _anchor_head_multi(inputs: int) -> nn.Module:
    """nuscenes_models/cbgs_pp_multihead.yaml: a shared convolution, six heads of one or two classes with 2 anchors each."""
    head = nn.Module()
    head.shared_conv = nn.Sequential(nn.Conv2d(inputs, 64, 3, padding=1, bias=False), _norm(64), nn.ReLU())
    head.rpn_heads = nn.ModuleList()
    for classes in (1, 2, 2, 1, 2, 2):
        rpn = nn.Module()
        rpn.register_buffer("head_label_indices", torch.zeros(classes, dtype=torch.long))
        two = lambda outputs: nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),  # noqa: E731
                                            nn.Conv2d(64, outputs, 3, padding=1))  # fmt: skip
        regressed = {"reg": 2, "height": 1, "size": 3, "angle": 2, "velo": 2}
        rpn.conv_box = nn.ModuleDict({f"conv_{name}": two(2 * classes * size) for name, size in regressed.items()})
        rpn.conv_cls = two(2 * classes * classes)
        head.rpn_heads.append(rpn)
    return head


def _center_head(inputs: int) -> nn.Module:
    """nuscenes_models/cbgs_dyn_pp_centerpoint.yaml."""
    return _center(inputs, (1, 2, 2, 1, 2, 2), {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "vel": 2})


def _waymo_center_head(inputs: int) -> nn.Module:
    """waymo_models/centerpoint_pillar_1x.yaml."""
    return _center(inputs, (3,), {"center": 2, "center_z": 1, "dim": 3, "rot": 2})


def _center(inputs: int, groups: Sequence[int], branches: Mapping[str, int]) -> nn.Module:
    """CenterHead: a shared convolution, then for each group of classes a heat map and the branches."""
    head = nn.Module()
    head.shared_conv = nn.Sequential(nn.Conv2d(inputs, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
    head.heads_list = nn.ModuleList()
    for classes in groups:
        one = nn.Module()
        for name, outputs in {**branches, "hm": classes}.items():
            first = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
            one.add_module(name, nn.Sequential(first, nn.Conv2d(64, outputs, 3, padding=1)))
        head.heads_list.append(one)
    return head


HEADS: dict[str, Callable[[int], nn.Module]] = {POINTPILLAR: _anchor_head_single, MULTIHEAD: _anchor_head_multi, CENTERPOINT: _center_head,
                                                WAYMO_PILLAR: _waymo_center_head}  # fmt: skip
ENCODER = ("vfe.", "backbone_2d.")


class Detector(nn.Module):
    """A detector as their template builds it: `global_step`, vfe, map_to_bev_module, backbone_2d and, where HEADS knows the base, dense_head,
    whose parameters are there to be counted and which forward leaves out."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("global_step", torch.zeros(1, dtype=torch.long))
        self.vfe = (PillarVFE if settings.vfe == "PillarVFE" else DynPillarVFE)(settings)
        self.map_to_bev_module = PointPillarScatter(settings)
        self.backbone_2d = BaseBEVBackbone(settings)
        if settings.base in HEADS:
            self.dense_head = HEADS[settings.base](sum(settings.upsample_widths))

    def forward(self, batch: Batch) -> Tensor:
        """batch as `collated` makes it -> spatial_features_2d (B,C,H,W)."""
        return self.backbone_2d(self.map_to_bev_module(self.vfe(batch)))["spatial_features_2d"]  # type: ignore[no-any-return]


def collated(clouds: Sequence[Tensor], settings: Settings) -> Batch:
    """The batch that their dataset and `collate_batch` make of clouds (N, len(columns)): the columns that are used, those points inside in x and y,
    and for the hard VFE spconv's voxels."""
    order = [settings.columns.index(name) for name in settings.used]
    low, high = settings.low, settings.high
    out: dict[str, list[Tensor]] = {"points": [], "voxels": [], "voxel_num_points": [], "voxel_coords": []}
    for index, cloud in enumerate(clouds):
        points = cloud[:, order].float()
        inside = (points[:, 0] >= low[0]) & (points[:, 0] <= high[0]) & (points[:, 1] >= low[1]) & (points[:, 1] <= high[1])
        points = points[inside].contiguous()
        out["points"].append(nn.functional.pad(points, (1, 0), value=index))
        if settings.vfe == "PillarVFE":
            voxels, coords, counts = hard_voxels(points.numpy(), low, high, settings.voxel, settings.max_points, settings.max_voxels)
            out["voxels"].append(torch.from_numpy(voxels))
            out["voxel_num_points"].append(torch.from_numpy(counts))
            out["voxel_coords"].append(nn.functional.pad(torch.from_numpy(coords), (1, 0), value=index))
    return {"batch_size": len(clouds), **{name: torch.cat(parts) for name, parts in out.items() if parts}}


@dataclass(frozen=True)
class Loaded:
    """updated: keys taken. left: keys of the model that keep their initial values. unknown: keys of the file that the model has not.
    mismatched: keys of both whose shapes differ. log: what their loader prints of this."""

    updated: tuple[str, ...]
    left: tuple[str, ...]
    unknown: tuple[str, ...]
    mismatched: tuple[str, ...]
    log: tuple[str, ...]


def load_params(model: nn.Module, model_state: Mapping[str, Tensor]) -> Loaded:
    """Load as `Detector3DTemplate.load_params_from_file` does: a key goes in if the model has it in the same shape, everything else is dropped
    without a word, and what the model has and did not get is listed."""
    own = model.state_dict()
    updated = {key: value for key, value in model_state.items() if key in own and own[key].shape == value.shape}
    model.load_state_dict(own | updated)
    left = [key for key in own if key not in updated]
    log = [f"Not updated weight {key}: {own[key].shape!s}" for key in left] + [f"==> Done (loaded {len(updated)}/{len(own)})"]
    mismatched = [key for key in model_state if key in own and key not in updated]
    return Loaded(tuple(updated), tuple(left), tuple(k for k in model_state if k not in own), tuple(mismatched), tuple(log))


def merged(config: dict[str, Any], new: Mapping[str, Any], read: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    """A YAML laid on the one its `_BASE_CONFIG_` names, as `merge_new_config` does: the base's top keys replace, ours go key by key, lists whole.
    A `_BASE_CONFIG_` inside the base is not followed. read: gives a parsed file."""
    if "_BASE_CONFIG_" in new:
        config.update(read(new["_BASE_CONFIG_"]))
    for key, value in new.items():
        if isinstance(value, Mapping):
            config[key] = merged(config.get(key, {}), value, read)
        else:
            config[key] = value
    return config
