"""The scene of a flat road with boxes on it: what stands, what moves, and what of it the newest sweep sees past."""

import dataclasses

import numpy as np
import pytest

from sensors.geometry import rotation_z, transform_points
from tests.test_motion import history
from worldmodel.batches import _Turn, _turned, _turned_scene
from worldmodel.config import load_config
from worldmodel.scene import AGE, CUBE_M, PAST, Scene, scene_of

CAR, SPEED = (14.0, 4.0, 4.4, 1.8, 1.5), 8.0
ENCODER = load_config("tiny").encoder
LOWERED = np.eye(4)
LOWERED[2, 3] = -1.8


@pytest.fixture(scope="module")
def past():
    return history([(CAR, (SPEED, 0.0))])[0]


@pytest.fixture(scope="module")
def scene(past):
    return scene_of(past, LOWERED, ENCODER)


def in_car(points, x, margin=0.25):
    return (np.abs(points[:, 0] - x) < CAR[2] / 2 + margin) & (np.abs(points[:, 1] - CAR[1]) < CAR[3] / 2 + margin) & (points[:, 2] > -1.7)


def test_each_cube_that_any_sweep_met_has_one_point_and_no_other_has(past, scene):
    low = np.float32(ENCODER.low)
    cube = lambda points: {tuple(row) for row in np.floor((points[:, :3] - low) / np.float32(CUBE_M)).astype(int)}  # noqa: E731
    everything = transform_points(LOWERED, np.concatenate(past.points))
    inside = ((everything >= low) & (everything < np.float32(ENCODER.high))).all(1)
    met, kept = cube(everything[inside]), cube(scene.still)
    assert len(kept) == len(scene.still) and kept <= met
    assert len(met - kept) < 0.01 * len(met)  # the newest points of what moves, which are kept apart
    assert cube(scene.moving) and len(scene.still) < 0.3 * len(everything)


def test_the_newest_point_of_a_cube_is_the_one(past, scene):
    seen_now = transform_points(LOWERED, past.points[-1])
    rows = scene.still[scene.still[:, AGE] == 0]
    assert len(rows) > 1000 and np.isin(rows[:, 0], seen_now[:, 0]).all()
    assert np.unique(scene.still[:, AGE]) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])


def test_what_moves_is_apart_and_goes_on(scene):
    assert in_car(scene.moving, CAR[0]).mean() > 0.9 and len(scene.moving) > 50
    assert not (in_car(scene.still, CAR[0], -0.1) & (scene.still[:, AGE] == 0)).any()
    assert in_car(scene.moving_at(1.0), CAR[0] + SPEED, 0.5).mean() > 0.9
    assert np.array_equal(scene.moving_at(0.0), scene.moving[:, :3])


def test_what_the_car_has_left_is_seen_past_and_what_stands_is_not(scene):
    older = scene.still[:, AGE] > 0.3
    trail = scene.still[older & in_car(scene.still, CAR[0] - 0.8 * SPEED)]
    assert len(trail) > 20 and (trail[:, PAST] > 1).mean() > 0.7
    wall = scene.still[(scene.still[:, AGE] > 0) & (scene.still[:, 1] > 15) & (np.abs(scene.still[:, 0]) < 25)]
    assert len(wall) > 20 and np.abs(np.median(wall[:, PAST])) < 0.1
    assert not scene.still[scene.still[:, AGE] == 0, PAST].any()


def test_a_turned_frame_turns_places_and_velocities(past, scene):
    turn = rotation_z(np.pi / 2)
    turned = scene_of(past, turn @ LOWERED, ENCODER)
    expected = transform_points(turn, scene.moving_at(1.0))
    assert np.abs(expected.mean(0) - turned.moving_at(1.0).mean(0)).max() < 0.1  # other cubes keep other points


@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_a_scene_that_is_turned_mirrored_and_scaled_goes_on_as_it_would_have(scene, mirror):
    turn = _Turn(0.7, mirror, 1.04)
    turned = _turned_scene(scene, turn)
    expected = _turned(scene.moving_at(0.8), turn)
    assert np.abs(expected - turned.moving_at(0.8)).max() < 1e-4 and np.abs(expected - turned.moving[:, :3]).max() > 1
    assert np.array_equal(turned.still[:, 3:PAST], scene.still[:, 3:PAST])
    assert np.allclose(turned.still[:, PAST], 1.04 * scene.still[:, PAST])  # it is a length


def test_of_too_many_points_older_ones_are_left_out(past, scene, monkeypatch):
    monkeypatch.setattr("worldmodel.scene.MOST_STILL", 5000)
    fewer = scene_of(dataclasses.replace(past, memo={}), LOWERED, ENCODER)
    assert np.array_equal(fewer.still, scene.still[:5000])


def test_an_empty_past_is_an_empty_scene(past):
    nothing = dataclasses.replace(past, points=tuple(p[:0] for p in past.points), intensity=tuple(i[:0] for i in past.intensity), memo={})
    found = scene_of(nothing, LOWERED, ENCODER)
    assert isinstance(found, Scene) and found.still.shape == (0, 6) and found.moving_at(0.4).shape == (0, 3)
