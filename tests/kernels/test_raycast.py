"""First hits against every occupied cell intersected with the ray: a cell the ray passes through by more than rounding has to be hit, and
one it misses by more than rounding must not be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensors.kernels.raycast import first_hit

MARGIN = 1e-5


def plain_hits(columns, low, size, origin, direction, min_range, max_range, grow) -> tuple[np.ndarray, np.ndarray]:
    """Entry into, and passing of the centre of, every occupied cell on the ray, cells grown by `grow` of their size on every side."""
    x, y, z = np.nonzero((columns[:, :, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1))
    cells = np.stack((x, y, z), 1)
    lower, upper = low + (cells - grow) * size, low + (cells + 1 + grow) * size
    d = direction / np.linalg.norm(direction)
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (lower - origin) / d, (upper - origin) / d
    still = d == 0
    inside = (lower < origin) & (origin < upper)
    enter = np.where(still, np.where(inside, -np.inf, np.inf), np.minimum(a, b)).max(1).clip(min=min_range)
    leave = np.where(still, np.where(inside, np.inf, -np.inf), np.maximum(a, b)).min(1).clip(max=max_range)
    hit = enter <= leave if grow > 0 else enter < leave
    return enter[hit], ((low + (cells + 0.5) * size - origin) @ d)[hit].clip(min=min_range)


def world(seed: int, density: float, shape: tuple) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(seed))
    bits = rng.random((*shape, 64)) < density
    return (bits.astype(np.uint64) << np.arange(64, dtype=np.uint64)).sum(-1, dtype=np.uint64)


def asked(seed: int, count: int, kind: str, low, size, shape) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(seed))
    extent = np.array((*shape, 64)) * size
    origins = low + extent * rng.uniform(-0.5, 1.5, (count, 3))
    directions = rng.normal(0, 1, (count, 3)) * rng.choice([1e-3, 1.0, 1e3], (count, 1))
    if kind == "lattice":
        origins = low + np.rint(origins / size) * size
        directions = rng.integers(-2, 3, (count, 3)) * size
    elif kind == "axis":
        directions *= np.eye(3)[rng.integers(0, 3, count)]
    elif kind == "flat":
        directions[:, 2] *= 1e-9
    elif kind == "steep":
        directions[:, :2] *= 1e-9
    return origins, directions


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 100_000),
    st.sampled_from([0.0, 1e-4, 3e-3, 0.2]),
    st.sampled_from([(20, 27), (1, 1), (8, 40), (33, 5)]),
    st.sampled_from(["generic", "lattice", "axis", "flat", "steep"]),
    st.sampled_from([(0.0, 100.0), (0.5, 6.0), (0.0, 0.0)]),
)
def test_first_hit_is_the_first_cell_on_the_ray(seed: int, density: float, shape: tuple, kind: str, ranges: tuple) -> None:
    columns = world(seed, density, shape)
    low, size = np.array([-2.0, 1.0, -3.0]), np.array([0.25, 0.5, 0.125])
    origins, directions = asked(seed, 25, kind, low, size, shape)
    got = first_hit(columns, low, size, origins, directions, ranges[1], min_range=ranges[0])
    centre = first_hit(columns, low, size, origins, directions, ranges[1], min_range=ranges[0], to="centre")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(got), np.isnan(centre))
    for r, (origin, direction) in enumerate(zip(origins, directions)):
        if not np.linalg.norm(direction) > 0:
            assert np.isnan(got[r])
            continue
        found = np.inf if np.isnan(got[r]) else got[r]
        certain = plain_hits(columns, low, size, origin, direction, *ranges, -MARGIN)
        possible = plain_hits(columns, low, size, origin, direction, *ranges, MARGIN)
        assert possible[0].min(initial=np.inf) - 1e-4 <= found <= certain[0].min(initial=np.inf) + 1e-4
        if np.isfinite(found):
            same = np.abs(possible[0] - found) < 1e-4
            assert np.abs(possible[1][same] - centre[r]).min() < 1e-4


def test_one_origin_serves_all_rays_and_hostile_ones_have_no_answer() -> None:
    columns = world(1, 0.01, (20, 20))
    directions = np.random.Generator(np.random.Philox(1)).normal(0, 1, (50, 3))
    origin = np.array([2.0, 2.0, 3.0])
    one = first_hit(columns, (0, 0, 0), 0.2, origin, directions, 50)
    np.testing.assert_array_equal(one, first_hit(columns, (0, 0, 0), 0.2, np.tile(origin, (50, 1)), directions, 50))
    assert np.isfinite(one).any()
    bad = np.array([[np.nan, 0, 1], [0, 0, 0], [np.inf, 1, 0], [1e-40, 0, 0], [1e300, 1, 1]])
    assert np.isnan(first_hit(columns, (0, 0, 0), 0.2, origin, bad, 50)).all()
    for far in (np.nan, np.inf, 1e12, -1e300):
        assert np.isnan(first_hit(columns, (0, 0, 0), 0.2, (far, 0, 0), directions, 50)).all()
    assert first_hit(columns, (0, 0, 0), 0.2, origin, np.empty((0, 3)), 50).shape == (0,)
    barely = np.array([[1e-300, 1e-310, 1.0], [1.0, 5e-324, -1e-200], [-0.0, -1.0, -0.0]])
    np.testing.assert_array_equal(
        first_hit(columns, (0, 0, 0), 0.2, origin, barely, 50), first_hit(columns, (0, 0, 0), 0.2, origin, np.rint(barely), 50)
    )


def test_a_ray_that_starts_in_a_cell_hits_it_at_once() -> None:
    columns = np.zeros((5, 5), np.uint64)
    columns[2, 2] = 1 << 3
    at = np.array([0.5, 0.5, 0.7])
    for direction in np.concatenate((np.eye(3), -np.eye(3), [[1, 2, 3]])):
        np.testing.assert_array_equal(first_hit(columns, (0, 0, 0), 0.2, at, direction[None], 9), [0.0])


def test_bad_arguments_are_refused() -> None:
    columns, d = np.zeros((5, 5), np.uint64), np.ones((2, 3))
    for attempt in (
        lambda: first_hit(columns.astype(np.int64), (0, 0, 0), 0.2, (0, 0, 0), d, 9),
        lambda: first_hit(columns, (0, 0), 0.2, (0, 0, 0), d, 9),
        lambda: first_hit(columns, (0, 0, 0), -0.2, (0, 0, 0), d, 9),
        lambda: first_hit(columns, (0, 0, 0), 0.2, np.zeros((3, 3)), d, 9),
        lambda: first_hit(columns, (0, 0, 0), 0.2, (0, 0, 0), d[:, :2], 9),
        lambda: first_hit(columns, (0, 0, 0), 0.2, (0, 0, 0), d, np.nan),
        lambda: first_hit(columns, (0, 0, 0), 0.2, (0, 0, 0), d, 9, to="middle"),
    ):
        with pytest.raises(ValueError, match="first_hit"):
            attempt()
