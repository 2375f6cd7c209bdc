"""Planes through readings: exact on planes, on the surface of the start where there are two, and as least squares written the long way."""

import numpy as np
import pytest
import torch

from worldmodel.planes import CLOSE_RAD, FAR_OFF, NOISE_M, SLOPE_PRICE, plane_ranges

SWEEPS = 5


def around(rng, count, inverse_range):
    """Readings (N,T,4) and offsets (N,T,4,2) of rays that look at surfaces: inverse_range(u, v) with u, v (N,T*4) in rad on the tangent plane."""
    elevation = rng.uniform(-0.4, 0.1, count)
    u, v = rng.uniform(-0.004, 0.004, (count, SWEEPS * 4)), rng.uniform(-0.006, 0.006, (count, SWEEPS * 4))
    offsets = np.stack((u / np.cos(elevation)[:, None], v), -1).reshape(count, SWEEPS, 4, 2)
    return inverse_range(u, v).reshape(count, SWEEPS, 4) ** -1, offsets, np.cos(elevation)


def fitted(quadrants, offsets, cos_elevation, start):
    found, support = plane_ranges(*(torch.as_tensor(a, dtype=torch.float32) for a in (quadrants, offsets, cos_elevation, start)))
    return found.numpy(), support.numpy()


def slowly(quadrants, offsets, cos_elevation, start):
    """One ray, one start: the passes of `plane_ranges` by `numpy.linalg.lstsq` with the prices of the slopes as two further rows."""
    there = ~np.isnan(quadrants.ravel())
    r = quadrants.ravel()[there]
    u, v = offsets.reshape(-1, 2)[there].T / np.array(CLOSE_RAD)[:, None] * np.array((cos_elevation, 1.0))[:, None]
    close = 1 / (1 + u * u + v * v)
    a, y, x = np.stack((np.ones_like(u), u, v), 1), start / r - 1, np.zeros(3)
    for far in FAR_OFF:
        weight = close / (1 + ((y - a @ x) / (far + NOISE_M / start)) ** 2) ** 2
        root = np.sqrt(np.concatenate((weight, (SLOPE_PRICE, SLOPE_PRICE, 1e-6))))
        rows = np.concatenate((a, ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0))))
        level_only = np.concatenate((y, np.zeros(3)))
        x = np.linalg.lstsq(rows * root[:, None], level_only * root, rcond=None)[0]
    return start / (1 + x[0]), weight.sum() / close.sum()


def test_the_same_as_least_squares_written_the_long_way():
    rng = np.random.default_rng(0)
    quadrants, offsets, cos = around(rng, 200, lambda u, v: 0.08 + 2 * u - 5 * v + rng.normal(0, 0.003, u.shape))
    quadrants[rng.random(quadrants.shape) < 0.3] = np.nan
    start = np.nanmedian(quadrants.reshape(200, -1), 1)[:, None] * rng.uniform(0.95, 1.05, (200, 2))
    found, support = fitted(quadrants, offsets, cos, start)
    slow = np.array([[slowly(quadrants[i], offsets[i], cos[i], s) for s in start[i]] for i in range(200)])
    np.testing.assert_allclose(found, slow[..., 0], rtol=1e-4)
    np.testing.assert_allclose(support, slow[..., 1], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("slope", [(0.0, 0.0), (0.3, 0.0), (0.0, -0.58)])  # a wall ahead, one in passing, the road
def test_readings_of_a_plane_give_its_range(slope):
    rng = np.random.default_rng(1)
    quadrants, offsets, cos = around(rng, 300, lambda u, v: 1 / 12.0 + slope[0] * u + slope[1] * v)
    found, support = fitted(quadrants, offsets, cos, np.full((300, 1), 12.3))
    assert np.abs(found - 12.0).max() < 0.05 and np.median(np.abs(found - 12.0)) < 0.005 and support.min() > 0.5


def test_of_two_surfaces_the_one_of_the_start():
    rng = np.random.default_rng(2)
    quadrants, offsets, cos = around(rng, 300, lambda u, v: np.where(rng.random(u.shape) < 0.5, 1 / 9.0, 1 / 25.0))
    found, support = fitted(quadrants, offsets, cos, np.repeat(np.array([[9.1, 24.7]]), 300, 0))
    np.testing.assert_allclose(found, np.repeat(np.array([[9.0, 25.0]]), 300, 0), rtol=4e-3)
    assert support.max() < 0.95


def test_noise_is_averaged():
    rng = np.random.default_rng(3)
    noise_m = 0.02
    quadrants, offsets, cos = around(rng, 2000, lambda u, v: 1 / (10.0 + rng.normal(0, noise_m, u.shape)))
    error = fitted(quadrants, offsets, cos, quadrants[:, :1, 0])[0][:, 0] - 10
    assert error.std() < 0.5 * noise_m


def test_absent_readings_say_nothing_and_none_at_all_leaves_the_start():
    rng = np.random.default_rng(4)
    quadrants, offsets, cos = around(rng, 50, lambda u, v: 0.05 + 3 * v)
    wild = quadrants.copy()
    wild[:, 2] = np.nan
    changed = offsets.copy()
    changed[:, 2] = np.nan
    start = np.full((50, 1), 20.0)
    kept = [0, 1, 3, 4]
    np.testing.assert_array_equal(fitted(wild, changed, cos, start)[0], fitted(wild, offsets, cos, start)[0])
    np.testing.assert_allclose(fitted(wild, changed, cos, start)[0], fitted(quadrants[:, kept], offsets[:, kept], cos, start)[0], rtol=1e-6)
    found, support = fitted(np.full_like(quadrants, np.nan), np.full_like(offsets, np.nan), cos, np.concatenate((start, start * np.nan), 1))
    assert (found[:, 0] == 20).all() and not support[:, 0].any() and np.isnan(found[:, 1]).all()
