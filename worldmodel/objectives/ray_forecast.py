"""Where the returns of the present and of the next second lie: minus the log density at the true range, plus a small CRPS.

A term for the rays read with the state and one for the prior alone: what the evidence says by itself is learned beside the model, on the
same batch, and no gradient of the state's reading flows into it (`worldmodel.heads.rays`). What the state adds to evidence has a small price."""

from __future__ import annotations

import torch
from torch import Tensor

from worldmodel.heads.rays import Mixture
from worldmodel.model import Batch, Output, WorldModel

CRPS_RAYS = 4096
CHANGE_PRICE = 0.02


def range_loss(mixture: Mixture, ranges: Tensor, weight: Tensor, crps_weight: float) -> Tensor:
    """Weighted mean over rays of -log density at ranges (N,) + crps_weight * CRPS; the latter of some CRPS_RAYS spread over larger batches, since
    other devices than the CPU hold all pairs of a ray's positions."""
    total = weight.sum().clamp(min=1e-6)
    loss = -(mixture.log_density(ranges) * weight).sum() / total
    if crps_weight > 0:
        rows = torch.arange(0, len(ranges), max(1, len(ranges) // CRPS_RAYS), device=ranges.device)
        few = mixture.take(rows)
        loss = loss + crps_weight * (few.crps(ranges[rows]) * weight[rows]).sum() / weight[rows].sum().clamp(min=1e-6)
    return loss


def appearance_loss(mixture: Mixture, batch: Batch) -> Tensor:
    """Mean absolute error of intensity, and of colour where a camera saw the return."""
    if mixture.intensity is None or mixture.colour is None:
        return batch.ranges.new_zeros(())
    known = ~batch.intensity[: batch.stateful].isnan()
    loss = (mixture.intensity - batch.intensity[: batch.stateful].nan_to_num(0.0)).abs()[known].sum() / known.sum().clamp(min=1)
    seen = ~batch.colour[: batch.stateful].isnan().any(1)
    difference = (mixture.colour - batch.colour[: batch.stateful].nan_to_num(0.0)).abs().mean(1)
    return loss + (difference * seen).sum() / seen.sum().clamp(min=1)


def loss(model: WorldModel, batch: Batch, output: Output) -> Tensor:
    crps_weight = model.config.train.crps_weight
    open_ = (~batch.hidden).float() * batch.weight
    rays = batch.rays.take(slice(0, batch.stateful))
    forecast = range_loss(output.model, batch.ranges[: batch.stateful], open_[: batch.stateful], crps_weight)
    told = (rays.told & rays.with_evidence).float()
    price = (output.change[:, :3].square().mean((1, 2)) * told).sum() / told.sum().clamp(min=1)
    prior = range_loss(output.prior, batch.ranges, batch.weight, crps_weight)
    return forecast + prior + CHANGE_PRICE * price + appearance_loss(output.model, batch)
