"""Vehicles seen from above: per cell of the encoder's map, is it covered by a vehicle's box at t = 0. The input is that of pretraining.

IoU is the sum of intersections over the sum of unions of the whole set, at probability 0.5, in the cells whose labels are complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sensors.geometry import rotation_z, transform_points
from sensors.rays import history_of
from sensors.records import Clip, Labels
from worldmodel.batches import joined, past_clouds, state_from_ego
from worldmodel.config import Config, Encoder

Array = NDArray[Any]

VEHICLES = ("car", "van", "truck", "bus", "trailer", "tram", "construction_vehicle", "vehicle")
POSITIVE_WEIGHT = 3.0


@dataclass(frozen=True, eq=False)
class Example:
    """log: whose clip it is; points (N,5) f32 x y z intensity dt; boxes (n,5) f64 x y length width yaw of vehicles; both in the state frame.
    fov_rad: half-angle about the x axis within which the labels are complete (pi: everywhere)."""

    log: str
    points: Array
    boxes: Array
    fov_rad: float


def is_vehicle(category: str) -> bool:
    return category.lower().split(".")[-1] in VEHICLES or category.lower().startswith("vehicle.")


def example_of(clip: Clip, labels: Labels, config: Config) -> Example:
    """The past of a clip as the encoder sees it (one cloud: the newest sweep, unless sweeps are joined), with the vehicles at t = 0."""
    to_state = state_from_ego(clip, config.encoder)
    turn = float(np.arctan2(to_state[1, 0], to_state[0, 0]))
    rows = []
    for box in labels.boxes:
        if box.stamp_ns == clip.stamp_ns and is_vehicle(box.category):
            x, y, _ = transform_points(to_state, box.centre[None])[0]
            rows.append((x, y, box.size[0], box.size[1], box.yaw_rad + turn))
    points = joined(past_clouds(clip, history_of(clip), config), config)[0]
    return Example(clip.log.id, points, np.array(rows).reshape(-1, 5), labels.complete_fov_rad)


def turned(example: Example, yaw_rad: float, mirror: bool) -> tuple[Array, Array]:
    """Points and boxes turned about z, after being mirrored in y where asked."""
    sign = -1.0 if mirror else 1.0
    points, boxes = example.points.copy(), example.boxes.copy()
    points[:, 1] *= sign
    boxes[:, 1] *= sign
    boxes[:, 4] = boxes[:, 4] * sign + yaw_rad
    linear = rotation_z(yaw_rad)[:2, :2]
    points[:, :2] = points[:, :2] @ linear.T.astype(np.float32)
    boxes[:, :2] = boxes[:, :2] @ linear.T
    return points, boxes


def target_of(boxes: Array, encoder: Encoder, cell_m: float, fov_rad: float, yaw_rad: float) -> tuple[Array, Array]:
    """(H,W) u8: cell centres covered by a box; (H,W) bool: cells with complete labels, for a scene turned by yaw_rad."""
    width = round((encoder.high[0] - encoder.low[0]) / cell_m)
    height = round((encoder.high[1] - encoder.low[1]) / cell_m)
    x, y = np.meshgrid(encoder.low[0] + (np.arange(width) + 0.5) * cell_m, encoder.low[1] + (np.arange(height) + 0.5) * cell_m)
    covered = np.zeros((height, width), bool)
    for bx, by, length, across, yaw in boxes:
        along = (x - bx) * np.cos(yaw) + (y - by) * np.sin(yaw)
        side = (y - by) * np.cos(yaw) - (x - bx) * np.sin(yaw)
        covered |= (np.abs(along) <= length / 2) & (np.abs(side) <= across / 2)
    angle = np.abs((np.arctan2(y, x) - yaw_rad + np.pi) % (2 * np.pi) - np.pi)
    return covered.astype(np.uint8), angle <= fov_rad


class Head(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 1, 1))
        nn.init.constant_(self.layers[3].bias, -3.0)  # type: ignore[arg-type]

    def forward(self, latent: Tensor) -> Tensor:
        """Logits (B,H,W)."""
        return self.layers(latent)[:, 0]  # type: ignore[no-any-return]


def loss(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    weight = logits.new_tensor(POSITIVE_WEIGHT)
    each = F.binary_cross_entropy_with_logits(logits.float(), target.float(), pos_weight=weight, reduction="none")
    return (each * valid).sum() / valid.sum().clamp(min=1)


def overlap(logits: Tensor, target: Tensor, valid: Tensor) -> tuple[int, int]:
    """Cells in both, cells in either."""
    said, true = (logits > 0) & valid, (target > 0) & valid
    return int((said & true).sum()), int((said | true).sum())
