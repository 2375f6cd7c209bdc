"""The first linear layer of a pillar encoder, rewritten for a target that orders and scales its point columns otherwise.

Its input is the raw columns of a point, then its offsets from the pillar's mean and from the pillar's centre. A column that the target scales
by s meets its weights divided by s; columns change places with their weights; a column that only the target has gets weights of zero. All
of this is exact. A curve (Waymo's tanh of the intensity) is no scale, and a column that only we have would be missed: both are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sensors.errors import UsageError, one_line

OFFSETS = 6


@dataclass(frozen=True)
class Column:
    """A column of the target's points: `name` as we call it (x, y, z, intensity, dt, or one that we have not), target = scale * ours.
    curve: what the target does to it beyond scaling, "" for nothing."""

    name: str
    scale: float = 1.0
    curve: str = ""


def folded(weight: Tensor, features: Sequence[str], columns: Sequence[Column]) -> Tensor:
    """(C, len(columns) + 6) f32 for the target's columns, from weight (C, len(features) + 6) for ours; float64, rounded once.

    features: our columns, x y z first; so must the target's be. UsageError where the target's columns do not hold what our encoder reads."""
    names = [column.name for column in columns]
    if tuple(names[:3]) != ("x", "y", "z") or any(c.scale != 1 or c.curve for c in columns[:3]):
        raise UsageError(f"the target's columns {one_line(names)} do not begin with x, y, z in metres: offsets from the pillar would change")
    if len(set(names)) != len(names):
        raise UsageError(f"the target's columns {one_line(names)} name one twice")
    if weight.ndim != 2 or weight.shape[1] != len(features) + OFFSETS:
        raise UsageError(f"a first layer of shape {tuple(weight.shape)} does not read {len(features)} columns and {OFFSETS} offsets")
    if missing := [name for name in features if name not in names]:
        raise UsageError(f"the encoder reads {missing[0]}, which the target's points ({', '.join(names)}) lack; train without it: "
                         f"--set encoder.features=[{', '.join(f for f in features if f in names)}]")  # fmt: skip
    for column in columns:
        if column.name in features and column.curve:
            raise UsageError(f"the target gives {column.curve}({column.name}), a curve that no weight can undo; train without it: "
                             f"--set encoder.features=[{', '.join(f for f in features if f != column.name)}]")  # fmt: skip
        if not (math.isfinite(column.scale) and column.scale > 0):
            raise UsageError(f"column {column.name}: scale {column.scale}; it has to be above 0")
    wide = weight.detach().double()
    out = torch.zeros(len(wide), len(columns) + OFFSETS, dtype=torch.float64)
    for at, column in enumerate(columns):
        if column.name in features:
            out[:, at] = wide[:, list(features).index(column.name)] / column.scale
    out[:, len(columns) :] = wide[:, len(features) :]
    return out.float()


def as_target(points: Tensor, features: Sequence[str], columns: Sequence[Column]) -> Tensor:
    """Our points (N, len(features)) as the target loads them: (N, len(columns)) f32; columns that we have not are 0."""
    out = points.new_zeros(len(points), len(columns))
    for at, column in enumerate(columns):
        if column.name in features:
            out[:, at] = (points[:, list(features).index(column.name)].double() * column.scale).float()
    return out
