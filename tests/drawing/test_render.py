"""The renderer, the colours and the pictures from above."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from worldmodel.drawing import colours
from worldmodel.drawing.bev import cloud_image, latent_image, map_image
from worldmodel.drawing.render import NEAR_M, Viewpoint, polyline, render

LOOK = Viewpoint(target=(0.0, 0.0, 0.0), distance_m=10.0, elevation_rad=0.3)


def slow_render(points, tints, viewpoint, width, height, opacity, radius_m):
    """The same picture, point by point from the nearest to the farthest, pixel by pixel."""
    pixels, depth = viewpoint.project(points, width, height)
    shown, left = np.zeros((height, width, 3)), np.ones((height, width))
    focal = 0.5 * height / np.tan(0.5 * viewpoint.field_rad)
    for i in np.argsort(depth, kind="stable"):
        if depth[i] <= NEAR_M:
            continue
        x, y = pixels[i].astype(np.float32)
        radius = np.clip(radius_m * focal / depth[i], 0.8, 2.5)
        for row in range(height):
            for column in range(width):
                near = abs(column - np.round(x)) <= 3 and abs(row - np.round(y)) <= 3
                alpha = min(max(radius + 0.5 - np.hypot(column - x, row - y), 0), 1) * opacity[i]
                if near and alpha > 0:
                    alpha = min(alpha, 0.999)
                    shown[row, column] += left[row, column] * alpha * tints[i]
                    left[row, column] *= 1 - alpha
    return np.round(shown + left[..., None] * np.array([10, 13, 20]))


@given(
    arrays(np.float32, (6, 3), elements=st.floats(-12, 12, width=32)),
    arrays(np.float32, 6, elements=st.floats(0, 1, width=32)),
    st.integers(0, 2**31),
)
def test_the_picture_is_that_of_its_slow_twin(points, opacity, seed):
    tints = np.random.default_rng(seed).uniform(0, 255, (6, 3)).astype(np.float32)
    fast = render(points, tints, LOOK, 24, 18, opacity, 0.3).astype(int)
    slow = slow_render(points, tints, LOOK, 24, 18, opacity, 0.3)
    assert np.abs(fast - slow).max() <= 1


def test_a_near_point_hides_a_far_one():
    line = LOOK.axes()[2]
    points = np.stack([LOOK.eye() + 4 * line, LOOK.eye() + 9 * line]).astype(np.float32)
    for order in ([0, 1], [1, 0]):
        picture = render(points[order], np.array([[255, 0, 0], [0, 255, 0]], np.float32)[order], LOOK, 41, 41)
        assert picture[20, 20].tolist() == [255, 0, 0]


def test_points_that_are_not_finite_or_behind_the_eye_are_not_drawn():
    points = np.array([[np.nan, 0, 0], [np.inf, 0, 0], LOOK.eye() - 3 * LOOK.axes()[2]], np.float32)
    assert (render(points, np.full((3, 3), 255.0), LOOK, 20, 20) == np.array(colours.BACKGROUND)).all()


def test_forward_is_up_and_left_is_left_in_a_picture():
    centre, ahead, left = Viewpoint().project(np.array([[10.0, 0, 0], [15, 0, 0], [10, 5, 0]]), 100, 100)[0]
    assert ahead[1] < centre[1] and left[0] < centre[0]


def test_a_path_is_cut_where_it_passes_behind_the_eye():
    eye, line = LOOK.eye(), LOOK.axes()[2]
    path = np.stack([eye + s * line for s in (3, 4, -5, -6, 5, 6)])
    assert [len(part) for part in polyline(path, LOOK, 50, 50)] == [2, 2]


def test_small_errors_keep_the_colour_of_the_height_and_large_ones_do_not():
    base = np.tile(np.array([[40.0, 118, 190]], np.float32), (4, 1))
    tint = colours.tinted(base, np.array([0.1, -0.4, 4.0, np.nan]))
    np.testing.assert_array_equal(tint[[0, 1, 3]], base[[0, 1, 3]])
    np.testing.assert_allclose(tint[2], colours.ERROR[-1])


def test_the_ground_is_found_below_the_sensor_and_without_points(street):
    assert abs(colours.ground_of(street().past) + 1.7) < 0.1
    assert colours.ground_of(()) == 0.0


def test_a_point_ahead_and_to_the_left_is_in_the_upper_left_quarter():
    picture = cloud_image(np.array([[20.5, 10.5, 1.0], [500, 0, 0], [np.nan, 0, 0]]), reach_m=40, cell_m=1, ground_z=0)
    rows, columns = np.nonzero((picture != np.array(colours.BACKGROUND)).any(axis=2))
    assert picture.shape == (80, 80, 3) and rows.tolist() == [19] and columns.tolist() == [29]


def test_a_latent_map_is_turned_like_the_cloud_and_keeps_its_colours():
    latent = np.zeros((8, 40, 60), np.float32)
    latent[2, 30, 50] = 5  # y = 30 of 40, x = 50 of 60: ahead and left
    latent[3, 5, 10] = 3
    picture = latent_image(latent)
    assert picture.shape == (60, 40, 3) and picture.dtype == np.uint8
    noise = np.random.default_rng(0).normal(size=(8, 20, 20))
    np.testing.assert_array_equal(latent_image(noise), latent_image(noise.copy()))
    lit = map_image(latent[2])
    assert lit[60 - 1 - 50, 40 - 1 - 30].sum() == lit.sum(axis=2).max() > lit[0, 0].sum()
    assert (latent_image(np.zeros((1, 4, 4))) == 127).all()
