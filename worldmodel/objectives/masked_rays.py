"""Ranges into a region that was withheld from all past input and from the evidence: the head is asked for what is hidden there, so that
collapsing cannot pay."""

from __future__ import annotations

from torch import Tensor

from worldmodel.model import Batch, Output, WorldModel


def loss(model: WorldModel, batch: Batch, output: Output) -> Tensor | None:
    weight = (batch.hidden.float() * batch.weight)[: batch.stateful]
    if not weight.any():
        return None
    density = output.model.log_density(batch.ranges[: batch.stateful])
    return -(density * weight).sum() / weight.sum().clamp(min=1.0)
