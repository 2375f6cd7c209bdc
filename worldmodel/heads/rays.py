"""The ray head: where along a ray will the return be.

A ray is read at P positions sorted by range. With evidence they are the readings of the past (quadrants and interpolation of each sweep,
and of the copies of the newest), planes through all sweeps' readings around each interpolation, and geometric bins from 2 to 56.4 m for
surfaces that nobody has seen; without evidence they are P finer bins. Between the two: the readings are positions, and the state alone has to
say which of them holds. Each position gets a hazard h, a centre m and a scale s; p_i = h_i prod_{j<i} (1 - h_j), and F(r) = sum_i p_i Laplace
CDF. That one F serves the loss, the median, the quantiles, CRPS and PIT.

Two parts add up at every position. The *prior* part knows the ray alone: its evidence, or, without any, its elevation and horizon; on
its own it is the `evidence_only` arm that every table shows. The *latent* part reads the state z_k where the position lies, heights of
surfaces among it, and the detail around it (`worldmodel.detail`), and corrects the prior's outputs; no gradient flows from it into the prior
part, so that the arm stays what it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensors.evidence import ALONG_EVERY, ALONG_M, AROUND_RAD, DISPLACED
from sensors.kernels.ray_loss import crps_loss
from worldmodel.planes import plane_ranges

FIRST_BIN_M, LAST_BIN_M = 2.0, 56.4
MEAN_FREE_PATH_M = 40.0
MIN_SCALE_M = 0.02
ABSENT_LOGIT = -30.0
NEAR_ENOUGH_RAD = float(np.deg2rad(3.0))  # a reading farther off in angle is no evidence about a ray
RAY_CONTEXT = 16
MOST_OFFSET = 0.08  # of a bin's centre, as the logarithm of a ratio
SURFACES, FIRST_HEIGHT_M = 2, -1.5  # heights that the state tells at a place, and where they begin
LEAST_SLOPE = 0.01


def bin_centres(count: int) -> Tensor:
    """Geometric bin centres (count,) f32 between FIRST_BIN_M and LAST_BIN_M."""
    edges = torch.logspace(np.log10(FIRST_BIN_M), np.log10(LAST_BIN_M), count + 1, dtype=torch.float64)
    return (edges[1:] * edges[:-1]).sqrt().float()


def constant_density_logits(count: int) -> Tensor:
    """Logits (count,) of bins whose hazard is that of a constant density along the ray: h = 1 - exp(-w / MEAN_FREE_PATH_M) for width w."""
    edges = torch.logspace(np.log10(FIRST_BIN_M), np.log10(LAST_BIN_M), count + 1, dtype=torch.float64)
    return torch.log(torch.expm1((edges[1:] - edges[:-1]) / MEAN_FREE_PATH_M)).float()


@dataclass(frozen=True)
class RayInput:
    """N rays as the head sees them. origin, direction (N,3) f32 in the frame of the state; of (N,) i64: which clip of the batch; step (N,) i64:
    0 = present, 1.. = future instants; horizon_s (N,); bearing (N,3): elevation, sine and cosine of azimuth in the sensor's frame.
    Evidence as in `sensors.evidence` (S readings, T sweeps), NaN where absent; with_evidence (N,) bool is False where it is withheld, told (N,)
    bool is False where its readings are only places to look at, and nothing else of them is known."""

    origin: Tensor
    direction: Tensor
    of: Tensor
    step: Tensor
    horizon_s: Tensor
    bearing: Tensor
    with_evidence: Tensor
    told: Tensor
    quadrants: Tensor
    interpolated: Tensor
    nearest: Tensor
    offsets: Tensor
    angle: Tensor
    seen: Tensor
    along: Tensor
    around: Tensor
    paced: Tensor

    def take(self, rows: Tensor | slice) -> RayInput:
        return RayInput(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


class Mixture(NamedTuple):
    """centre (N,P) m, scale (N,P) m, log_mass (N,P), log_left (N,): log of the mass beyond the last position; intensity (N,) and colour (N,3)
    in 0..1, or None where the latent part was not asked."""

    centre: Tensor
    scale: Tensor
    log_mass: Tensor
    log_left: Tensor
    intensity: Tensor | None
    colour: Tensor | None

    @staticmethod
    def joined(parts: Sequence[Mixture]) -> Mixture:
        """The rays of all parts, in fp32 on the CPU."""
        return Mixture(*(None if column[0] is None else torch.cat(column).float().cpu() for column in zip(*parts, strict=True)))

    def take(self, rows: Tensor | slice) -> Mixture:
        """Some of the rays."""
        return Mixture(*(None if column is None else column[rows] for column in self))

    def masses(self) -> Tensor:
        """(N,P): the mass of each position given that there is a return, so that they sum to 1."""
        return (self.log_mass - torch.logsumexp(self.log_mass, 1, keepdim=True)).exp()

    def log_density(self, ranges: Tensor) -> Tensor:
        """log of the (unconditional) density at ranges (N,), fp32."""
        laplace = -(ranges[:, None] - self.centre).abs() / self.scale - torch.log(2 * self.scale)
        return torch.logsumexp(self.log_mass + laplace, 1)

    def crps(self, ranges: Tensor) -> Tensor:
        """CRPS (N,) in metres at ranges (N,), given that there is a return; the formula is that of `sensors.kernels.ray_loss`."""
        if ranges.device.type != "cpu":
            return self.crps_anywhere(ranges)
        found: Tensor = _Crps.apply(self.log_mass, self.centre, self.scale, ranges)
        return found

    def crps_anywhere(self, ranges: Tensor) -> Tensor:
        """What `crps` gives, by torch and of all pairs of positions."""
        p = self.masses()
        d = (self.centre - ranges[:, None]).abs()
        to_truth = (p * (d + self.scale * torch.exp(-d / self.scale))).sum(1)
        gap = (self.centre[:, :, None] - self.centre[:, None, :]).abs()
        s = 0.5 * (self.scale[:, :, None] + self.scale[:, None, :])
        pair = gap + 0.5 * (3 * s + gap) * torch.exp(-gap / s)
        return to_truth - 0.5 * (p[:, :, None] * p[:, None, :] * pair).sum((1, 2))


class _Crps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_mass: Tensor, centre: Tensor, scale: Tensor, ranges: Tensor) -> Tensor:
        value, *gradients = crps_loss(*(column.detach().float().numpy() for column in (log_mass, centre, scale, ranges)))
        ctx.gradients = [torch.from_numpy(gradient) for gradient in gradients]
        return torch.from_numpy(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return *(grads[0][:, None] * gradient for gradient in ctx.gradients), None


class Prior(NamedTuple):
    """What the ray alone says, sorted by range: position (N,P); raw (N,3,P): hazard logit, offset and scale; kind (N,P); candidate (N,P) bool;
    shift (N,P): by how many metres a displaced copy's reading lies farther than the newest sweep's own, 0 elsewhere and where readings are not
    told; hidden (N,width): the vector behind it, zero for rays without evidence."""

    position: Tensor
    raw: Tensor
    kind: Tensor
    candidate: Tensor
    shift: Tensor
    hidden: Tensor

    def first(self, count: int) -> Prior:
        return Prior(*(column[:count] for column in self))


def evidence_features(rays: RayInput) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N,E) of rays with evidence, their candidate ranges (N,S*5+T) and which of those exist (N,S*5+T) bool.

    Ranges enter relative to a reference, the newest sweep's nearest reading, at three scales (metres, decimetres, centimetres)."""
    count = len(rays.nearest)
    known = ~rays.nearest.isnan()
    first = known.to(torch.int8).argmax(1, keepdim=True)
    reference = rays.nearest.gather(1, first).nan_to_num(20.0).clamp(1.0, 120.0)
    candidates = torch.cat((rays.quadrants, rays.interpolated[:, :, None]), 2)
    ranges = torch.cat((candidates, rays.nearest[:, :, None]), 2)
    there = ~ranges.isnan()
    sweeps = rays.seen.shape[1]
    planes, support = plane_ranges(rays.quadrants[:, :sweeps], rays.offsets[:, :sweeps], rays.bearing[:, 0].cos(), rays.interpolated[:, :sweeps])
    flat = ~planes.isnan()
    of_planes = torch.log(planes.nan_to_num(1.0).clamp(0.5, 200.0) / reference) * flat
    log = torch.log(ranges.nan_to_num(1.0).clamp(0.5, 200.0) / reference[:, :, None]) * there
    log = log.reshape(count, -1)
    offsets = rays.offsets.nan_to_num(0.0) * torch.tensor([1 / 0.0061, 1 / 0.0087], device=log.device)
    angle = torch.log1p(rays.angle.nan_to_num(1.0) / 0.003)
    seen = rays.seen.flatten(1)
    seen_there = ~seen.isnan()
    seen = seen.nan_to_num(0.0)
    along = rays.along.flatten(1)
    beside = ~rays.around.isnan()
    of_around = torch.log(rays.around.nan_to_num(1.0).clamp(0.5, 200.0) / reference) * beside
    kept = ~rays.paced.isnan()
    of_paced = torch.log(rays.paced.nan_to_num(1.0).clamp(0.5, 200.0) / reference) * kept
    point = rays.origin + rays.direction * reference
    told = rays.told[:, None]
    of_readings = torch.cat(
        (2 * log, torch.tanh(25 * log), torch.tanh(200 * log), there.flatten(1),
         2 * of_planes, torch.tanh(25 * of_planes), torch.tanh(200 * of_planes), flat, support.nan_to_num(0.0), offsets.flatten(1), angle,
         torch.tanh(seen * 2), torch.tanh(seen * 0.2), seen_there,
         torch.tanh(along.nan_to_num(0.0)), ~along.isnan(),
         2 * of_around, torch.tanh(8 * of_around), beside,
         2 * of_paced, torch.tanh(25 * of_paced), torch.tanh(200 * of_paced), kept, torch.log(reference) - 2.5), 1
    )  # fmt: skip
    features = torch.cat(
        (of_readings * told, rays.bearing, rays.horizon_s[:, None], point[:, 2:] * 0.5 * told, rays.origin[:, :2].norm(dim=1, keepdim=True) * 0.1), 1
    )
    return features, torch.cat((candidates.flatten(1), planes), 1), torch.cat((there[:, :, :5].flatten(1), flat), 1)


def feature_count(readings: int, sweeps: int) -> int:
    of_places = 2 * len(ALONG_M) * -(-sweeps // ALONG_EVERY) + 3 * len(AROUND_RAD)
    return readings * 6 * 4 + readings * 8 + readings + 5 * sweeps + 3 * sweeps * sweeps + of_places + 4 * (sweeps - 1) + 7


class RayHead(nn.Module):
    """sweeps: T past sweeps; readings: S = T + displaced copies; bins: geometric bins beside the candidates; latent_channels: of the state's
    maps; detail: numbers that the detail tells at a position."""

    def __init__(
        self, sweeps: int, readings: int, bins: int = 24, width: int = 192, latent_channels: int = 48, latent_width: int = 48, detail: int = 0
    ) -> None:
        super().__init__()
        self.sweeps, self.readings, self.bins = sweeps, readings, bins
        self.positions = readings * 5 + sweeps + bins
        self.width = width
        self.register_buffer("bin_centre", bin_centres(bins))
        self.register_buffer("fine_centre", bin_centres(self.positions))
        self.register_buffer("fine_logit", constant_density_logits(self.positions))
        candidate_kind = torch.arange(readings).repeat_interleave(5)
        self.register_buffer("kind", torch.cat((candidate_kind, torch.full((sweeps,), readings), torch.full((bins,), readings + 1))))
        self.evidence = nn.Sequential(
            nn.Linear(feature_count(readings, sweeps), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.evidence_out = nn.Linear(width, 3 * self.positions)
        self.blind = nn.Sequential(nn.Linear(6, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.blind_out = nn.Linear(64, 3 * self.positions)
        for out in (self.evidence_out, self.blind_out):
            nn.init.normal_(out.weight, std=0.01)
            nn.init.zeros_(out.bias)
        with torch.no_grad():
            logit = self.evidence_out.bias.view(3, self.positions)[0]
            logit[-bins:] = constant_density_logits(bins) - 1
            logit[:-bins] = -1.0
            logit[4 : 5 * readings : 5] = 0.5
            self.evidence_out.bias.view(3, self.positions)[2, -bins:] = 2.0
            self.blind_out.bias.view(3, self.positions)[0] = self.fine_logit
            self.blind_out.bias.view(3, self.positions)[2] = 1.0
        self.kind_embedding = nn.Embedding(readings + 3, latent_width)
        self.context = nn.Linear(width, RAY_CONTEXT)
        self.heights = nn.Linear(latent_channels, SURFACES)
        nn.init.constant_(self.heights.bias, FIRST_HEIGHT_M)
        self.at_position = nn.Linear(latent_channels + detail + 8 + 3 * SURFACES, latent_width)
        self.of_ray = nn.Linear(RAY_CONTEXT + 7, latent_width, bias=False)
        self.latent_hidden = nn.Linear(latent_width, latent_width)
        self.latent_out = nn.Linear(latent_width, 7)
        nn.init.zeros_(self.latent_out.weight)
        nn.init.zeros_(self.latent_out.bias)

    @property
    def has_learned_colour(self) -> bool:
        """Whether any return in training was seen by a camera: without, the weights of the three colours are the zeros that they began as."""
        return bool(self.latent_out.weight[4:].any())

    def prior(self, rays: RayInput) -> Prior:
        count = len(rays.origin)
        device = rays.origin.device
        position = self.fine_centre.expand(count, -1).clone()
        kind = torch.full((count, self.positions), self.readings + 2, dtype=torch.long, device=device)
        scalars = torch.cat((rays.bearing, rays.horizon_s[:, None], rays.origin[:, 2:] * 0.5, rays.direction[:, 2:]), 1)
        raw = self.blind_out(self.blind(scalars)).view(count, 3, self.positions).float()
        shift = torch.zeros(count, self.positions, device=device)
        hidden = torch.zeros(count, self.width, device=device)
        rows = torch.nonzero(rays.with_evidence)[:, 0]
        if len(rows):
            told = rays.take(rows)
            features, candidates, there = evidence_features(told)
            of_evidence = self.evidence(features)
            out = self.evidence_out(of_evidence).view(len(rows), 3, self.positions).float()
            place = torch.cat((candidates.nan_to_num(LAST_BIN_M), self.bin_centre.expand(len(rows), -1)), 1)
            there = F.pad(there, (0, self.bins), value=True)
            logit = out[:, 0].masked_fill(~there, ABSENT_LOGIT)
            out = torch.stack((logit, out[:, 1], out[:, 2]), 1)
            readings = candidates[:, : 5 * self.readings].unflatten(1, (self.readings, 5))
            copies = readings[:, self.sweeps : self.sweeps + DISPLACED]
            moved = (copies - readings[:, :1]).nan_to_num(0.0).flatten(1) * told.told[:, None]
            moved = F.pad(moved, (5 * self.sweeps, self.positions - 5 * (self.sweeps + DISPLACED)))
            place, order = place.sort(dim=1, stable=True)
            out = out.gather(2, order[:, None].expand(-1, 3, -1))
            position = position.index_copy(0, rows, place)
            raw = raw.index_copy(0, rows, out)
            kind = kind.index_copy(0, rows, self.kind[order])
            shift = shift.index_copy(0, rows, moved.gather(1, order))
            hidden = hidden.index_copy(0, rows, of_evidence.float())
        return Prior(position, raw, kind, kind <= self.readings, shift, hidden)

    def correction(self, rays: RayInput, sampled: Tensor, detail: Tensor, prior: Prior) -> Tensor:
        """What the state adds (N,7,P): hazard logit, offset, scale, intensity, colour. sampled (N,P,C), detail (N,P,D): the state and the
        detail read at the positions."""
        position, raw = prior.position, prior.raw.detach()
        height = rays.origin[:, 2:] + rays.direction[:, 2:] * position
        here = torch.stack((height * 0.5, torch.tanh(height), torch.tanh(4 * (height - 0.3)), torch.log(position) - 2.5,
                            torch.sigmoid(raw[:, 0]), torch.tanh(raw[:, 1]), torch.tanh(raw[:, 2] * 0.5), torch.tanh(prior.shift)), 2)  # fmt: skip
        moves = torch.tanh(prior.shift.abs().amax(1, keepdim=True))  # where something moves, what stood at a place says less about it
        scalars = torch.cat((rays.bearing, rays.horizon_s[:, None], rays.origin[:, 2:] * 0.5, rays.with_evidence[:, None].float(), moves), 1)
        ray = self.of_ray(torch.cat((self.context(prior.hidden.detach()), scalars), 1))
        told = torch.cat((sampled, detail, here, self.surfaces(rays, sampled, position, height)), 2)
        x = self.at_position(told) + ray[:, None] + self.kind_embedding(prior.kind)
        x = F.silu(self.latent_hidden(F.silu(x)))
        return self.latent_out(x).transpose(1, 2).float()

    def surfaces(self, rays: RayInput, sampled: Tensor, position: Tensor, height: Tensor) -> Tensor:
        """(N,P,3*SURFACES): how far the surfaces that the state tells at each position lie above the ray there (position, height (N,P) m), at two
        scales, and how much farther along the ray it would meet them, as a share of the position and in the units of a centre's offset. That a
        decimetre of height is metres of range at a slant is geometry, and nothing that a small network should have to learn."""
        with torch.autocast(sampled.device.type, enabled=False):  # bf16 knows such heights to a centimetre, which is a decimetre of range
            above = self.heights(sampled.float()) - height[:, :, None]
        slope = rays.direction[:, 2:, None]
        slope = torch.where(slope < 0, slope.clamp(max=-LEAST_SLOPE), slope.clamp(min=LEAST_SLOPE))
        farther = above / (slope * position[:, :, None])
        return torch.cat((torch.tanh(2 * above), torch.tanh(10 * above), torch.tanh(farther / MOST_OFFSET)), 2)

    def mixture(self, position: Tensor, raw: Tensor, candidate: Tensor, appearance: Tensor | None = None) -> Mixture:
        """The distribution of sorted positions (N,P) and raw outputs (N,3,P): fp32 throughout."""
        logit, offset, scale = raw.unbind(1)
        centre = torch.where(candidate, position * (1 + 0.02 * offset), position * torch.exp(MOST_OFFSET * torch.tanh(offset)))
        s = MIN_SCALE_M + 0.01 * position * F.softplus(scale)
        log_on = F.logsigmoid(-logit)
        passed = torch.cumsum(log_on, 1)
        log_mass = F.logsigmoid(logit) + passed - log_on
        intensity = colour = None
        if appearance is not None:
            weight = (log_mass - torch.logsumexp(log_mass, 1, keepdim=True)).exp().detach()
            shown = (torch.sigmoid(appearance) * weight[:, None]).sum(2)
            intensity, colour = shown[:, 0], shown[:, 1:]
        return Mixture(centre, s, log_mass, passed[:, -1], intensity, colour)
