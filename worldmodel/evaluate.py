"""Evaluation: a model's arms and every baseline on the same rays of the same clips, as rows of a table.

Protocol `native`: 5 past sweeps at 5 Hz, 5 future ones (0.2 .. 1.0 s), t = 0 at every fifth sweep of a 10 Hz log, the earliest with a full
past first; `native3`: the same past, 0.6 .. 3.0 s. Truth are the returns at 2..56 m from the future sensor, the ego vehicle's own removed,
RAYS_PER_SWEEP of them drawn by (seed, log, stamp), the same for every method. That a return exists on a ray is known; where it lies is
asked. How answers are scored: `worldmodel.metrics`.

Subsets of rays: `worldmodel.subsets`, and `hidden` is a pass of its own: a sector of 60 degrees is taken out of all past sweeps, and the
rays whose return lies in it, seen from the ego at t = 0, are asked, at t = 0 too.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sensors.clips import clips_of
from sensors.data import Part
from sensors.errors import UsageError, WmError, one_line
from sensors.kernels.mixture import quantiles
from sensors.rays import MAX_RANGE_M, MIN_RANGE_M, RAYS_PER_SWEEP, History, Rays, hide_sector, history_of, in_sector, rays_of
from sensors.records import Clip, Log
from worldmodel import metrics
from worldmodel.forecast import EVIDENCE_ONLY, Mixture
from worldmodel.subsets import SUBSETS, Movers, subset_masks

Array = NDArray[Any]
Baseline = Callable[[History, Rays], Array]
Report = Callable[[int, int, str], None]

GROUP = "driving_worldmodel.baselines"
PAST, RATE_HZ, EVERY_S = 5, 5.0, 0.5
HIDDEN, SECTOR_RAD = "hidden", float(np.deg2rad(60))
DRAWS = 400
FARTHEST_SCALE = 1.1  # times the farthest horizon that scales were fitted at


class Forecaster(Protocol):
    """A trained model as evaluation sees it: `arms` (the first is "model") and their distributions along rays."""

    arms: tuple[str, ...]

    def mixtures(self, clip: Clip, history: History, rays: Sequence[Rays], arms: Sequence[str]) -> dict[str, list[Mixture]]: ...


@dataclass(frozen=True)
class Horizons:
    """Which frames of the future, at RATE_HZ, a protocol asks for: every `step`-th of `frames`."""

    frames: int
    step: int

    @property
    def seconds(self) -> tuple[float, ...]:
        return tuple(round(k * self.step / RATE_HZ, 6) for k in range(1, self.frames // self.step + 1))


PROTOCOLS = {"native": Horizons(5, 1), "native3": Horizons(15, 3)}


@dataclass(frozen=True)
class Row:
    """One line of the table: a method on a subset of rays, of one log (None: all of them) at one horizon (None: the mean of the horizons'
    values, where the subset has rays at each; rays and missing are then totals). A metric is None where the method has no such thing.
    l1_over_evidence_only: where that arm answered, too.
    intervals: 95 %, by bootstrap over logs and clips, of every metric but the median; empty with fewer than two clips."""

    method: str
    subset: str
    log: str | None
    horizon_s: float | None
    n_clips: int
    rays: int
    missing: int
    l1_mean: float | None
    l1_median: float | None
    absrel: float | None
    within_02: float | None
    chamfer: float | None
    chamfer_near: float | None
    chamfer_trimmed: float | None
    nll: float | None
    crps: float | None
    ece: float | None
    coverage80: float | None
    width80: float | None
    l1_over_evidence_only: float | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The fields as a flat dictionary; intervals as METRIC_low and METRIC_high."""
        flat = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "intervals"}
        for name, (low, high) in self.intervals.items():
            flat[f"{name}_low"], flat[f"{name}_high"] = low, high
        return flat


class Table(list[Row]):
    """Rows, and what they rest on: logs, clips, seconds (of recording between the first past and the last future frames, overlaps counted
    once), poses (their sources) and clips left out because a sweep was unreadable."""

    logs: int = 0
    clips: int = 0
    seconds: float = 0.0
    poses: tuple[str, ...] = ()
    unreadable: int = 0


def baselines() -> dict[str, Baseline]:
    """All baselines by name: the modules of `worldmodel.baselines`, then those that other distributions announce."""
    package = importlib.import_module("worldmodel.baselines")
    found = {m.name: importlib.import_module(f"worldmodel.baselines.{m.name}").predict for m in pkgutil.iter_modules(package.__path__)}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, entry.load().predict)
    return dict(sorted(found.items()))


def conditional_quantiles(mixture: Mixture, levels: Array) -> Array:
    """(R,Q) f64: quantiles at ascending levels (Q,), given a return within the protocol's bounds; NaN where the mixture has none there."""
    return quantiles(mixture.p, mixture.m, mixture.s, levels, MIN_RANGE_M, MAX_RANGE_M)


def sector_of(clip: Clip, seed: int = 0) -> tuple[float, float]:
    """(centre, width) in rad of the sector that a clip's hidden pass withholds."""
    key = np.random.SeedSequence((seed, zlib.crc32(clip.id.encode())))
    return float(np.random.Generator(np.random.Philox(key)).uniform(-np.pi, np.pi)), SECTOR_RAD


def clips_to_evaluate(parts: Sequence[Part], protocol: str = "native", max_clips: int | None = None) -> list[Clip]:
    """The protocol's clips, log by log; where there are more than max_clips, so many spread evenly over them."""
    if protocol not in PROTOCOLS:
        raise UsageError(f"protocol {one_line(protocol)!r} is not one of {', '.join(PROTOCOLS)}")
    asked = PROTOCOLS[protocol]
    by_log: dict[str, list[Clip]] = {}
    for part in parts:
        every_s = _stride_s(part.log)
        cut = clips_of(part.log, past=PAST, future=asked.frames, rate_hz=RATE_HZ, every_s=every_s, from_ns=part.from_ns, to_ns=part.to_ns)
        short = [dataclasses.replace(clip, future=clip.future[asked.step - 1 :: asked.step]) for clip in cut]
        known = by_log.setdefault(part.log.id, [])
        stamps = {clip.stamp_ns for clip in known}
        known += [clip for clip in short if clip.stamp_ns not in stamps]
    clips = [clip for of_log in by_log.values() for clip in of_log]
    if max_clips is not None and len(clips) > max_clips:
        clips = [clips[i] for i in np.unique(np.linspace(0, len(clips) - 1, max_clips).astype(int))]
    return clips


def _stride_s(log: Log) -> float:
    """EVERY_S as a whole number of the reference LiDAR's sweeps, in seconds of their true spacing (a scanner of 10 Hz turns at 9.65 Hz, too)."""
    lidar = log.reference_lidar
    stamps = log.sweep_stamps_ns[lidar]
    sweeps = max(math.ceil(EVERY_S * log.lidars[lidar].rate_hz - 0.55), 1)  # 2.5 sweeps, give or take what a rate is off, are 2
    return sweeps * float(np.median(np.diff(stamps))) / 1e9 if len(stamps) > 1 else EVERY_S


def points_of(rays: Rays, ranges: Array) -> Array:
    """(R,3) f64 in the ego frame of t = 0 at the given ranges (R,)."""
    local = rays.directions.astype(np.float64) * np.asarray(ranges, np.float64)[:, None]
    return local @ rays.present_from_sensor[:3, :3].T + rays.present_from_sensor[:3, 3]


@dataclass(frozen=True, eq=False)
class _Methods:
    """Who answers: baselines by name, arms of the forecaster, and the Laplace scales of point methods, rows (horizon_s, scale_m) by name."""

    baselines: Mapping[str, Baseline]
    forecaster: Forecaster | None
    arms: tuple[str, ...]
    scales: Mapping[str, Sequence[Sequence[float]]]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.arms, *self.baselines)

    def answers(self, clip: Clip, history: History, rays: Sequence[Rays]) -> Iterator[tuple[str, int, metrics.Answer]]:
        """(method, index into rays, answer) of every method."""
        there = [k for k, asked in enumerate(rays) if len(asked.ranges)]  # a hidden sector may hold none
        if self.forecaster is not None and self.arms and there:
            for arm, mixtures in self.forecaster.mixtures(clip, history, [rays[k] for k in there], self.arms).items():
                for k, mixture in zip(there, mixtures, strict=True):
                    yield arm, k, metrics.answer_of_mixture(mixture, rays[k].ranges)
        for name, predict in self.baselines.items():
            for k, asked in enumerate(rays):
                yield name, k, metrics.answer_of_points(predict(history, asked), asked.ranges, self._scale(name, asked.horizon_s))

    def _scale(self, name: str, horizon_s: float) -> float | None:
        rows = np.asarray(self.scales.get(name, ()), np.float64)
        if not len(rows) or horizon_s > FARTHEST_SCALE * rows[-1, 0]:
            return None  # a scale fitted nearer would be too small, and its NLL too bad
        return float(np.interp(horizon_s, rows[:, 0], rows[:, 1]))


def _chosen(forecaster: Forecaster | None, methods: Sequence[str] | None, scales: Mapping[str, Sequence[Sequence[float]]] | None) -> _Methods:
    known = baselines()
    arms = tuple(forecaster.arms) if forecaster is not None else ()
    if methods is not None:
        if unknown := [m for m in methods if m not in known and m not in arms]:
            raise UsageError(f"method {one_line(unknown[0])!r} is not one of {', '.join((*arms, *known))}")
        known, arms = {n: p for n, p in known.items() if n in methods}, tuple(a for a in arms if a in methods)
    if scales is None:
        scales = getattr(forecaster, "point_scales", None) or {}
    return _Methods(known, forecaster, arms, scales)


class _Tally:
    """Sums per method, clip, subset and horizon, and counts of errors per method, subset and horizon: of one log, or of all."""

    def __init__(self, methods: Sequence[str], subsets: Sequence[str], horizons: Sequence[float]) -> None:
        self.methods, self.subsets, self.horizons = methods, subsets, horizons
        self.sums: dict[str, list[Array]] = {m: [] for m in methods}
        self.counts = {m: np.zeros((len(subsets), len(horizons), metrics.ERROR_BINS), np.int64) for m in methods}
        self.log_of_clip: list[int] = []

    def add(self, sums: Mapping[str, Array], counts: Mapping[str, Array], log: int) -> None:
        self.log_of_clip.append(log)
        for method in self.methods:
            self.sums[method].append(sums[method])
            self.counts[method] += counts[method]

    def rows(self, log: str | None) -> Iterator[Row]:
        clips = len(self.log_of_clip)
        weights = metrics.bootstrap_weights(np.array(self.log_of_clip), DRAWS, 0) if clips > 1 else None
        reference = np.stack(self.sums[EVIDENCE_ONLY]).astype(np.float64) if clips and EVIDENCE_ONLY in self.methods else None
        for method in self.methods if clips else ():
            sums = np.stack(self.sums[method]).astype(np.float64)  # clips, subsets, horizons, columns
            for s, subset in enumerate(self.subsets):
                for horizons in (*((k,) for k in range(len(self.horizons))), tuple(range(len(self.horizons)))):
                    these = sums[:, s, list(horizons)].transpose(1, 0, 2)
                    rays = these[:, :, metrics.AT["rays"]]
                    if not rays.sum() or (subset != "all" and not rays.sum(1).all()):
                        continue  # a mean over some of the horizons is comparable with nothing
                    values = {n: metrics.mean_over_horizons(v) for n, v in metrics.metrics_of_sums(these.sum(1)).items()}
                    medians = np.array([metrics.median_of_counts(self.counts[method][s, k]) for k in horizons])
                    values["l1_median"] = metrics.mean_over_horizons(medians)
                    one = len(horizons) == 1
                    drawn = metrics.intervals(these, weights) if weights is not None else {}
                    over = None
                    if reference is not None and method != EVIDENCE_ONLY:
                        over, between = metrics.l1_over(these, reference[:, s, list(horizons)].transpose(1, 0, 2), weights)
                        if between is not None:
                            drawn["l1_over_evidence_only"] = between
                    yield Row(
                        method, subset, log, self.horizons[horizons[0]] if one else None, int((rays.sum(0) > 0).sum()), int(rays.sum()),
                        int(these[:, :, metrics.AT["missing"]].sum()), **{n: _or_none(values[n]) for n in metrics.METRICS},
                        l1_over_evidence_only=None if over is None else _or_none(over), intervals=drawn,
                    )  # fmt: skip


def _or_none(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _scores(
    methods: _Methods, clip: Clip, history: History, rays: Sequence[Rays], masks: Sequence[Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Per method the sums (subsets, K, WIDTH) f32 and error counts (subsets, K, ERROR_BINS) of one clip."""
    subsets, horizons = len(masks[0]), len(rays)
    sums = {m: np.zeros((subsets, horizons, metrics.WIDTH), np.float32) for m in methods.names}
    counts = {m: np.zeros((subsets, horizons, metrics.ERROR_BINS), np.int64) for m in methods.names}
    true_points = [points_of(asked, asked.ranges) for asked in rays]
    for method, k, answer in methods.answers(clip, history, rays):
        asked = rays[k]
        if not len(asked.ranges):
            continue
        table = metrics.ray_table(answer, asked.ranges, points_of(asked, answer.ranges), true_points[k])
        error = np.abs(answer.ranges - asked.ranges)
        sums[method][:, k] = masks[k].astype(np.float64) @ table
        for s in range(subsets):
            if masks[k][s].any():
                counts[method][s, k] = metrics.error_counts(error[masks[k][s]])
    return sums, counts


def evaluate(
    parts: Sequence[Part],
    forecaster: Forecaster | None = None,
    *,
    protocol: str = "native",
    rays_per_sweep: int = RAYS_PER_SWEEP,
    all_rays: bool = False,
    max_clips: int | None = None,
    methods: Sequence[str] | None = None,
    hidden_sector: bool = False,
    seed: int = 0,
    scales: Mapping[str, Sequence[Sequence[float]]] | None = None,
    report: Report | None = None,
) -> Table:
    """The rows of every method on every clip of the parts: per log and over all of them. methods: only these baselines and arms.
    hidden_sector: the `hidden` pass too. scales: rows (horizon_s, scale_m) of point methods' Laplace distributions, as `laplace_scales`
    fits them on training clips (None: the forecaster's `point_scales`; where there are none, their nll is None). report: (done, total,
    text) per clip. UsageError for data without a clip, and for an unknown method or protocol."""
    if min(rays_per_sweep, 1 if max_clips is None else max_clips) < 1 or seed < 0 or methods == []:
        raise UsageError("evaluate: rays_per_sweep and max_clips are above 0, seed is not below 0, and methods, where given, names some")
    chosen = _chosen(forecaster, methods, scales)
    clips = clips_to_evaluate(parts, protocol, max_clips)
    seconds = PROTOCOLS[protocol].seconds if protocol in PROTOCOLS else ()
    if not clips:
        longest = (PAST - 1) / RATE_HZ + seconds[-1]
        raise UsageError(
            f"no clip of {longest:.1f} s in the data: logs are shorter, have gaps, or no poses at least every 0.5 s; `wm check` says which"
        )
    rays_asked = None if all_rays else rays_per_sweep
    table = Table()
    passes = [("", SUBSETS, seconds)] + ([(HIDDEN, (HIDDEN,), (0.0, *seconds))] if hidden_sector else [])
    total = {name: _Tally(chosen.names, subsets, horizons) for name, subsets, horizons in passes}
    of_log = dict(total)
    logs: list[str] = []
    scored: list[Clip] = []
    rows_by_log: list[Row] = []
    movers: Movers | None = None
    first_error = ""
    for done, clip in enumerate(clips):
        if not logs or clip.log.id != logs[-1]:
            if logs:
                rows_by_log += [row for tally in of_log.values() for row in tally.rows(logs[-1])]
            logs.append(clip.log.id)
            of_log = {name: _Tally(chosen.names, subsets, horizons) for name, subsets, horizons in passes}
            movers = Movers(clip.log)
        if report is not None:
            report(done, len(clips), one_line(clip.log.id, 60))
        try:
            history = history_of(clip)
            rays = [rays_of(clip, frame, rays_asked, seed) for frame in clip.future]
            present = rays_of(clip, clip.past[-1], rays_asked, seed) if hidden_sector else None
        except WmError as error:
            table.unreadable += 1
            first_error = first_error or f"{one_line(clip.id, 120)}: {one_line(error, 200)}"
            clip.log.counts[f"evaluation: clip left out ({one_line(error, 80)})"] += 1
            continue
        assert movers is not None
        masks = [subset_masks(clip, frame, history, asked, movers) for frame, asked in zip(clip.future, rays, strict=True)]
        results = {"": _scores(chosen, clip, history, rays, masks)}
        if present is not None:
            sector = sector_of(clip, seed)
            inside = [asked.take(in_sector(points_of(asked, asked.ranges), *sector)) for asked in (present, *rays)]
            whole = [np.ones((1, len(asked.ranges)), bool) for asked in inside]
            results[HIDDEN] = _scores(chosen, clip, hide_sector(history, *sector), inside, whole)
        for name, (sums, counts) in results.items():
            total[name].add(sums, counts, len(logs) - 1)
            of_log[name].add(sums, counts, len(logs) - 1)
        scored.append(clip)
    table.clips = len(scored)
    if not scored:
        raise WmError(f"none of the {len(clips)} clips is readable; look at the data with `wm check`; the first is {first_error}")
    rows_by_log += [row for tally in of_log.values() for row in tally.rows(logs[-1])]
    table.extend(row for tally in total.values() for row in tally.rows(None))
    table.extend(rows_by_log)
    table.logs = len({clip.log.id for clip in scored})
    table.seconds = covered_seconds(scored)
    table.poses = tuple(sorted({clip.log.poses.source for clip in scored if clip.log.poses is not None}))
    if report is not None:
        report(len(clips), len(clips), f"{table.unreadable} clips unreadable" if table.unreadable else "")
    return table


def covered_seconds(clips: Sequence[Clip]) -> float:
    """Seconds of recording that the clips lie in, overlaps counted once."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for clip in clips:
        spans.setdefault(clip.log.id, []).append((clip.past[0].stamp_ns, clip.future[-1].stamp_ns))
    total = 0
    for of_log in spans.values():
        end = 0
        for start, stop in sorted(of_log):
            total += max(stop - max(start, end), 0)
            end = max(end, stop)
    return total / 1e9


def laplace_scales(
    parts: Sequence[Part],
    *,
    protocol: str = "native",
    rays_per_sweep: int = 4096,
    max_clips: int | None = 40,
    seed: int = 0,
    report: Report | None = None,
) -> dict[str, list[list[float]]]:
    """Per baseline rows (horizon_s, scale_m): the maximum-likelihood scale of a Laplace distribution around it, its mean absolute error as it
    is scored, on these clips. Give training clips: nothing is fitted on what is evaluated. Unreadable clips are left out."""
    errors: dict[str, dict[float, list[float]]] = {}
    clips = clips_to_evaluate(parts, protocol, max_clips)
    for done, clip in enumerate(clips):
        if report is not None:
            report(done, len(clips), "")
        try:
            history = history_of(clip)
            rays = [rays_of(clip, frame, rays_per_sweep, seed) for frame in clip.future]
        except WmError:
            continue
        for name, predict in baselines().items():
            for horizon, asked in zip(PROTOCOLS[protocol].seconds, rays, strict=True):
                if len(asked.ranges):
                    placed, _ = metrics.scored(predict(history, asked), asked.ranges)
                    errors.setdefault(name, {}).setdefault(horizon, []).append(float(np.abs(placed - asked.ranges).mean()))
    if report is not None:
        report(len(clips), len(clips), "")
    return {name: [[h, max(float(np.mean(e)), 1e-3)] for h, e in sorted(by.items())] for name, by in errors.items()}
