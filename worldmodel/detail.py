"""Detail: what stands where a ray passes, in cells a quarter as wide as the state's.

The state is as fine as its network can afford, and a ray that misses a car by two decimetres ends thirty metres farther. So the past sweeps
are kept a second time, cell by cell and without a look around: of the points of a cell the maximum of a small layer, and of that a few numbers.
A static world stands still in the frame of the state, so nothing is foretold here; what has driven away since, the state has to say.

B clips, N points, L rays, P positions along a ray, R places read around each, C numbers a cell, K slices of height.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sensors.kernels import columns
from worldmodel.config import Encoder
from worldmodel.encoders.contract import Clouds
from worldmodel.encoders.pillars import grouped_points, max_over_pillars
from worldmodel.heads.rays import RayInput
from worldmodel.sampling import read_at

FINER, LEAST_CELL_M = 4, 0.2
WIDTH = 40
HEIGHTS, FREE = 2, 3
SLICES, LOWEST_M, THICK_M = 8, -2.2, 0.6
AROUND = (-0.0165, -0.0055, 0.0055, 0.0165)  # places read around a position, as shares of it: they tile the bins of a ray without evidence
FEATURES = len(AROUND) * (2 + 2 * HEIGHTS + FREE)


def slices_at(height: Tensor) -> Tensor:
    """(..., SLICES) 0..1: how much of each slice is at a height, in m: hats that add up to one, the outermost ones without end."""
    at = ((height - LOWEST_M) / THICK_M).clamp(0, SLICES - 1)
    return (1 - (at[..., None] - torch.arange(SLICES, device=height.device)).abs()).clamp(min=0)


class Detail(nn.Module):
    """A cell's numbers are: how much is there, HEIGHTS heights and SLICES amounts by height, each in proportion to it, and FREE others."""

    def __init__(self, config: Encoder, cell_m: float) -> None:
        """cell_m: of the state."""
        super().__init__()
        self.low, self.cell_m = config.low, max(cell_m / FINER, LEAST_CELL_M)
        width = len(config.features) - 2 + 6
        shape = [-(-round(1000 * (config.high[axis] - config.low[axis])) // round(1000 * self.cell_m)) for axis in (0, 1)]
        self.shape = (shape[1], shape[0])
        self.voxel = (self.cell_m, self.cell_m, config.high[2] - config.low[2])
        self.high = tuple(low + cells * size for low, cells, size in zip(self.low, (*shape, 1), self.voxel, strict=True))
        scale = torch.ones(width)
        scale[[-6, -5, -3, -2]] = 1 / self.cell_m
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("around", 1 + torch.tensor(AROUND), persistent=False)
        self.of_point = nn.Linear(width + SLICES, WIDTH)
        self.of_cell = nn.Linear(WIDTH, 1 + HEIGHTS + FREE + SLICES, bias=False)

    def forward(self, clouds: Clouds) -> Tensor:
        """Maps (B,h,w,C) f32 of B clouds, zero where there is no point; h goes along y."""
        with torch.autocast(clouds.points.device.type, enabled=False):  # half precision would put points on a grid of decimetres
            features, row, cells = grouped_points(clouds, self.low, self.high, self.voxel)
            features = features[:, 2:] * self.scale
            points = torch.relu(self.of_point(torch.cat((features, slices_at(features[:, 0])), 1)))
            maps = points.new_zeros(len(clouds.sizes) * self.shape[0] * self.shape[1], self.of_cell.out_features)
            if len(cells):
                maps = maps.index_copy(0, cells, self.of_cell(max_over_pillars(points, row)))
        return maps.view(len(clouds.sizes), *self.shape, -1)

    def read(self, maps: Tensor, rays: RayInput, position: Tensor) -> Tensor:
        """(L,P,FEATURES) f32: what is around the positions (L,P) m of rays: how much, how much of it at the height of the ray, the free numbers, and
        how far its heights are above the ray, at two scales."""
        with torch.autocast(maps.device.type, enabled=False):
            found = self.read_by_kernel(maps, rays, position) if maps.device.type == "cpu" else self.read_anywhere(maps, rays, position)
            above = found[..., -HEIGHTS:]
            return torch.cat((found[..., :-HEIGHTS], torch.tanh(2 * above), torch.tanh(10 * above)), 3).flatten(2)

    def read_by_kernel(self, maps: Tensor, rays: RayInput, position: Tensor) -> Tensor:
        """What `read_anywhere` gives, and its gradient, on the CPU."""
        found: Tensor = _Columns.apply(maps, rays.of.to(torch.int32), rays.origin, rays.direction, position, self.around, self.low, self.cell_m)
        return found

    def read_anywhere(self, maps: Tensor, rays: RayInput, position: Tensor) -> Tensor:
        """(L,P,R,2+FREE+HEIGHTS) f32: amount, that at the ray's height, free numbers, heights above the ray in proportion to the amount."""
        ranges = position[:, :, None] * self.around
        places = rays.origin[:, None, None] + rays.direction[:, None, None] * ranges[..., None]
        of = rays.of[:, None, None].expand_as(ranges)
        there, heights, free, slices = read_at(maps, of, places, self.low, self.cell_m).split((1, HEIGHTS, FREE, SLICES), 3)
        here = (slices * slices_at(places[..., 2])).sum(3, keepdim=True)
        return torch.cat((there, here, free, heights - places[..., 2:] * there), 3)


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, *where: Any) -> Tensor:
        *arrays, low, cell_m = where
        ctx.arrays = [array.contiguous().numpy() for array in arrays]
        of, position, around = ctx.arrays[0], ctx.arrays[3], ctx.arrays[4]
        ctx.grid = (np.float32(low[:2]), np.float32(cell_m), np.float32([LOWEST_M, THICK_M]), HEIGHTS, FREE)
        ctx.shape = maps.shape
        out = np.empty((*position.shape, len(around), 2 + FREE + HEIGHTS), np.float32)
        values, bounds = maps.detach().contiguous().numpy(), np.linspace(0, len(of), torch.get_num_threads() + 1).astype(np.int64)
        with ThreadPoolExecutor(len(bounds) - 1) as pool:
            list(pool.map(lambda part: columns.read(values, *ctx.arrays, *ctx.grid, *part, out), itertools.pairwise(bounds)))
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        out = np.zeros(ctx.shape, np.float32)
        columns.add_gradient(grads[0].contiguous().numpy(), *ctx.arrays, *ctx.grid, out)
        return torch.from_numpy(out), *([None] * (len(ctx.arrays) + 2))
