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
from worldmodel.encoders.contract import Clouds
from worldmodel.model import OCCUPANCY_SLICES, Batch, Output, WorldModel


def loss(model: WorldModel, batch: Batch, output: Output) -> Tensor:
    clouds, origins, states = batch.newest, batch.newest_origin, output.start
    if batch.future is not None:
        of = torch.arange(len(batch.future_step), device=states.device)
        clouds = Clouds(torch.cat((clouds.points, batch.future.points)), clouds.sizes + batch.future.sizes)
        origins = torch.cat((origins, batch.future_origin))
        states = torch.cat((states, output.states[of, batch.future_step + 1]))
    met, through = seen(model, clouds, origins)
    logits = model.occupancy(states).float()
    if_through = F.softplus(logits)
    return 0.5 * (_mean(if_through - logits, met) + _mean(if_through, through))


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum() / where.sum().clamp(min=1)


def seen(model: WorldModel, clouds: Clouds, origins: Tensor) -> tuple[Tensor, Tensor]:
    """(n,Z,H,W) bool each, of n clouds seen from origins (n,3): cells of the state's map, in OCCUPANCY_SLICES of height, with a return, and those
    that only rays passed."""
    encoder, cell = model.config.encoder, model.cell_m
    size = (cell, cell, (encoder.high[2] - encoder.low[2]) / OCCUPANCY_SLICES)
    shape = (*(round((encoder.high[axis] - encoder.low[axis]) / cell) for axis in (0, 1)), OCCUPANCY_SLICES)
    words = []
    for points, origin in zip(clouds.points[:, :3].cpu().split(clouds.sizes), origins.cpu().numpy(), strict=True):
        cloud = points.numpy()
        met = columns(cloud, encoder.low, size, shape)
        words.append((met, free_space(cloud, origin, encoder.low, size, shape, met)))
    rows = np.array(words).transpose(0, 1, 3, 2)  # (n,2,Y,X), a bit for each slice
    bits = np.unpackbits(rows.astype("<u8")[..., None].view(np.uint8), axis=4, count=OCCUPANCY_SLICES, bitorder="little")
    met, through = torch.from_numpy(bits).bool().permute(0, 1, 4, 2, 3).to(clouds.points.device).unbind(1)
    return met, through
