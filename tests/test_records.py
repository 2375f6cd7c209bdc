"""Records check themselves when they are made: what cannot be right is refused in a line, and nothing is bent to fit."""

from collections import Counter

import numpy as np
import pytest

from sensors.adapters.base import in_order
from sensors.geometry import rotation_z
from sensors.records import Box, Labels, Lidar, Log, RecordError, Sweep, Trajectory, checked_transform

POINTS, INTENSITY = np.zeros((5, 3), np.float32), np.zeros(5, np.float32)


@pytest.mark.parametrize(("field", "value", "words"), [
    ("time_ns", np.linspace(0, 0.1, 5), "not whole numbers"),
    ("time_ns", np.arange(5, dtype=np.int64) + 1_700_000_000_000_000_000, "does not fit int32"),
    ("ring", np.array([-1, 0, 1, 2, 3]), "-1..3 does not fit uint16"),
    ("ring", np.array([0, 1, 2, 3, 70000]), "0..70000 does not fit uint16"),
])  # fmt: skip
def test_numbers_that_a_cast_would_change_are_refused(field, value, words):
    with pytest.raises(RecordError, match=rf"^sweep of top at 7, {field}: .*{words}"):
        Sweep("top", 7, POINTS, INTENSITY, **{field: value})
    Sweep("top", 7, POINTS, INTENSITY, **{field: np.arange(5, dtype=np.int64)})  # other integers are no matter
    Sweep("top", 7, POINTS, INTENSITY, **{field: np.zeros(5)})


def test_stamps_in_seconds_are_refused_wherever_they_come_in():
    seconds = np.arange(50) * 0.1
    with pytest.raises(RecordError, match="top, stamps: not whole numbers"):
        in_order(seconds, list(range(50)), "top", Counter())
    with pytest.raises(RecordError, match="trajectory, stamps: not whole numbers"):
        Trajectory(seconds, np.tile(np.eye(4), (50, 1, 1)))
    stamps, items = in_order([], [], "top", Counter())
    assert len(stamps) == len(items) == 0


def test_many_poses_are_checked_as_one_is():
    rng = np.random.default_rng(0)
    poses = np.stack([rotation_z(yaw) for yaw in rng.uniform(-3, 3, 50)])
    poses[:, :3, :3] += rng.normal(size=(50, 3, 3)) * 1e-5
    poses[:, :3, 3] = rng.normal(size=(50, 3)) * 1e6
    stamps = np.arange(50)
    made = Trajectory(stamps, poses).world_from_ego
    assert np.array_equal(made, np.stack([checked_transform("pose", p) for p in poses])) and not made.flags.writeable
    wrong = {"not finite": np.nan, "left-handed": -1.0, "not a rigid": 2.0}
    for words, factor in wrong.items():
        broken = poses.copy()
        broken[7, :3, 0] *= factor
        with pytest.raises(RecordError, match=f"^pose at 7: .*{words}"):
            Trajectory(stamps, broken)
    broken = poses.copy()
    broken[9, 3, 0] = 1
    with pytest.raises(RecordError, match=r"^pose at 9: not a rigid"):
        Trajectory(stamps, broken)


@pytest.mark.parametrize(("change", "words"), [
    ({"track": 17}, "track 17 is a int, expected a str"),
    ({"category": None}, "category None is a NoneType"),
])  # fmt: skip
def test_names_of_boxes_are_text(change, words):
    right = {"stamp_ns": 7, "track": "17", "category": "car", "centre": (9, 0, 1), "size": (4, 2, 1.5), "yaw_rad": -6.2}
    assert Labels([Box(**right)]).boxes[0].track == "17"
    with pytest.raises(RecordError, match=rf"^box .* at 7: {words}"):
        Box(**right | change)
    for wrong, words in (((Box(**right), right), "holds a dict where each is a Box"), ([None], "holds a NoneType"), (None, "a NoneType, expected")):
        with pytest.raises(RecordError, match=f"labels, boxes: {words}"):
            Labels(wrong)
    with pytest.raises(RecordError, match="labels, categories: a str, expected a tuple"):
        Labels((), "car")


def test_a_lidar_and_a_camera_have_names_of_their_own():
    nothing = np.zeros(0, np.int64)
    lidar = Lidar("front", np.eye(4), 10.0, beams=np.int64(64))
    assert type(lidar.beams) is int
    with pytest.raises(RecordError, match="elevations: 1 values are not finite"):
        Lidar("front", np.eye(4), 10.0, elevations_rad=np.array([0.0, np.nan]))
    common = {"id": "own/a", "dataset": "own", "licence": "", "ego_frame": "", "poses": None, "read_sweep": None, "read_image": None}
    with pytest.raises(RecordError, match="log own/a: 'front' is the name of a LiDAR and of a camera"):
        Log(lidars={"front": lidar}, cameras={"front": None}, sweep_stamps_ns={"front": nothing}, image_stamps_ns={"front": nothing}, **common)
    with pytest.raises(RecordError, match="log own/a: 3 stamps and 2 values of the measured speed"):
        Log(lidars={"front": lidar}, cameras={}, sweep_stamps_ns={"front": nothing}, image_stamps_ns={}, measured_speed=(np.arange(3), np.zeros(2)),
            **common)  # fmt: skip
