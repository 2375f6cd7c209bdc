"""SemanticKITTI's `.label` files (Behley et al., ICCV 2019): a little-endian uint32 for each point of a sweep, in its order; the lower 16 bits
are the class, the upper 16 the instance, 0 for neither."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.errors import one_line
from sensors.formats.detections import Detection
from sensors.geometry import points_in
from sensors.records import RecordError

Array = NDArray[Any]

# resting and ridden two-wheelers are classes of their own
_CLASS = {
    "car": 10, "truck": 18, "bus": 13, "trailer": 20, "construction_vehicle": 20, "pedestrian": 30, "motorcycle": 15, "bicycle": 11,
    "traffic_cone": 99, "barrier": 99,
}  # fmt: skip
_RIDDEN = {"motorcycle": 32, "bicycle": 31}
RIDDEN_MPS = 0.5


def labels_of_boxes(points: Array, found: Sequence[Detection], least_score: float = 0.0) -> bytes:
    """The file for points (N,3), given in the boxes' frame: a point in several boxes is the surest one's, one in none is unlabelled.

    Instances are numbered from 1, surest first. least_score: less sure detections are left out."""
    kept = sorted((d for d in found if d.score >= least_score), key=lambda detection: -detection.score)[:0xFFFF]
    labels = np.zeros(len(points), "<u4")
    for number, detection in reversed(list(enumerate(kept, 1))):
        box = detection.box
        ridden = box.velocity is not None and float(np.hypot(*box.velocity)) > RIDDEN_MPS
        label = _RIDDEN.get(box.category, _CLASS[box.category]) if ridden else _CLASS[box.category]
        labels[points_in(box, points)] = label | number << 16
    return labels.tobytes()


def read_labels(data: bytes, count: int, what: str) -> tuple[Array, Array]:
    """Class (N,) u16 and instance (N,) u16 of a file for count points; RecordError, naming `what`, where it has another size."""
    if len(data) != 4 * count:
        raise RecordError(f"{one_line(what)}: {len(data)} bytes, expected {4 * count} for {count} points; is it of another sweep?")
    labels = np.frombuffer(data, "<u4")
    return (labels & 0xFFFF).astype(np.uint16), (labels >> 16).astype(np.uint16)
