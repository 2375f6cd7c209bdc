"""Detections as KITTI's label text: one file a frame, one line an object, in a camera's frame (x right, y down, z forward)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.formats.detections import Detection
from sensors.geometry import inverse, project, rotation_z, transform_points
from sensors.records import Box, Camera

Array = NDArray[Any]

# KITTI's cyclist is the rider with the bicycle, as a box of nuScenes' class is; cones and barriers it has none
_TYPES = {
    "car": "Car", "truck": "Truck", "bus": "Misc", "trailer": "Misc", "construction_vehicle": "Misc", "pedestrian": "Pedestrian",
    "motorcycle": "Misc", "bicycle": "Cyclist",
}  # fmt: skip
_UNKNOWN_PX = (-1.0, -1.0, -1.0, -1.0)


def label_text(found: Sequence[Detection], ego_from_camera: Array, camera: Camera | None = None) -> str:
    """Lines `type truncated occluded alpha left top right bottom h w l x y z rotation_y score`, surest first, of what lies ahead of the camera.

    ego_from_camera (4,4) is the frame that x y z (the middle of the bottom face) and rotation_y refer to; KITTI's own is the rectified camera
    0. With a camera the 2D box is the picture's part of the projected corners, and what it does not show is left out; without one it is -1, as
    truncated and occluded, which a LiDAR cannot tell, always are."""
    lines = []
    for detection in sorted(found, key=lambda detection: -detection.score):
        box, kind = detection.box, _TYPES.get(detection.box.category)
        camera_from_ego = inverse(ego_from_camera)
        centre = transform_points(camera_from_ego, box.centre[None])[0]
        heading = camera_from_ego[:3, :3] @ (np.cos(box.yaw_rad), np.sin(box.yaw_rad), 0.0)
        window = _UNKNOWN_PX if camera is None else _window(box, camera)
        if kind is None or window is None or centre[2] <= 0:
            continue
        length, width, height = box.size
        turn = float(np.arctan2(-heading[2], heading[0]))
        alpha = (turn - np.arctan2(centre[0], centre[2]) + np.pi) % (2 * np.pi) - np.pi
        numbers = (alpha, *window, height, width, length, centre[0], centre[1] + height / 2, centre[2], turn, detection.score)
        lines.append(f"{kind} -1 -1 " + " ".join(f"{number:.4f}" for number in numbers) + "\n")
    return "".join(lines)


def _window(box: Box, camera: Camera) -> tuple[float, ...] | None:
    """left, top, right, bottom (px) of the box in the picture; None where nothing of it is seen."""
    signs = np.array([(x, y, z) for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
    corners = (signs * box.size) @ rotation_z(box.yaw_rad)[:3, :3].T + box.centre
    pixels, depth, _ = project(camera, transform_points(inverse(camera.ego_from_camera), corners))
    pixels = pixels[depth > 0.1]
    if not len(pixels):
        return None
    (left, top), (right, bottom) = pixels.min(0), pixels.max(0)
    if right < 0 or bottom < 0 or left > camera.width - 1 or top > camera.height - 1:
        return None
    return max(left, 0.0), max(top, 0.0), min(right, camera.width - 1.0), min(bottom, camera.height - 1.0)
