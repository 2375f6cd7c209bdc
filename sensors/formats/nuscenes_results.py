"""Detections as nuScenes' detection task wants them: one JSON for all samples, everything in the global frame."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.formats.detections import Detection
from sensors.geometry import quaternion_from_rotation, rotation_z
from sensors.records import Box

Array = NDArray[Any]

MOST_PER_SAMPLE = 500
MOVING_MPS = 0.5
# what most annotations of a class carry, moving and not; motorcycles and bicycles have a rider or not, which boxes do not say
_ATTRIBUTES = {
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    **dict.fromkeys(("car", "truck", "trailer", "construction_vehicle"), ("vehicle.moving", "vehicle.parked")),
    **dict.fromkeys(("motorcycle", "bicycle"), ("cycle.with_rider", "cycle.without_rider")),
}


def results_json(samples: Mapping[str, tuple[Array, Sequence[Detection]]]) -> bytes:
    """The submission file. samples: by sample token world_from_ego (4,4) and the detections in that ego frame, of which the
    MOST_PER_SAMPLE surest are taken; a sample without any is there with an empty list, as the evaluation demands."""
    results = {}
    for token, (world_from_ego, found) in samples.items():
        surest = sorted(found, key=lambda detection: -detection.score)[:MOST_PER_SAMPLE]
        results[token] = [_row(token, world_from_ego, detection) for detection in surest]
    meta = {f"use_{what}": what == "lidar" for what in ("camera", "lidar", "radar", "map", "external")}
    return json.dumps({"meta": meta, "results": results}, allow_nan=False).encode()


def _row(token: str, world_from_ego: Array, detection: Detection) -> dict[str, Any]:
    box, rotation = detection.box, world_from_ego[:3, :3]
    length, width, height = (float(number) for number in box.size)
    velocity = np.zeros(3) if box.velocity is None else rotation @ (*box.velocity, 0.0)
    return {
        "sample_token": token,
        "translation": (rotation @ box.centre + world_from_ego[:3, 3]).tolist(),
        "size": [width, length, height],
        "rotation": [float(number) for number in quaternion_from_rotation(rotation @ rotation_z(box.yaw_rad)[:3, :3])],
        "velocity": velocity[:2].tolist(),
        "detection_name": box.category,
        "detection_score": float(detection.score),
        "attribute_name": _attribute(box),
    }


def _attribute(box: Box) -> str:
    moving = box.velocity is not None and float(np.hypot(*box.velocity)) > MOVING_MPS
    return _ATTRIBUTES.get(box.category, ("", ""))[0 if moving else 1]
