"""Rigid transforms, pose interpolation and camera models. numpy only; transforms are float64 (4,4) named ``target_from_source``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.records import Box, Camera, RecordError, Trajectory

Array = NDArray[Any]


def inverse(target_from_source: Array) -> Array:
    """source_from_target of rigid transforms (..., 4, 4)."""
    rotation = np.swapaxes(target_from_source[..., :3, :3], -1, -2)
    out = np.zeros_like(target_from_source)
    out[..., :3, :3] = rotation
    out[..., :3, 3] = -(rotation @ target_from_source[..., :3, 3, None])[..., 0]
    out[..., 3, 3] = 1
    return out


def transform_points(target_from_source: Array, points: Array) -> Array:
    """points (N,3) of the source frame in the target frame; computed in float64, returned in the points' dtype."""
    return (points.astype(np.float64) @ target_from_source[:3, :3].T + target_from_source[:3, 3]).astype(points.dtype)


def yaw_of(target_from_source: Array) -> float:
    """The angle about z in radians by which a transform (4,4) turns the x axis; undoes `rotation_z`."""
    return float(np.arctan2(target_from_source[1, 0], target_from_source[0, 0]))


def rotation_z(yaw_rad: float) -> Array:
    """4x4 rotation about z, counter-clockwise seen from above."""
    c, s = np.cos(yaw_rad), np.sin(yaw_rad)
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


def from_rotation_translation(rotation: Array, translation: Array) -> Array:
    """4x4 of a (3,3) rotation and a (3,) translation."""
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = rotation, np.asarray(translation, np.float64).reshape(3)
    return out


def rotation_from_quaternion(wxyz: Array) -> Array:
    """Rotation matrices (...,3,3) of quaternions (...,4) in wxyz order; they are normalised, and a zero one is refused."""
    q = np.asarray(wxyz, np.float64)
    norm = np.linalg.norm(q, axis=-1, keepdims=True)
    if not np.isfinite(q).all() or (norm < 1e-6).any():
        raise RecordError("quaternion: zero or not finite; drop this pose or calibration in the adapter")
    w, x, y, z = np.moveaxis(q / norm, -1, 0)
    rows = (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y))  # fmt: skip
    return np.stack(rows, -1).reshape(*w.shape, 3, 3)


def quaternion_from_rotation(rotation: Array) -> Array:
    """wxyz quaternions (...,4), w >= 0, of rotation matrices (...,3,3)."""
    from scipy.spatial.transform import Rotation

    flat = Rotation.from_matrix(np.reshape(rotation, (-1, 3, 3))).as_quat()[:, [3, 0, 1, 2]]
    flat = np.where(flat[:, :1] < 0, -flat, flat)
    return flat.reshape(*rotation.shape[:-2], 4)


def _log_so3(rotation: Array) -> Array:
    from scipy.spatial.transform import Rotation

    return Rotation.from_matrix(rotation).as_rotvec()


def _exp_so3(vector: Array) -> Array:
    from scipy.spatial.transform import Rotation

    return Rotation.from_rotvec(vector).as_matrix()


def pose_at(trajectory: Trajectory, stamps_ns: Array, max_extrapolation_s: float = 0.1) -> Array:
    """world_from_ego (N,4,4) at stamps_ns (N,): rotation along the geodesic, translation linear between the two poses around each stamp.

    Beyond an end the last motion is continued for at most max_extrapolation_s; farther away raises RecordError (a log of one pose is
    extended as standing still)."""
    stamps = np.atleast_1d(np.asarray(stamps_ns, np.int64))
    known, poses = trajectory.stamps_ns, trajectory.world_from_ego
    outside = ~trajectory.covers(stamps, max_extrapolation_s)
    if outside.any():
        raise RecordError(f"pose at {int(stamps[outside][0])} ns: the trajectory covers {int(known[0])}..{int(known[-1])} ns; cut the clip there")
    if len(known) == 1:
        return np.repeat(poses, len(stamps), axis=0)
    left = np.clip(np.searchsorted(known, stamps, side="right") - 1, 0, len(known) - 2)
    share = (stamps - known[left]) / (known[left + 1] - known[left])
    out = np.tile(np.eye(4), (len(stamps), 1, 1))
    start, end = poses[left], poses[left + 1]
    step = _log_so3(np.swapaxes(start[:, :3, :3], 1, 2) @ end[:, :3, :3])
    out[:, :3, :3] = start[:, :3, :3] @ _exp_so3(step * share[:, None])
    out[:, :3, 3] = start[:, :3, 3] + share[:, None] * (end[:, :3, 3] - start[:, :3, 3])
    return out


def in_box_frame(box: Box, vectors: Array) -> Array:
    """(N,3) f64: vectors (N,3) of the box's frame along its length, width and height."""
    c, s = np.cos(box.yaw_rad), np.sin(box.yaw_rad)
    v = np.asarray(vectors, np.float64)
    return np.stack((v[:, 0] * c + v[:, 1] * s, v[:, 1] * c - v[:, 0] * s, v[:, 2]), 1)


def points_in(box: Box, points: Array, grown_m: float = 0.0) -> Array:
    """(N,) bool: points (N,3) of the box's frame that lie in it, grown on all sides."""
    inside: Array = (np.abs(in_box_frame(box, points - box.centre)) <= box.size / 2 + grown_m).all(1)
    return inside


def _folds_at(coefficients: Iterable[float]) -> float:
    """The square of the radius from which on r (1 + c0 r^2 + c1 r^4 + ...) falls: the least positive root of its derivative, inf without one."""
    derivative = [(2 * power + 1) * c for power, c in enumerate((1.0, *coefficients))]
    roots = np.roots(derivative[::-1])
    real = roots.real[(np.abs(roots.imag) < 1e-9) & (roots.real > 0)]
    return float(real.min()) if len(real) else np.inf


def project(camera: Camera, points: Array, min_depth: float = 0.1) -> tuple[Array, Array, Array]:
    """Project points (N,3) of the camera frame: pixels (N,2), depth (N,) = z, and a mask of those in front and inside the image. Points so
    far off the axis that the distortion's polynomial folds back, and puts them into the image once more, are outside.

    Distortion parameters, by model: ``brown_conrady`` k1 k2 p1 p2 k3 (OpenCV's order; fewer are padded with 0);
    ``kannala_brandt`` k1 k2 k3 k4 on the angle (OpenCV's fisheye); ``mei`` xi k1 k2 p1 p2 (Mei & Rives 2007, as in KITTI-360)."""
    p = np.asarray(points, np.float64)
    depth = p[:, 2]
    radius = np.linalg.norm(p, axis=1)
    d = np.zeros(5)
    d[: min(5, len(camera.distortion))] = camera.distortion[:5]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if camera.model == "mei":
            # the unified model sees beyond 90 degrees: a point counts while its image on the shifted sphere is in front
            front = depth / radius + d[0]
            ok = (radius > min_depth) & (front > 0.05)
            x, y = p[:, 0] / radius / front, p[:, 1] / radius / front
            k1, k2, p1, p2, k3 = d[1], d[2], d[3], d[4], 0.0
        else:
            ok = depth > min_depth
            x, y = p[:, 0] / depth, p[:, 1] / depth
            k1, k2, p1, p2, k3 = d
        if camera.model == "kannala_brandt":
            # on the angle, so beyond 90 degrees too; straight behind there is no direction
            across = np.hypot(p[:, 0], p[:, 1])
            angle = np.arctan2(across, depth)
            a2 = angle * angle
            ok = (radius > min_depth) & (a2 < _folds_at(d[:4])) & ((depth > 0) | (across > 1e-9))
            scaled = angle * (1 + a2 * (d[0] + a2 * (d[1] + a2 * (d[2] + a2 * d[3]))))
            x, y = p[:, 0] / np.maximum(across, 1e-12) * scaled, p[:, 1] / np.maximum(across, 1e-12) * scaled
        elif camera.model in ("brown_conrady", "mei"):
            r2 = x * x + y * y
            ok &= r2 < _folds_at((k1, k2, k3))
            radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
            x, y = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x), y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
        k = camera.k_px
        u = k[0, 0] * x + k[0, 1] * y + k[0, 2]
        v = k[1, 1] * y + k[1, 2]
        ok = ok & (u >= -0.5) & (v >= -0.5) & (u < camera.width - 0.5) & (v < camera.height - 0.5)
    return np.stack((u, v), 1), depth, ok
