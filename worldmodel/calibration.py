"""How sure a forecast may be, and how far to trust the state: per arm and horizon a factor of the scales, and for the model, per horizon, the
share that counts of what the state adds to rays whose readings are told. The one is fitted by likelihood, the other by CRPS, whose metres are
those of the tables, on held-out training clips; both are applied wherever the model answers. The masses stay as learned: a temperature on them
fits no better, and it moves medians from one surface to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sensors.errors import WmError
from sensors.kernels.mixture import crps
from worldmodel.heads.rays import Mixture

FACTORS = np.geomspace(0.5, 3.0, 31)
SHARES = np.linspace(0.0, 1.0, 9)
MOST_RAYS = 1500  # of an instant, spread over the clips: one number is fitted to them

Rows = Sequence[Sequence[float]]  # (horizon_s, number) of each, by rising horizon
Table = Mapping[str, Rows]


def widened(mixture: Mixture, factor: Tensor | float) -> Mixture:
    """The mixture given a return, with its scales times the factor ((N,1) or a number)."""
    log_mass = mixture.log_mass - torch.logsumexp(mixture.log_mass, 1, keepdim=True)
    return mixture._replace(scale=mixture.scale * factor, log_mass=log_mass)


def fit(mixture: Mixture, ranges: Tensor, horizon_s: Tensor, step: Tensor) -> list[list[float]]:
    """Rows (horizon_s, factor), one an instant, of the least mean negative log density on the given rays (N,)."""
    rows = []
    for k in torch.unique(step).tolist():
        these = torch.nonzero(step == k)[:, 0]
        these = these[:: max(1, len(these) // MOST_RAYS)]
        part = Mixture(mixture.centre[these], mixture.scale[these], mixture.log_mass[these], mixture.log_left[these], None, None)
        surprise = [float(-widened(part, float(factor)).log_density(ranges[these]).mean()) for factor in FACTORS]
        rows.append([float(horizon_s[these].mean()), float(FACTORS[int(np.argmin(surprise))])])
    return sorted(rows)


def fit_shares(answers: Sequence[Mixture], ranges: Tensor, horizon_s: Tensor, step: Tensor) -> list[list[float]]:
    """Rows (horizon_s, share), one an instant: of SHARES the one whose answers, a mixture of the rays (N,) for each of them, have the least
    mean CRPS."""
    truth = ranges.numpy()
    score = [crps(m.log_mass.exp().numpy(), m.centre.numpy(), m.scale.numpy(), truth) for m in (widened(a, 1.0) for a in answers)]
    instants = [(step == k).numpy() for k in torch.unique(step).tolist()]
    return sorted([float(horizon_s.numpy()[k].mean()), float(SHARES[int(np.argmin([s[k].mean() for s in score]))])] for k in instants)


def shares_at(rows: Rows | None, horizon_s: Tensor) -> Tensor:
    """Of rays at these horizons (N,), between the fitted ones; 1 without rows."""
    if not rows:
        return torch.ones_like(horizon_s)
    at_s, shares = np.asarray(rows, float).T
    return torch.from_numpy(np.interp(horizon_s.cpu().numpy(), at_s, shares)).to(horizon_s)


def at(table: Table | None, arm: str, horizon_s: float) -> float:
    """Factor of an arm at a horizon, between the fitted ones; 1 without a table."""
    if not table or arm not in table:
        return 1.0
    rows = np.asarray(table[arm], float)
    return float(np.exp(np.interp(horizon_s, rows[:, 0], np.log(rows[:, 1]))))


def checked(value: Any) -> dict[str, list[list[float]]] | None:
    """A table as a checkpoint's JSON holds it, or None. WmError for rows of another shape."""
    return {str(arm): _rows(rows) for arm, rows in value.items()} if isinstance(value, dict) else None


def checked_shares(value: Any) -> list[list[float]] | None:
    """Rows as a checkpoint's JSON holds them, or None. WmError for what are no shares."""
    rows = None if value is None else _rows(value)
    if rows and not all(0 <= share <= 1 for _, share in rows):
        raise WmError("the checkpoint's state.json says shares that are not between 0 and 1; train the run again")
    return rows


def _rows(value: Any) -> list[list[float]]:
    try:
        rows = [[float(x) for x in row] for row in value]
    except (TypeError, ValueError):
        rows = []
    if not rows or any(len(row) != 2 for row in rows):
        raise WmError("the checkpoint was calibrated by another version of this program; train the run again")
    return rows
