"""Vehicles seen from above: per cell of the encoder's map, is it covered by a vehicle's box at t = 0. The input is that of pretraining.

IoU is the sum of intersections over the sum of unions of the whole set, at probability 0.5, in the cells whose labels are complete.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sensors.geometry import transform_points, yaw_of
from sensors.rays import history_of
from sensors.records import Box, Clip, Labels
from worldmodel.batches import state_from_ego
from worldmodel.config import Config
from worldmodel.labelled import Grid, cloud_of, in_view, turned_angle, turned_xy

Array = NDArray[Any]

SCORE = "IoU"
VEHICLES = ("car", "van", "truck", "bus", "trailer", "tram", "construction_vehicle", "vehicle")
CYCLES = ("vehicle.bicycle", "vehicle.motorcycle")  # of nuScenes; other datasets do not count theirs among vehicles
POSITIVE_WEIGHT = 3.0


@dataclass(frozen=True, eq=False)
class Example:
    """log: whose clip it is; points (N,5) f32 x y z intensity dt; boxes (n,5) f64 x y length width yaw of vehicles; both in the state frame.
    Labels are complete within fov_rad of ahead_rad (pi: everywhere)."""

    log: str
    points: Array
    boxes: Array
    ahead_rad: float
    fov_rad: float


def is_vehicle(category: str) -> bool:
    kind = category.lower()
    return kind.split(".")[-1] in VEHICLES or (kind.startswith("vehicle.") and kind not in CYCLES)


def example_of(clip: Clip, labels: Labels, config: Config) -> Example:
    """The past of a clip as the encoder sees it, with the vehicles at t = 0."""
    to_state = state_from_ego(clip, config.encoder)
    vehicles = footprints([box for box in labels.boxes if box.stamp_ns == clip.stamp_ns and is_vehicle(box.category)], to_state)
    return Example(clip.log.id, cloud_of(clip, history_of(clip), config), vehicles, yaw_of(to_state), labels.complete_fov_rad)


def footprints(boxes: Sequence[Box], state_from_ego: Array) -> Array:
    """(n,5) f64 of boxes in the ego frame: centre x y, length, width and yaw in the state frame."""
    centres = transform_points(state_from_ego, np.array([box.centre for box in boxes]).reshape(-1, 3))
    rest = np.array([(*box.size[:2], box.yaw_rad + yaw_of(state_from_ego)) for box in boxes]).reshape(-1, 3)
    return np.concatenate((centres[:, :2], rest), 1)


def turned(example: Example, yaw_rad: float, mirror: bool) -> Example:
    """The scene turned about z, after being mirrored in y where asked."""
    points, boxes = example.points.copy(), example.boxes.copy()
    points[:, :2] = turned_xy(points[:, :2], yaw_rad, mirror)
    boxes[:, :2] = turned_xy(boxes[:, :2], yaw_rad, mirror)
    boxes[:, 4] = turned_angle(boxes[:, 4], yaw_rad, mirror)
    return dataclasses.replace(example, points=points, boxes=boxes, ahead_rad=turned_angle(example.ahead_rad, yaw_rad, mirror))


def covered(boxes: Array, grid: Grid) -> Array:
    """(H,W) bool: cell centres that lie in one of the boxes (n,5)."""
    x, y = grid.centres()
    inside = np.zeros(x.shape, bool)
    for bx, by, length, across, yaw in boxes:
        along = (x - bx) * np.cos(yaw) + (y - by) * np.sin(yaw)
        side = (y - by) * np.cos(yaw) - (x - bx) * np.sin(yaw)
        inside |= (np.abs(along) <= length / 2) & (np.abs(side) <= across / 2)
    return inside


def targets(example: Example, grid: Grid) -> dict[str, Array]:
    """covered (H,W) u8, and valid (H,W) bool: cells with complete labels."""
    valid = in_view(*grid.centres(), example.ahead_rad, example.fov_rad)
    return {"covered": covered(example.boxes, grid).astype(np.uint8), "valid": valid}


class Head(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 1, 1))
        nn.init.constant_(self.layers[3].bias, -3.0)  # type: ignore[arg-type]

    def forward(self, latent: Tensor) -> Tensor:
        """Logits (B,H,W)."""
        return self.layers(latent)[:, 0]  # type: ignore[no-any-return]


def loss(logits: Tensor, wanted: dict[str, Tensor]) -> Tensor:
    weight = logits.new_tensor(POSITIVE_WEIGHT)
    each = F.binary_cross_entropy_with_logits(logits.float(), wanted["covered"].float(), pos_weight=weight, reduction="none")
    return (each * wanted["valid"]).sum() / wanted["valid"].sum().clamp(min=1)


def answers(logits: Tensor, grid: Grid) -> list[Array]:
    """Per frame (H,W) bool: cells called covered."""
    return list((logits > 0).numpy())


def score(examples: Sequence[Example], found: Sequence[Array], grid: Grid) -> float:
    """IoU of the answers, one a frame."""
    both = either = 0
    for example, said in zip(examples, found, strict=True):
        wanted = targets(example, grid)
        true, said = (wanted["covered"] > 0) & wanted["valid"], said & wanted["valid"]
        both, either = both + int((said & true).sum()), either + int((said | true).sum())
    return both / max(either, 1)
