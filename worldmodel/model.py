"""The world model, from the past sweeps of a clip to range distributions along rays; read it from `forward` down.

Everything predicted lives in the *state frame*: the reference LiDAR's at t = 0 (turned about z by the encoder's `input_yaw_deg`). A static
world stands still in it, ego motion is known geometry, and what has to be learned is what is hidden and what moves. Future poses only
say from where the sensor will look. The state has two parts: maps that a network makes and rolls out, and a finer one, the detail.

B clips whose rays are read with the state, D dense ones that follow them and are only encoded, T past sweeps, K future instants, C channels, H/W
cells, N rays, L of them read with the state, P positions along a ray.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sensors.evidence import MOVED
from worldmodel.config import Config
from worldmodel.detail import FEATURES, Detail, Kept
from worldmodel.dynamics import Dynamics
from worldmodel.encoders.contract import Clouds, build_encoder
from worldmodel.fusion import Fusion
from worldmodel.heads.rays import Mixture, Prior, RayHead, RayInput
from worldmodel.sampling import read_at

OCCUPANCY_SLICES = 16  # of the encoder's range in height
RARE = -3.0  # logit at which a cell that nobody knows anything of is taken to move


@dataclass(frozen=True)
class Batch:
    """clouds: (B+D)*T past sweeps, clip by clip, newest first; present (B+D,T) bool: which of them are there (a withheld one has no points);
    times_s (B,K): future instants. rays: N rays, of which the first `stateful` are read with the state. ranges (N,): the truth, NaN where
    unknown; weight (N,); hidden (N,) bool: the truth lies in a region withheld from all past input; intensity (N,), colour (N,3): of the
    return, NaN where unknown. newest: B+D clouds of the newest past sweep with nothing withheld, seen from newest_origin (B+D,3); movers: B+D clouds,
    points of what moves at t = 0. still: B clouds of what stands, moving: B*(K+1) clouds of what moves, at t = 0 and at the times (`Scene`).
    future: B clouds of the true future sweep at index future_step (B,) of times_s, seen from future_origin (B,3), or None; foretell: ask for its
    latents. clips: their ids."""

    clouds: Clouds
    present: Tensor
    times_s: Tensor
    rays: RayInput
    stateful: int
    ranges: Tensor
    weight: Tensor
    hidden: Tensor
    intensity: Tensor
    colour: Tensor
    newest: Clouds
    newest_origin: Tensor
    movers: Clouds
    still: Clouds
    moving: Clouds
    future: Clouds | None
    future_step: Tensor
    future_origin: Tensor
    foretell: bool
    clips: tuple[str, ...]


@dataclass(frozen=True)
class Output:
    """latents (B+D,T,C',H,W) of the encoder; start (B+D,C,H,W): the states at t = 0; states (B,K+1,C,H,W); model: mixtures of the first
    `stateful` rays, change (L,7,P): what the state added there to the outputs of the prior part, prior: mixtures of all rays."""

    latents: Tensor
    start: Tensor
    states: Tensor
    model: Mixture
    change: Tensor
    prior: Mixture


class WorldModel(nn.Module):
    deep = ("encoder.", "fusion.", "rays.evidence.")  # layers that `worldmodel.optimizer` takes as matrices

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.config = config
        self.encoder = build_encoder(config.encoder)
        self.cell_m = float(self.encoder.cell_m)  # type: ignore[arg-type]
        latent = int(self.encoder.channels)  # type: ignore[arg-type]
        self.fusion = Fusion(latent, 1 if model.join_sweeps else len(model.latent_sweeps), model.channels)
        self.dynamics = Dynamics(model.channels, model.dynamics_width)
        self.detail = Detail(config.encoder, self.cell_m)
        self.rays = RayHead(model.past, model.past + MOVED, model.head_bins, model.head_width, model.channels, model.head_latent_width, FEATURES)
        self.occupancy = nn.Conv2d(model.channels, OCCUPANCY_SLICES, 1)
        self.moving = nn.Sequential(nn.Conv2d(latent, model.channels, 1), nn.ReLU(), nn.Conv2d(model.channels, 1, 1))
        nn.init.constant_(self.moving[2].bias, RARE)  # type: ignore[arg-type]
        self.future_latent = nn.Sequential(nn.Conv2d(model.channels, model.channels, 1), nn.SiLU(), nn.Conv2d(model.channels, latent, 1))

    def forward(self, batch: Batch) -> Output:
        sweeps = batch.present.shape[1]
        latents = self.encode(batch.clouds, sweeps)
        start = self.fusion(latents, batch.present)
        states = self.dynamics.roll_out(start[: len(batch.times_s)], batch.times_s)
        detail = self.detail(batch.still, batch.moving)
        prior = self.rays.prior(batch.rays)
        alone = self.rays.mixture(prior.position, prior.raw, prior.candidate)
        read = prior.first(batch.stateful)
        change = self.change(states, detail, batch.rays.take(slice(0, batch.stateful)), read)
        return Output(latents, start, states, self.changed(read, change), change, alone)

    def encode(self, clouds: Clouds, sweeps: int) -> Tensor:
        """Latents (B,T,C',H,W) of B*T clouds."""
        latents: Tensor = self.encoder(clouds)
        return latents.unflatten(0, (-1, sweeps))

    def encode_target(self, clouds: Clouds) -> Tensor:
        """Latents (B,C',H,W) of clouds as a target: no gradient, and batch statistics are used without being counted."""
        norms = [m for m in self.encoder.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.training]
        for norm in norms:
            norm.track_running_stats = False
        try:
            return self.encoder(clouds)  # type: ignore[no-any-return]
        finally:
            for norm in norms:
                norm.track_running_stats = True

    def read(self, states: Tensor, detail: Kept, rays: RayInput, prior: Prior, share: float = 1.0) -> Mixture:
        """The rays with what the states (B,K+1,C,H,W) and the detail add to their prior; share: how much of it where readings are told."""
        return self.changed(prior, self.change(states, detail, rays, prior), shared(rays, share))

    def change(self, states: Tensor, detail: Kept, rays: RayInput, prior: Prior) -> Tensor:
        """What the states add (L,7,P), see `RayHead.correction`: to readings that are not there, nothing."""
        sampled, beside = self.sample(states, rays, prior.position), self.detail.read(detail, rays, prior.position)
        change = self.rays.correction(rays, sampled, beside, prior)
        absent = prior.raw[:, :1] <= -29.0
        return torch.cat((change[:, :3].masked_fill(absent, 0.0), change[:, 3:]), 1)

    def changed(self, prior: Prior, change: Tensor, share: Tensor | float = 1.0) -> Mixture:
        return self.rays.mixture(prior.position, prior.raw.detach() + change[:, :3] * share, prior.candidate, change[:, 3:])

    def sample(self, states: Tensor, rays: RayInput, position: Tensor) -> Tensor:
        """(L,P,C): each ray's state where its positions (L,P) lie."""
        maps = states.permute(0, 1, 3, 4, 2).flatten(0, 1)
        places = rays.origin[:, None, :2] + rays.direction[:, None, :2] * position[:, :, None]
        of = (rays.of * states.shape[1] + rays.step)[:, None].expand_as(position)
        return read_at(maps, of, places, self.config.encoder.low, self.cell_m)


def shared(rays: RayInput, share: float) -> Tensor:
    """(N,1,1): the share for rays whose readings are told, and 1 where the state alone has to answer."""
    return torch.where(rays.with_evidence & rays.told, share, 1.0)[:, None, None]
