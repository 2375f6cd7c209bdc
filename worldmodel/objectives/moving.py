"""What may move: from the latent itself, which cells hold a thing that was found to move (`sensors.motion`), without labels.

What could move and stands still counts as standing still. Where the encoder sees several sweeps it can tell the two apart; where it sees the newest
alone it cannot, and learns what road users look like. A cell that moves counts POSITIVE_WEIGHT times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.model import Batch, Output, WorldModel

POSITIVE_WEIGHT = 3.0


def loss(model: WorldModel, batch: Batch, output: Output) -> Tensor:
    logits = model.moving(output.latents[:, 0])[:, 0].float()
    weight = logits.new_tensor(POSITIVE_WEIGHT)
    return F.binary_cross_entropy_with_logits(logits, cells(model, batch, logits.shape).to(logits.dtype), pos_weight=weight)


def cells(model: WorldModel, batch: Batch, shape: torch.Size) -> Tensor:
    """(B+D,H,W) bool, of the shape given: cells of the latent's map with a point of what moves."""
    low, points = model.config.encoder.low, batch.movers.points
    out = torch.zeros(shape, dtype=torch.bool, device=points.device)
    of = torch.repeat_interleave(torch.arange(shape[0]), torch.tensor(batch.movers.sizes)).to(points.device)
    row, column = (torch.floor((points[:, axis] - low[axis]) / model.cell_m).long() for axis in (1, 0))
    inside = (row >= 0) & (row < shape[1]) & (column >= 0) & (column < shape[2])
    out[of[inside], row[inside], column[inside]] = True
    return out
