"""Boxes in 3D: a head in the manner of CenterPoint (Yin et al., CVPR 2021) on the encoder's map. The input is that of pretraining.

Per cell and class a heat that peaks at centres, and for the box centred in a cell: where in the cell, height of the centre, log size, sine and
cosine of yaw, velocity. Score: mean AP over centre distances and classes as in nuScenes (`worldmodel.metrics_nuscenes`), where labels are complete.
Boxes that no point of the newest sweep lies in count neither as truth in training nor in the score, as in the devkit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sensors.formats.detections import CLASSES, Detection, class_of
from sensors.geometry import inverse, points_in, transform_points, yaw_of
from sensors.rays import history_of
from sensors.records import Box, Clip, Labels
from worldmodel.batches import state_from_ego
from worldmodel.config import Config
from worldmodel.labelled import Grid, cloud_of, in_view, turned_angle, turned_xy
from worldmodel.metrics_nuscenes import mean_average_precision

Array = NDArray[Any]

SCORE = "mAP"
SHARED = 48  # channels
REACH_M = 60.0  # labels farther off are no concern of any range below
LEAST_RADIUS = 2  # cells
MOST = 200  # detections a frame
LEAST_SCORE = 0.02
# two detections of a class are one where their centres are closer, m
APART_M = {"car": 1.5, "truck": 2.5, "bus": 3.0, "trailer": 3.0, "construction_vehicle": 2.0, "pedestrian": 0.4, "motorcycle": 0.6,
           "bicycle": 0.6, "traffic_cone": 0.3, "barrier": 0.6}  # fmt: skip
# what is regressed in a cell: x and y within it (cells), z, log of length, width, height, sine and cosine of yaw, velocity
NUMBERS = 10
WEIGHTS = (1.0,) * 8 + (0.2, 0.2)
BOX_WEIGHT = 0.25


@dataclass(frozen=True, eq=False)
class Example:
    """log, stamp_ns: of which instant; points (N,5) f32 x y z intensity dt; boxes (n,9) f64 x y z length width height yaw vx vy (NaN where
    unknown), classes (n,) i64 into CLASSES; all in the state frame, metres, rad, m/s. Labels are complete within fov_rad of ahead_rad."""

    log: str
    stamp_ns: int
    points: Array
    boxes: Array
    classes: Array
    ahead_rad: float
    fov_rad: float
    ego_from_state: Array


def example_of(clip: Clip, labels: Labels | None, config: Config) -> Example:
    """The past of a clip as the encoder sees it, with the boxes at t = 0; without labels it has none."""
    to_state = state_from_ego(clip, config.encoder)
    turn = yaw_of(to_state)
    history = history_of(clip)
    rows, classes = [], []
    for box in labels.boxes if labels is not None else ():
        name = class_of(box.category)
        if box.stamp_ns != clip.stamp_ns or name is None or np.hypot(*box.centre[:2]) > REACH_M:
            continue
        inside = int(points_in(box, history.points[-1]).sum()) if box.points_inside is None else box.points_inside
        if inside:
            centre = transform_points(to_state, box.centre[None])[0]
            velocity = np.full((1, 2), np.nan) if box.velocity is None else turned_xy(box.velocity[None], turn, False)
            rows.append((*centre, *box.size, box.yaw_rad + turn, *velocity[0]))
            classes.append(CLASSES.index(name))
    fov = labels.complete_fov_rad if labels is not None else np.pi
    boxes = np.array(rows, np.float64).reshape(-1, 9)
    cloud = cloud_of(clip, history, config)
    return Example(clip.log.id, clip.stamp_ns, cloud, boxes, np.array(classes, np.int64), turn, fov, inverse(to_state))


def turned(example: Example, yaw_rad: float, mirror: bool) -> Example:
    """The scene turned about z, after being mirrored in y where asked: points, boxes, velocities and the view. ego_from_state does not follow."""
    points, boxes = example.points.copy(), example.boxes.copy()
    points[:, :2] = turned_xy(points[:, :2], yaw_rad, mirror)
    boxes[:, :2] = turned_xy(boxes[:, :2], yaw_rad, mirror)
    boxes[:, 6] = turned_angle(boxes[:, 6], yaw_rad, mirror)
    boxes[:, 7:9] = turned_xy(boxes[:, 7:9], yaw_rad, mirror)
    return dataclasses.replace(example, points=points, boxes=boxes, ahead_rad=turned_angle(example.ahead_rad, yaw_rad, mirror))


def targets(example: Example, grid: Grid) -> dict[str, Array]:
    """heat (K,H,W) f32: 1 in the cell of a centre, falling off around it; boxes (10,H,W) f32: NaN where there is nothing to regress;
    valid (H,W) bool: cells with complete labels. Boxes centred outside of the grid or of the view are left out."""
    heat = np.zeros((len(CLASSES), grid.rows, grid.columns), np.float32)
    numbers = np.full((NUMBERS, grid.rows, grid.columns), np.nan, np.float32)
    valid = in_view(*grid.centres(), example.ahead_rad, example.fov_rad)
    for box, kind in zip(example.boxes, example.classes, strict=True):
        place = (box[:2] - grid.low) / grid.cell_m
        column, row = np.floor(place).astype(int)
        if 0 <= column < grid.columns and 0 <= row < grid.rows and valid[row, column]:
            _peak(heat[kind], row, column, max(LEAST_RADIUS, int(box[3] / 4 / grid.cell_m)))
            numbers[:, row, column] = (*(place - (column, row)), box[2], *np.log(box[3:6]), np.sin(box[6]), np.cos(box[6]), *box[7:9])
    return {"heat": heat, "boxes": numbers, "valid": valid}


def _peak(heat: Array, row: int, column: int, radius: int) -> None:
    """A Gaussian of that radius (3 sigma) laid over heat (H,W), the higher value staying."""
    rows, columns = (slice(max(0, at - radius), at + radius + 1) for at in (row, column))
    up, across = np.arange(heat.shape[0])[rows, None] - row, np.arange(heat.shape[1])[None, columns] - column
    sigma = (2 * radius + 1) / 6
    heat[rows, columns] = np.maximum(heat[rows, columns], np.exp(-(up**2 + across**2) / (2 * sigma**2)))


class Head(nn.Module):
    """A shared convolution, then a branch for the heat and one for the numbers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Conv2d(channels, SHARED, 3, padding=1, bias=False), nn.BatchNorm2d(SHARED), nn.ReLU())
        self.heat = _branch(SHARED, len(CLASSES))
        self.numbers = _branch(64, NUMBERS)
        nn.init.constant_(self.heat[-1].bias, -2.19)  # type: ignore[arg-type]  # a tenth everywhere

    def forward(self, latent: Tensor) -> dict[str, Tensor]:
        """heat (B,K,H,W) logits and boxes (B,10,H,W) of a map (B,C,H,W)."""
        shared = self.shared(latent)
        return {"heat": self.heat(shared), "boxes": self.numbers(shared)}


def _branch(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(SHARED, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, out, 1))


def loss(outputs: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """Focal loss of the heat plus L1 of the numbers, both per box of the batch."""
    count = (~wanted["boxes"][:, 0].isnan()).sum().clamp(min=1)
    numbers, known = wanted["boxes"], ~wanted["boxes"].isnan()
    away = (outputs["boxes"].float() - numbers.nan_to_num()).abs() * known
    weights = away.new_tensor(WEIGHTS)[:, None, None]
    return focal(outputs["heat"].float(), wanted["heat"], wanted["valid"]) / count + BOX_WEIGHT * (away * weights).sum() / count


def focal(logits: Tensor, heat: Tensor, valid: Tensor) -> Tensor:
    """Sum over valid cells (B,H,W): -(1-p)^2 log p where heat (B,K,H,W) is 1, elsewhere -(1-heat)^4 p^2 log(1-p) (Law & Deng, ECCV 2018)."""
    p = torch.sigmoid(logits)
    hit = (1 - p) ** 2 * F.logsigmoid(logits)
    miss = (1 - heat) ** 4 * p**2 * F.logsigmoid(-logits)
    return -(torch.where(heat == 1, hit, miss) * valid[:, None]).sum()


def answers(outputs: dict[str, Tensor], grid: Grid) -> list[Array]:
    """Per frame (m,11) f64, surest first: class, score, then a box as `Example.boxes` has it. Peaks of the heat, thinned by distance."""
    heat = torch.sigmoid(outputs["heat"].float())
    heat = heat * (heat == F.max_pool2d(heat, 3, 1, 1))
    scores, at = heat.flatten(1).topk(min(MOST, heat[0].numel()))
    cells = grid.rows * grid.columns
    kinds, cell = torch.div(at, cells, rounding_mode="floor"), at % cells
    numbers = outputs["boxes"].float().flatten(2).gather(2, cell[:, None].expand(-1, NUMBERS, -1)).transpose(1, 2)
    rows = torch.cat((kinds[..., None], scores[..., None], cell[..., None], numbers), 2).double().numpy()
    return [_boxes(frame, grid) for frame in rows]


def _boxes(peaks: Array, grid: Grid) -> Array:
    """(m,11) of peaks (n,13): class, score, cell, numbers."""
    kinds, scores, cell, numbers = peaks[:, 0], peaks[:, 1], peaks[:, 2], peaks[:, 3:]
    place = np.stack((cell % grid.columns, cell // grid.columns), 1) + numbers[:, :2]
    size = np.exp(np.clip(numbers[:, 3:6], -3.0, 3.5))
    yaw = np.arctan2(numbers[:, 6], numbers[:, 7])
    rows = np.column_stack((kinds, scores, place * grid.cell_m + grid.low, numbers[:, 2], size, yaw, numbers[:, 8:]))
    rows = rows[(scores >= LEAST_SCORE) & np.isfinite(rows).all(1)]
    apart = np.array([APART_M[name] for name in CLASSES])[rows[:, 0].astype(int)]
    kept: list[int] = []
    for i in range(len(rows)):
        same = [k for k in kept if rows[k, 0] == rows[i, 0]]
        if not (np.hypot(*(rows[same, 2:4] - rows[i, 2:4]).T) < apart[i]).any():
            kept.append(i)
    return rows[kept]


def score(examples: Sequence[Example], found: Sequence[Array], grid: Grid) -> float:
    """Mean AP of the answers (one a frame) where labels are complete."""
    truth, said = [], []
    for example, rows in zip(examples, found, strict=True):
        seen, told = (in_view(x, y, example.ahead_rad, example.fov_rad) for x, y in (example.boxes[:, :2].T, rows[:, 2:4].T))
        centres = transform_points(example.ego_from_state, example.boxes[seen, :3])[:, :2]
        places = transform_points(example.ego_from_state, rows[told, 2:5])[:, :2]
        truth.append(np.column_stack((example.classes[seen], centres)))
        said.append(np.column_stack((rows[told, 0], places, rows[told, 1])))
    return mean_average_precision(truth, said)


def detections(example: Example, rows: Array) -> list[Detection]:
    """An answer as records, in the ego frame."""
    turn = yaw_of(example.ego_from_state)
    centres = transform_points(example.ego_from_state, rows[:, 2:5])
    velocities = turned_xy(rows[:, 9:11], turn, False)
    return [
        Detection(Box(example.stamp_ns, "", CLASSES[int(row[0])], centre, row[5:8], float(row[8] + turn), velocity), float(row[1]))
        for row, centre, velocity in zip(rows, centres, velocities, strict=True)
    ]
