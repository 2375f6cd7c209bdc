"""Camera models: what is projected, and what lies outside however the polynomial folds; turns about z."""

import cv2
import numpy as np
import pytest

from sensors.geometry import project, rotation_z, yaw_of
from sensors.records import Camera, RecordError

K = np.array([[960.0, 0, 696], [0, 957, 256], [0, 0, 1]])
KITTI_RAW = np.array([-0.3728755, 0.2037299, 0.002219027, 0.001383707, -0.07233722])  # of camera 00 before rectification


def camera(model, distortion, width=1392, height=512):
    return Camera("front", np.eye(4), K, width, height, model, np.asarray(distortion, float))


@pytest.mark.parametrize(
    "model, distortion", [("brown_conrady", KITTI_RAW), ("kannala_brandt", (0.02, -0.4, 0.1, -0.05)), ("mei", (0.6, -0.5, 0.1, 0, 0))]
)
def test_pixels_go_outwards_with_the_angle_and_none_comes_back_into_the_image(model, distortion):
    angle = np.deg2rad(np.arange(0, 89.5, 0.25))
    points = 10 * np.stack((np.sin(angle), np.zeros_like(angle), np.cos(angle)), 1)
    pixels, _, seen = project(camera(model, distortion, width=16000), points)
    edge = int(np.argmin(seen)) if not seen.all() else len(seen)
    assert not seen[edge:].any() and edge > 100
    assert (np.diff(pixels[:edge, 0]) > 0).all()


def test_a_fisheye_sees_beyond_90_degrees():
    fisheye = camera("kannala_brandt", (0.02, -0.004, 0, 0), width=16000, height=16000)
    angle = np.deg2rad([60.0, 89.0, 91.0, 100.0])
    pixels, depth, seen = project(fisheye, 5 * np.stack((np.sin(angle), 0 * angle, np.cos(angle)), 1))
    assert seen.all() and (depth[2:] < 0).all()
    np.testing.assert_allclose(pixels[:, 0], 960 * angle * (1 + 0.02 * angle**2 - 0.004 * angle**4) + 696)
    assert not project(fisheye, np.array([[0.0, 0.0, -5.0]]))[2].any()  # straight behind lies in no direction


def test_inside_the_image_it_is_opencv():
    rng = np.random.default_rng(0)
    points = rng.uniform((-12, -4, 4), (12, 4, 30), (500, 3))
    pixels, _, seen = project(camera("brown_conrady", KITTI_RAW), points)
    theirs = cv2.projectPoints(points, np.zeros(3), np.zeros(3), K, KITTI_RAW)[0][:, 0]
    assert seen.sum() > 200
    np.testing.assert_allclose(pixels[seen], theirs[seen], atol=1e-6)


@pytest.mark.parametrize("model, count", [("pinhole", 1), ("brown_conrady", 8), ("kannala_brandt", 5), ("mei", 6)])
def test_distortion_that_the_model_does_not_have_is_refused(model, count):
    with pytest.raises(RecordError, match=r"camera front.*distortion"):
        camera(model, np.full(count, 0.01))
    camera(model, np.zeros(count))


@pytest.mark.parametrize("yaw_rad", [-3.0, -0.4, 0.0, 2.2])
def test_the_yaw_of_a_turn_is_the_angle_that_it_was_made_of(yaw_rad):
    assert yaw_of(rotation_z(yaw_rad)) == pytest.approx(yaw_rad) and yaw_of(rotation_z(yaw_rad) @ rotation_z(0.1)) == pytest.approx(yaw_rad + 0.1)
