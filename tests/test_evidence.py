"""What a sweep reads towards a place, against a plain search over all its points."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sensors.evidence import _seen_beyond
from sensors.kernels.directions import AZIMUTH_CELLS, View

STEP = float(np.deg2rad(0.5))
LIMIT = np.float32(20)


def around(rng: np.random.Generator, count: int, middle: float) -> np.ndarray:
    """Points within some cells of an azimuth."""
    a, e, r = rng.normal(middle, 0.02, count), rng.normal(0, 0.02, count), rng.uniform(2, 60, count)
    return np.stack((r * np.cos(e) * np.cos(a), r * np.cos(e) * np.sin(a), r * np.sin(e)), 1).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 300), st.sampled_from([np.pi, -np.pi, 0.0, 2.0]))
def test_what_is_read_towards_a_place_is_the_nearest_reading_of_the_cells_around(seed: int, count: int, middle: float) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    view, places = View(around(rng, count, middle), STEP), around(rng, 80, middle)
    places[0] = 0
    start, _, azimuth, elevation, radius = view._cells[:5]
    out = np.empty(len(places), np.float32)
    _seen_beyond(places, start, azimuth, elevation, radius, view.n_elevation, STEP, LIMIT, out)
    row, column = np.divmod(np.searchsorted(start, np.arange(len(view)), side="right") - 1, AZIMUTH_CELLS)
    assert np.isnan(out[0])
    for place, got in zip(places[1:].astype(float), out[1:], strict=True):
        a, e = np.arctan2(place[1], place[0]), np.arctan2(place[2], np.hypot(place[0], place[1]))
        cell = np.array((e + np.pi / 2) / STEP), np.array((a + np.pi) / (2 * np.pi) * AZIMUTH_CELLS)
        if any(abs(c - np.rint(c)) < 1e-3 for c in cell):
            continue  # single precision may put it on either side
        rows, columns = row - np.floor(cell[0]), (column - np.floor(cell[1]) + AZIMUTH_CELLS // 2) % AZIMUTH_CELLS - AZIMUTH_CELLS // 2
        near = np.flatnonzero((np.abs(rows) <= 1) & (np.abs(columns) <= 1))
        if not len(near):
            assert np.isnan(got)
            continue
        off = np.hypot((azimuth[near] - a + np.pi) % (2 * np.pi) - np.pi, elevation[near] - e)
        equal = near[off <= off.min() + 1e-6]
        beyond = np.clip(radius[equal] - np.linalg.norm(place), -LIMIT, LIMIT)
        assert np.abs(beyond - got).min() < 1e-3
