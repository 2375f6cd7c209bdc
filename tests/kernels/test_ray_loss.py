"""Losses along rays against their formulas in float64, and their gradients against those of the formulas."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sensors.kernels.mixture import crps
from sensors.kernels.ray_loss import crps_loss, hazard_loss


def plain_hazard_loss(logits: np.ndarray, bins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = logits.astype(np.float64)
    s = np.arange(x.shape[1])[None]
    before, at = s < bins[:, None], s == bins[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        terms = np.where(before, np.logaddexp(0, x), 0) + np.where(at, np.logaddexp(0, -x), 0)
        sigmoid = np.exp(-np.logaddexp(0, -x))
        slopes = np.where(before, sigmoid, 0) + np.where(at, -np.exp(-np.logaddexp(0, x)), 0)
    return terms.sum(1), slopes


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0, 1, 31, 32, 33, 100]), st.integers(1, 130), st.sampled_from([0.1, 3.0, 40.0, 1e4]))
def test_loss_and_gradient_are_the_formulas(seed: int, rays: int, positions: int, scale: float) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    logits = rng.normal(0, scale, (rays, positions)).astype(np.float32)
    bins = rng.integers(-1, positions + 1, rays)
    loss, gradient = hazard_loss(logits, bins)
    want, slopes = plain_hazard_loss(logits, bins)
    assert (loss.dtype, gradient.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(loss, want, rtol=1e-6, atol=1e-7 * positions)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=2e-7)
    assert (gradient[np.arange(positions)[None] > bins[:, None]] == 0).all()


hostile = st.sampled_from([np.nan, np.inf, -np.inf, -0.0, 88.0, -88.0, 1.5, float(np.float32(3e38)), float(np.float32(-3e38))])


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 9)), elements=hostile), st.integers(0, 10_000))
def test_hostile_logits_give_what_the_formula_gives(logits: np.ndarray, seed: int) -> None:
    bins = np.random.Generator(np.random.Philox(seed)).integers(-1, logits.shape[1] + 1, len(logits)).astype(np.int32)
    loss, gradient = hazard_loss(logits, bins)
    want, slopes = plain_hazard_loss(logits, bins)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(loss, want.astype(np.float32), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=2e-7)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_gradient_is_that_of_the_loss(seed: int) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    logits, bins = rng.normal(0, 2, (4, 7)).astype(np.float32), rng.integers(-1, 8, 4)
    _, gradient = hazard_loss(logits, bins)
    step = 1e-5
    for s in range(7):
        moved = np.zeros((1, 7))
        moved[0, s] = step
        rise = plain_hazard_loss(logits + moved, bins)[0] - plain_hazard_loss(logits - moved, bins)[0]
        np.testing.assert_allclose(gradient[:, s], rise / (2 * step), atol=1e-5)


def test_bad_arguments_are_refused() -> None:
    logits, bins = np.zeros((3, 4), np.float32), np.zeros(3, np.int64)
    for attempt in (
        lambda: hazard_loss(logits.astype(np.float64), bins),
        lambda: hazard_loss(logits[:, :0], bins),
        lambda: hazard_loss(logits, bins[:2]),
        lambda: hazard_loss(logits, bins.astype(np.float32)),
        lambda: hazard_loss(logits, bins + 5),
        lambda: hazard_loss(logits, bins - 2),
    ):
        with pytest.raises(ValueError, match="hazard_loss"):
            attempt()


def plain_crps(log_mass: np.ndarray, centre: np.ndarray, scale: np.ndarray, truth: np.ndarray) -> np.ndarray:
    m, s = centre.astype(np.float64), scale.astype(np.float64)
    p = np.exp(log_mass.astype(np.float64) - log_mass.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    d = np.abs(m - truth[:, None])
    gap, half = np.abs(m[:, :, None] - m[:, None]), 0.5 * (s[:, :, None] + s[:, None])
    pair = gap + 0.5 * (3 * half + gap) * np.exp(-gap / half)
    return (p * (d + s * np.exp(-d / s))).sum(1) - 0.5 * (p[:, :, None] * p[:, None] * pair).sum((1, 2))


def mixtures(seed: int, rays: int, positions: int, spread: float) -> tuple[np.ndarray, ...]:
    rng = np.random.Generator(np.random.Philox(seed))
    log_mass = rng.normal(0, spread, (rays, positions))
    centre, scale = rng.uniform(2, 60, (rays, positions)), 10 ** rng.uniform(-2, 0.5, (rays, positions))
    centre[:, ::3] = centre[:, :1]  # readings of several sweeps often agree
    return tuple(a.astype(np.float32) for a in (log_mass, centre, scale, rng.uniform(2, 60, rays)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0, 1, 5, 33]), st.integers(1, 40), st.sampled_from([0.1, 3.0, 30.0]))
def test_crps_is_the_formula(seed: int, rays: int, positions: int, spread: float) -> None:
    log_mass, centre, scale, truth = mixtures(seed, rays, positions, spread)
    found, *gradients = crps_loss(log_mass, centre, scale, truth)
    np.testing.assert_allclose(found, plain_crps(log_mass, centre, scale, truth), rtol=1e-4, atol=1e-3)  # what is negligible is left out
    assert [g.shape for g in gradients] == [log_mass.shape] * 3 and all(g.dtype == np.float32 for g in (found, *gradients))
    np.testing.assert_allclose(crps_loss(log_mass + np.float32(5), centre, scale, truth)[0], found, rtol=1e-4, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.1, 3.0]))
def test_gradients_of_crps_are_those_of_the_formula(seed: int, spread: float) -> None:
    log_mass, centre, scale, truth = mixtures(seed, 6, 5, spread)
    centre += np.linspace(0, 1, 5, dtype=np.float32)  # between centres that are one the formula has a corner
    _, *gradients = crps_loss(log_mass, centre, scale, truth)
    step = 1e-6
    for which, gradient in enumerate(gradients):
        for k in range(5):
            moved = [[a.astype(np.float64).copy() for a in (log_mass, centre, scale)] for _ in range(2)]
            moved[0][which][:, k] -= step
            moved[1][which][:, k] += step
            below, above = (plain_crps(*columns, truth) for columns in moved)
            np.testing.assert_allclose(gradient[:, k], (above - below) / (2 * step), rtol=1e-3, atol=2e-4)


def test_crps_of_equal_scales_is_the_integral() -> None:
    log_mass, centre, _, truth = mixtures(0, 50, 9, 1.0)
    scale = np.full_like(centre, 0.3)
    p = np.exp(log_mass.astype(np.float64))
    np.testing.assert_allclose(crps_loss(log_mass, centre, scale, truth)[0], crps(p, centre, scale, truth), rtol=1e-4)


def test_crps_of_hostile_rows() -> None:
    log_mass, centre, scale, truth = mixtures(1, 5, 4, 1.0)
    log_mass[0, 1], centre[0, 1] = -np.inf, np.nan  # without mass nobody asks where
    centre[1, 0], truth[2], log_mass[3, 2] = np.nan, np.nan, np.nan
    found, *gradients = crps_loss(log_mass, centre, scale, truth)
    np.testing.assert_array_equal(np.isnan(found), [False, True, True, True, False])
    keep = np.array([0, 2, 3])
    np.testing.assert_allclose(found[:1], plain_crps(*(a[:1, keep] for a in (log_mass, centre, scale)), truth[:1]), rtol=1e-4)
    assert all(np.isfinite(g[[0, 4]]).all() and g[0, 1] == 0 for g in gradients)


def test_bad_arguments_of_crps_are_refused() -> None:
    row, truth = np.zeros((3, 4), np.float32), np.zeros(3, np.float32)
    for attempt in (
        lambda: crps_loss(row.astype(np.float64), row, row, truth),
        lambda: crps_loss(row, row[:, :2], row, truth),
        lambda: crps_loss(row[:, :0], row[:, :0], row[:, :0], truth),
        lambda: crps_loss(row, row, row, truth[:2]),
        lambda: crps_loss(row, row, row, truth.astype(np.float64)),
    ):
        with pytest.raises(ValueError, match="crps_loss"):
            attempt()
