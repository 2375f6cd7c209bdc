"""What the encoder will see: from the state rolled out to a future instant, how the encoder's latent of one sweep changes from the present
to that instant; both sweeps are in the present frame like all points. The target is normalised over channels and gets no gradient; it
cannot collapse alone, since the same encoder carries the ray objectives. Asked only where either sweep has something."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.encoders.contract import Clouds
from worldmodel.model import Batch, Output, WorldModel


def loss(model: WorldModel, batch: Batch, output: Output) -> Tensor | None:
    if batch.future is None or not batch.foretell:
        return None
    with torch.no_grad():
        change, busy = change_of(model.encode_target(future_and_newest(batch)))
    error = F.smooth_l1_loss(foretold(model, batch, output), change, reduction="none").mean(3)
    return (error * busy).sum() / busy.sum().clamp(min=1)


def future_and_newest(batch: Batch) -> Clouds:
    """B future clouds, then the newest past ones of the same clips."""
    assert batch.future is not None
    sizes = batch.newest.sizes[: len(batch.future.sizes)]
    return Clouds(torch.cat((batch.future.points, batch.newest.points[: sum(sizes)])), batch.future.sizes + sizes)


def foretold(model: WorldModel, batch: Batch, output: Output) -> Tensor:
    """(B,H,W,C'): the change that the states tell."""
    rows = torch.arange(len(batch.future_step), device=output.states.device)
    return model.future_latent(output.states[rows, batch.future_step + 1]).float().permute(0, 2, 3, 1)


def change_of(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Of latents (2B,C',H,W), future then present: the change (B,H,W,C') of the normalised vectors, and where (B,H,W) there is anything."""
    flat = latents.float().permute(0, 2, 3, 1)
    future, present = F.layer_norm(flat, flat.shape[3:]).chunk(2)
    background = flat.flatten(0, 2)[::61].median(0).values  # most cells are empty
    busy = ((flat - background).abs().sum(3) > 1e-3).unflatten(0, (2, -1)).any(0)
    return future - present, busy
