"""Poses from the LiDAR itself: `odometry` where a log has none, `refined` where those it has are not good enough to stack sweeps by.

A position that drifts by 0.4 m/s is invisible on a map and smears every accumulated cloud: on one real drive, registration took the median
error of the plainest forecast, 1 s ahead, from 0.44 to 0.13 m. Pose error cannot be told from forecast error, so refine also what looks good.

Both give world_from_ego at the stamps of the reference LiDAR's sweeps. The world is the log's own where the log has poses (the first pose
is kept), else the ego frame of the first sweep. Both drift over a long drive, by a per cent or so of the way: nothing closes loops.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.alignment.deskew import deskew_steady
from sensors.geometry import from_rotation_translation, inverse, pose_at, transform_points
from sensors.kernels.registration import Planes, thinned
from sensors.rays import inside_box
from sensors.records import Log, RecordError, Trajectory

Array = NDArray[Any]
Report = Callable[[int, int, str], None]

MIN_RANGE_M, MAX_RANGE_M = 2.5, 80.0
# kiss-icp starts without a velocity: that many sweeps are walked forth and back to find one
START_SWEEPS = 12
# half of it costs four times the time and made no difference beyond noise on three real drives
MAP_VOXEL_M = 1.0
# rings on the ground move along with the car and drag point-to-point matching back: of what lies within GROUND_M of the lowest point of its
# GROUND_CELL_M cell, one point in GROUND_EVERY stays, to hold height and tilt
GROUND_CELL_M, GROUND_M, GROUND_EVERY = 2.0, 0.25, 10

VOXEL_M = 0.25
TARGETS = 4
TARGET_AGE_S = 2.0
# (correspondence limit, Tukey's constant), m: first to find the place, then to settle in it
STAGES = ((0.6, 0.4), (0.25, 0.15))
ITERATIONS = 20
STILL_M, STILL_RAD = 2e-4, 2e-6
# a lever that makes rotations comparable with translations, and the share of the normals that must look along a direction to move in it
LEVER_M = 10.0
MIN_INFORMATION = 2e-3
# a registration is believed when this many points matched and it moved the start by no more than this
MIN_MATCHED = 500
MAX_MOVED_M = 1.5
# where the log's step and that of a steady motion lie farther apart, both are tried: poses jump, freeze and catch up
STEPS_APART_M, CLEARLY_MORE = 0.3, 1.02


def _usable_sweeps(log: Log, lidar: str, what: str, report: Report | None) -> Iterator[tuple[int, Array, Array | None]]:
    """(index, points (N,3) f64, time_ns or None) of the sweeps that can be read, the vehicle's own returns and far points left out."""
    total = len(log.sweep_stamps_ns[lidar])
    for index in range(total):
        if report:
            report(index, total, what)
        try:
            sweep = log.read_sweep(lidar, index)
        except RecordError:
            log.counts[f"{lidar}: unreadable, no {what} pose"] += 1
            continue
        keep = ~inside_box(transform_points(log.lidars[lidar].ego_from_lidar, sweep.points), log.ego_box)
        distance = np.sqrt((sweep.points.astype(np.float64) ** 2).sum(1))
        keep &= (distance > MIN_RANGE_M) & (distance < MAX_RANGE_M)
        time_ns = sweep.time_ns[keep] if sweep.time_ns is not None and not sweep.deskewed else None
        yield index, sweep.points[keep].astype(np.float64), time_ns
    if report:
        report(total, total, what)


def _start_pose(log: Log, stamp_ns: int) -> Array:
    """world_from_ego of the first sweep: the log's, or the identity where it has none there."""
    if log.poses is not None:
        try:
            return pose_at(log.poses, np.array([stamp_ns]))[0]
        except RecordError:
            pass
    return np.eye(4)


def _trajectory(log: Log, lidar: str, indices: list[int], lidar_poses: list[Array], source: str, world_from_local: Array | None = None) -> Trajectory:
    """Ego poses of lidar poses of a common frame: world_from_local says which; without it they are so placed that the first one is the log's."""
    if not indices:
        raise RecordError(f"log {log.id}: no readable sweep of {lidar}; poses cannot be made from it")
    stamps = log.sweep_stamps_ns[lidar][indices]
    lidar_from_ego = inverse(log.lidars[lidar].ego_from_lidar)
    poses = np.stack(lidar_poses) @ lidar_from_ego
    if world_from_local is None:
        world_from_local = _start_pose(log, int(stamps[0])) @ inverse(poses[0])
    return Trajectory(stamps, world_from_local @ poses, source)


def _ground_thinned(points: Array) -> Array:
    """(N,) bool of points (N,3): all but most of those near the ground."""
    if not len(points):
        return np.ones(0, bool)
    cells = np.floor(points[:, :2] / GROUND_CELL_M).astype(np.int64)
    cells -= cells.min(0)
    cell = cells[:, 0] * (cells[:, 1].max() + 1) + cells[:, 1]
    lowest = np.full(cell.max() + 1, np.inf)
    np.minimum.at(lowest, cell, points[:, 2])
    low = np.flatnonzero(points[:, 2] < lowest[cell] + GROUND_M)
    keep = np.ones(len(points), bool)
    keep[low] = np.arange(len(low)) % GROUND_EVERY == 0
    return keep


class _Kiss:
    """One run of kiss-icp on one thread. Most of the ground is left out, and sweeps with a time per point are first brought to the middle of these
    times by the last motion. Not to their stamp: where that is the first point's, what the last motion got wrong would come back with its sign
    turned in every step, and swing up."""

    def __init__(self, motion: Array | None = None) -> None:
        from kiss_icp.config import load_config
        from kiss_icp.kiss_icp import KissICP

        config = load_config(None)
        config.data.max_range, config.data.min_range, config.data.deskew = MAX_RANGE_M, 0.0, False
        config.mapping.voxel_size = MAP_VOXEL_M
        config.registration.max_num_threads = 1
        self.kiss = KissICP(config)
        self.last_ns: int | None = None
        if motion is not None:
            self.kiss.last_delta = motion

    def add(self, stamp_ns: int, points: Array, time_ns: Array | None) -> Array:
        """first_from_lidar (4,4) of the sweep."""
        keep = _ground_thinned(points)
        points, time_ns = points[keep], None if time_ns is None else time_ns[keep]
        step_ns = 100_000_000 if self.last_ns is None else stamp_ns - self.last_ns
        middle_ns = 0
        if time_ns is not None and len(time_ns) and step_ns:
            middle_ns = int(np.median(time_ns))
            points = deskew_steady(points, time_ns - middle_ns, self.kiss.last_delta, step_ns)
        self.kiss.register_frame(points, np.zeros(0))
        self.last_ns = stamp_ns
        if middle_ns == 0:
            return np.array(self.kiss.last_pose)
        return np.array(self.kiss.last_pose) @ _part(self.kiss.last_delta, -middle_ns / step_ns)


def odometry(log: Log, report: Report | None = None) -> Trajectory:
    """Poses by kiss-icp (Vizzo et al., RA-L 2023), at the stamps of the reference LiDAR's readable sweeps; source ``odometry``.

    Started without a velocity, kiss-icp loses a moving car in its first seconds (5.7 m on a drive that starts at 13 m/s). So the first
    START_SWEEPS sweeps are walked forward, then back from the motion found, and the run proper starts with the motion that this gives:
    the first poses have seen START_SWEEPS sweeps, every later one those up to its own stamp. A log's own poses only place the first
    one. report(done, total, text) is called per sweep. RecordError without a readable sweep."""
    lidar = log.reference_lidar
    stamps = log.sweep_stamps_ns[lidar]
    indices: list[int] = []
    poses: list[Array] = []
    waiting: list[tuple[int, Array, Array | None]] = []
    run: _Kiss | None = None

    def forward(kiss: _Kiss, item: tuple[int, Array, Array | None]) -> None:
        indices.append(item[0])
        poses.append(kiss.add(int(stamps[item[0]]), item[1], item[2]))

    for item in _usable_sweeps(log, lidar, "odometry", report):
        if run is not None:
            forward(run, item)
            continue
        waiting.append(item)
        if len(waiting) == START_SWEEPS:
            run = _started(waiting, stamps)
            for earlier in waiting:
                forward(run, earlier)
    if run is None:
        run = _started(waiting, stamps)
        for earlier in waiting:
            forward(run, earlier)
    return _trajectory(log, lidar, indices, poses, "odometry")


def _started(sweeps: list[tuple[int, Array, Array | None]], stamps: Array) -> _Kiss:
    """A run that knows the motion at the first sweep."""
    if len(sweeps) < 3:
        return _Kiss()
    ahead = _Kiss()
    poses = [ahead.add(int(stamps[i]), points, time_ns) for i, points, time_ns in sweeps]
    back = _Kiss(inverse(poses[-1]) @ poses[-2])
    # seen backwards in time, the motion per step and the step both turn round
    back.last_ns = int(stamps[sweeps[-1][0]]) + int(stamps[sweeps[-1][0]] - stamps[sweeps[-2][0]])
    poses = [back.add(int(stamps[i]), points, time_ns) for i, points, time_ns in reversed(sweeps)]
    run = _Kiss(inverse(poses[-1]) @ poses[-2])
    run.last_ns = int(stamps[sweeps[0][0]]) - int(stamps[sweeps[1][0]] - stamps[sweeps[0][0]])
    return run


def register(source: Array, target: Planes, target_from_source: Array) -> tuple[Array, int, float]:
    """Point-to-plane registration of source (N,3) m, Gauss-Newton under Tukey's weight in two stages of STAGES.

    Gives target_from_source (4,4), the number of points matched within the last limit, and their weighted rms distance to the planes, m. In
    directions that hardly any plane looks along (a tunnel's axis, an empty field) the start is kept."""
    from scipy.spatial.transform import Rotation

    pose = np.array(target_from_source, np.float64)
    scale = np.array([1 / LEVER_M] * 3 + [1.0] * 3)
    matched, rms = 0, float("inf")
    for limit_m, tukey_m in STAGES:
        for _ in range(ITERATIONS):
            a, b, matched, weights, squares = target.equations(source, pose, limit_m, tukey_m)
            if weights <= 0:
                return pose, 0, float("inf")
            rms = float(np.sqrt(squares / weights))
            # about the sensor, so that the lever means the same wherever the target's origin is
            about = np.eye(6)
            x, y, z = pose[:3, 3]
            about[3:, :3] = ((0, -z, y), (z, 0, -x), (-y, x, 0))
            a, b = about.T @ a @ about, about.T @ b
            values, vectors = np.linalg.eigh(scale[:, None] * a * scale / weights)
            strong = values > MIN_INFORMATION
            step = scale * (vectors[:, strong] @ ((vectors[:, strong].T @ (scale * b / weights)) / values[strong]))
            turn = Rotation.from_rotvec(step[:3]).as_matrix()
            pose = from_rotation_translation(turn @ pose[:3, :3], pose[:3, 3] + step[3:])
            if np.abs(step[3:]).max() < STILL_M and np.abs(step[:3]).max() < STILL_RAD:
                break
    return pose, matched, rms


def refined(log: Log, report: Report | None = None) -> Trajectory:
    """Poses by point-to-plane registration of each sweep to the TARGETS before it, in their refined places; source ``refined``.

    Each starts from the step that the log's poses say, or `odometry` where the log has none and beyond their ends; where that is far from a
    steady motion, from the better of both, which is counted in ``log.counts``. A pose at t has seen sweeps at <= t only (the start of `odometry`
    apart). Points are used as recorded, as the forecasts that these poses serve do. A sweep that does not register (fewer than MIN_MATCHED
    points match, or it would move more than MAX_MOVED_M) keeps the start's step and is counted, too. report(done, total, text) is called per
    sweep. RecordError without a readable sweep."""
    lidar = log.reference_lidar
    stamps = log.sweep_stamps_ns[lidar]
    if not len(stamps):
        raise RecordError(f"log {log.id}: no sweep of {lidar}; poses cannot be made from it")
    start, given = _start(log, stamps, report)
    ego_from_lidar = log.lidars[lidar].ego_from_lidar
    given = given @ ego_from_lidar
    recent: deque[tuple[int, Array]] = deque(maxlen=TARGETS)
    indices: list[int] = []
    poses: list[Array] = []
    for index, points, _ in _usable_sweeps(log, lidar, "refined", report):
        cloud = thinned(points, VOXEL_M)
        if not poses:
            pose = given[index]
        else:
            pose = poses[-1] @ inverse(given[indices[-1]]) @ given[index]
            oldest_ns = int(stamps[index]) - int(TARGET_AGE_S * 1e9)
            near = [world for stamp_ns, world in recent if stamp_ns >= oldest_ns]
            moved = None
            if near:
                # in the sensor's expected frame: small numbers, and the start is the identity
                here = transform_points(inverse(pose), np.concatenate(near))
                here = here[(np.abs(here) < MAX_RANGE_M + 20).all(1)]
                planes = Planes(here)
                still: Array = np.eye(4)
                offset = still
                found, matched, _ = register(cloud, planes, still)
                if len(poses) > 1:
                    steady = inverse(pose) @ _steady(poses[-2:], stamps[[*indices[-2:], index]])
                    if np.linalg.norm(steady[:3, 3]) > STEPS_APART_M:
                        other, more, _ = register(cloud, planes, steady)
                        if more > CLEARLY_MORE * matched:
                            found, matched, offset = other, more, steady
                if matched >= max(1, min(MIN_MATCHED, len(cloud) // 3)) and np.linalg.norm((inverse(offset) @ found)[:3, 3]) <= MAX_MOVED_M:
                    moved = pose @ found
                    if offset is not still:
                        log.counts[f"{lidar}: step of the {start.source} poses given up for that of a steady motion"] += 1
            if moved is None:
                log.counts[f"{lidar}: not registered, step of the {start.source} poses kept"] += 1
            else:
                pose = moved
        pose = from_rotation_translation(_orthonormal(pose[:3, :3]), pose[:3, 3])
        indices.append(index)
        poses.append(pose)
        recent.append((int(stamps[index]), transform_points(pose, cloud)))
    return _trajectory(log, lidar, indices, poses, "refined", np.eye(4))


def _steady(last_two: list[Array], stamps_ns: Array) -> Array:
    """The pose (4,4) at the third of stamps_ns (3,) of what was at last_two at the first two, and moves on steadily."""
    share = (stamps_ns[2] - stamps_ns[1]) / (stamps_ns[1] - stamps_ns[0])
    return last_two[1] @ _part(inverse(last_two[0]) @ last_two[1], share)


def _part(motion: Array, share: float) -> Array:
    """That share of a motion (4,4) which turns and moves evenly."""
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_rotvec(share * Rotation.from_matrix(motion[:3, :3]).as_rotvec()).as_matrix()
    return from_rotation_translation(turn, share * motion[:3, 3])


def _start(log: Log, stamps_ns: Array, report: Report | None) -> tuple[Trajectory, Array]:
    """Whose poses the sweeps at stamps_ns (N,) start from, and world_from_ego (N,4,4)."""
    given = log.poses
    covered = np.zeros(len(stamps_ns), bool) if given is None else given.covers(stamps_ns)
    if given is not None and covered.all():
        return given, pose_at(given, stamps_ns)
    found = odometry(log, report)
    steps = pose_at(found, stamps_ns, max_extrapolation_s=1e9)
    if given is None or not covered.any():
        return found, steps
    log.counts[f"{log.reference_lidar}: beyond the {given.source} poses, step from odometry"] += int((~covered).sum())
    poses = np.empty_like(steps)
    poses[covered] = pose_at(given, stamps_ns[covered])
    first, last = np.flatnonzero(covered)[[0, -1]]  # what is covered lies in one piece
    for rows, end in ((slice(0, first), first), (slice(last + 1, None), last)):
        poses[rows] = poses[end] @ inverse(steps[end]) @ steps[rows]
    return given, poses


def _orthonormal(rotation: Array) -> Array:
    u, _, vt = np.linalg.svd(rotation)
    return u @ vt
