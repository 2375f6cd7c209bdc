"""Maxima over runs of rows, against a loop over the runs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensors.kernels.segments import scatter_rows, segment_max


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), max_size=30), st.integers(1, 5), st.integers(0, 1000))
def test_maxima_and_where_they_are(sizes: list[int], channels: int, seed: int) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    row = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
    values = rng.integers(-3, 4, (int(row[-1]), channels)).astype(np.float32)
    out, at = segment_max(values, row)
    for v in range(len(sizes)):
        run = values[row[v] : row[v + 1]]
        np.testing.assert_array_equal(out[v], run.max(0))
        np.testing.assert_array_equal(at[v], row[v] + run.argmax(0))
    grads = rng.normal(size=out.shape).astype(np.float32)
    back = scatter_rows(grads, at, len(values))
    slow = np.zeros_like(values)
    for v in range(len(sizes)):
        for c in range(channels):
            slow[at[v, c], c] += grads[v, c]
    np.testing.assert_array_equal(back, slow)


def test_an_empty_run_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        segment_max(np.zeros((3, 2), np.float32), np.array([0, 2, 2, 3], np.int32))


@pytest.mark.parametrize("row", [[0, 2, 4], [-1, 2, 3]])
def test_a_run_beyond_the_values_is_refused(row: list[int]) -> None:
    with pytest.raises(ValueError, match="beyond"):
        segment_max(np.zeros((3, 2), np.float32), np.array(row, np.int32))
