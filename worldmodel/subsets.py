"""Subsets of rays that a table is split by.

`all`; `moving`, the true return lies in a box, grown by 0.2 m, whose speed in the world over 1 s exceeds 1 m/s; `static`, in no such box (where
points have times of their own, the box is where it was then);
`vacated`, the ray crosses the place of such a box at t = 0 on its way to the return and does not end on a mover (these three where boxes are
complete: frames that have boxes at their stamp or lie between such keyframes, within the labelled field of view); `unseen`, no reading of the
past around the ray lies within 1 m of the truth; `range_...`, by true range.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.alignment.deskew import deskew
from sensors.errors import WmError, one_line
from sensors.evidence import view_from
from sensors.geometry import in_box_frame, inverse, points_in, pose_at, transform_points, yaw_of
from sensors.rays import History, Rays
from sensors.records import Box, Clip, Frame, Labels, Log, RecordError

Array = NDArray[Any]

BANDS_M = ((0, 10), (10, 20), (20, 40), (40, 56))
SUBSETS = ("all", "static", "moving", "vacated", "unseen", *(f"range_{low}_{high}" for low, high in BANDS_M))
GROWN_M, MOVING_M_S, SPEED_WINDOW_S = 0.2, 1.0, 1.0
KEYFRAMES_S = 0.6
UNSEEN_M = 1.0


class Movers:
    """The boxes of a log by stamp, and which of them move. Between keyframes at most KEYFRAMES_S apart, boxes that both have are where their
    track is then, in a straight line, as nuScenes' development kit has it."""

    def __init__(self, log: Log) -> None:
        try:
            labels: Labels | None = log.open_labels()
        except WmError as error:
            log.counts[f"labels: unreadable, no moving and static rays ({one_line(error, 80)})"] += 1
            labels = None
        self.fov_rad = float(labels.complete_fov_rad) if labels else 0.0
        self._boxes: dict[int, list[Box]] = {}
        self._tracks: dict[str, tuple[Array, Array]] = {}
        self._log, self._stamps = log, np.zeros(0, np.int64)
        if labels is None or log.poses is None:
            return
        stamps = np.unique(np.array([box.stamp_ns for box in labels.boxes], np.int64))
        known = stamps[(stamps >= log.poses.stamps_ns[0]) & (stamps <= log.poses.stamps_ns[-1])]
        pose = dict(zip(known.tolist(), pose_at(log.poses, known), strict=True)) if len(known) else {}
        track: dict[str, list[tuple[int, Array]]] = {}
        for box in labels.boxes:
            self._boxes.setdefault(box.stamp_ns, []).append(box)
            if box.stamp_ns in pose:
                track.setdefault(box.track, []).append((box.stamp_ns, (pose[box.stamp_ns] @ np.append(box.centre, 1))[:2]))
        self._stamps = np.array(sorted(self._boxes), np.int64)
        for name, places in track.items():
            places.sort(key=lambda place: place[0])
            self._tracks[name] = np.array([s for s, _ in places], np.int64), np.array([p for _, p in places])

    def boxes_at(self, stamp_ns: int) -> list[Box]:
        """The boxes at an instant; none where nobody labelled it."""
        if stamp_ns in self._boxes or not len(self._stamps):
            return self._boxes.get(stamp_ns, [])
        right = int(np.searchsorted(self._stamps, stamp_ns))
        ends = self._stamps[max(right - 1, 0) : right + 1].tolist()
        if len(ends) < 2 or ends[1] - ends[0] > KEYFRAMES_S * 1e9:
            return []
        assert self._log.poses is not None
        before_world, now_world, after_world = (pose_at(self._log.poses, np.array([at]), 0.1)[0] for at in (ends[0], stamp_ns, ends[1]))
        share, later = (stamp_ns - ends[0]) / (ends[1] - ends[0]), {box.track: box for box in self._boxes[ends[1]]}
        found = []
        for box in self._boxes[ends[0]]:
            if box.track in later:
                first, last = (_moved(one, inverse(now_world) @ pose) for one, pose in ((box, before_world), (later[box.track], after_world)))
                turn = (last.yaw_rad - first.yaw_rad + np.pi) % (2 * np.pi) - np.pi
                centre = first.centre + share * (last.centre - first.centre)
                found.append(dataclasses.replace(first, stamp_ns=stamp_ns, centre=centre, yaw_rad=first.yaw_rad + share * turn, points_inside=None))
        return self._boxes.setdefault(stamp_ns, found)

    def labelled(self, stamp_ns: int) -> bool:
        return bool(self.boxes_at(stamp_ns))

    def speed(self, box: Box) -> float:
        """In the world, m/s: of the track over the second around the box, or, where the track is shorter than half of that, the box's own."""
        moved, seconds = self._way(box)
        if seconds >= 0.45 * SPEED_WINDOW_S:
            return float(np.linalg.norm(moved) / seconds)
        return float(np.hypot(*box.velocity)) if box.velocity is not None and np.isfinite(box.velocity).all() else 0.0

    def moving(self, stamp_ns: int) -> list[Box]:
        return [box for box in self.boxes_at(stamp_ns) if self.speed(box) > MOVING_M_S]

    def velocity(self, box: Box) -> Array:
        """(2,) m/s in the world, its axes turned into the ego frame: the box's own, or that of its track, or 0."""
        if box.velocity is not None and np.isfinite(box.velocity).all():
            return box.velocity
        moved, seconds = self._way(box)
        if not seconds or self._log.poses is None:
            return np.zeros(2)
        return np.asarray(pose_at(self._log.poses, np.array([box.stamp_ns]), 0.1)[0, :2, :2].T @ moved / seconds)

    def _way(self, box: Box) -> tuple[Array, float]:
        """How far (2,) in the world the track comes over the second around the box, and in how many seconds; 0 where it is nowhere else then."""
        stamps, places = self._tracks.get(box.track, (np.zeros(0, np.int64), np.zeros((0, 2))))
        near = np.flatnonzero(np.abs(stamps - box.stamp_ns) <= SPEED_WINDOW_S * 0.5e9)
        if not len(near):
            return np.zeros(2), 0.0
        return places[near[-1]] - places[near[0]], float(stamps[near[-1]] - stamps[near[0]]) / 1e9


def _moved(box: Box, target_from_box: Array) -> Box:
    """The box in another frame that is turned about z."""
    turn = yaw_of(target_from_box)
    velocity = None if box.velocity is None else target_from_box[:2, :2] @ box.velocity
    return dataclasses.replace(box, centre=(target_from_box @ np.append(box.centre, 1))[:3], yaw_rad=box.yaw_rad + turn, velocity=velocity)


def crosses_box(box: Box, origin: Array, directions: Array, ranges: Array) -> Array:
    """(R,) bool: rays from origin (3,) along unit directions (R,3) that enter the box before their ranges (R,)."""
    o, d = in_box_frame(box, (origin - box.centre)[None]), in_box_frame(box, directions)
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (-box.size / 2 - o) / d, (box.size / 2 - o) / d
    beside = (d == 0) & (np.abs(o) > box.size / 2)
    enter = np.where(d == 0, -np.inf, np.minimum(a, b)).max(1)
    leave = np.where(d == 0, np.inf, np.maximum(a, b)).min(1)
    return ~beside.any(1) & (enter <= leave) & (leave > 0) & (enter < ranges)


def subset_masks(clip: Clip, frame: Frame, history: History, rays: Rays, movers: Movers) -> Array:
    """(len(SUBSETS), R) bool."""
    count = len(rays.ranges)
    masks = dict.fromkeys(SUBSETS, np.zeros(count, bool))
    masks["all"] = np.ones(count, bool)
    if movers.labelled(frame.stamp_ns):
        ends, late_s = _ends(clip, frame, rays)
        known = np.abs(np.arctan2(ends[:, 1], ends[:, 0])) <= movers.fov_rad
        moving = np.zeros(count, bool)
        for box in movers.moving(frame.stamp_ns):
            since = np.append(movers.velocity(box), 0.0) * late_s[:, None]
            moving |= points_in(box, ends - since, GROWN_M)
        masks["moving"], masks["static"] = known & moving, known & ~moving
        if movers.labelled(clip.stamp_ns):
            pose = rays.present_from_sensor
            directions, vacated = rays.directions.astype(np.float64) @ pose[:3, :3].T, np.zeros(count, bool)
            for box in movers.moving(clip.stamp_ns):
                vacated |= crosses_box(box, pose[:3, 3], directions, rays.ranges)
            masks["vacated"] = known & vacated & ~moving
    masks["unseen"] = ~seen(history, rays)
    for (low, high), name in zip(BANDS_M, SUBSETS[-len(BANDS_M) :], strict=True):
        masks[name] = (rays.ranges >= low) & ((rays.ranges < high) | (high == BANDS_M[-1][1]))
    return np.stack([masks[name] for name in SUBSETS])


def _ends(clip: Clip, frame: Frame, rays: Rays) -> tuple[Array, Array]:
    """Where the returns lie in the ego frame at the sweep's stamp (R,3), and how long after it (R,) each was measured: 0 for all of a sweep
    without times, or brought to one instant before, or that the poses do not reach."""
    lidar, local = clip.log.lidars[clip.lidar], rays.directions.astype(np.float64) * rays.ranges[:, None]
    sweep = clip.log.read_sweep(clip.lidar, frame.sweep_index)
    if sweep.time_ns is None or sweep.deskewed or clip.log.poses is None:
        return transform_points(lidar.ego_from_lidar, local), np.zeros(len(local))
    late_ns = sweep.time_ns[rays.index]
    try:
        together, _ = deskew(local, late_ns, lidar.ego_from_lidar, clip.log.poses, frame.stamp_ns)
    except RecordError:  # a sweep at the very end of the poses
        return transform_points(lidar.ego_from_lidar, local), np.zeros(len(local))
    return transform_points(lidar.ego_from_lidar, together), late_ns / 1e9


def seen(history: History, rays: Rays) -> Array:
    """(R,) bool: some past sweep's nearest reading, or one in a quadrant around the ray, lies within UNSEEN_M of the true range."""
    sensor_from_present = inverse(rays.present_from_sensor)
    out = np.zeros(len(rays.ranges), bool)
    for sweep in range(len(history.points)):
        view = view_from(history, sweep, sensor_from_present, rays.horizon_s)
        readings = np.concatenate((view.quadrants(rays.directions)[0], view.nearest(rays.directions)[0][:, None]), 1)
        out |= (np.abs(readings - rays.ranges[:, None]) <= UNSEEN_M).any(1)
    return out
