"""What the encoder will see: from the state rolled out to a future instant, the change of the encoder's latent from the present to the true
future sweep, which is in the present frame like all points. The target is normalised over channels and gets no gradient; it cannot
collapse alone, since the same latents carry the ray objectives. Asked only where either sweep has something."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.model import Batch, Output, WorldModel


def loss(model: WorldModel, batch: Batch, output: Output) -> Tensor:
    if batch.future is None:
        return output.states.new_zeros(())
    with torch.no_grad():
        future = model.encode_target(batch.future).float()
    rows = torch.arange(len(batch.future_step), device=future.device)
    predicted = model.future_latent(output.states[rows, batch.future_step + 1]).float().permute(0, 2, 3, 1)
    present = output.latents[:, 0].detach().float()
    busy = (present.abs().amax(1) > 0) | (future.abs().amax(1) > 0)
    usable = busy & batch.present[:, 0][:, None, None]
    error = F.smooth_l1_loss(predicted, normalised(future) - normalised(present), reduction="none").mean(3)
    return (error * usable).sum() / usable.sum().clamp(min=1)


def normalised(latent: Tensor) -> Tensor:
    """(B,H,W,C) from (B,C,H,W): every cell's vector with mean 0 and deviation 1."""
    return F.layer_norm(latent.permute(0, 2, 3, 1), (latent.shape[1],))
