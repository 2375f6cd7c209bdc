"""Roll-out of the state: z_(k+1) = z_k + dt g(z_k), one step a future frame."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn, stack

GROUPS = 4
GAIN = 0.1  # AdamW's steps are as large for any layer; what leaves this one is added up over all instants


class Dynamics(nn.Module):
    """g works at half the resolution of the state, where a step of motion is one or two cells, and is added back at full resolution. It is applied
    to what it gave itself, step after step, so that its layers are normalised: without, they grew until what they gave was either nothing, for
    every street, or without bounds."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.entered = nn.GroupNorm(GROUPS, width)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.crossed = nn.GroupNorm(GROUPS, width)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def step(self, state: Tensor, dt_s: Tensor) -> Tensor:
        """state (B,C,H,W) -> the state dt_s (B,) later."""
        x = F.silu(self.entered(self.enter(state)))
        x = F.silu(self.crossed(self.middle(x)))
        change = self.leave(x) * (GAIN * dt_s[:, None, None, None]).to(state.dtype)
        return state + F.interpolate(change, size=state.shape[2:], mode="bilinear", align_corners=False)

    def roll_out(self, state: Tensor, times_s: Tensor) -> Tensor:
        """States (B,K+1,C,H,W) at t = 0 and at times_s (B,K), ascending."""
        states, now = [state], times_s.new_zeros(len(times_s))
        for k in range(times_s.shape[1]):
            states.append(self.step(states[-1], times_s[:, k] - now))
            now = times_s[:, k]
        return stack(states, 1)
