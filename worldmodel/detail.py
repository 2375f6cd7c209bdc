"""Detail: what is where a ray passes, in cells a quarter as wide as the state's.

The state is as fine as its network can afford, and a ray that misses a car by two decimetres ends thirty metres farther. So the scene
(`worldmodel.scene`) is kept a second time, cell by cell and without a look around: of the points of a cell the maximum of a small layer, and of
that a few numbers. What stands is kept once, in the frame of the state, in which it stands still; what moves at each instant asked for, where
its motion brings it.

B clips, K instants, N points, L rays, P positions along a ray, R places read around each, C numbers a cell, V cells that have any.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensors.kernels import columns
from worldmodel.config import Encoder
from worldmodel.encoders.contract import Clouds
from worldmodel.encoders.pillars import grouped_points, max_over_pillars
from worldmodel.heads.rays import RayInput
from worldmodel.sampling import read_at
from worldmodel.scene import PAST

FINER, LEAST_CELL_M = 4, 0.2
OF_POINT, WIDTH = 5 + 6, 40  # z, intensity, age, past, whether it moves; where it lies in the cell
HEIGHTS, FREE = 2, 3
SLICES, LOWEST_M, THICK_M = 8, -2.2, 0.6
AROUND = (-0.0165, -0.0055, 0.0055, 0.0165)  # places read around a position, as shares of it: they tile the bins of a ray without evidence
TO_THE_LEFT = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
COLUMN = 1 + HEIGHTS + FREE + 2 + SLICES
FEATURES = len(AROUND) * (2 + FREE + 2 * (HEIGHTS + 1))


def slices_at(height: Tensor) -> Tensor:
    """(..., SLICES) 0..1: how much of each slice is at a height, in m: hats that add up to one, the outermost ones without end."""
    at = ((height - LOWEST_M) / THICK_M).clamp(0, SLICES - 1)
    return (1 - (at[..., None] - torch.arange(SLICES, device=height.device)).abs()).clamp(min=0)


class Kept(NamedTuple):
    """columns (V,C) f32: the numbers of cells; row (B+B*K,h,w) i32: which of them a cell has, -1 for one without points. First come the maps of what
    stands, one for each of `clips`, then those of what moves, clip by clip at every instant. h goes along y."""

    columns: Tensor
    row: Tensor
    clips: int

    @property
    def instants(self) -> int:
        return len(self.row) // self.clips - 1


class Detail(nn.Module):
    """A cell's numbers are: how much is there; HEIGHTS heights in proportion to it; FREE others; where in the cell it is, along x and y, and SLICES
    amounts by height, in proportion to it as well."""

    def __init__(self, config: Encoder, cell_m: float) -> None:
        """cell_m: of the state."""
        super().__init__()
        self.low, self.cell_m = config.low, max(cell_m / FINER, LEAST_CELL_M)
        shape = [-(-round(1000 * (config.high[axis] - config.low[axis])) // round(1000 * self.cell_m)) for axis in (0, 1)]
        self.shape = (shape[1], shape[0])
        self.voxel = (self.cell_m, self.cell_m, config.high[2] - config.low[2])
        self.high = tuple(low + cells * size for low, cells, size in zip(self.low, (*shape, 1), self.voxel, strict=True))
        scale = torch.ones(OF_POINT)
        scale[[-6, -5, -3, -2]] = 1 / self.cell_m
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("around", 1 + torch.tensor(AROUND), persistent=False)
        self.of_point = nn.Linear(OF_POINT + SLICES, WIDTH)
        self.of_cell = nn.Linear(WIDTH, COLUMN, bias=False)

    def forward(self, still: Clouds, moving: Clouds) -> Kept:
        """still: B clouds (N,6), columns as `Scene.still` has them; moving: B*K clouds (N,3), clip by clip."""
        points = still.points.new_zeros(len(still.points) + len(moving.points), 7)
        points[: len(still.points), :6] = still.points
        points[len(still.points) :, :3] = moving.points
        points[len(still.points) :, 6] = 1
        points[:, PAST].tanh_()
        with torch.autocast(points.device.type, enabled=False):  # half precision would put points on a grid of decimetres
            features, first, cells = grouped_points(Clouds(points, still.sizes + moving.sizes), self.low, self.high, self.voxel)
            features = features[:, 2:] * self.scale
            layer = torch.relu(self.of_point(torch.cat((features, slices_at(features[:, 0])), 1)))
            numbers = self.of_cell(max_over_pillars(layer, first) if len(cells) else layer[:0])
        maps = len(still.sizes) + len(moving.sizes)
        row = torch.full((maps * self.shape[0] * self.shape[1],), -1, dtype=torch.int32, device=points.device)
        row[cells] = torch.arange(len(cells), dtype=torch.int32, device=points.device)
        return Kept(numbers, row.view(maps, *self.shape), len(still.sizes))

    def read(self, kept: Kept, rays: RayInput, position: Tensor) -> Tensor:
        """(L,P,FEATURES) f32: what is around the positions (L,P) m of rays at their instants: how much, how much of it at the height of the ray, the
        free numbers, and how far its heights are above the ray and how far it is to the left, at two scales."""
        with torch.autocast(position.device.type, enabled=False):
            found = self.read_by_kernel(kept, rays, position) if position.device.type == "cpu" else self.read_anywhere(kept, rays, position)
            amounts, above, left = found.split((2 + FREE, HEIGHTS, 1), 3)
            return torch.cat((amounts, torch.tanh(2 * above), torch.tanh(10 * above), torch.tanh(4 * left), torch.tanh(20 * left)), 3).flatten(2)

    def read_by_kernel(self, kept: Kept, rays: RayInput, position: Tensor) -> Tensor:
        """What `read_anywhere` gives, and its gradient, on the CPU."""
        of = maps_of(kept, rays).to(torch.int32)
        found: Tensor = _Columns.apply(kept.columns, kept.row, of, rays.origin, rays.direction, position, self.around, self.low, self.cell_m)
        return found

    def read_anywhere(self, kept: Kept, rays: RayInput, position: Tensor) -> Tensor:
        """(L,P,R,2+FREE+HEIGHTS+1) f32: amount, that at the ray's height, free numbers, heights above the ray and metres to its left in proportion to
        the amount."""
        ranges = position[:, :, None] * self.around
        places = rays.origin[:, None, None] + rays.direction[:, None, None] * ranges[..., None]
        maps = torch.cat((kept.columns, kept.columns.new_zeros(1, COLUMN)))[kept.row.long()]
        middle = [low + self.cell_m * (torch.arange(n, device=maps.device) + 0.5) for low, n in zip(self.low[:2], self.shape[::-1], strict=True)]
        where = maps[..., -SLICES - 2 : -SLICES] + torch.stack(torch.meshgrid(*middle, indexing="xy"), 2) * maps[..., :1]
        maps = torch.cat((maps[..., : -SLICES - 2], where, maps[..., -SLICES:]), 3)
        read = [read_at(maps, of[:, None, None].expand_as(ranges), places, self.low, self.cell_m) for of in maps_of(kept, rays).T]
        there, heights, free, where, slices = torch.stack(read).sum(0).split((1, HEIGHTS, FREE, 2, SLICES), 3)
        here = (slices * slices_at(places[..., 2])).sum(3, keepdim=True)
        aside = (where - places[..., :2] * there) @ F.normalize(rays.direction[:, :2] @ TO_THE_LEFT.to(places), dim=1)[:, None, :, None]
        return torch.cat((there, here, free, heights - places[..., 2:] * there, aside), 3)


def maps_of(kept: Kept, rays: RayInput) -> Tensor:
    """(L,2) i64: the maps of what stands, and of what moves at its instant, that a ray reads."""
    return torch.stack((rays.of, kept.clips + rays.of * kept.instants + rays.step), 1)


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor, *where: Any) -> Tensor:
        *arrays, low, cell_m = where
        ctx.arrays = [array.contiguous().numpy() for array in arrays]
        of, position, around = ctx.arrays[1], ctx.arrays[4], ctx.arrays[5]
        ctx.grid = (np.float32(low[:2]), np.float32(cell_m), np.float32([LOWEST_M, THICK_M]), HEIGHTS, FREE)
        ctx.shape = numbers.shape
        out = np.empty((*position.shape, len(around), 3 + FREE + HEIGHTS), np.float32)
        values, bounds = numbers.detach().contiguous().numpy(), np.linspace(0, len(of), torch.get_num_threads() + 1).astype(np.int64)
        with ThreadPoolExecutor(len(bounds) - 1) as pool:
            list(pool.map(lambda part: columns.read(values, *ctx.arrays, *ctx.grid, *part, out), itertools.pairwise(bounds)))
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        out = np.zeros(ctx.shape, np.float32)
        columns.add_gradient(grads[0].contiguous().numpy(), *ctx.arrays, *ctx.grid, out)
        return torch.from_numpy(out), *([None] * (len(ctx.arrays) + 2))
