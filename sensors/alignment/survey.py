"""A look at the payloads of a log, on samples: can they be read, are sweeps whole, and do the poses lay one sweep onto the next.

Pose quality is measured where it matters: two sweeps PAIR_S apart are joined by the poses, and once more after registration. The distance
between the clouds before and after, and how far the registration had to move, say what the poses cost; moving things and newly seen space
are in both figures alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.alignment.deskew import deskew
from sensors.alignment.odometry import register
from sensors.clips import nearest_index
from sensors.errors import Interrupted, WmError, one_line
from sensors.formats.images import decode
from sensors.geometry import inverse, pose_at, transform_points
from sensors.kernels.nearest import nearest
from sensors.kernels.registration import Planes, thinned
from sensors.rays import inside_box
from sensors.records import Log, RecordError, boxes_astray

Array = NDArray[Any]

SWEEPS, PAIRS, IMAGES = 48, 6, 4
PAIR_S = 1.0
VOXEL_M = 0.25
MIN_RANGE_M, MAX_RANGE_M = 3.0, 40.0
AZIMUTH_BINS = 180
MIN_MATCHED = 500
# nothing on wheels gets as far in PAIR_S: the poses jump, and clouds so far apart are not for the registration
FAR_M = 200.0
# what makes a warning
MOVED_M, THIN_SHARE, COVERAGE_SHARE, ODD_SHARE = 0.10, 0.5, 0.8, 0.05
FAR_BOX_M = 1000.0
TILTED_DEG = 10.0
# where ground is looked for, and how far below the LiDAR an encoder that sees from -3 m on (the default) still has it
AROUND_M, DEEPEST_M = (5.0, 20.0), -2.7
# and from where on a LiDAR seems to stand on it
SHALLOWEST_M = -0.4


@dataclass(frozen=True, eq=False)
class SweepSamples:
    """Sampled sweeps of one LiDAR: stamps_ns (N,), points (N,) i64 per sweep, azimuth (N,) share of the directions around the sensor that
    hold a return, time_per_point and rings: whether sweeps have them; unreadable: how many of the samples could not be read, and why the first
    could not; ground_m (N,): how high low points around the vehicle lie in the LiDAR's frame (NaN where there are none)."""

    stamps_ns: Array
    points: Array
    azimuth: Array
    time_per_point: bool
    rings: bool
    deskewed: bool
    unreadable: int
    why: str
    ground_m: Array


@dataclass(frozen=True)
class Pair:
    """Two sweeps joined by the poses: the median distance from the later one's points to the earlier cloud, m, as the poses have it and
    after registration; how far registration moved and turned the later sweep. registered: whether there was enough to match. Where the poses
    put the two more than FAR_M apart, nothing is registered and both distances are how far apart that is."""

    from_ns: int
    to_ns: int
    median_m: float
    registered_m: float
    moved_m: float
    turned_deg: float
    registered: bool


@dataclass(frozen=True, eq=False)
class Survey:
    """What `survey` found, by LiDAR, and the pairs of the reference LiDAR. warnings are lines of text."""

    sweeps: dict[str, SweepSamples]
    pairs: tuple[Pair, ...]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        sweeps = {
            name: {
                "sampled": len(s.stamps_ns), "unreadable": s.unreadable, "points_median": float(np.median(s.points)) if len(s.points) else None,
                "points_min": int(s.points.min()) if len(s.points) else None, "time_per_point": s.time_per_point, "rings": s.rings,
                "deskewed": s.deskewed, "ground_m": float(np.nanmedian(s.ground_m)) if np.isfinite(s.ground_m).any() else None,
            }
            for name, s in self.sweeps.items()
        }  # fmt: skip
        return {"sweeps": sweeps, "pairs": [vars(pair) for pair in self.pairs], "warnings": list(self.warnings)}


def spread(count: int, most: int) -> Array:
    """At most `most` indices (N,) i64 of 0..count-1, evenly spread, both ends among them."""
    return np.unique(np.round(np.linspace(0, count - 1, min(count, most))).astype(np.int64)) if count else np.zeros(0, np.int64)


def survey(log: Log, report: Callable[[int, int, str], None] | None = None, *, labels: bool = True) -> Survey:
    """Reads at most SWEEPS sweeps of each LiDAR, PAIRS pairs of the reference's, IMAGES images of each camera, and the labels unless they are slow to
    open. What is unreadable is counted, not raised."""
    sweeps = {name: _samples(log, name, report) for name in sorted(log.lidars)}
    pairs = _pairs(log, report) if log.lidars and log.poses is not None else ()
    of_poses = _warnings(sweeps, pairs, log.poses.source if log.poses else "none")
    return Survey(sweeps, pairs, tuple(_mounting(log, sweeps) + of_poses + _images(log) + (_labels(log) if labels else [])))


def _samples(log: Log, lidar: str, report: Callable[[int, int, str], None] | None) -> SweepSamples:
    stamps, points, azimuth, ground_m = [], [], [], []
    times, rings, deskewed, unreadable, why = True, True, True, 0, ""
    wanted = spread(len(log.sweep_stamps_ns[lidar]), SWEEPS)
    for done, index in enumerate(wanted):
        if report:
            report(done, len(wanted), lidar)
        try:
            sweep = log.read_sweep(lidar, int(index))
        except Interrupted:
            raise
        except WmError as error:
            unreadable, why = unreadable + 1, why or one_line(error)
            continue
        stamps.append(sweep.stamp_ns)
        points.append(len(sweep.points))
        bins = np.floor((np.arctan2(sweep.points[:, 1], sweep.points[:, 0]) + np.pi) / (2 * np.pi) * AZIMUTH_BINS).astype(np.int64)
        azimuth.append(len(np.unique(np.clip(bins, 0, AZIMUTH_BINS - 1))) / AZIMUTH_BINS)
        away = np.hypot(sweep.points[:, 0], sweep.points[:, 1])
        around = sweep.points[(away > AROUND_M[0]) & (away < AROUND_M[1]), 2]
        ground_m.append(float(np.percentile(around, 5)) if len(around) else np.nan)
        times, rings, deskewed = times and sweep.time_ns is not None, rings and sweep.ring is not None, deskewed and sweep.deskewed
    some = bool(stamps)
    return SweepSamples(
        np.array(stamps, np.int64), np.array(points, np.int64), np.array(azimuth), some and times, some and rings, some and deskewed, unreadable,
        why, np.array(ground_m),
    )  # fmt: skip


def cloud_in_ego(log: Log, lidar: str, index: int) -> Array:
    """Points (N,3) f64 of a sweep in the ego frame at its stamp: deskewed where points have times and the poses reach, else as recorded; the
    vehicle's own returns, and what is nearer or farther than the survey looks, left out."""
    sweep = log.read_sweep(lidar, index)
    distance = np.sqrt((sweep.points.astype(np.float64) ** 2).sum(1))
    ego_from_lidar = log.lidars[lidar].ego_from_lidar
    own = inside_box(transform_points(ego_from_lidar, sweep.points), log.ego_box)
    keep = ~own & (distance > MIN_RANGE_M) & (distance < MAX_RANGE_M)
    points = sweep.points[keep]
    if sweep.time_ns is not None and not sweep.deskewed and log.poses is not None:
        # beyond the poses: as recorded
        with contextlib.suppress(RecordError):
            points, _ = deskew(points, sweep.time_ns[keep], ego_from_lidar, log.poses, sweep.stamp_ns)
    return transform_points(ego_from_lidar, points.astype(np.float64))


def pair_indices(log: Log) -> list[tuple[int, int]]:
    """Indices of at most PAIRS pairs of the reference LiDAR's sweeps, PAIR_S apart (within a tenth) and covered by poses."""
    if log.poses is None or not log.lidars:
        return []
    stamps = log.sweep_stamps_ns[log.reference_lidar]
    if len(stamps) < 2:
        return []
    later = nearest_index(stamps, stamps + int(PAIR_S * 1e9))
    apart = (stamps[later] - stamps) / 1e9
    covered = (stamps >= log.poses.stamps_ns[0]) & (stamps <= log.poses.stamps_ns[-1])
    good = np.flatnonzero((np.abs(apart - PAIR_S) < 0.1 * PAIR_S + 1e-6) & covered & covered[later])
    return [(int(good[i]), int(later[good[i]])) for i in spread(len(good), PAIRS)]


def _pairs(log: Log, report: Callable[[int, int, str], None] | None) -> tuple[Pair, ...]:
    lidar = log.reference_lidar
    stamps = log.sweep_stamps_ns[lidar]
    found = []
    wanted = pair_indices(log)
    for done, (earlier, later) in enumerate(wanted):
        if report:
            report(done, len(wanted), "poses")
        try:
            first, second = (cloud_in_ego(log, lidar, index) for index in (earlier, later))
        except Interrupted:
            raise
        except WmError:
            continue
        if not (len(first) and len(second)):
            continue
        assert log.poses is not None
        world_from_first, world_from_second = pose_at(log.poses, stamps[[earlier, later]])
        first_from_second = inverse(world_from_first) @ world_from_second
        # a jump within a sweep tears its own cloud apart where points have times
        apart = max(float(np.linalg.norm(first_from_second[:3, 3])), float(np.abs(first).max()), float(np.abs(second).max()))
        if apart > FAR_M:
            found.append(Pair(int(stamps[earlier]), int(stamps[later]), apart, apart, 0.0, 0.0, registered=False))
            continue
        first, second = thinned(first, VOXEL_M), thinned(second, VOXEL_M)
        target = Planes(first)
        # started in the later sweep's frame, so that what registration adds is measured at the sensor
        moved, matched, _ = register(second, Planes(transform_points(inverse(first_from_second), first)), np.eye(4))
        registered = matched >= min(MIN_MATCHED, len(second) // 4)
        if not registered:
            moved = np.eye(4)
        before, after = (_distance(target, second, first_from_second @ extra) for extra in (np.eye(4), moved))
        turned = float(np.rad2deg(np.arccos(np.clip((np.trace(moved[:3, :3]) - 1) / 2, -1, 1))))
        found.append(Pair(int(stamps[earlier]), int(stamps[later]), before, after, float(np.linalg.norm(moved[:3, 3])), turned, registered))
    return tuple(found)


def _distance(target: Planes, points: Array, target_from_points: Array) -> float:
    away, _ = nearest(transform_points(target_from_points, points).astype(np.float32), target.points.astype(np.float32))
    return float(np.median(away))


def _mounting(log: Log, sweeps: dict[str, SweepSamples]) -> list[str]:
    """Warnings on a reference LiDAR whose own frame is not that of one on a car's roof, which is what encoders are made for."""
    out = []
    for name in [log.reference_lidar] if log.lidars else []:
        s = sweeps[name]
        tilt_deg = float(np.rad2deg(np.arccos(np.clip(log.lidars[name].ego_from_lidar[2, 2], -1, 1))))
        if tilt_deg > TILTED_DEG:
            out.append(f"{name}: mounted {tilt_deg:.0f} degrees from upright, its frame too; encoders expect z up: turn points and ego_from_lidar "
                       "in the adapter")  # fmt: skip
        elif not np.isfinite(s.ground_m).any():
            continue
        elif (ground_m := float(np.nanmedian(s.ground_m))) > SHALLOWEST_M:
            out.append(f"{name}: the ground lies at {round(ground_m, 1) + 0.0:.1f} m in its frame; if it is not mounted that low, its points "
                       "are in the vehicle's frame, and rays seem to start from the road: subtract its place in the adapter")  # fmt: skip
        elif ground_m < DEEPEST_M:
            low, high = round(ground_m - 1.5), round(ground_m - 1.5) + 6
            out.append(f"{name}: the ground lies {-ground_m:.1f} m below it, the default encoder sees from 3 m below to 3 m above; pretrain with "
                       f"--set encoder.low=[-51.2,-51.2,{low}] encoder.high=[51.2,51.2,{high}]")  # fmt: skip
    return out


def _images(log: Log) -> list[str]:
    """Warnings on cameras of which sampled images cannot be decoded, or are not of the size that the calibration is for."""
    out = []
    for name, camera in sorted(log.cameras.items()):
        wanted, unreadable, sizes, why = spread(len(log.image_stamps_ns[name]), IMAGES), 0, set(), ""
        for index in wanted:
            try:
                sizes.add(decode(log.read_image(name, int(index))).shape[1::-1])
            except Interrupted:
                raise
            except WmError as error:
                unreadable, why = unreadable + 1, why or one_line(error)
        if unreadable:
            out.append(f"{name}: {unreadable} of {len(wanted)} sampled images cannot be read; the first: {why}")
        for width, height in sorted(sizes - {(camera.width, camera.height)}):
            out.append(f"{name}: images of {width}x{height} pixels, its calibration is for {camera.width}x{camera.height}; scale K in the adapter")
    return out


def _labels(log: Log) -> list[str]:
    """Warnings on labels that do not open, and on boxes in other units, other frames or at other instants, if they are more than a few."""
    try:
        labels = log.open_labels()
    except Interrupted:
        raise
    except WmError as error:
        return [f"labels: cannot be read: {one_line(error)}"]
    if labels is None or not labels.boxes or not log.lidars or not len(stamps := log.sweep_stamps_ns[log.reference_lidar]):
        return []
    out, count = [], len(labels.boxes)
    turned, far = np.abs([box.yaw_rad for box in labels.boxes]), np.linalg.norm([box.centre for box in labels.boxes], axis=1)
    if (most := int((turned > 2 * np.pi + 1e-3).sum())) > ODD_SHARE * count:
        out.append(f"labels: {most} of {count} boxes are turned by more than 2 pi; are their yaws in degrees? Give radians")
    if (most := int((far > FAR_BOX_M).sum())) > ODD_SHARE * count:
        out.append(f"labels: {most} of {count} boxes are more than {FAR_BOX_M:g} m away; give centres in the ego frame of their instant")
    if (most := boxes_astray(labels, stamps)) > ODD_SHARE * count:
        instants = np.array([box.stamp_ns for box in labels.boxes], np.int64)
        off_ms = np.abs(stamps[nearest_index(stamps, instants)] - instants) / 1e6
        out.append(f"labels: {most} of {count} boxes lie at no sweep's stamp ({np.median(off_ms[off_ms > 0]):.1f} ms off, median) and are of no use; "
                   f"give them the stamp of a sweep of {log.reference_lidar}")  # fmt: skip
    return out


def _warnings(sweeps: dict[str, SweepSamples], pairs: tuple[Pair, ...], poses: str) -> list[str]:
    out = []
    for name, s in sweeps.items():
        if s.unreadable:
            out.append(f"{name}: {s.unreadable} of {len(s.stamps_ns) + s.unreadable} sampled sweeps cannot be read; the first: {s.why}")
        if len(s.points) < 2:
            continue
        thin = int((s.points < THIN_SHARE * np.median(s.points)).sum())
        if thin:
            out.append(f"{name}: {thin} of {len(s.points)} sampled sweeps have less than half the usual points; packets lost?")
        narrow = int((s.azimuth < COVERAGE_SHARE * np.median(s.azimuth)).sum())
        if narrow:
            out.append(f"{name}: {narrow} of {len(s.points)} sampled sweeps see less of the surroundings than usual; packets lost?")
    known = [pair for pair in pairs if pair.registered]
    far = [pair.median_m for pair in pairs if not pair.registered and pair.median_m > FAR_M]
    if far:
        what = f"{len(far)} of {len(pairs)} pairs of sweeps {PAIR_S:g} s apart lie up to {max(far):.0f} m apart by the poses"
        out.append(f"poses: {what} and were not registered; the trajectory jumps, ingest with --poses odometry")
    if len(known) + len(far) < len(pairs):
        unmatched = len(pairs) - len(known) - len(far)
        out.append(f"poses: {unmatched} of {len(pairs)} pairs of sweeps {PAIR_S} s apart cannot be registered to each other")
    if known:
        moved = np.array([pair.moved_m for pair in known])
        if np.median(moved) > MOVED_M or moved.max() > 3 * MOVED_M:
            off = f"{np.median(moved):.2f} m (median of {len(known)} pairs, at most {moved.max():.2f} m)"
            advice = "look at the pictures: traffic, or little structure?" if poses == "refined" else "ingest with --poses refined"
            out.append(f"poses: sweeps {PAIR_S:g} s apart lie off each other by {off}; {advice}")
    return out
