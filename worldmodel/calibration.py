"""How sure a forecast may be, and how far to trust the state: per arm and horizon a factor of the scales, and for the model the share that
counts of what the state adds to rays whose readings are told. Both are fitted by likelihood on held-out training clips (in metres a few rays
would decide), and applied wherever the model answers. The masses stay as learned: a temperature on them fits no better, and it moves
medians from one surface to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sensors.errors import WmError
from worldmodel.heads.rays import Mixture

FACTORS = np.geomspace(0.5, 3.0, 31)
SHARES = np.linspace(0.0, 1.0, 9)
MOST_RAYS = 1500  # of an instant, spread over the clips: one number is fitted to them

Table = Mapping[str, Sequence[Sequence[float]]]  # arm -> rows of (horizon_s, factor)


def widened(mixture: Mixture, factor: Tensor | float) -> Mixture:
    """The mixture given a return, with its scales times the factor ((N,1) or a number)."""
    log_mass = mixture.log_mass - torch.logsumexp(mixture.log_mass, 1, keepdim=True)
    return mixture._replace(scale=mixture.scale * factor, log_mass=log_mass)


def fit(mixture: Mixture, ranges: Tensor, horizon_s: Tensor, step: Tensor, weight: Tensor) -> list[list[float]]:
    """Rows (horizon_s, factor), one an instant, of the least negative log density, the weighted mean over the given rays (N,)."""
    rows = []
    for k in torch.unique(step).tolist():
        these = torch.nonzero(step == k)[:, 0]
        these = these[:: max(1, len(these) // MOST_RAYS)]
        part = mixture.take(these)
        surprise = [surprise_of(widened(part, float(factor)), ranges[these], weight[these]) for factor in FACTORS]
        rows.append([float(horizon_s[these].mean()), float(FACTORS[int(np.argmin(surprise))])])
    return sorted(rows)


def fit_share(answers: Sequence[Mixture], ranges: Tensor, weight: Tensor) -> float:
    """The one of SHARES whose answers, one mixture of the rays (N,) for each of them, have the least negative log density, the weighted mean."""
    return float(SHARES[int(np.argmin([surprise_of(widened(answer, 1.0), ranges, weight) for answer in answers]))])


def surprise_of(mixture: Mixture, ranges: Tensor, weight: Tensor) -> float:
    """Minus the log density at the ranges (N,), the mean weighted by (N,)."""
    return float(-(mixture.log_density(ranges) * weight).sum() / weight.sum())


def at(table: Table | None, arm: str, horizon_s: float) -> float:
    """Factor of an arm at a horizon, between the fitted ones; 1 without a table."""
    if not table or arm not in table:
        return 1.0
    rows = np.asarray(table[arm], float)
    return float(np.exp(np.interp(horizon_s, rows[:, 0], np.log(rows[:, 1]))))


def checked(value: Any) -> dict[str, list[list[float]]] | None:
    """A table as a checkpoint's JSON holds it, or None. WmError for rows of another shape."""
    return {str(arm): _rows(rows) for arm, rows in value.items()} if isinstance(value, dict) else None


def checked_share(value: Any) -> float:
    """The share as a checkpoint's JSON holds it; 1 where it holds none. WmError for what is no share."""
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise WmError("the checkpoint's state.json says a share that is not between 0 and 1; train the run again")
    return float(value)


def _rows(value: Any) -> list[list[float]]:
    try:
        rows = [[float(x) for x in row] for row in value]
    except (TypeError, ValueError):
        rows = []
    if not rows or any(len(row) != 2 for row in rows):
        raise WmError("the checkpoint was calibrated by another version of this program; train the run again")
    return rows
