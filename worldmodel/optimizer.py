"""How the world model learns: the deep layers, linear and convolutions, by orthogonalised momentum, everything else by AdamW.

A gradient's few strong directions are those that most rays agree on; a step of equal length along all of its directions learns from the rare
ones, too, in a fraction of AdamW's steps (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024). Its length is
scaled to that of AdamW's steps, so that both share a learning rate (Liu et al., "Muon is scalable for LLM training", 2025). Layers whose output is
read as numbers, and the small ones that read the state along a ray, learn better by AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
LIKE_ADAMW = 0.2  # root mean square of AdamW's step, in learning rates
DECAY = 0.1  # of the matrices, times the rate
QUINTIC = (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5: brings singular values from 0..1 to 0.7..1.2 in ROUNDS rounds
ROUNDS = 5
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def orthogonalized(matrix: Tensor) -> Tensor:
    """U V^T, nearly, of a matrix (M,N) = U S V^T: its singular values brought to 0.7..1.2 by Newton-Schulz rounds in bf16; f32. Zero stays zero."""
    a, b, c = QUINTIC
    x = matrix.bfloat16()
    if tall := len(matrix) > matrix.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Steps of root mean square LIKE_ADAMW times the group's `lr` for weights (M, ...), taken as matrices of M rows."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
                matrix = weight.grad.lerp(momentum, MOMENTUM).flatten(1)
                length = group["lr"] * LIKE_ADAMW * max(matrix.shape) ** 0.5
                weight.mul_(1 - group["lr"] * DECAY).sub_(orthogonalized(matrix).view(weight.shape), alpha=length)


def optimizers_of(model: nn.Module, deep: tuple[str, ...], rate_of: Callable[[str], float], weight_decay: float) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the weights of those linear and convolution layers whose names start as `deep` says. rate_of: the peak rate of a
    parameter by its name, which its group keeps as `peak`; weight_decay: AdamW's, of what is neither vector nor embedding."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS) and name.startswith(deep)}
    matrices = {f"{name}.weight" for name, layer in layers.items() if min(layer.weight.flatten(1).shape) > 1}  # type: ignore[operator]
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decay = weight_decay if parameter.ndim > 1 and "embedding" not in name else 0.0
        groups.setdefault((name in matrices, rate_of(name), decay), []).append(parameter)
    of = {
        muon: [{"params": found, "lr": rate, "peak": rate, "weight_decay": decay} for (m, rate, decay), found in groups.items() if m == muon]
        for muon in (False, True)
    }
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(of[False], betas=(0.9, 0.98))]
    return [*made, Muon(of[True])] if of[True] else made
