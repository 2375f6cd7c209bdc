"""What a fine-tuned detector says about logs, as files that others read: nuScenes' results JSON, KITTI's label text, SemanticKITTI's labels.

FOLDER/nuscenes.json                               where the logs' tables are given; every sample of their scenes
FOLDER/kitti/LOG/000012.txt                        SWEEP counts the sweeps of the log's reference LiDAR as stored, from 0
FOLDER/semantickitti/LOG/000012.label              one label for each point of the sweep as stored
FOLDER/manifest.json
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.adapters.nuscenes import Keyframe
from sensors.clips import clips_at
from sensors.data import Part
from sensors.errors import UsageError, one_line
from sensors.files import MANIFEST, new_folder, safe_name, seal
from sensors.formats.detections import Detection
from sensors.formats.kitti_results import label_text
from sensors.formats.nuscenes_results import results_json
from sensors.formats.semantickitti import labels_of_boxes
from sensors.geometry import from_rotation_translation, transform_points
from sensors.records import Camera, Log
from worldmodel.finetune import Trial, tasks
from worldmodel.labelled import labelled_stamps

Array = NDArray[Any]

SURE = 0.3  # a point gets a class from boxes that are at least so sure
# a camera at the LiDAR's place that looks ahead, for logs without one
AHEAD = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])


def write(
    folder: Path, trial: Trial, parts: Sequence[Part], tables: Mapping[str, Sequence[Keyframe]], every_s: float, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the detections of a trained trial on the parts as the new folder, and give its manifest.

    tables: by log id the samples of those that come from nuScenes' tables, which are then answered, all of them; other logs at their labelled
    sweeps, every_s apart. about: further fields of the manifest."""
    samples: dict[str, tuple[Array, Sequence[Detection]]] = {}
    counts = {"frames": 0, "boxes": 0, "samples_without_sweep": 0}
    with new_folder(folder.parent) as new:
        for part in parts:
            keyframes = {frame.stamp_ns: frame for frame in tables.get(part.log.id, ())}
            found = detect(trial, part, np.array(sorted(keyframes), np.int64) if keyframes else _labelled(part, every_s))
            ego_from_camera, camera = _camera(part.log)
            for index, detections in found.items():
                name = f"{safe_name(part.log.id)}/{index:06d}"
                new.write(f"kitti/{name}.txt", label_text(detections, ego_from_camera, camera).encode())
                new.write(f"semantickitti/{name}.label", labels_of_boxes(_points(part.log, index), detections, SURE))
                counts["frames"] += 1
                counts["boxes"] += len(detections)
            of_stamp = {int(part.log.sweep_stamps_ns[part.log.reference_lidar][index]): detections for index, detections in found.items()}
            samples |= {frame.token: (frame.world_from_ego, of_stamp.get(stamp, ())) for stamp, frame in keyframes.items()}
            counts["samples_without_sweep"] += len(keyframes.keys() - of_stamp.keys())
        if samples:
            new.write("nuscenes.json", results_json(samples))
        manifest = {**about, **counts, "samples": len(samples), "files": [vars(entry) for entry in new.entries()]}
        new.write(MANIFEST, seal(manifest))
        new.publish(folder.name)
    return manifest


def detect(trial: Trial, part: Part, stamps_ns: Array) -> dict[int, list[Detection]]:
    """What the trial finds at the stamps (S,), by sweep of the log's reference LiDAR; sweeps without pose are left out."""
    model = trial.config.model
    clips = clips_at(part.log, stamps_ns, past=model.past, rate_hz=model.rate_hz, from_ns=part.from_ns)
    examples = [trial.task.example_of(clip, None, trial.config) for clip in clips]
    answers = trial.answers(examples)
    return {c.past[-1].sweep_index: trial.task.detections(e, a) for c, e, a in zip(clips, examples, answers, strict=True)}


def _labelled(part: Part, every_s: float) -> Array:
    labels = part.log.open_labels()
    return np.zeros(0, np.int64) if labels is None else labelled_stamps(part, labels, every_s)


def _points(log: Log, index: int) -> Array:
    """(N,3) f32: all points of a sweep of the reference LiDAR, as stored, in the ego frame."""
    lidar = log.reference_lidar
    return transform_points(log.lidars[lidar].ego_from_lidar, log.read_sweep(lidar, index).points)


def _camera(log: Log) -> tuple[Array, Camera | None]:
    """The frame of a log's first camera by name, in the ego frame, and the camera."""
    if log.cameras:
        camera = log.cameras[min(log.cameras)]
        return camera.ego_from_camera, camera
    return log.lidars[log.reference_lidar].ego_from_lidar @ from_rotation_translation(AHEAD, np.zeros(3)), None


def check(folder: Path, task_name: str, parts: Sequence[Part], tables: Mapping[str, Sequence[Keyframe]]) -> None:
    """UsageError, before anything is trained, where `write` would have nothing to write, or would have to replace something."""
    if task_name in tasks() and not hasattr(importlib.import_module(f"worldmodel.downstream.{task_name}"), "detections"):
        raise UsageError(f"--results: the task {task_name} finds no boxes; give --task detection")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"--results {one_line(folder)}: is not empty; give a new folder")
    if cut := [part.log.id for part in parts if part.log.id in tables and (part.from_ns, part.to_ns) != (None, None)]:
        raise UsageError(f"--tables: the test data has a part of log {one_line(cut[0])}, and scenes are scored whole; leave out its range")
