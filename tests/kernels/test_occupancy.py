"""Column words against one point at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sensors.kernels.occupancy import columns

LOW, SIZE = (-2.0, -1.5, -1.0), (0.25, 0.3, 0.1)


def plain_columns(points: np.ndarray, shape: tuple) -> np.ndarray:
    out = np.zeros(shape[:2], np.uint64)
    for x, y, z in points[:, :3]:
        with np.errstate(over="ignore"):
            a = (np.array([x, y, z]) - np.array(LOW, np.float32)) / np.array(SIZE, np.float32)
        if (a >= 0).all() and (a < np.array(shape)).all():
            i, j, k = a.astype(int)
            out[i, j] |= np.uint64(1 << int(k))
    return out


hostile = st.sampled_from([np.nan, np.inf, -np.inf, -0.0, -2.0, -1.5, -1.0, 5.5, float(np.float32(3e38)), -3e9])
number = st.one_of(st.floats(-2.5, 6, width=32), hostile)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 300), st.integers(3, 5)), elements=number),
    st.sampled_from([(16, 10, 64), (1, 1, 1), (30, 3, 20)]),
)
def test_a_bit_is_set_where_a_point_falls(points: np.ndarray, shape: tuple) -> None:
    got = columns(points, LOW, SIZE, shape)
    assert got.dtype == np.uint64
    np.testing.assert_array_equal(got, plain_columns(points, shape))


def test_sweeps_accumulate_and_outside_points_mark_nothing() -> None:
    rng = np.random.Generator(np.random.Philox(5))
    first, second = (rng.uniform(-3, 6, (700, 3)).astype(np.float32) for _ in range(2))
    shape = (16, 10, 64)
    both = columns(second, LOW, SIZE, shape, out=columns(first, LOW, SIZE, shape))
    np.testing.assert_array_equal(both, columns(np.concatenate((first, second)), LOW, SIZE, shape))
    assert not columns(np.full((300, 3), -9, np.float32), LOW, SIZE, shape).any()


def test_bad_arguments_are_refused() -> None:
    points = np.zeros((3, 3), np.float32)
    for attempt in (
        lambda: columns(points.astype(np.float64), LOW, SIZE, (4, 4, 4)),
        lambda: columns(points, LOW, SIZE, (4, 4, 65)),
        lambda: columns(points, LOW, 0.0, (4, 4, 4)),
        lambda: columns(points, LOW[:2], SIZE, (4, 4, 4)),
        lambda: columns(points, LOW, SIZE, (4, 4, 4), out=np.zeros((4, 4), np.int64)),
        lambda: columns(points, LOW, SIZE, (4, 4, 4), out=np.zeros((4, 5), np.uint64)),
    ):
        with pytest.raises(ValueError, match="columns"):
            attempt()
