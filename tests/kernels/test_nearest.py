"""Nearest neighbours against the whole table of distances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sensors.kernels.nearest import both_ways, nearest


def plain_nearest(queries: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return ((queries[:, None].astype(np.float64) - targets[None].astype(np.float64)) ** 2).sum(-1).min(1)


def cloud(seed: int, count: int, scale: float, kind: str, dtype: type) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(seed))
    points = rng.normal(0, scale, (count, 3))
    if kind == "flat":
        points[:, rng.integers(0, 3)] = 0.25
    elif kind == "equal":
        points[:] = points[:1]
    elif kind == "lattice":
        points = np.rint(points / scale * 2) * scale
    elif kind == "clusters":
        points = points * 0.01 + rng.normal(0, scale, (5, 3))[rng.integers(0, 5, count)]
    return points.astype(dtype)


clouds = st.builds(
    cloud,
    st.integers(0, 10_000),
    st.sampled_from([1, 2, 15, 16, 17, 33, 250, 700]),
    st.sampled_from([1e-6, 0.01, 1.0, 50.0, 1e5]),
    st.sampled_from(["normal", "flat", "equal", "lattice", "clusters"]),
    st.sampled_from([np.float32, np.float64]),
)
any_cloud = hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.just(3)), elements=st.floats(-1e9, 1e9, width=32))


@settings(max_examples=120, deadline=None)
@given(st.one_of(clouds, any_cloud), st.one_of(clouds, any_cloud))
def test_no_target_is_nearer(queries: np.ndarray, targets: np.ndarray) -> None:
    distance2, index = nearest(queries, targets)
    assert (distance2.dtype, index.dtype) == (np.float64, np.int64)
    np.testing.assert_array_equal(distance2, ((queries.astype(np.float64) - targets[index].astype(np.float64)) ** 2).sum(1))
    # rounding of a far origin: a part in 10^7 of the extent
    slack = 1e-6 * np.sqrt(distance2) + 4e-7 * max(np.abs(queries).max(), np.abs(targets).max())
    if queries.dtype == targets.dtype == np.float32 and max(np.abs(queries).max(), np.abs(targets).max()) < 1000:
        slack = 1e-6 * np.sqrt(distance2) + 1e-18
    assert (np.sqrt(distance2) <= np.sqrt(plain_nearest(queries, targets)) + slack).all()


@settings(max_examples=30, deadline=None)
@given(clouds, clouds)
def test_both_ways_is_each_way(a: np.ndarray, b: np.ndarray) -> None:
    forth, forth_index, back, back_index = both_ways(a, b)
    slack = 4e-7 * max(np.abs(a).max(), np.abs(b).max())  # as above, and both searches share an origin
    np.testing.assert_allclose(np.sqrt(forth), np.sqrt(nearest(a, b)[0]), rtol=1e-6, atol=slack)
    np.testing.assert_allclose(np.sqrt(back), np.sqrt(nearest(b, a)[0]), rtol=1e-6, atol=slack)
    assert forth_index.max() < len(b) and back_index.max() < len(a) and min(forth_index.min(), back_index.min()) >= 0


def test_map_coordinates_keep_their_centimetres() -> None:
    near = cloud(1, 500, 20.0, "normal", np.float64)
    other = near + np.random.Generator(np.random.Philox(2)).normal(0, 0.01, near.shape)
    offset = np.array([5.4e6, -3.2e5, 120.0])
    np.testing.assert_allclose(nearest(near + offset, other + offset)[0], plain_nearest(near, other), rtol=1e-3)


def test_nothing_to_find_is_infinitely_far() -> None:
    empty, some = np.empty((0, 3), np.float32), np.zeros((3, 3), np.float32)
    distance2, index = nearest(some, empty)
    assert np.isinf(distance2).all() and (index == -1).all()
    distance2, index = nearest(empty, some)
    assert len(distance2) == len(index) == 0
    assert [len(v) for v in both_ways(empty, some)] == [0, 0, 3, 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_points_without_a_place_are_refused(bad: float) -> None:
    good = np.zeros((5, 3), np.float32)
    wrong = good.copy()
    wrong[3, 1] = bad
    for queries, targets in ((wrong, good), (good, wrong)):
        with pytest.raises(ValueError, match="drop those points"):
            nearest(queries, targets)
    for shape in ((5, 2), (5,), (5, 4)):
        with pytest.raises(ValueError, match="nearest"):
            nearest(good, np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="int64"):
        nearest(good.astype(np.int64), good)
