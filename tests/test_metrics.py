"""Scores against loops that a reader can check; what an empty or sparse forecast gets; the published 4D-Occ formulas."""

import math

import numpy as np
import pytest

from sensors.errors import UsageError
from worldmodel import metrics, metrics_4docc
from worldmodel.forecast import Mixture


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def rays(seed: int, count: int = 120):
    """Truth (R,), unit directions (R,3), a sensor's place (3,)."""
    r = rng(seed)
    directions = r.normal(size=(count, 3)) * (1, 1, 0.2)
    return r.uniform(2, 56, count).astype(np.float32), directions / np.linalg.norm(directions, axis=1, keepdims=True), np.array([1.0, -0.5, 1.7])


def table_of(answer, truth, directions, origin):
    forecast, true = (origin + directions * r[:, None] for r in (answer.ranges, truth.astype(float)))
    return metrics.ray_table(answer, truth, forecast, true), forecast, true


def plain_chamfer(a, b, cut=math.inf):
    there = [min(min(math.dist(p, q), cut) ** 2 for q in b) for p in a]
    back = [min(min(math.dist(p, q), cut) ** 2 for q in a) for p in b]
    return 0.5 * (sum(there) / len(there) + sum(back) / len(back))


def test_sums_become_the_metrics_that_loops_give():
    truth, directions, origin = rays(0)
    guess = truth + rng(1).normal(0, 1, len(truth)) * (rng(2).random(len(truth)) < 0.5)
    answer = metrics.answer_of_points(guess, truth, scale_m=0.7)
    table, forecast, true = table_of(answer, truth, directions, origin)
    found = metrics.metrics_of_sums(table.sum(0))
    placed = np.clip(guess, 2, 56).astype(float)
    errors = [abs(a - b) for a, b in zip(placed, truth.astype(float), strict=True)]
    assert found["l1_mean"] == pytest.approx(sum(errors) / len(errors), rel=1e-6)
    assert found["absrel"] == pytest.approx(sum(e / t for e, t in zip(errors, truth, strict=True)) / len(errors), rel=1e-6)
    assert found["within_02"] == pytest.approx(sum(e <= 0.2 for e in errors) / len(errors))
    assert found["chamfer"] == pytest.approx(plain_chamfer(forecast, true), rel=1e-4)
    assert found["chamfer_trimmed"] == pytest.approx(plain_chamfer(forecast, true, 2.0), rel=1e-4)
    assert found["crps"] == pytest.approx(found["l1_mean"])
    # a Laplace distribution cut to 2..56 m
    inside = [1 - 0.5 * math.exp(-(p - 2) / 0.7) - 0.5 * math.exp(-(56 - p) / 0.7) for p in placed]
    nll = [e / 0.7 + math.log(2 * 0.7) + math.log(z) for e, z in zip(errors, inside, strict=True)]
    assert found["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-4)
    assert np.isnan(found["ece"]) and np.isnan(found["coverage80"])


def test_the_near_field_counts_what_is_there_and_what_was_invented_there():
    truth = np.array([10.0, 50.0, 50.0], np.float32)
    directions, origin = np.array([[1.0, 0, 0], [0, 1, 0], [0, -1, 0]]), np.zeros(3)
    good, invents = (metrics.metrics_of_sums(table_of(metrics.answer_of_points(np.array(a), truth), truth, directions, origin)[0].sum(0))
                     for a in ([10.0, 40.0, 50.0], [10.0, 5.0, 50.0]))  # fmt: skip
    assert good["chamfer_near"] == pytest.approx(0)
    # the invented point (0, 5) is sqrt(125) m from the only true point nearby
    assert invents["chamfer_near"] == pytest.approx(0.5 * (0 + 125) / 2)
    leaves_out = metrics.metrics_of_sums(table_of(metrics.answer_of_points(np.array([56.0, 50, 50]), truth), truth, directions, origin)[0].sum(0))
    assert leaves_out["chamfer_near"] > 1000


def test_an_empty_forecast_is_scored_at_the_farther_bound_everywhere():
    truth, directions, origin = rays(4)
    empty = metrics.answer_of_points(np.full(len(truth), np.nan), truth, 0.5)
    far = np.where(truth > 29, 2.0, 56.0)
    np.testing.assert_array_equal(empty.ranges, far)
    assert empty.missing.all()
    found = metrics.metrics_of_sums(table_of(empty, truth, directions, origin)[0].sum(0))
    # nothing that answers at all, however wrong, is worse on a ray
    worst = np.maximum(truth - 2, 56 - truth)
    assert found["l1_mean"] == pytest.approx(worst.mean(), rel=1e-6) and found["crps"] == found["l1_mean"] and found["nll"] > 20
    constant = metrics.metrics_of_sums(table_of(metrics.answer_of_points(np.full(len(truth), 30.0), truth, 0.5), truth, directions, origin)[0].sum(0))
    for name in ("l1_mean", "absrel", "chamfer", "crps", "nll"):
        assert found[name] > constant[name], name
    assert found["chamfer_near"] > 50 and found["chamfer_trimmed"] > 0.9 * 2.0**2
    nothing = np.zeros((len(truth), 3), np.float32)
    silent = metrics.answer_of_mixture(Mixture(nothing, nothing + 20, nothing + 1), truth)
    assert silent.missing.all() and not silent.covered.any()
    np.testing.assert_allclose(silent.crps, worst, rtol=1e-6)
    np.testing.assert_array_equal(silent.width, 54)
    assert (silent.nll > 27).all() and set(np.unique(silent.pit)) <= {0.0, 1.0}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_sparse_forecast_is_worse_than_the_whole(bad):
    truth, directions, origin = rays(5)
    whole = truth + rng(6).normal(0, 0.5, len(truth))
    sparse = np.where(np.arange(len(truth)) % 3 == 0, bad, whole)
    a, b = (metrics.metrics_of_sums(table_of(metrics.answer_of_points(g, truth), truth, directions, origin)[0].sum(0)) for g in (whole, sparse))
    assert metrics.answer_of_points(sparse, truth).missing.sum() == 40
    for name in ("l1_mean", "absrel", "chamfer", "chamfer_trimmed", "crps"):
        assert b[name] > a[name], name
    assert b["within_02"] < a["within_02"]


def test_answers_outside_the_bounds_are_moved_to_them_and_not_missing():
    ranges, missing = metrics.scored(np.array([1e9, -5, 0.5, 30]), np.array([40.0, 3, 3, 3]))
    assert ranges.tolist() == [56, 2, 2, 30] and not missing.any()
    with pytest.raises(ValueError, match="answers"):
        metrics.scored(np.zeros(3), np.zeros(4))


def test_a_distribution_that_is_right_is_calibrated_and_one_that_is_too_sure_is_not():
    r = rng(7)
    count = 20000
    centre, scale = r.uniform(10, 40, count), np.full((count, 1), 0.5)
    truth = centre + r.laplace(0, 0.5, count)
    one = np.ones((count, 1), np.float32)

    def found(factor):
        answer = metrics.answer_of_mixture(Mixture(one, centre[:, None], scale * factor), truth)
        points = np.stack((np.arange(count) * 1.0, truth, truth), 1)
        return metrics.metrics_of_sums(metrics.ray_table(answer, truth, points, points).sum(0))

    right, sure = found(1.0), found(0.2)
    assert right["ece"] < 0.01 and abs(right["coverage80"] - 0.8) < 0.01
    assert right["width80"] == pytest.approx(2 * 0.5 * math.log(5), rel=1e-3)
    # Laplace: entropy 1 + log(2 s), CRPS 3 s / 4, L1 s
    assert right["nll"] == pytest.approx(1 + math.log(1.0), abs=0.03)
    assert right["crps"] == pytest.approx(0.375, rel=0.03) and right["l1_mean"] == pytest.approx(0.5, rel=0.03)
    assert sure["ece"] > 0.1 and sure["coverage80"] < 0.4 and sure["nll"] > right["nll"] and sure["crps"] > right["crps"]


def test_the_median_of_counts_is_the_median_to_a_percent():
    for seed in range(5):
        errors = np.abs(rng(seed).standard_cauchy(2001)) * 0.1
        counts = metrics.error_counts(errors[:700]) + metrics.error_counts(errors[700:])
        assert metrics.median_of_counts(counts) == pytest.approx(np.median(errors), rel=0.011)
    assert math.isnan(metrics.median_of_counts(metrics.error_counts(np.zeros(0))))
    assert metrics.median_of_counts(metrics.error_counts(np.zeros(3))) == 0.0


def test_bootstrap_draws_logs_and_then_their_clips():
    log_of_clip = np.array([0] * 30 + [1] * 2)
    weights = metrics.bootstrap_weights(log_of_clip, 500, 0)
    assert set(np.unique(weights[:, :30].sum(1))) <= {0, 30, 60} and set(np.unique(weights[:, 30:].sum(1))) <= {0, 2, 4}
    np.testing.assert_array_equal(weights, metrics.bootstrap_weights(log_of_clip, 500, 0))
    # clips of one log agree, the logs do not: clips alone would give an interval that is far too narrow
    sums = np.zeros((1, 32, metrics.WIDTH))
    sums[0, :, metrics.AT["rays"]] = 100
    sums[0, :, metrics.AT["l1"]] = np.where(log_of_clip == 0, 100, 300)
    low, high = metrics.intervals(sums, weights)["l1_mean"]
    assert low == 1 and high == 3


def test_chamfer_of_nothing_is_never_good():
    some = np.ones((3, 3))
    assert metrics.chamfer(some[:0], some) == math.inf and metrics.chamfer(some, some[:0]) == math.inf
    assert math.isnan(metrics.chamfer(some[:0], some[:0])) and metrics.chamfer(some, some) == 0


def plain_clamp(point, origin, volume):
    """Their rule, plane by plane: back along the ray to the first plane at which it is inside (within 2 cm). The clamped point, and from where
    its range counts: the origin, or the entry where the origin is outside and the point had to be moved. None for a ray that misses."""
    low, high = np.array(volume[:3]), np.array(volume[3:])

    def inside(p, slack=0.02):
        return ((p >= low - slack) & (p <= high + slack)).all()

    length = np.linalg.norm(point - origin)
    direction = (point - origin) / length
    planes = [((edge[axis] - origin[axis]) / direction[axis]) for axis in range(3) for edge in (low, high) if abs(direction[axis]) > 1e-12]
    start = 0.0
    if not inside(origin):
        entries = [t for t in sorted(planes) if t >= 0 and inside(origin + t * direction)]
        if not entries:
            return None
        start = entries[0]
        if start > length:
            return origin + start * direction, origin + start * direction
    if inside(point, 0.0):
        return point, origin
    if inside(point):
        return point, origin + start * direction
    back = [t for t in sorted(planes, reverse=True) if t <= length and inside(origin + t * direction)]
    return origin + back[0] * direction, origin + start * direction


def plain_ray_errors(forecast, truth, origin, elevation, volume):
    def angles(p):
        return math.atan2(p[0], p[1]), math.atan2(p[2], p[1] if elevation == "code" else math.hypot(p[0], p[1]))

    there = [(angles(p - origin), np.linalg.norm(p - origin)) for p in forecast if np.linalg.norm(p - origin) > 0.01]
    l1 = absrel = 0.0
    count = 0
    for point in truth:
        ray = point - origin
        if np.linalg.norm(ray) <= 0.01:
            continue
        count += 1
        here = angles(ray)
        _, found = min(there, key=lambda item: math.dist(item[0], here))
        true_end = plain_clamp(point, origin, volume)
        forecast_end = plain_clamp(origin + ray / np.linalg.norm(ray) * found, origin, volume)
        if true_end is None or np.linalg.norm(true_end[0] - true_end[1]) <= 0.01:
            continue
        error = np.linalg.norm(true_end[0] - forecast_end[0])
        l1 += error
        absrel += error / np.linalg.norm(true_end[0] - true_end[1])
    return l1 / count, absrel / count


def clouds(seed):
    r = rng(seed)
    truth = r.normal(size=(90, 3)) * (45, 45, 2)
    return truth * r.uniform(0.7, 1.3, (90, 1)) + r.normal(0, 0.05, (90, 3)), truth


@pytest.mark.parametrize("elevation", ["code", "fixed"])
@pytest.mark.parametrize("origin", [(0, 0, 0), (12.0, -3, 0.3), (75.0, 2, 0.5)], ids=["centre", "moved", "outside"])
def test_4docc_ray_errors_are_those_of_their_code(elevation, origin):
    for seed in range(3):
        forecast, truth = clouds(seed)
        origin = np.array(origin, float)
        found = metrics_4docc.ray_errors(forecast, truth, origin, elevation)
        assert found == pytest.approx(plain_ray_errors(forecast, truth, origin, elevation, metrics_4docc.VOLUME), rel=1e-6)


def test_4docc_elevation_as_coded_is_another_number():
    forecast, truth = clouds(9)
    code, fixed = (metrics_4docc.score(forecast, truth, np.zeros(3), e) for e in ("code", "fixed"))
    assert code.l1 != fixed.l1 and code.cd == fixed.cd
    with pytest.raises(UsageError, match="elevation"):
        metrics_4docc.ray_errors(forecast, truth, np.zeros(3), "right")


def test_4docc_chamfer_and_nfcd():
    forecast, truth = clouds(11)
    low, high = np.array(metrics_4docc.VOLUME[:3]), np.array(metrics_4docc.VOLUME[3:])
    inside = [np.array([p for p in cloud if (p >= low).all() and (p <= high).all()]) for cloud in (forecast, truth)]
    found = metrics_4docc.score(forecast, truth, np.zeros(3))
    assert found.cd == pytest.approx(plain_chamfer(forecast, truth), rel=1e-6)
    assert found.nfcd == pytest.approx(plain_chamfer(*inside), rel=1e-6) and not found.nfcd_was_empty
    assert metrics_4docc.nfcd(forecast + 500, truth) == (0.0, True)


def test_4docc_returns_beyond_the_volume_cost_nothing():
    truth = np.array([[100.0, 0, 0], [20.0, 0, 0.1]])
    l1, absrel = metrics_4docc.ray_errors(np.array([[300.0, 0, 0], [25.0, 0, 0.125]]), truth, np.zeros(3), "fixed")
    assert l1 == pytest.approx(5 * np.linalg.norm(truth[1]) / 20 / 2, rel=1e-6) and absrel == pytest.approx(0.25 / 2, rel=1e-6)
