"""The pillar encoder in torch alone: this one file, `config.json` and `model.safetensors` beside it are all that is needed to use it.

    from encoder import load, thinned
    encoder = load("FOLDER")                      # an nn.Module in eval mode
    maps = encoder([thinned(points, 20000)])      # (N,F) float32 clouds -> (B,C,H,W); rows go along y, columns along x, from `low` upwards

Points carry the columns that ``encoder.config["features"]`` names, in the LiDAR's frame, metres, intensity 0..1, dt in seconds >= 0. Where
``encoder.config["max_points"]`` is not 0, it was trained on sweeps that were `thinned` to so many points, those before the newest to half.
Module names are OpenPCDet's (`vfe.pfn_layers.*`, `backbone_2d.blocks.*`, `backbone_2d.deblocks.*`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def thinned(points: Tensor, most: int) -> Tensor:
    """At most `most` points of one sweep (N,F), in their order: drawn, near ones less often, since they lie close together (0: all)."""
    if not most or len(points) <= most:
        return points
    weight = (points[:, :2].norm(dim=1) / 15.0).clamp(0.1, 1.0)
    keys = torch.rand(len(points), device=points.device).log() / weight  # Efraimidis & Spirakis, 2006
    return points[keys.topk(most).indices.sort().values]


def cells_of(points: Tensor, low: Sequence[float], high: Sequence[float], voxel: Sequence[float]) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Indices (M,) of the points (N,F) inside, their cells (M,) = row * nx + column, and (nx, ny); float32 division decides, as in spconv."""
    low_t, size = points.new_tensor(low), points.new_tensor(voxel)
    grid = tuple(round((h - l) / v) for l, h, v in zip(low, high, voxel))
    at = (points[:, :3] - low_t) / size
    inside = ((at >= 0) & (at < points.new_tensor(grid))).all(1)
    index = torch.nonzero(inside)[:, 0]
    cell = at[index].to(torch.int64)
    return index, cell[:, 1] * grid[0] + cell[:, 0], (grid[0], grid[1])


def grouped(points: Tensor, low: Sequence[float], high: Sequence[float], voxel: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Features (M,F+6) of the points inside (raw, xyz minus the pillar's mean, xyz minus its centre), sorted by pillar; the pillar (M,) of
    each; and the cells (V,) of the pillars."""
    index, cell, (nx, _) = cells_of(points, low, high, voxel)
    order = torch.argsort(cell, stable=True)
    inside = points[index[order]]
    cells, pillar, counts = torch.unique_consecutive(cell[order], return_inverse=True, return_counts=True)
    mean = torch.zeros(len(cells), 3, device=points.device).index_add(0, pillar, inside[:, :3]) / counts[:, None]
    return torch.cat((inside, inside[:, :3] - mean[pillar], inside[:, :3] - centres(cells, nx, low, voxel)[pillar]), 1), pillar, cells


def centres(cells: Tensor, nx: int, low: Sequence[float], voxel: Sequence[float]) -> Tensor:
    """(V,3) centres of pillars."""
    at = torch.stack((cells % nx, torch.div(cells, nx, rounding_mode="floor"), torch.zeros_like(cells)), 1).float()
    size = torch.tensor(voxel, dtype=torch.float32, device=cells.device)
    return at * size + (size / 2 + torch.tensor(low, dtype=torch.float32, device=cells.device))


def padded(
    points: Tensor, low: Sequence[float], high: Sequence[float], voxel: Sequence[float], most_points: int, most_pillars: int
) -> tuple[Tensor, Tensor]:
    """Slots (V,most_points,F+6), empty ones zero, and cells (V,): pillars in order of appearance, capped in number and in points."""
    index, cell, (nx, _) = cells_of(points, low, high, voxel)
    order = torch.argsort(cell, stable=True)
    sorted_cells, pillar, counts = torch.unique_consecutive(cell[order], return_inverse=True, return_counts=True)
    starts = torch.cumsum(counts, 0) - counts
    slot = torch.arange(len(order), device=points.device) - starts[pillar]
    appearance = torch.argsort(order[starts]) if len(starts) else starts
    number = torch.empty_like(appearance)
    number[appearance] = torch.arange(len(appearance), device=points.device)
    keep = (slot < most_points) & (number[pillar] < most_pillars)
    kept = min(len(sorted_cells), most_pillars)
    slots = torch.zeros(kept, most_points, points.shape[1], device=points.device)
    slots[number[pillar[keep]], slot[keep]] = points[index[order[keep]]]
    cells = sorted_cells[appearance[:kept]]
    filled = torch.clamp(counts[appearance[:kept]], max=most_points)
    mean = slots[:, :, :3].sum(1, keepdim=True) / filled[:, None, None]
    there = torch.arange(most_points, device=points.device)[None, :] < filled[:, None]
    offsets = slots[:, :, :3] - centres(cells, nx, low, voxel)[:, None]
    return torch.cat((slots, slots[:, :, :3] - mean, offsets), 2) * there[:, :, None], cells


class _PFNLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int, last: bool, norm: dict[str, float]) -> None:
        super().__init__()
        self.last = last
        self.linear = nn.Linear(inputs, outputs if last else outputs // 2, bias=False)
        self.norm = nn.BatchNorm1d(outputs if last else outputs // 2, **norm)


class Encoder(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        norm = {"eps": config["bn_eps"], "momentum": config["bn_momentum"]}
        widths = [len(config["features"]) + 6, *config["pfn_widths"]]
        self.vfe = nn.Module()
        self.vfe.pfn_layers = nn.ModuleList(_PFNLayer(widths[i], widths[i + 1], i == len(widths) - 2, norm) for i in range(len(widths) - 1))
        self.backbone_2d = nn.Module()
        self.backbone_2d.blocks, self.backbone_2d.deblocks = nn.ModuleList(), nn.ModuleList()
        width = widths[-1]
        for layers, stride, out, up, up_width in zip(*(config[k] for k in ("layers", "strides", "widths", "upsample_strides", "upsample_widths"))):
            block = [nn.ZeroPad2d(1), nn.Conv2d(width, out, 3, stride, bias=False), nn.BatchNorm2d(out, **norm), nn.ReLU()]
            for _ in range(layers):
                block += [nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out, **norm), nn.ReLU()]
            self.backbone_2d.blocks.append(nn.Sequential(*block))
            lift = (nn.ConvTranspose2d(out, up_width, int(up), int(up), bias=False) if up >= 1
                    else nn.Conv2d(out, up_width, round(1 / up), round(1 / up), bias=False))  # fmt: skip
            self.backbone_2d.deblocks.append(nn.Sequential(lift, nn.BatchNorm2d(up_width, **norm), nn.ReLU()))
            width = out

    def forward(self, clouds: Sequence[Tensor]) -> Tensor:
        box = (self.config["low"], self.config["high"], self.config["voxel"])
        ny, nx = (round((box[1][i] - box[0][i]) / box[2][i]) for i in (1, 0))
        features, pillars, cells, count = [], [], [], 0
        for index, points in enumerate(clouds):
            if self.config["padded_slots"]:
                x, own = padded(points, *box, self.config["max_points_per_pillar"], self.config["max_pillars"])
            else:
                x, pillar, own = grouped(points, *box)
                pillars.append(pillar + count)
            features.append(x)
            cells.append(own + index * ny * nx)
            count += len(own)
        width = self.vfe.pfn_layers[-1].linear.out_features
        flat = torch.zeros(len(clouds) * ny * nx, width, device=features[0].device)
        if count:  # all clouds at once: while it trains, the norms' statistics are of the batch
            x = torch.cat(features)
            flat[torch.cat(cells)] = self._padded_features(x) if self.config["padded_slots"] else self._grouped_features(x, torch.cat(pillars), count)
        x = flat.view(len(clouds), ny * nx, width).transpose(1, 2).reshape(len(clouds), width, ny, nx)
        lifted = []
        for block, deblock in zip(self.backbone_2d.blocks, self.backbone_2d.deblocks):
            x = block(x)
            lifted.append(deblock(x))
        return torch.cat(lifted, 1)

    def _grouped_features(self, x: Tensor, pillar: Tensor, count: int) -> Tensor:
        for layer in self.vfe.pfn_layers:
            y = torch.relu(layer.norm(layer.linear(x)))
            top = torch.zeros(count, y.shape[1], device=x.device).scatter_reduce(0, pillar[:, None].expand_as(y), y, "amax")
            x = top if layer.last else torch.cat((y, top[pillar]), 1)
        return x

    def _padded_features(self, slots: Tensor) -> Tensor:
        for layer in self.vfe.pfn_layers:
            y = layer.linear(slots)
            y = torch.relu(layer.norm(y.flatten(0, 1)).view_as(y))
            top = y.amax(1, keepdim=True)
            slots = top if layer.last else torch.cat((y, top.expand(-1, slots.shape[1], -1)), 2)
        return slots[:, 0]


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: an 8-byte length, a JSON header, bytes."""
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8:
        raise ValueError(f"{path}: header of {length} bytes in a file of {len(data)}; the file is cut off")
    kinds = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}
    out = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= len(data) - 8 - length:
                raise ValueError(f"{path}: {name} lies beyond the end; the file is cut off")
            raw = bytearray(data[8 + length + first : 8 + length + last])
            kind = kinds[entry["dtype"]]
            out[name] = (torch.frombuffer(raw, dtype=kind) if raw else torch.zeros(0, dtype=kind)).reshape(entry["shape"])
    return out


def load(folder: str | Path) -> Encoder:
    """The encoder of an export folder, in eval mode; every tensor must be there and fit."""
    encoder = Encoder(json.loads((Path(folder) / "config.json").read_text()))
    encoder.load_state_dict(read_safetensors(Path(folder) / "model.safetensors"), strict=True)
    return encoder.eval()
