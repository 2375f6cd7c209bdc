"""Sweeps put together, against one matrix product per sweep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensors.kernels.aggregate import aggregate


def sweeps(seed: int, counts: list, far: float) -> tuple[list, list, list, list]:
    rng = np.random.Generator(np.random.Philox(seed))
    points = [rng.normal(0, 8, (n, 3)).astype(np.float32) for n in counts]
    intensity = [rng.random(n).astype(np.float32) for n in counts]
    transforms = []
    for _ in counts:
        q, _r = np.linalg.qr(rng.normal(0, 1, (3, 3)))
        m = np.eye(4)
        m[:3, :3], m[:3, 3] = q, rng.normal(0, far, 3)
        transforms.append(m)
    return points, intensity, transforms, [0.05 * i for i in range(len(counts))]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.sampled_from([0, 1, 3, 400]), max_size=4),
    st.sampled_from([0.0, 1.0, 1e6]),
    st.sampled_from([0.0, 2.0, 100.0]),
)
def test_every_kept_point_is_where_its_transform_puts_it(seed: int, counts: list, far: float, close: float) -> None:
    points, intensity, transforms, lags = sweeps(seed, counts, far)
    for p in points:
        p[::17] = np.float32(-0.0)
        p[1::19, 2] = np.nan
        p[2::23, 0] = np.inf
    got = aggregate(points, intensity, transforms, lags, close)
    want = [np.empty((0, 5))]
    for p, v, m, lag in zip(points, intensity, transforms, lags):
        keep = ~((np.abs(p[:, 0]) < close) & (np.abs(p[:, 1]) < close))
        with np.errstate(invalid="ignore"):
            moved = p[keep].astype(np.float64) @ m[:3, :3].T + m[:3, 3]
        want.append(np.column_stack((moved, v[keep], np.full(keep.sum(), lag))))
    whole = np.concatenate(want)
    assert got.dtype == np.float32 and got.shape == whole.shape
    np.testing.assert_allclose(got, whole, rtol=2e-7, atol=1e-6 * max(far, 1))
    np.testing.assert_array_equal(got[:, 3:], whole[:, 3:].astype(np.float32))


def test_bad_arguments_are_refused() -> None:
    points, intensity, transforms, lags = sweeps(1, [5, 6], 1.0)
    broken = transforms[1].copy()
    broken[0, 3] = np.nan
    for attempt in (
        lambda: aggregate(points, intensity, transforms, lags[:1]),
        lambda: aggregate(points, intensity[::-1], transforms, lags),
        lambda: aggregate([p.astype(np.float64) for p in points], intensity, transforms, lags),
        lambda: aggregate(points, intensity, [transforms[0], broken], lags),
        lambda: aggregate(points, intensity, [transforms[0], np.eye(3)], lags),
    ):
        with pytest.raises(ValueError, match="aggregate"):
            attempt()
