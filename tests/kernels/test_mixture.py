"""Laplace mixtures given bounds, against plain numpy: F as it is written, integrals as sums over a fine grid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensors.kernels.mixture import LEAST_MASS, cdf, crps, log_density, quantiles

LOW, HIGH = 2.0, 56.0
LEVELS = np.array([0.05, 0.1, 0.5, 0.9, 0.95])


def plain_f(x, p, m, s):
    u = (np.asarray(x, np.float64)[..., None] - m) / s
    return (p * np.where(u < 0, 0.5 * np.exp(np.minimum(u, 0)), 1 - 0.5 * np.exp(-np.maximum(u, 0)))).sum(-1)


def plain_g(x, p, m, s, low, high):
    a, b = plain_f(low, p, m, s), plain_f(high, p, m, s)
    return (plain_f(x, p, m, s) - a) / (b - a)


def plain_crps(y, p, m, s, low, high):
    """Midpoints of a grid that is fine around every centre and edge and has the truth among its edges."""
    steps = np.concatenate((-np.geomspace(1e-4, 40, 400)[::-1], [0], np.geomspace(1e-4, 40, 400)))
    edges = np.concatenate([np.linspace(low, high, 4001), [y], *(centre + scale * steps for centre, scale in zip(m, s, strict=True))])
    edges = np.unique(np.clip(edges, low, high))
    middle = 0.5 * (edges[1:] + edges[:-1])
    return (np.diff(edges) * (plain_g(middle, p, m, s, low, high) - (middle >= y)) ** 2).sum()


@st.composite
def mixtures(draw):
    """(p, m, s) of one row: masses over many magnitudes and zeros, centres inside the bounds and beyond them, equal and unequal scales."""
    count = draw(st.integers(1, 12))
    rng = np.random.Generator(np.random.Philox(draw(st.integers(0, 2**32))))
    p = 10 ** rng.uniform(-draw(st.sampled_from([0.5, 3, 9])), 0, count)
    p[rng.random(count) < draw(st.sampled_from([0, 0.4]))] = 0
    p[rng.integers(count)] = 1
    spread = draw(st.sampled_from(["inside", "beyond", "clustered"]))
    m = rng.uniform(2, 56, count) if spread == "inside" else rng.uniform(-3, 75, count) if spread == "beyond" else rng.normal(20, 0.1, count)
    s = 10 ** rng.uniform(-1.7, 0.8, count)
    if draw(st.booleans()):
        s[:] = s[0]
    return p / p.sum(), m, s


def inside_share(p, m, s, low, high):
    return plain_f(high, p, m, s) - plain_f(low, p, m, s)


@settings(max_examples=150, deadline=None)
@given(mixtures(), st.floats(LOW, HIGH))
def test_the_distribution_given_the_bounds_is_the_plain_one(mixture, y):
    p, m, s = mixture
    row = p[None], m[None], s[None]
    if inside_share(p, m, s, LOW, HIGH) < 1e-6:
        return
    found = quantiles(*row, LEVELS, LOW, HIGH)[0]
    assert ((found >= LOW) & (found <= HIGH)).all() and (np.diff(found) >= -1e-4).all()
    # a quantile is right to 0.1 mm: one tenth of a millimetre to either side F has passed its level
    assert (plain_g(np.maximum(found - 1e-4, LOW), p, m, s, LOW, HIGH) <= LEVELS + 1e-5).all()
    assert (plain_g(np.minimum(found + 1e-4, HIGH), p, m, s, LOW, HIGH) >= LEVELS - 1e-5).all()
    np.testing.assert_allclose(cdf(*row, np.array([y]), LOW, HIGH)[0], plain_g(y, p, m, s, LOW, HIGH), atol=1e-5)
    density = (p / (2 * s) * np.exp(-np.abs(y - m) / s)).sum() / inside_share(p, m, s, LOW, HIGH)
    if density > 1e-200:
        np.testing.assert_allclose(log_density(*row, np.array([y]), LOW, HIGH)[0], np.log(density), atol=1e-4)


@settings(max_examples=80, deadline=None)
@given(mixtures(), st.floats(LOW, HIGH))
def test_crps_is_the_integral(mixture, y):
    p, m, s = mixture
    share = inside_share(p, m, s, LOW, HIGH)
    if share < 1e-6:
        return
    expected = plain_crps(y, p, m, s, LOW, HIGH)
    # with little of the mass inside it is summed over quantiles, to a part of the spread
    tolerance = 1e-4 if share > 0.02 else 0.02 + 0.01 * expected
    np.testing.assert_allclose(crps(p[None], m[None], s[None], np.array([y]), LOW, HIGH)[0], expected, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.floats(-10, 90))
def test_without_bounds_everything_counts(mixture, y):
    p, m, s = mixture
    row = p[None], m[None], s[None]
    found = quantiles(*row, LEVELS)[0]
    assert (plain_f(found - 1e-4, p, m, s) <= LEVELS + 1e-5).all() and (plain_f(found + 1e-4, p, m, s) >= LEVELS - 1e-5).all()
    np.testing.assert_allclose(cdf(*row, np.array([y]))[0], plain_f(y, p, m, s), atol=1e-5)
    far = (min(y, (m - 40 * s).min()), max(y, (m + 40 * s).max()))
    # as X and an independent copy of it say: E|X - y| - E|X - X'| / 2, on the same grid
    np.testing.assert_allclose(crps(*row, np.array([y]))[0], plain_crps(y, p, m, s, *far), rtol=1e-3, atol=2e-4)


def test_one_narrow_component_is_a_point_forecast():
    one = np.ones((1, 1)), np.full((1, 1), 20.0), np.full((1, 1), 1e-4)
    np.testing.assert_allclose(crps(*one, np.array([23.5]), LOW, HIGH), 3.5, atol=2e-4)
    np.testing.assert_allclose(quantiles(*one, np.array([0.5]), LOW, HIGH), 20.0, atol=2e-4)


def test_a_truth_beyond_the_bounds_adds_its_distance_and_has_no_density():
    row = np.ones((1, 1)), np.full((1, 1), 50.0), np.full((1, 1), 1.0)
    at_edge, beyond = (crps(*row, np.array([y]), LOW, HIGH)[0] for y in (56.0, 60.0))
    np.testing.assert_allclose(beyond, at_edge + 4.0)
    assert log_density(*row, np.array([60.0]), LOW, HIGH)[0] == -np.inf
    assert cdf(*row, np.array([60.0]), LOW, HIGH)[0] == 1.0 and cdf(*row, np.array([0.5]), LOW, HIGH)[0] == 0.0


def hostile_rows():
    good = (0.5, 20.0, 0.3)
    second = [(np.nan, 20, 1), (0.5, np.inf, 1), (0.5, 20, 0), (0.5, 20, -1), (np.inf, 20, 1), (-0.1, 20, 1), (0.5, 20, np.nan)]
    return [np.array([good, bad]).T for bad in second] + [np.zeros((3, 2)), np.array([(1, 500.0, 0.1), (0, np.nan, np.nan)]).T]


@pytest.mark.parametrize("row", hostile_rows(), ids=range(len(hostile_rows())))
def test_a_row_that_says_nothing_gives_nan_and_leaves_its_neighbours_alone(row):
    good = np.array([(1.0, 20.0, 0.3), (0.0, np.nan, np.nan)]).T
    p, m, s = np.stack((good, row, good), 1)
    y = np.full(3, 21.0)
    for value in (quantiles(p, m, s, LEVELS, LOW, HIGH), cdf(p, m, s, y, LOW, HIGH), log_density(p, m, s, y, LOW, HIGH), crps(p, m, s, y, LOW, HIGH)):
        assert np.isnan(value[1]).all() and np.isfinite(value[0]).all()
        np.testing.assert_array_equal(value[0], value[2])


def test_mass_just_beyond_a_bound_still_has_a_conditional_distribution():
    row = np.ones((1, 1)), np.full((1, 1), 57.0), np.full((1, 1), 0.1)
    assert LEAST_MASS < inside_share(*(a[0] for a in row), LOW, HIGH) < 1e-4
    # below the bound it is an exponential of the same scale
    np.testing.assert_allclose(quantiles(*row, np.array([0.5]), LOW, HIGH)[0, 0], HIGH + 0.1 * np.log(0.5), atol=1e-3)


def test_empty_and_ill_shaped_input():
    none = np.zeros((0, 4))
    assert quantiles(none, none, none, LEVELS).shape == (0, 5) and crps(none, none, none, np.zeros(0)).shape == (0,)
    assert np.isnan(quantiles(np.zeros((2, 0)), np.zeros((2, 0)), np.zeros((2, 0)), LEVELS)).all()
    one = np.ones((1, 1))
    for call in (lambda: quantiles(one, one, np.ones((1, 2)), LEVELS), lambda: quantiles(one, one, one, LEVELS[::-1]),
                 lambda: cdf(one, one, one, np.zeros(2)), lambda: crps(one, one, one, np.zeros(1), 56, 2)):  # fmt: skip
        with pytest.raises(ValueError):
            call()
