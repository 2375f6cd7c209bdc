"""What a detector says, in the records' own terms, and the ten classes that it says it in: those of nuScenes' detection task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.formats.nuscenes_writer import category_of
from sensors.records import Box, RecordError

Array = NDArray[Any]

CLASSES = (
    "car", "truck", "bus", "trailer", "construction_vehicle", "pedestrian", "motorcycle", "bicycle", "traffic_cone", "barrier",
)  # fmt: skip
_CLASS_OF_CATEGORY = {
    "vehicle.car": "car", "vehicle.truck": "truck", "vehicle.bus.bendy": "bus", "vehicle.bus.rigid": "bus", "vehicle.trailer": "trailer",
    "vehicle.construction": "construction_vehicle", "human.pedestrian.adult": "pedestrian", "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian", "human.pedestrian.police_officer": "pedestrian", "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle", "movable_object.trafficcone": "traffic_cone", "movable_object.barrier": "barrier",
}  # fmt: skip


def class_of(category: str) -> str | None:
    """The class of CLASSES that a box of any dataset belongs to (`vehicle.car`, `Car` and `van` are cars), None for what is not detected."""
    return _CLASS_OF_CATEGORY.get(category_of(category))


@dataclass(frozen=True, eq=False)
class Detection:
    """A box in the ego frame of its stamp, its category one of CLASSES, and how sure the detector is of it (0..1)."""

    box: Box
    score: float

    def __post_init__(self) -> None:
        if self.box.category not in CLASSES or not 0 <= self.score <= 1:
            raise RecordError(f"detection at {self.box.stamp_ns}: {self.box.category!r}, score {self.score}; expected a class of nuScenes and 0..1")


def points_in(box: Box, points: Array) -> Array:
    """(N,) bool: points (N,3) of the box's frame that lie in it."""
    c, s = np.cos(box.yaw_rad), np.sin(box.yaw_rad)
    away = points.astype(np.float64) - box.centre
    along = np.stack((away[:, 0] * c + away[:, 1] * s, away[:, 1] * c - away[:, 0] * s, away[:, 2]), 1)
    inside: Array = (np.abs(along) <= box.size / 2).all(axis=1)
    return inside
