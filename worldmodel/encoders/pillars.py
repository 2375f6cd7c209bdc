"""The pillar encoder, module for module as OpenPCDet has it (PillarVFE or DynPillarVFE, then BaseBEVBackbone), so that its weights leave
under their own names. Differences are of speed only: points are grouped once, and maxima run over the groups.

Shapes: B clouds, N points, M of them inside, V pillars, C channels, H rows (y), W columns (x).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sensors.kernels.segments import scatter_rows, segment_max
from sensors.kernels.voxels import hard_voxels, pillar_features, pillars
from worldmodel.config import Encoder
from worldmodel.encoders import standalone
from worldmodel.encoders.contract import Clouds


class _SegmentMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, row: Tensor) -> Tensor:
        out, at = segment_max(values.detach().contiguous().numpy(), row.numpy())
        ctx.rows = len(values)
        ctx.at = at
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return torch.from_numpy(scatter_rows(grads[0].contiguous().numpy(), ctx.at, ctx.rows)), None


def max_over_pillars(values: Tensor, row: Tensor) -> Tensor:
    """Maxima (V,C) over the runs of values (M,C) that row (V+1,) delimits."""
    if values.device.type == "cpu":
        return _SegmentMax.apply(values.float(), row)  # type: ignore[no-any-return]
    return torch.segment_reduce(values.float(), "max", offsets=row.long(), axis=0)


class PFNLayer(nn.Module):
    """Linear, BatchNorm, ReLU, maximum over the pillar; a layer that is not the last has half the width and hands on both."""

    def __init__(self, inputs: int, outputs: int, *, last: bool, eps: float, momentum: float) -> None:
        super().__init__()
        self.last = last
        outputs = outputs if last else outputs // 2
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs, eps=eps, momentum=momentum)


class PillarVFE(nn.Module):
    def __init__(self, config: Encoder) -> None:
        super().__init__()
        widths = (len(config.features) + 6, *config.pfn_widths)
        count = len(config.pfn_widths)
        self.pfn_layers = nn.ModuleList(
            PFNLayer(widths[i], widths[i + 1], last=i == count - 1, eps=config.bn_eps, momentum=config.bn_momentum) for i in range(count)
        )

    def grouped(self, features: Tensor, row: Tensor) -> Tensor:
        """Pillar features (V,C) of grouped points (M,F): the dynamic VFE, without empty slots."""
        sizes = (row[1:] - row[:-1]).long()
        for layer in self.pfn_layers:
            x = torch.relu(layer.norm(layer.linear(features)))
            top = max_over_pillars(x, row)
            features = top if layer.last else torch.cat((x, top.repeat_interleave(sizes, 0)), 1)
        return features

    def padded(self, slots: Tensor) -> Tensor:
        """Pillar features (V,C) of padded slots (V,P,F), empty ones zero: the hard VFE, in which they take part from the norm on."""
        for layer in self.pfn_layers:
            x = layer.norm(layer.linear(slots).flatten(0, 1)).view(*slots.shape[:2], -1)
            x = torch.relu(x)
            top = x.amax(1, keepdim=True)
            slots = top if layer.last else torch.cat((x, top.expand(-1, slots.shape[1], -1)), 2)
        return slots[:, 0]


class BaseBEVBackbone(nn.Module):
    def __init__(self, config: Encoder) -> None:
        super().__init__()
        norm = {"eps": config.bn_eps, "momentum": config.bn_momentum}
        self.blocks, self.deblocks = nn.ModuleList(), nn.ModuleList()
        width = config.pfn_widths[-1]
        for layers, stride, out, up, up_width in zip(
            config.layers, config.strides, config.widths, config.upsample_strides, config.upsample_widths, strict=True
        ):
            # the target pads in a module of its own; padding in the convolution gives the same and keeps the numbering
            first = nn.Conv2d(width, out, 3, stride, padding=1, bias=False)
            block: list[nn.Module] = [nn.Identity(), first, nn.BatchNorm2d(out, **norm), nn.ReLU()]
            for _ in range(layers):
                block += [nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out, **norm), nn.ReLU()]
            self.blocks.append(nn.Sequential(*block))
            lift: nn.Module
            if up >= 1:
                lift = nn.ConvTranspose2d(out, up_width, int(up), int(up), bias=False)
            else:
                lift = nn.Conv2d(out, up_width, round(1 / up), round(1 / up), bias=False)
            self.deblocks.append(nn.Sequential(lift, nn.BatchNorm2d(up_width, **norm), nn.ReLU()))
            width = out

    def forward(self, x: Tensor) -> Tensor:
        lifted = []
        for block, deblock in zip(self.blocks, self.deblocks, strict=True):
            x = block(x)
            lifted.append(deblock(x))
        return torch.cat(lifted, 1)


class PillarEncoder(nn.Module):
    """Clouds -> (B, sum of upsample_widths, H, W)."""

    def __init__(self, config: Encoder) -> None:
        super().__init__()
        config.check_maps()
        self.config = config
        self.vfe = PillarVFE(config)
        self.backbone_2d = BaseBEVBackbone(config)
        self.channels = sum(config.upsample_widths)
        self.cell_m = config.voxel[0] * config.strides[0] / config.upsample_strides[0]

    def forward(self, clouds: Clouds) -> Tensor:
        canvas = self.canvas(clouds)
        return self.backbone_2d(canvas)  # type: ignore[no-any-return]

    def canvas(self, clouds: Clouds) -> Tensor:
        """Pillar features laid on the grid: (B,C,ny,nx), zero where there is no point."""
        nx, ny = self.config.grid
        device = clouds.points.device
        with torch.autocast(device.type, enabled=False):  # half precision would put coordinates on a grid of decimetres
            if not self.config.padded_slots:
                cells, values = self._grouped(clouds)
            elif device.type == "cpu":
                cells, values = self._padded(clouds)
            else:
                cells, values = self._padded_on_device(clouds)
        if torch.is_autocast_enabled(device.type):
            values = values.to(torch.get_autocast_dtype(device.type))
        flat = torch.zeros(len(clouds.sizes) * ny * nx, self.config.pfn_widths[-1], device=device, dtype=values.dtype)
        if len(cells):
            flat = flat.index_copy(0, cells.to(device), values)
        return flat.view(len(clouds.sizes), ny, nx, -1).permute(0, 3, 1, 2)

    def _grouped(self, clouds: Clouds) -> tuple[Tensor, Tensor]:
        features, row, cells = grouped_points(clouds, self.config.low, self.config.high, self.config.voxel)
        return cells, self.vfe.grouped(features, row) if len(features) else features.new_zeros(0, self.config.pfn_widths[-1])

    def _padded_on_device(self, clouds: Clouds) -> tuple[Tensor, Tensor]:
        """Cells and pillar features without leaving the device: plain torch."""
        config = self.config
        nx, ny = config.grid
        slots, cells = [], []
        for index, points in enumerate(clouds.points.float().split(clouds.sizes)):
            x, found = standalone.padded(points, config.low, config.high, config.voxel, config.max_points_per_pillar, config.max_pillars)
            slots.append(x)
            cells.append(found + index * nx * ny)
        x = torch.cat(slots)
        return torch.cat(cells), self.vfe.padded(x) if len(x) else x.new_zeros(0, config.pfn_widths[-1])

    def _padded(self, clouds: Clouds) -> tuple[Tensor, Tensor]:
        config = self.config
        nx, ny = config.grid
        slots, cells = [], []
        for index, points in enumerate(_split(clouds)):
            voxels, coords, counts = hard_voxels(points, config.low, config.high, config.voxel, config.max_points_per_pillar, config.max_pillars)
            slots.append(self._decorated(torch.from_numpy(voxels), torch.from_numpy(coords), torch.from_numpy(counts)))
            cells.append(coords[:, 1].astype(np.int64) * nx + coords[:, 2] + index * nx * ny)
        flat = torch.cat(slots).to(clouds.points.device)
        if not len(flat):
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, config.pfn_widths[-1], device=clouds.points.device)
        return torch.from_numpy(np.concatenate(cells)), self.vfe.padded(flat)

    def _decorated(self, voxels: Tensor, coords: Tensor, counts: Tensor) -> Tensor:
        """Slots (V,P,F) with offsets from the mean and from the voxel's centre appended; empty slots zero."""
        size = torch.tensor(self.config.voxel, dtype=torch.float32)
        centre = coords[:, [2, 1, 0]].float() * size + (size / 2 + torch.tensor(self.config.low, dtype=torch.float32))
        xyz = voxels[:, :, :3]
        mean = xyz.sum(1, keepdim=True) / counts[:, None, None].float()
        there = torch.arange(voxels.shape[1])[None, :] < counts[:, None]
        return torch.cat((voxels, xyz - mean, xyz - centre[:, None]), 2) * there[:, :, None]


def grouped_points(clouds: Clouds, low: Sequence[float], high: Sequence[float], voxel: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Features (M,F+6) f32 of the points inside (raw, xyz minus the pillar's mean, xyz minus its centre), pillar by pillar; row (V+1,) i32, where
    each pillar's points begin; cells (V,) i64 = (cloud * ny + row) * nx + column: by a kernel on the CPU, in plain torch elsewhere."""
    nx, ny = (round((high[axis] - low[axis]) / voxel[axis]) for axis in (0, 1))
    device = clouds.points.device
    features, rows, cells, offset = [], [torch.zeros(1, dtype=torch.int32, device=device)], [], 0
    for index, points in enumerate(clouds.points.detach().float().split(clouds.sizes)):
        if device.type == "cpu":
            own = points.contiguous().numpy()
            found = pillars(own, low, voxel, (nx, ny))
            x, row, at = (torch.from_numpy(a) for a in (pillar_features(own, found), found.row[1:], found.cells.astype(np.int64)))
        else:
            x, pillar, at = standalone.grouped(points, low, high, voxel)
            row = torch.cumsum(torch.bincount(pillar, minlength=len(at)), 0, dtype=torch.int32)
        features.append(x)
        rows.append(row + offset)
        cells.append(at + index * nx * ny)
        offset += len(x)
    return torch.cat(features), torch.cat(rows), torch.cat(cells)


def _split(clouds: Clouds) -> list[np.ndarray[Any, Any]]:
    points = clouds.points.detach().cpu().contiguous().numpy()
    return np.split(points, np.cumsum(clouds.sizes)[:-1])
