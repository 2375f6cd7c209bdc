"""Motion compensation: a sweep takes a tenth of a second, in which a car moves metres.

The store keeps points as recorded; `deskew` brings them to one instant and says from where each ray left, which is no longer one point.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.geometry import inverse, pose_at
from sensors.records import RecordError, Trajectory

Array = NDArray[Any]

# where a sweep has more distinct times than this, poses are computed on a raster of KNOT_NS: at 40 m/s a point moves 0.4 mm in half of it
MAX_INSTANTS = 4096
KNOT_NS = 20_000


def deskew(
    points: Array, time_ns: Array | None, ego_from_lidar: Array, trajectory: Trajectory, stamp_ns: int, at_ns: int | None = None
) -> tuple[Array, Array]:
    """The points of a sweep as the LiDAR would have measured them all at at_ns, and where each ray started.

    points (N,3) f32 m in the LiDAR's frame, each at its own instant stamp_ns + time_ns (N,); ego_from_lidar (4,4); at_ns: the instant to
    bring them to, stamp_ns if None. Gives points (N,3) f32 and origins (N,3) f32, both in the LiDAR's frame at at_ns. RecordError where
    time_ns is None, its length differs, or the trajectory does not cover the instants."""
    if time_ns is None:
        raise RecordError(
            f"sweep at {stamp_ns}: no time per point, so it cannot be deskewed; use it as recorded, or times_from_azimuth for a spinning scanner"
        )
    points = np.asarray(points)
    time_ns = np.asarray(time_ns, np.int64)
    if points.ndim != 2 or points.shape[1] != 3 or time_ns.shape != (len(points),):
        raise RecordError(f"sweep at {stamp_ns}: {points.shape} points with {time_ns.shape} times, expected (N, 3) and (N,)")
    if not len(points):
        return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)
    instants, row = np.unique(time_ns, return_inverse=True)
    if len(instants) > MAX_INSTANTS:
        instants, row = np.unique(np.round(time_ns / KNOT_NS).astype(np.int64) * KNOT_NS, return_inverse=True)
    world_from_then = pose_at(trajectory, stamp_ns + instants) @ ego_from_lidar
    world_from_at = pose_at(trajectory, np.array([stamp_ns if at_ns is None else at_ns]))[0] @ ego_from_lidar
    at_from_then = (inverse(world_from_at) @ world_from_then)[row.reshape(-1)]
    moved = np.einsum("nij,nj->ni", at_from_then[:, :3, :3], points.astype(np.float64)) + at_from_then[:, :3, 3]
    return moved.astype(np.float32), at_from_then[:, :3, 3].astype(np.float32)


def deskew_steady(points: Array, time_ns: Array, last_from_now: Array, step_ns: int) -> Array:
    """points (N,3) f64 brought to their sweep's stamp by a constant motion: last_from_now (4,4) is the LiDAR's motion over step_ns
    (negative when time runs backwards), time_ns (N,) the points' offsets from the stamp. For odometry, which has no trajectory yet."""
    from scipy.spatial.transform import Rotation

    instants, row = np.unique(np.round(np.asarray(time_ns, np.int64) / KNOT_NS).astype(np.int64) * KNOT_NS, return_inverse=True)
    share = instants / step_ns
    turn = Rotation.from_rotvec(share[:, None] * Rotation.from_matrix(last_from_now[:3, :3]).as_rotvec()).as_matrix()[row.reshape(-1)]
    moved: Array = np.einsum("nij,nj->ni", turn, points) + (share[:, None] * last_from_now[:3, 3])[row.reshape(-1)]
    return moved


def times_from_azimuth(points: Array, period_ns: int, *, clockwise: bool, azimuth_at_stamp_rad: float = 0.0) -> Array:
    """Offsets (N,) i32 ns from the stamp that a steadily spinning scanner would have given to points (N,3): **a guess**.

    It assumes one even turn of period_ns around the stamp, which is when the beam passes azimuth_at_stamp_rad (counter-clockwise from x);
    clockwise is the direction seen from above. Near the seam, half a turn away from there, a point may come out a whole turn early or late.
    Only for a scanner that is known to spin so, and what rests on it has to say so. KITTI's HDL-64E does, clockwise and stamped when it
    faces forward: deskewed by this guess, sweeps of a drive lie closer on each other than as recorded, by the opposite turn less close.
    RecordError for a period that is no scanner's."""
    if not 0 < period_ns <= 10**9:
        raise RecordError(f"times from azimuth: a period of {period_ns} ns is not a scanner's; expected up to a second")
    points = np.asarray(points, np.float64)
    turned = np.arctan2(points[:, 1], points[:, 0]) - azimuth_at_stamp_rad
    turned = (-turned if clockwise else turned) / (2 * np.pi)
    return np.rint((turned - np.round(turned)) * period_ns).astype(np.int32)
