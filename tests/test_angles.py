"""Polynomials of angles against numpy's functions in double precision."""

import numpy as np
from numba import njit

from sensors.angles import atan2, sine_of_half2


@njit
def both(y, x, angle):
    turned, squared = np.empty(len(y), np.float32), np.empty(len(angle), np.float32)
    for i in range(len(y)):
        turned[i] = atan2(y[i], x[i])
    for i in range(len(angle)):
        squared[i] = sine_of_half2(angle[i])
    return turned, squared


def test_polynomials_are_as_exact_as_single_precision_has_angles():
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=200_000) * 10 ** rng.uniform(-6, 6, 200_000) for _ in range(2))
    x, y = (np.append(v, w).astype(np.float32) for v, w in ((x, [0, 1, -1, 0, 0, -1]), (y, [0, 0, 0, 1, -1, -1])))
    angle = np.append(rng.uniform(-2 * np.pi, 2 * np.pi, 200_000) * 10 ** rng.uniform(-6, 0, 200_000), 0).astype(np.float32)
    turned, squared = both(y, x, angle)
    assert np.abs(turned - np.arctan2(y.astype(float), x.astype(float))).max() < 4e-7
    half = np.sin(np.abs(angle.astype(float)) / 2)
    within = np.abs(angle) < np.pi
    assert np.abs(np.sqrt(squared) - np.abs(half)).max() < 3e-7
    assert np.abs(squared[within & (angle != 0)] / half[within & (angle != 0)] ** 2 - 1).max() < 1e-6
