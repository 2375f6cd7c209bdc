"""Free space against every cell of the grid intersected with every segment: what a segment passes through by more than rounding is free
unless occupied, what all of them miss by more than rounding is not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensors.kernels.traversal import free_space

MARGIN = 1e-5
LOW, SIZE = np.array([-1.0, 2.0, -0.5]), np.array([0.25, 0.5, 0.125])


def bits(words: np.ndarray, levels: int) -> np.ndarray:
    return ((words[:, :, None] >> np.arange(levels, dtype=np.uint64)) & np.uint64(1)).astype(bool)


def plain_passed(shape: tuple, origin: np.ndarray, end: np.ndarray, grow: float) -> np.ndarray:
    cells = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    lower, upper = LOW + (cells - grow) * SIZE, LOW + (cells + 1 + grow) * SIZE
    d = end - origin
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        a, b = (lower - origin) / d, (upper - origin) / d
    inside = (lower < origin) & (origin < upper)
    enter = np.where(d == 0, np.where(inside, -np.inf, np.inf), np.minimum(a, b)).max(-1).clip(min=0)
    leave = np.where(d == 0, np.where(inside, np.inf, -np.inf), np.maximum(a, b)).min(-1).clip(max=1)
    return enter <= leave if grow > 0 else enter < leave


def segments(seed: int, count: int, kind: str, shape: tuple) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(seed))
    extent = np.array(shape) * SIZE
    origins, ends = (LOW + extent * rng.uniform(-0.4, 1.4, (count, 3)) for _ in range(2))
    if kind == "lattice":
        origins, ends = (LOW + np.rint((v - LOW) / SIZE) * SIZE for v in (origins, ends))
    elif kind == "axis":
        ends = origins + (ends - origins) * np.eye(3)[rng.integers(0, 3, count)]
    elif kind == "steep":
        ends[:, :2] = origins[:, :2] + (ends - origins)[:, :2] * 1e-10
    elif kind == "long":
        ends = origins + (ends - origins) * 1e4
    return origins, ends


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 100_000),
    st.sampled_from([(12, 9, 20), (1, 1, 1), (1, 30, 3), (25, 2, 64)]),
    st.sampled_from(["generic", "lattice", "axis", "steep", "long"]),
)
def test_free_is_what_the_segments_pass(seed: int, shape: tuple, kind: str) -> None:
    origins, ends = segments(seed, 6, kind, shape)
    rng = np.random.Generator(np.random.Philox(seed + 1))
    occupied = (rng.integers(0, 1 << 62, shape[:2]) & rng.integers(0, 1 << 62, shape[:2]) & rng.integers(0, 1 << 62, shape[:2])).astype(np.uint64)
    words = free_space(ends, origins, LOW, SIZE, shape, occupied)
    assert not (words & occupied).any()
    free, held = bits(words, 64), bits(occupied, 64)[:, :, : shape[2]]
    assert not free[:, :, shape[2] :].any()
    certain = np.any([plain_passed(shape, o, e, -MARGIN) for o, e in zip(origins, ends)], axis=0)
    possible = np.any([plain_passed(shape, o, e, MARGIN) for o, e in zip(origins, ends)], axis=0)
    assert not (certain & ~held & ~free[:, :, : shape[2]]).any()
    assert not (free[:, :, : shape[2]] & ~possible).any()


def test_one_origin_serves_all_points_and_hostile_ones_carve_nothing() -> None:
    shape, none = (12, 9, 20), np.zeros((12, 9), np.uint64)
    origin = LOW + np.array(shape) * SIZE / 3
    ends = segments(3, 40, "generic", shape)[1].astype(np.float32)
    with_more = np.concatenate((ends, np.ones((40, 2), np.float32)), 1)
    one = free_space(ends, origin, LOW, SIZE, shape, none)
    assert one.any()
    np.testing.assert_array_equal(one, free_space(with_more, np.tile(origin, (40, 1)), LOW, SIZE, shape, none))
    bad = np.array([[np.nan, 3, 0], [0, np.nan, 0], [0, 3, np.nan], [np.inf, 3, 0], [0, -np.inf, 0], [3e38, 3, 0], [0, 3, 2e9]], np.float32)
    assert not free_space(bad, origin, LOW, SIZE, shape, none).any()
    for far in (np.nan, np.inf, -1e300):
        for axis in range(3):
            moved = origin.copy()
            moved[axis] = far
            assert not free_space(ends, moved, LOW, SIZE, shape, none).any()
    assert not free_space(ends[:0], origin, LOW, SIZE, shape, none).any()


def test_bad_arguments_are_refused() -> None:
    ends, shape, none = np.zeros((3, 3), np.float32), (12, 9, 20), np.zeros((12, 9), np.uint64)
    for attempt in (
        lambda: free_space(ends.astype(int), (0, 0, 0), LOW, SIZE, shape, none),
        lambda: free_space(ends[:, :2], (0, 0, 0), LOW, SIZE, shape, none),
        lambda: free_space(ends, (0, 0), LOW, SIZE, shape, none),
        lambda: free_space(ends, np.zeros((2, 3)), LOW, SIZE, shape, none),
        lambda: free_space(ends, (0, 0, 0), LOW, 0, shape, none),
        lambda: free_space(ends, (0, 0, 0), LOW, SIZE, (12, 9, 65), none),
        lambda: free_space(ends, (0, 0, 0), LOW, SIZE, (12, 8, 20), none),
        lambda: free_space(ends, (0, 0, 0), LOW, SIZE, shape, none.astype(np.int64)),
    ):
        with pytest.raises(ValueError, match="free_space"):
            attempt()
