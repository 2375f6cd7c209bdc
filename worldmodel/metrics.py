"""How good a forecast of ranges is: per-ray scores, Chamfer distances, and the sums that tables are made of.

Every method answers the same rays, whose returns are known to lie within MIN_RANGE_M .. MAX_RANGE_M of the sensor; a finite answer outside
is therefore scored at the nearer bound (the same for every method: it can only help, and a model's distribution is conditioned on the
bounds for the same reason), and a ray without a finite answer at the bound that is farther from the truth, in every metric, and counted
in `missing`. An empty or sparse forecast thus scores as badly as a forecast can.

Chamfer distances are between the clouds of the drawn rays: forecast points to the cloud of all true points and true points to the cloud
of all forecast points, squared, half the sum of both means. A subset's are those of its rays' points, still to the whole of the other
cloud. Near field: a true point counts with |x|, |y| <= NEAR_M in the ego frame of t = 0, a forecast point when it or the truth of its ray
lies there (so that neither inventing something nearby nor leaving it out is free). Trimmed: distances are cut at TRIM_M before squaring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.kernels import mixture as laplace
from sensors.kernels.nearest import both_ways
from sensors.rays import MAX_RANGE_M, MIN_RANGE_M
from worldmodel.forecast import Mixture

Array = NDArray[Any]

WITHIN_M = 0.2
NEAR_M = 20.0
TRIM_M = 2.0
INTERVAL = (0.1, 0.9)
ECE_LEVELS = np.arange(1, 20) / 20
UNSURE_M = 1.0  # scale of the Laplace distribution at the bound that stands in for a model's missing answer

METRICS = ("l1_mean", "l1_median", "absrel", "within_02", "chamfer", "chamfer_near", "chamfer_trimmed", "nll", "crps", "ece", "coverage80", "width80")
COLUMNS = ("rays", "missing", "l1", "absrel", "within", "forward", "backward", "forward_cut", "backward_cut", "near_forward_rays",
           "near_backward_rays", "near_forward", "near_backward", "nll", "crps", "covered", "width")  # fmt: skip
WIDTH = len(COLUMNS) + len(ECE_LEVELS)
AT = {name: index for index, name in enumerate(COLUMNS)}

# absolute errors by 1 % of themselves from 0.1 mm on: what a median is read from without keeping every error
FIRST_ERROR_M, ERROR_RATIO, ERROR_BINS = 1e-4, 1.01, 1340


@dataclass(frozen=True, eq=False)
class Answer:
    """What a method says about R rays, ready to be scored: ranges (R,) f64 within the bounds, missing (R,) bool, and per ray nll, crps, pit
    (the truth's place in the distribution), covered (by the 80 % interval) and width (of it, m), each (R,) f64 or None where the method
    has no such thing."""

    ranges: Array
    missing: Array
    crps: Array
    nll: Array | None = None
    pit: Array | None = None
    covered: Array | None = None
    width: Array | None = None


def scored(ranges: Array, truth: Array) -> tuple[Array, Array]:
    """Ranges (R,) f64 as they are scored and which of them were missing (R,) bool: finite ones clipped to the bounds, others at the bound
    farther from the truth (R,)."""
    ranges, truth = np.asarray(ranges, np.float64), np.asarray(truth, np.float64)
    if ranges.shape != truth.shape:
        raise ValueError(f"scored: {ranges.shape} answers to {truth.shape} rays")
    missing = ~np.isfinite(ranges)
    farther = np.where(truth - MIN_RANGE_M > MAX_RANGE_M - truth, MIN_RANGE_M, MAX_RANGE_M)
    return np.where(missing, farther, np.clip(np.where(missing, farther, ranges), MIN_RANGE_M, MAX_RANGE_M)), missing


def answer_of_points(ranges: Array, truth: Array, scale_m: float | None = None) -> Answer:
    """A point forecast (R,): its crps is its distance to the truth (R,); its nll that of a Laplace distribution of scale_m around it, within
    the bounds (None: no nll). scale_m comes from training clips, never from those that are scored."""
    placed, missing = scored(ranges, truth)
    truth = np.asarray(truth, np.float64)
    nll = None
    if scale_m is not None:
        nll = -laplace.log_density(np.ones((len(placed), 1)), placed[:, None], np.full((len(placed), 1), scale_m), truth, *_bounds())
    return Answer(placed, missing, np.abs(placed - truth), nll)


def answer_of_mixture(mixture: Mixture, truth: Array) -> Answer:
    """A distribution (R rays), given a return within the bounds: forecast is its median. Where it says nothing there, or is not finite, the
    ray is missing: the distribution is then a point at the farther bound, and for nll a Laplace of UNSURE_M around it."""
    truth = np.asarray(truth, np.float64)
    p, m, s = mixture.p, mixture.m, mixture.s
    low, median, high = laplace.quantiles(p, m, s, np.array([INTERVAL[0], 0.5, INTERVAL[1]]), *_bounds()).T
    placed, missing = scored(median, truth)
    inside = np.clip(truth, *_bounds())
    away = np.abs(placed - truth)
    nll = np.where(missing, away / UNSURE_M + np.log(2 * UNSURE_M), -laplace.log_density(p, m, s, inside, *_bounds()))
    crps = np.where(missing, away, laplace.crps(p, m, s, truth, *_bounds()))
    pit = np.where(missing, (placed < truth).astype(np.float64), laplace.cdf(p, m, s, truth, *_bounds()))
    covered = ~missing & (low <= truth) & (truth <= high)
    width = np.where(missing, MAX_RANGE_M - MIN_RANGE_M, high - low)
    return Answer(placed, missing, crps, nll, pit, covered.astype(np.float64), width)


def _bounds() -> tuple[float, float]:
    return MIN_RANGE_M, MAX_RANGE_M


def squared_distances(forecast: Array, truth: Array) -> tuple[Array, Array]:
    """Squared distances (N,) f64 of forecast points (N,3) to the nearest true point (M,3), and (M,) of true points to the nearest forecast."""
    forward, _, backward, _ = both_ways(np.asarray(forecast, np.float64), np.asarray(truth, np.float64))
    return forward, backward


def chamfer(forecast: Array, truth: Array) -> float:
    """Half the sum of both mean squared distances, m^2, of two clouds (N,3), (M,3); infinite where one of them is empty and the other is not,
    NaN where both are."""
    if not len(forecast) or not len(truth):
        return float("nan") if len(forecast) == len(truth) else float("inf")
    forward, backward = squared_distances(forecast, truth)
    return float(0.5 * (forward.mean() + backward.mean()))


def ray_table(answer: Answer, truth: Array, forecast_points: Array, true_points: Array) -> Array:
    """(R, WIDTH) f64: what each ray adds to the sums, a column of COLUMNS each, then whether its pit is at most each of ECE_LEVELS; a column
    that the method has nothing for is NaN. Points (R,3) in the ego frame of t = 0."""
    truth = np.asarray(truth, np.float64)
    table = np.full((len(truth), WIDTH), np.nan)
    error = np.abs(answer.ranges - truth)
    forward, backward = squared_distances(forecast_points, true_points)
    near_truth = (np.abs(true_points[:, :2]) <= NEAR_M).all(1)
    near_either = near_truth | (np.abs(forecast_points[:, :2]) <= NEAR_M).all(1)
    values: dict[str, Array | float | None] = {
        "rays": 1.0, "missing": answer.missing, "l1": error, "absrel": error / truth, "within": error <= WITHIN_M,
        "forward": forward, "backward": backward, "forward_cut": np.minimum(forward, TRIM_M**2), "backward_cut": np.minimum(backward, TRIM_M**2),
        "near_forward_rays": near_either, "near_backward_rays": near_truth,
        "near_forward": forward * near_either, "near_backward": backward * near_truth,
        "nll": answer.nll, "crps": answer.crps, "covered": answer.covered, "width": answer.width,
    }  # fmt: skip
    for name, value in values.items():
        if value is not None:
            table[:, AT[name]] = value
    if answer.pit is not None:
        table[:, len(COLUMNS) :] = answer.pit[:, None] <= ECE_LEVELS
    return table


def error_counts(error: Array) -> Array:
    """(ERROR_BINS,) i64: absolute errors (R,) in metres, counted by size."""
    at = np.floor(np.log(np.maximum(error, FIRST_ERROR_M) / FIRST_ERROR_M) / np.log(ERROR_RATIO)).astype(np.int64)
    return np.bincount(np.clip(at, 0, ERROR_BINS - 1), minlength=ERROR_BINS)


def median_of_counts(counts: Array) -> float:
    """The median, to 1 %, of errors counted by `error_counts`; NaN without any."""
    total = counts.sum()
    if not total:
        return float("nan")
    passed = np.cumsum(counts)
    bin_ = int(np.searchsorted(passed, total / 2))
    before = passed[bin_ - 1] if bin_ else 0
    share = (total / 2 - before) / counts[bin_]
    return float(FIRST_ERROR_M * ERROR_RATIO ** (bin_ + share)) if bin_ else 0.0


def metrics_of_sums(sums: Array) -> dict[str, Array]:
    """METRICS but l1_median from sums (..., WIDTH) over rays; NaN where there were no rays or the method has no such thing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        rays = sums[..., AT["rays"]]

        def mean(name: str, over: Array = rays) -> Array:
            return np.where(over > 0, sums[..., AT[name]] / over, np.nan)

        near_forward, near_backward = (
            mean("near_forward", sums[..., AT["near_forward_rays"]]),
            mean("near_backward", sums[..., AT["near_backward_rays"]]),
        )
        # without true points nearby, what was invented there counts alone
        near = np.where(np.isnan(near_backward), near_forward, 0.5 * (near_forward + near_backward))
        pit = sums[..., len(COLUMNS) :] / np.where(rays > 0, rays, np.nan)[..., None]
        return {
            "l1_mean": mean("l1"),
            "absrel": mean("absrel"),
            "within_02": mean("within"),
            "chamfer": 0.5 * (mean("forward") + mean("backward")),
            "chamfer_near": near,
            "chamfer_trimmed": 0.5 * (mean("forward_cut") + mean("backward_cut")),
            "nll": mean("nll"),
            "crps": mean("crps"),
            "ece": np.abs(pit - ECE_LEVELS).mean(-1),
            "coverage80": mean("covered"),
            "width80": mean("width"),
        }


def intervals(sums: Array, weights: Array) -> dict[str, tuple[float, float]]:
    """95 % intervals of the metrics under drawn weights (draws, clips) of the clips. sums (K, clips, WIDTH): per horizon and clip; a metric
    is the mean of its K values."""
    values = metrics_of_sums(np.stack([weights @ horizon for horizon in sums]))
    out = {}
    for name, value in values.items():
        drawn = mean_over_horizons(value)
        drawn = drawn[np.isfinite(drawn)]
        if len(drawn):
            low, high = np.percentile(drawn, (2.5, 97.5))
            out[name] = (float(low), float(high))
    return out


def l1_over(sums: Array, reference: Array, weights: Array | None) -> tuple[float, tuple[float, float] | None]:
    """L1 of a method over that of another on the same rays, both as means over horizons, and its 95 % interval: sums (K, clips, WIDTH) of both,
    weights (draws, clips) or None. The same clips are drawn for both, so what makes a clip hard for both does not widen it."""
    of, to = (mean_over_horizons(metrics_of_sums(these.sum(1))["l1_mean"]) for these in (sums, reference))
    if weights is None:
        return float(of / to), None
    drawn = [mean_over_horizons(metrics_of_sums(np.stack([weights @ horizon for horizon in these]))["l1_mean"]) for these in (sums, reference)]
    ratio = drawn[0] / drawn[1]
    ratio = ratio[np.isfinite(ratio)]
    return float(of / to), (float(np.percentile(ratio, 2.5)), float(np.percentile(ratio, 97.5))) if len(ratio) else None


def mean_over_horizons(values: Array) -> Array:
    """(...) mean over the first axis of those that are there; NaN where none is."""
    there = ~np.isnan(values)
    count = there.sum(0)
    return np.where(count > 0, np.where(there, values, 0).sum(0) / np.maximum(count, 1), np.nan)


def bootstrap_weights(log_of_clip: Array, draws: int, seed: int) -> Array:
    """(draws, clips) f64: how often each clip was drawn: logs with replacement, then as many clips of each as it has, with replacement."""
    rng = np.random.Generator(np.random.Philox(seed))
    logs = np.unique(log_of_clip)
    rows = [np.flatnonzero(log_of_clip == log) for log in logs]
    weights = np.zeros((draws, len(log_of_clip)))
    for draw in range(draws):
        for log in rng.integers(0, len(logs), len(logs)):
            np.add.at(weights[draw], rng.choice(rows[log], len(rows[log])), 1)
    return weights
