"""Average precision of nuScenes' detection task (Caesar et al., CVPR 2020), for validation without the devkit or tables.

A detection is right when the centre of a box of its class lies within a distance on the ground (.5, 1, 2, 4 m), each box once, surest first.
Precision is read at recalls .11, .12 .. 1; what it has over .1 is averaged, and scaled to 0..1. Boxes count up to a range that depends on the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.formats.detections import CLASSES

Array = NDArray[Any]

DISTANCES_M = (0.5, 1.0, 2.0, 4.0)
RANGE_M = {"car": 50, "truck": 50, "bus": 50, "trailer": 50, "construction_vehicle": 50, "pedestrian": 40, "motorcycle": 40, "bicycle": 40,
           "traffic_cone": 30, "barrier": 30}  # fmt: skip
LEAST = 0.1  # recall and precision below count for nothing


def average_precisions(truth: Sequence[Array], found: Sequence[Array]) -> dict[str, tuple[float, ...]]:
    """By class that the truth has within range: AP at each of DISTANCES_M.

    truth: per frame (n,3) f64 index of the class, x, y; found: per frame (m,4) the same and the score; both about the ego vehicle, metres."""
    out = {}
    for number, name in enumerate(CLASSES):
        true = [_of_class(rows, number) for rows in truth]
        said = [_of_class(rows, number) for rows in found]
        if any(len(rows) for rows in true):
            out[name] = tuple(_average_precision(true, said, distance) for distance in DISTANCES_M)
    return out


def mean_average_precision(truth: Sequence[Array], found: Sequence[Array]) -> float:
    """Mean over distances and over the classes that the truth has (the devkit's mAP counts the others as 0); 0 where it has none."""
    by_class = average_precisions(truth, found)
    return float(np.mean(list(by_class.values()))) if by_class else 0.0


def _of_class(rows: Array, number: int) -> Array:
    return rows[(rows[:, 0] == number) & (np.hypot(rows[:, 1], rows[:, 2]) < RANGE_M[CLASSES[number]])]


def _average_precision(truth: Sequence[Array], found: Sequence[Array], distance_m: float) -> float:
    frame = np.concatenate([np.full(len(rows), i) for i, rows in enumerate(found)])
    rows = np.concatenate(found)
    order = np.lexsort((np.arange(len(rows)), rows[:, 3]))[::-1]  # of equal scores the later one first, as in the devkit
    free = [np.ones(len(rows), bool) for rows in truth]
    right = np.zeros(len(rows), bool)
    for place, row in enumerate(order):
        here, taken = truth[frame[row]], free[frame[row]]
        if not taken.any():
            continue
        away = np.where(taken, np.hypot(*(here[:, 1:3] - rows[row, 1:3]).T), np.inf)
        nearest = int(np.argmin(away))
        if away[nearest] < distance_m:
            taken[nearest] = False
            right[place] = True
    if not right.any():
        return 0.0
    hits = np.cumsum(right)
    recall, precision = hits / sum(map(len, truth)), hits / np.arange(1, len(right) + 1)
    sampled = np.interp(np.linspace(0, 1, 101), recall, precision, right=0)[round(100 * LEAST) + 1 :]
    return float(np.clip(sampled - LEAST, 0, None).mean() / (1 - LEAST))
