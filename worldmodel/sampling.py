"""Reading the state where rays lie: bilinear, by a kernel on the CPU and by grid_sample elsewhere; both give the same and so do their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sensors.kernels.sample_map import gather, scatter


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, of: Tensor, places: Tensor) -> Tensor:
        values = maps.detach().numpy()
        out = np.empty((len(of), maps.shape[3]), np.float32)
        bounds = np.linspace(0, len(of), max(torch.get_num_threads(), 1) + 1).astype(np.int64)
        with ThreadPoolExecutor(len(bounds) - 1) as pool:
            list(pool.map(lambda i: gather(values, of.numpy(), places.numpy(), bounds[i], bounds[i + 1], out), range(len(bounds) - 1)))
        ctx.save_for_backward(of, places)
        ctx.shape = maps.shape
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        of, places = ctx.saved_tensors
        out = np.zeros(ctx.shape, np.float32)
        scatter(grads[0].contiguous().numpy(), of.numpy(), places.numpy(), out)
        return torch.from_numpy(out), None, None


def sample_maps(maps: Tensor, of: Tensor, places: Tensor) -> Tensor:
    """maps (B,H,W,C) f32 read at places (N,2) f32 = (row, column) in cells, cell centres at integers; of (N,) i32 says which map.
    (N,C) f32; zero beyond the map."""
    if maps.device.type == "cpu":
        return _Gather.apply(maps.float().contiguous(), of.to(torch.int32).contiguous(), places.float().contiguous())  # type: ignore[no-any-return]
    height, width = maps.shape[1:3]
    out = maps.new_zeros(len(of), maps.shape[3], dtype=torch.float32)
    for b in range(len(maps)):
        rows = torch.nonzero(of == b)[:, 0]
        x = (places[rows, 1] + 0.5) * (2 / width) - 1
        y = (places[rows, 0] + 0.5) * (2 / height) - 1
        grid = torch.stack((x, y), 1)[None, None].float()
        read = F.grid_sample(maps[b].permute(2, 0, 1)[None].float(), grid, align_corners=False)
        out = out.index_copy(0, rows, read[0, :, 0].T)
    return out


def read_at(maps: Tensor, of: Tensor, places: Tensor, low: Sequence[float], cell_m: float) -> Tensor:
    """maps (B,H,W,C) of square cells from low on read at places (...,2+) m, x y first; of (...): which map. (...,C) f32."""
    cells = torch.stack(((places[..., 1] - low[1]) / cell_m - 0.5, (places[..., 0] - low[0]) / cell_m - 0.5), -1)
    return sample_maps(maps, of.reshape(-1), cells.reshape(-1, 2)).unflatten(0, of.shape)
