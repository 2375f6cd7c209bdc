"""Past latents -> one state: the maps of the past sweeps, all in the present frame, newest first, become z_0."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Fusion(nn.Module):
    """Latents (B,T,C,H,W) -> state (B,channels,H,W). A sweep that is withheld is a map of zeros with a flag of its own."""

    def __init__(self, latent: int, sweeps: int, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(latent, channels, 1)
        self.join = nn.Conv2d(sweeps * channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)
        self.direct = nn.Conv2d(latent, channels, 1)
        self.absent = nn.Parameter(torch.zeros(sweeps, channels))

    def forward(self, latents: Tensor, present: Tensor) -> Tensor:
        """present (B,T) bool: which sweeps are there."""
        batch, sweeps = latents.shape[:2]
        there = present[:, :, None, None, None].to(latents.dtype)
        x = torch.relu(self.squeeze(latents.flatten(0, 1))).unflatten(0, (batch, sweeps))
        x = x * there + self.absent[None, :, :, None, None] * (1 - there)
        x = torch.relu(self.norm(self.join(x.flatten(1, 2))))
        return x + self.direct(latents[:, 0]) * there[:, 0]  # type: ignore[no-any-return]
