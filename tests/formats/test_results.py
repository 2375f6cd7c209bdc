"""Detections leave as nuScenes JSON, KITTI text and SemanticKITTI labels, and say the same when they are read back."""

import json

import numpy as np
import pytest

from sensors.formats import kitti
from sensors.formats.detections import CLASSES, Detection, class_of
from sensors.formats.kitti_results import label_text
from sensors.formats.nuscenes_results import MOST_PER_SAMPLE, results_json
from sensors.formats.nuscenes_writer import CATEGORIES
from sensors.formats.semantickitti import labels_of_boxes, read_labels
from sensors.geometry import from_rotation_translation, inverse, points_in, rotation_from_quaternion, rotation_z, transform_points
from sensors.records import Box, Camera, RecordError

EGO_FROM_CAMERA = from_rotation_translation(np.array([[0, 0, 1.0], [-1, 0, 0], [0, -1, 0]]), np.array([1.2, 0.1, 0.6]))
CAMERA = Camera("image_02", EGO_FROM_CAMERA, np.array([[700.0, 0, 600], [0, 700, 180], [0, 0, 1]]), 1242, 375)


def detection(name="car", at=(15.0, 3.0, 0.2), size=(4.2, 1.8, 1.5), yaw=0.4, velocity=(3.0, 1.0), score=0.8):
    velocity = None if velocity is None else np.array(velocity)
    return Detection(Box(10**9, "", name, np.array(at), np.array(size), yaw, velocity), score)


def test_classes_are_those_of_the_devkit_and_hold_every_datasets_names():
    assert [class_of(n) for n in ("Car", "van", "Cyclist", "Person_sitting", "PEDESTRIAN", "vehicle.bus.bendy", "tree", "animal")] == [
        "car", "car", "bicycle", "pedestrian", "pedestrian", "bus", None, None]  # fmt: skip
    evaluation = pytest.importorskip("nuscenes.eval.detection.utils", reason="the extra `nuscenes` is not installed")
    constants = pytest.importorskip("nuscenes.eval.detection.constants")
    assert {name: class_of(name) for name in CATEGORIES} == {name: evaluation.category_to_detection_name(name) for name in CATEGORIES}
    assert set(CLASSES) == set(constants.DETECTION_NAMES)


@pytest.mark.parametrize("name, score", [("tree", 0.5), ("car", 1.5), ("car", float("nan"))])
def test_a_detection_that_cannot_be_is_refused(name, score):
    with pytest.raises(RecordError):
        detection(name, score=score)


def test_nuscenes_results_are_global_and_capped():
    world_from_ego = rotation_z(0.7)
    world_from_ego[:3, 3] = (400, 1000, 2)
    many = [detection(score=i / 1000) for i in range(MOST_PER_SAMPLE + 7)]
    found = json.loads(results_json({"a": (world_from_ego, [detection()]), "b": (world_from_ego, []), "c": (world_from_ego, many)}))
    assert found["results"]["b"] == [] and len(found["results"]["c"]) == MOST_PER_SAMPLE
    assert min(row["detection_score"] for row in found["results"]["c"]) == 0.007
    (row,) = found["results"]["a"]
    np.testing.assert_allclose(transform_points(inverse(world_from_ego), np.array([row["translation"]]))[0], (15, 3, 0.2), atol=1e-9)
    heading = world_from_ego[:3, :3].T @ rotation_from_quaternion(np.array(row["rotation"]))[:, 0]
    assert np.arctan2(heading[1], heading[0]) == pytest.approx(0.4)
    np.testing.assert_allclose(world_from_ego[:2, :2].T @ row["velocity"], (3, 1))
    assert row["size"] == [1.8, 4.2, 1.5] and row["attribute_name"] == "vehicle.moving" and row["detection_name"] == "car"


@pytest.mark.parametrize("camera", [None, CAMERA])
def test_kitti_text_is_read_back_by_the_label_reader(camera):
    said = [detection(score=0.3), detection("pedestrian", (9.0, -2.0, 0.0), (0.6, 0.7, 1.7), -2.0, None, 0.9), detection("traffic_cone"),
            detection("truck", (-20.0, 0.0, 0.0))]  # fmt: skip
    lines = label_text(said, EGO_FROM_CAMERA, camera).splitlines()
    assert [line.split()[0] for line in lines] == ["Pedestrian", "Car"]  # surest first; cones are none of KITTI's, the truck is behind
    assert all(len(line.split()) == 16 for line in lines)
    read, regions, unreadable = kitti.read_tracking_labels("".join(f"7 -1 {line}\n" for line in lines))  # a tracking line has two more
    assert (len(read), regions, unreadable) == (2, 0, 0)
    for back, whole in zip(read, (said[1].box, said[0].box), strict=True):
        centre = (EGO_FROM_CAMERA @ (*(np.array(back.bottom) - (0, back.size[2] / 2, 0)), 1))[:3]
        heading = EGO_FROM_CAMERA[:3, :3] @ (np.cos(back.turn_rad), 0, -np.sin(back.turn_rad))
        np.testing.assert_allclose(centre, whole.centre, atol=1e-3)
        np.testing.assert_allclose(back.size, whole.size, atol=1e-4)
        assert np.angle(np.exp(1j * (np.arctan2(heading[1], heading[0]) - whole.yaw_rad))) == pytest.approx(0, abs=1e-3)
    _, truncated, occluded, _, left, top, right, bottom = lines[1].split()[:8]
    assert truncated == occluded == "-1"
    if camera is None:
        assert {left, top, right, bottom} == {"-1.0000"}
    else:
        assert 0 <= float(left) < 600 - 700 * 2.9 / 13.8 < float(right) < 600 and 0 < float(top) < float(bottom) <= 374


def test_kitti_leaves_out_what_the_picture_does_not_show():
    beside = detection(at=(5.0, 30.0, 0.0))
    assert label_text([beside], EGO_FROM_CAMERA) and not label_text([beside], EGO_FROM_CAMERA, CAMERA)
    assert label_text([], EGO_FROM_CAMERA) == ""


def test_labels_are_one_per_point_and_the_surest_box_wins():
    rng = np.random.default_rng(0)
    points = rng.uniform((10, -2, -1), (20, 6, 2), (5000, 3)).astype(np.float32)
    sure, other, ridden = detection(score=0.9), detection("truck", (16.0, 3.5, 0.2), score=0.5), detection("bicycle", (12.0, 0.0, 0.2), score=0.4)
    data = labels_of_boxes(points, [other, ridden, sure, detection("bus", (12.0, 0.0, 0.2), score=0.2)], least_score=0.3)
    assert len(data) == 4 * len(points)
    kind, instance = read_labels(data, len(points), "000000.label")
    first, second, third = points_in(sure.box, points), points_in(other.box, points), points_in(ridden.box, points)
    assert first.sum() > 50 and (first & second).any()
    assert (kind[first] == 10).all() and (instance[first] == 1).all()
    assert (kind[second & ~first] == 18).all() and (instance[second & ~first] == 2).all()
    assert (kind[third & ~first & ~second] == 31).all()  # it moves, so somebody rides it
    assert not kind[~(first | second | third)].any() and not instance[~(first | second | third)].any()
    with pytest.raises(RecordError, match="of another sweep"):
        read_labels(data[:-4], len(points), "000000.label")
    assert labels_of_boxes(points[:0], [sure]) == b"" and not np.frombuffer(labels_of_boxes(points, []), "<u4").any()


def test_points_in_a_turned_box_are_those_within_its_own_axes():
    box = detection(yaw=0.9).box
    local = np.array([[2.05, 0.85, 0.7], [2.15, 0, 0], [0, 0.95, 0], [0, 0, 0.8], [-2.05, -0.85, -0.7]])
    points = local @ rotation_z(0.9)[:3, :3].T + box.centre
    assert points_in(box, points).tolist() == [True, False, False, False, True]
