"""What a detector says, in the records' own terms, and the ten classes that it says it in: those of nuScenes' detection task."""

from __future__ import annotations

from dataclasses import dataclass

from sensors.formats.nuscenes_writer import category_of
from sensors.records import Box, RecordError

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
