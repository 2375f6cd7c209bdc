"""What the stamps and poses of a log say about it, without reading a payload: rates, gaps, skews, clocks, speeds.

A pure report: the same log gives the same one, and nothing is changed or mended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.clips import TOLERANCE, nearest_index
from sensors.records import Log

Array = NDArray[Any]

GAP_STEPS = 1.5
MOST_GAPS = 20
# leap seconds between GPS and UTC, TAI and GPS, TAI and UTC: an offset this near to one of them is hardly an accident
CLOCK_OFFSETS_S = {18: "GPS against UTC", 19: "TAI against GPS", 37: "TAI against UTC"}
CLOCK_TOLERANCE_S = 0.05
SPEED_WINDOW_S = 0.5
SPEED_TOLERANCE_MPS, SPEED_TOLERANCE_SHARE = 0.15, 0.01
# no car gains or loses this much within SPEED_WINDOW_S (2 g), so poses that say so jumped
SPEED_JUMP_MPS = 10.0
SPEED_LIMIT_MPS = 80.0
# what `sensors.clips.clips_of` cuts where it is not told otherwise, and `wm evaluate` always: 5 past and 5 future frames
CLIP_HZ, CLIP_FRAMES = 5.0, np.arange(-4, 6)


@dataclass(frozen=True)
class Gap:
    """A step longer than GAP_STEPS periods: where it starts, and how long it is."""

    from_ns: int
    seconds: float


@dataclass(frozen=True)
class SensorTiming:
    """The stamps of one sensor: steps in seconds, skews in milliseconds to the nearest sweep of the reference LiDAR (its stamp minus the
    sweep's). Values that a sensor of fewer than two items does not have are None. unmatched: sweeps of the reference without an item of
    this sensor within half its period."""

    name: str
    kind: str
    count: int
    nominal_hz: float
    rate_hz: float | None
    first_ns: int | None
    last_ns: int | None
    median_step_s: float | None
    max_step_s: float | None
    missing: int
    gaps: tuple[Gap, ...]
    gaps_total: int
    skew_median_ms: float | None = None
    skew_max_ms: float | None = None
    unmatched: int = 0


@dataclass(frozen=True, eq=False)
class PoseTiming:
    """The poses: their source and steps, how many sweeps of the reference LiDAR they cover (within 0.1 s), the path's length, the speed
    (m/s) over SPEED_WINDOW_S at speed_ns, and what another sensor measured at the same instants (NaN where it did not)."""

    source: str
    count: int
    median_step_s: float | None
    max_step_s: float | None
    covered_share: float
    distance_m: float
    speed_ns: Array
    speed_mps: Array
    measured_mps: Array

    @property
    def speed_error_mps(self) -> Array:
        """(N,) pose speed minus measured speed; NaN without a measurement."""
        error: Array = self.speed_mps - self.measured_mps
        return error


@dataclass(frozen=True, eq=False)
class Timing:
    """The report of `timing`: warnings are lines of text; an empty list is the verdict ok."""

    log_id: str
    reference: str | None
    stamps: str
    duration_s: float
    sensors: tuple[SensorTiming, ...]
    poses: PoseTiming | None
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.warnings

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`; the speed profile as its summary."""
        out: dict[str, Any] = {"log": self.log_id, "reference": self.reference, "stamps": self.stamps, "duration_s": self.duration_s}
        out["ok"], out["warnings"] = self.ok, list(self.warnings)
        out["sensors"] = [{**vars(s), "gaps": [vars(g) for g in s.gaps]} for s in self.sensors]
        out["poses"] = None
        if self.poses is not None:
            p = self.poses
            names = ("source", "count", "median_step_s", "max_step_s", "covered_share", "distance_m")
            out["poses"] = {name: getattr(p, name) for name in names}
            error = np.abs(p.speed_error_mps[np.isfinite(p.speed_error_mps)])
            out["poses"]["speed_median_mps"] = float(np.median(p.speed_mps)) if len(p.speed_mps) else None
            out["poses"]["speed_max_mps"] = float(p.speed_mps.max()) if len(p.speed_mps) else None
            out["poses"]["speed_error_median_mps"] = float(np.median(error)) if len(error) else None
            out["poses"]["speed_error_max_mps"] = float(error.max()) if len(error) else None
        return out


def _sensor(name: str, kind: str, stamps: Array, nominal_hz: float, reference: Array | None) -> SensorTiming:
    count = len(stamps)
    steps = np.diff(stamps) / 1e9
    period = float(np.median(steps)) if count > 1 else 1 / nominal_hz
    long = np.flatnonzero(steps > GAP_STEPS * period)
    gaps = tuple(Gap(int(stamps[i]), float(steps[i])) for i in long[np.sort(np.argsort(-steps[long], kind="stable")[:MOST_GAPS])])
    skew_median = skew_max = None
    unmatched = 0
    if reference is not None and len(reference) and count:
        skew = (stamps[nearest_index(stamps, reference)] - reference) / 1e6
        matched = np.abs(skew) <= 0.5e3 / nominal_hz
        unmatched = int((~matched).sum())
        if matched.any():
            skew_median, skew_max = float(np.median(skew[matched])), float(skew[matched][np.abs(skew[matched]).argmax()])
    return SensorTiming(
        name, kind, count, nominal_hz,
        rate_hz=(count - 1) / ((stamps[-1] - stamps[0]) / 1e9) if count > 1 else None,
        first_ns=int(stamps[0]) if count else None,
        last_ns=int(stamps[-1]) if count else None,
        median_step_s=period if count > 1 else None,
        max_step_s=float(steps.max()) if count > 1 else None,
        missing=int(np.maximum(np.round(steps[long] / period) - 1, 1).sum()),
        gaps=gaps, gaps_total=len(long), skew_median_ms=skew_median, skew_max_ms=skew_max, unmatched=unmatched,
    )  # fmt: skip


def _window_speed(stamps: Array, place: Array, at: Array) -> Array:
    """How far place (N,K) moves over SPEED_WINDOW_S around each instant (M,), the window cut at the ends, by its length. Not the way: that
    grows with the noise of every step, and a vehicle at rest would move."""
    half = int(SPEED_WINDOW_S * 5e8)
    low, high = np.maximum(at - half, stamps[0]), np.minimum(at + half, stamps[-1])
    moved = np.linalg.norm(_placed(stamps, place, high) - _placed(stamps, place, low), axis=1)
    return np.divide(moved, (high - low) / 1e9, out=np.full(len(at), np.nan), where=high > low)


def _placed(stamps: Array, place: Array, at: Array) -> Array:
    """place (N,K) at the instants (M,), between the stamps in straight lines."""
    return np.stack([np.interp(at - stamps[0], stamps - stamps[0], axis) for axis in place.T], 1)


def _poses(log: Log, reference: Array | None) -> PoseTiming | None:
    if log.poses is None:
        return None
    stamps, place = log.poses.stamps_ns, log.poses.world_from_ego[:, :3, 3]
    steps = np.diff(stamps) / 1e9
    first, last = stamps[[0, -1]]
    if reference is not None and len(reference):  # poses may go on where nothing was recorded
        first, last = np.clip(reference[[0, -1]], first, last)
    every = np.append(np.arange(first, last, int(SPEED_WINDOW_S * 1e9)), last)
    distance_m = float(np.linalg.norm(np.diff(_placed(stamps, place, every), axis=0), axis=1).sum())
    covered = 1.0
    if reference is not None and len(reference):
        covered = float(((reference >= stamps[0] - 10**8) & (reference <= stamps[-1] + 10**8)).mean())
    at = stamps if len(stamps) > 1 else stamps[:0]
    speed = _window_speed(stamps, place, at)
    measured = np.full(len(at), np.nan)
    if log.measured_speed is not None and len(log.measured_speed[0]) > 1 and len(at):
        known, forward = (np.asarray(a) for a in log.measured_speed)
        way = np.concatenate(([0.0], np.cumsum(0.5 * (forward[1:] + forward[:-1]) * np.diff(known) / 1e9)))
        inside = (at >= known[0]) & (at <= known[-1])
        measured[inside] = _window_speed(known, way[:, None], at[inside])
    return PoseTiming(
        log.poses.source, len(stamps), float(np.median(steps)) if len(steps) else None, float(steps.max()) if len(steps) else None,
        covered, distance_m, at, speed, measured,
    )  # fmt: skip


def _clock_offset(first_ns: int, last_ns: int, reference: Array, slack_s: float) -> str | None:
    """A known difference of clocks that both ends of a sensor's stamps show against the reference's."""
    starts, ends = (first_ns - int(reference[0])) / 1e9, (last_ns - int(reference[-1])) / 1e9
    for seconds, meaning in CLOCK_OFFSETS_S.items():
        for offset in (seconds, -seconds):
            if abs(0.5 * (starts + ends) - offset) <= CLOCK_TOLERANCE_S + 0.5 * slack_s and abs(starts - ends) <= 2 * slack_s + CLOCK_TOLERANCE_S:
                return f"{offset:+d} s ({meaning})"
    return None


def _gap_warning(sensor: SensorTiming) -> str:
    longest = max(sensor.gaps, key=lambda gap: gap.seconds)
    return (
        f"{sensor.name}: {sensor.gaps_total} gaps, about {sensor.missing} items missing, "
        f"the longest {longest.seconds:.2f} s after {longest.from_ns} ns; clips are cut there"
    )


def _short_warning(lidar: SensorTiming) -> str | None:
    """That no clip fits from the first sweep to the last."""
    seconds = (lidar.last_ns - lidar.first_ns) / 1e9 if lidar.first_ns is not None and lidar.last_ns is not None else 0.0
    needed_s = (CLIP_FRAMES[-1] - CLIP_FRAMES[0]) / CLIP_HZ
    if seconds >= needed_s - TOLERANCE / lidar.nominal_hz:
        return None
    return f"{lidar.name}: {seconds:.1f} s of sweeps; clips of {needed_s:g} s are cut, so this log gives none"


def _slow_warning(lidar: SensorTiming) -> str | None:
    """That no clip fits: of sweeps so far apart, the nearest ones to a clip's instants are the same twice, or too far from one."""
    if lidar.median_step_s is None or lidar.median_step_s <= 1 / CLIP_HZ:
        return None
    wanted_s = CLIP_FRAMES / CLIP_HZ
    nearest = np.round(wanted_s / lidar.median_step_s)
    if len(set(nearest)) == len(nearest) and (np.abs(nearest * lidar.median_step_s - wanted_s) <= TOLERANCE / lidar.nominal_hz).all():
        return None
    rate_hz = 1 / lidar.median_step_s
    return (
        f"{lidar.name}: {rate_hz:.2f} sweeps a second, too few for clips of {CLIP_HZ:g} frames a second: none for `wm evaluate`, "
        f"and for `wm pretrain` only at a lower rate: --set model.rate_hz={rate_hz:.3g}"
    )


def _warnings(log: Log, sensors: tuple[SensorTiming, ...], poses: PoseTiming | None, reference: Array | None) -> list[str]:
    out = []
    if log.stamps == "assumed":
        out.append("stamps are assumed at the nominal rate: skews and speeds mean little")
    if reference is None:
        out.append("no LiDAR sweeps: no clips can be cut")
    for sensor in sensors:
        if sensor.count == 0:
            out.append(f"{sensor.name}: no items")
            continue
        if sensor.gaps_total:
            out.append(_gap_warning(sensor))
        if reference is not None and sensor.name == log.reference_lidar:
            out += [line for line in (_short_warning(sensor), _slow_warning(sensor)) if line is not None]
        if sensor.rate_hz is not None and sensor.median_step_s is not None and not 0.8 < sensor.median_step_s * sensor.nominal_hz < 1.25:
            out.append(f"{sensor.name}: {1 / sensor.median_step_s:.2f} Hz where {sensor.nominal_hz:.2f} Hz is nominal; check the unit of the stamps, "
                       "and whether the clock ran back in between")  # fmt: skip
        if reference is not None and sensor.first_ns is not None and sensor.last_ns is not None:
            offset = _clock_offset(sensor.first_ns, sensor.last_ns, reference, sensor.median_step_s or 1 / sensor.nominal_hz)
            if offset:
                out.append(f"{sensor.name}: its clock seems to differ by {offset} from the LiDAR's; nothing was shifted")
            elif sensor.unmatched > 0.1 * len(reference):
                out.append(f"{sensor.name}: {sensor.unmatched} of {len(reference)} sweeps have no item of it within half its period")
    if poses is None:
        out.append("no poses: ingest with --poses odometry")
        return out
    if reference is not None and log.poses is not None:
        offset = _clock_offset(int(log.poses.stamps_ns[0]), int(log.poses.stamps_ns[-1]), reference, max(poses.median_step_s or 0.0, 0.1))
        if offset:
            out.append(f"poses: their clock seems to differ by {offset} from the LiDAR's; nothing was shifted")
        elif poses.covered_share < 1:
            out.append(f"poses: {1 - poses.covered_share:.0%} of the sweeps lie outside of them; no clips there")
    if poses.max_step_s is not None and poses.median_step_s is not None and poses.max_step_s > 0.5:
        none = "; most are, so ingest with --poses refined" if poses.median_step_s > 0.5 else ""
        out.append(f"poses: up to {poses.max_step_s:.2f} s apart; no clips across steps of more than 0.5 s{none}")
    return out + _speed_warnings(poses)


def _speed_warnings(poses: PoseTiming) -> list[str]:
    out: list[str] = []
    speed = poses.speed_mps
    if not len(speed):
        return out
    seconds = (poses.speed_ns - poses.speed_ns[0]) / 1e9
    if np.nanmax(speed) > SPEED_LIMIT_MPS:
        out.append(f"poses: {np.nanmax(speed):.0f} m/s at {seconds[np.nanargmax(speed)]:.1f} s, faster than a car; the trajectory jumps")
    else:
        later = np.interp(seconds + SPEED_WINDOW_S, seconds, speed)
        change = np.abs(later - speed)
        if change.max() > SPEED_JUMP_MPS:
            when = seconds[change.argmax()]
            out.append(f"poses: the speed changes by {change.max():.1f} m/s within {SPEED_WINDOW_S} s at {when:.1f} s; the trajectory jumps")
    error = poses.speed_error_mps
    known = np.isfinite(error)
    if known.any():
        bad = known & (np.abs(error) > SPEED_TOLERANCE_MPS + SPEED_TOLERANCE_SHARE * np.abs(np.nan_to_num(poses.measured_mps)))
        if bad.any():
            worst = np.flatnonzero(bad)[np.abs(error[bad]).argmax()]
            advice = "stacked sweeps will smear, ingest with --poses refined" if poses.source in ("log", "gnss") else "look at the start of the drive"
            out.append(
                f"poses: their speed differs from the measured one by up to {error[worst]:+.2f} m/s (at {seconds[worst]:.1f} s; beyond "
                f"tolerance in {bad.sum() / known.sum():.0%} of the poses); {advice}"
            )
    return out


def timing(log: Log) -> Timing:
    """The report of a log, from its stamps, poses and measured speed alone."""
    name = log.reference_lidar if log.lidars else None
    reference = log.sweep_stamps_ns[name] if name is not None and len(log.sweep_stamps_ns[name]) else None
    sensors = [_sensor(n, "lidar", log.sweep_stamps_ns[n], log.lidars[n].rate_hz, None if n == name else reference) for n in sorted(log.lidars)]
    sensors += [_sensor(n, "camera", log.image_stamps_ns[n], log.cameras[n].rate_hz, reference) for n in sorted(log.cameras)]
    ends = [(s.first_ns, s.last_ns) for s in sensors if s.first_ns is not None and s.last_ns is not None]
    duration = (max(last for _, last in ends) - min(first for first, _ in ends)) / 1e9 if ends else 0.0
    poses = _poses(log, reference)
    return Timing(log.id, name, log.stamps, duration, tuple(sensors), poses, tuple(_warnings(log, tuple(sensors), poses, reference)))
