"""Whether encoder and roll-out still say something: monitors of their maps on held-out clips, and the alarm. Formulas: RankMe (Garrido et al.,
2023) for the effective rank; the Epps-Pulley gauge of SIGReg (Balestriero & LeCun, 2025), whose floor is 1.05 for independent values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

CELLS = 4096
SLICES = 64
LEAST_ROLLED = 1e-4


@dataclass(frozen=True)
class Health:
    """Of busy cells (with points near): std_min, std_median of the channels and dead (share below a tenth of the median); rank, the effective
    rank; cosine, the mean |cos| of cell pairs; sigreg, the mean Epps-Pulley statistic, and sigreg_share, the same over the number of cells
    (0.40 = full collapse). empty_std: median deviation of cells without points. skill: 1 - error of the forecast latent over that of copying
    the present one, NaN where nothing changes. rolled: what the roll-out adds to a state up to the last instant, as its deviation between
    cells, over that of the state: 0 where it adds the same everywhere, NaN where there is no future."""

    std_min: float
    std_median: float
    dead: float
    rank: float
    cosine: float
    sigreg: float
    sigreg_share: float
    empty_std: float
    skill: float
    rolled: float

    def scalars(self) -> dict[str, float]:
        return {f"health/{name}": value for name, value in asdict(self).items()}


def measure(latent: Tensor, skill: float = math.nan, rolled: float = math.nan, seed: int = 0) -> Health:
    """latent (B,C,H,W) f32 of a held-out batch."""
    generator = torch.Generator().manual_seed(seed)
    cells = latent.detach().float().cpu().permute(0, 2, 3, 1).flatten(0, 2)
    energy = (cells - cells.median(0).values).abs().sum(1)
    busy = energy > energy.median()
    quiet = cells[~busy]
    cells = cells[busy]
    if len(cells) < 16:
        return Health(0.0, 0.0, 1.0, 1.0, 1.0, 0.402 * len(cells), 0.402, 0.0, skill, rolled)
    cells = cells[torch.randperm(len(cells), generator=generator)[:CELLS]]
    std = cells.std(0)
    median = float(std.median())
    share = torch.linalg.svdvals(cells - cells.mean(0))
    share = share / share.sum().clamp(min=1e-12) + 1e-7
    unit = cells / cells.norm(dim=1, keepdim=True).clamp(min=1e-9)
    half = len(unit) // 2
    gauge = epps_pulley((cells - cells.mean(0)) / std.clamp(min=1e-6), generator)
    return Health(
        std_min=float(std.min()), std_median=median, dead=float((std < 0.1 * median).float().mean()) if median > 1e-8 else 1.0,
        rank=float(torch.exp(-(share * share.log()).sum())), cosine=float((unit[:half] * unit[half : 2 * half]).sum(1).abs().mean()),
        sigreg=gauge, sigreg_share=gauge / len(cells), empty_std=float(quiet.std(0).median()) if len(quiet) > 1 else 0.0, skill=skill, rolled=rolled,
    )  # fmt: skip


def rolled(start: Tensor, end: Tensor) -> float:
    """How much a roll-out from start to end (B,C,H,W) f32 changes, see `Health`."""
    between_cells = [maps.flatten(2).std(2).mean() for maps in (end - start, start)]
    return float(between_cells[0] / between_cells[1].clamp(min=1e-9))


def epps_pulley(cells: Tensor, generator: torch.Generator) -> float:
    """Mean over SLICES random directions of N * integral of |phi_empirical(t) - exp(-t^2/2)|^2 exp(-t^2/2) dt over -3..3, for cells (N,C)."""
    directions = torch.randn(cells.shape[1], SLICES, generator=generator)
    u = cells @ (directions / directions.norm(dim=0))
    t = torch.linspace(0, 3, 17)
    weight = torch.full((17,), 2 * 3 / 16.0)
    weight[[0, -1]] /= 2
    phi = torch.exp(-t * t / 2)
    total = torch.zeros(SLICES)
    for k in range(17):
        total += weight[k] * phi[k] * ((torch.cos(t[k] * u).mean(0) - phi[k]) ** 2 + torch.sin(t[k] * u).mean(0) ** 2)
    return float(len(cells) * total.mean())


def alarm(now: Health, random_rank: float) -> str | None:
    """One line where the encoder has collapsed or is about to, judged against the same network before training, or the roll-out has; else None."""
    if now.std_median < 1e-4:
        return f"the encoder gives the same vector everywhere (median channel deviation {now.std_median:.1e}): collapsed; lower train.lr"
    if now.dead > 0.5:
        return f"{now.dead:.0%} of the encoder's channels are dead; lower train.lr or start again with another seed"
    if now.rank < max(1.5, 0.35 * random_rank):
        return f"the encoder's effective rank fell to {now.rank:.1f} (before training: {random_rank:.1f}); the latent is collapsing"
    if now.rolled < LEAST_ROLLED:
        return f"the roll-out adds the same to every cell (deviation {now.rolled:.1e} of the state's): the state forecasts nothing; lower train.lr"
    return None
