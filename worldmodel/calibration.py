"""How sure a forecast may be: per arm and horizon a temperature of the masses and a factor of the scales, fitted by likelihood on held-out
training clips and applied wherever the model answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.heads.rays import Mixture

TEMPERATURES = np.linspace(0.5, 1.3, 9)
FACTORS = np.geomspace(0.6, 2.6, 10)
MOST_RAYS = 1500  # of an instant, spread over the clips: two numbers are fitted to them

Table = Mapping[str, Sequence[Sequence[float]]]  # arm -> rows of (horizon_s, temperature, factor)


def sharpened(mixture: Mixture, temperature: Tensor | float, factor: Tensor | float) -> Mixture:
    """The mixture given a return, with masses to the power of the temperature and scales times the factor ((N,1) or numbers)."""
    log_mass = mixture.log_mass * temperature
    log_mass = log_mass - torch.logsumexp(log_mass, 1, keepdim=True)
    return Mixture(mixture.centre, mixture.scale * factor, log_mass, mixture.log_left, mixture.intensity, mixture.colour)


def fit(mixture: Mixture, ranges: Tensor, horizon_s: Tensor, step: Tensor) -> list[list[float]]:
    """Rows (horizon_s, temperature, factor), one an instant, of the least mean negative log density on the given rays (N,)."""
    rows = []
    for k in torch.unique(step).tolist():
        these = torch.nonzero(step == k)[:, 0]
        these = these[:: max(1, len(these) // MOST_RAYS)]
        part = Mixture(mixture.centre[these], mixture.scale[these], mixture.log_mass[these], mixture.log_left[these], None, None)
        best = (math.inf, 1.0, 1.0)
        for temperature in TEMPERATURES:
            for factor in FACTORS:
                value = float(-sharpened(part, float(temperature), float(factor)).log_density(ranges[these]).mean())
                best = min(best, (value, float(temperature), float(factor)))
        rows.append([float(horizon_s[these].mean()), best[1], best[2]])
    return sorted(rows)


def at(table: Table | None, arm: str, horizon_s: float) -> tuple[float, float]:
    """(temperature, factor) of an arm at a horizon, between the fitted ones; (1, 1) without a table."""
    if not table or arm not in table:
        return 1.0, 1.0
    rows = np.asarray(table[arm], float)
    return float(np.interp(horizon_s, rows[:, 0], rows[:, 1])), float(np.exp(np.interp(horizon_s, rows[:, 0], np.log(rows[:, 2]))))


def checked(value: Any) -> dict[str, list[list[float]]] | None:
    """A table as a checkpoint's JSON holds it, or None."""
    if not isinstance(value, dict):
        return None
    return {str(arm): [[float(x) for x in row] for row in rows] for arm, rows in value.items()}
