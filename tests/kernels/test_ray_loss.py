"""The hazard loss against its formula in float64, and its gradient against that of the formula."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sensors.kernels.ray_loss import hazard_loss


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
