"""What is where: from the state, which cells the sweep of the present and that of a future instant met, and which they saw through.

Dense beside the ray objectives: every cell in the sensor's sight is asked about, the withheld ones too. Both kinds count the same, however
many cells there are of each; cells behind a return are nobody's business.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sensors.kernels.occupancy import columns
from sensors.kernels.traversal import free_space
from worldmodel.model import OCCUPANCY_SLICES, Batch, Output, WorldModel


def loss(model: WorldModel, batch: Batch, output: Output) -> Tensor | None:
    if batch.future is None:
        return None
    met, through = seen(model, batch)
    of = torch.arange(len(batch.future_step), device=output.states.device)
    states = torch.cat((output.states[of, batch.future_step + 1], output.states[:, 0]))
    logits = model.occupancy(states).float()
    return 0.5 * (_mean(F.softplus(-logits), met) + _mean(F.softplus(logits), through))


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum() / where.sum().clamp(min=1)


def seen(model: WorldModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """(2B,Z,H,W) bool each: cells of the state's map, in OCCUPANCY_SLICES of height, with a return of the batch's `future` clouds, and those that
    only their rays passed."""
    assert batch.future is not None
    encoder, cell = model.config.encoder, model.cell_m
    size = (cell, cell, (encoder.high[2] - encoder.low[2]) / OCCUPANCY_SLICES)
    shape = (*(round((encoder.high[axis] - encoder.low[axis]) / cell) for axis in (0, 1)), OCCUPANCY_SLICES)
    words = []
    for points, origin in zip(batch.future.points[:, :3].cpu().split(batch.future.sizes), batch.future_origin.cpu().numpy(), strict=True):
        cloud = points.numpy()
        met = columns(cloud, encoder.low, size, shape)
        words.append((met, free_space(cloud, origin, encoder.low, size, shape, met)))
    both = torch.from_numpy(np.array(words).astype(np.int64)).to(batch.future.points.device)  # (2B,2,X,Y)
    bits = (both[:, :, None] >> torch.arange(OCCUPANCY_SLICES, device=both.device)[:, None, None]) & 1
    met, through = bits.bool().transpose(3, 4).unbind(1)
    return met, through
