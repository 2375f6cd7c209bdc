"""A street made of a few hundred boxes on rough ground, and a scanner that drives through it; everything is exact and noise is added by seed."""

import functools
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sensors.adapters.base import open_source
from sensors.geometry import from_rotation_translation, inverse, rotation_z
from sensors.records import Lidar, Log, RecordError, Sweep, Trajectory

EGO_FROM_LIDAR = from_rotation_translation(rotation_z(0.02)[:3, :3], (0.8, -0.1, 1.7))
START_NS, PERIOD_NS = 10**12, 100_000_000
RINGS, COLUMNS = 24, 300


def street(seed=0, count=160):
    """Boxes (count,6) low and high corners, beside a road along x, of many sizes."""
    rng = np.random.default_rng(seed)
    x, side = rng.uniform(-40, 90, count), rng.choice((-1, 1), count)
    y = side * rng.uniform(4.5, 22, count)
    size = np.stack((rng.uniform(0.3, 6, count), rng.uniform(0.3, 4, count), rng.uniform(0.5, 7, count)), 1)
    low = np.stack((x, np.where(side > 0, y, y - size[:, 1]), np.zeros(count)), 1)
    return np.concatenate((low, low + size), 1)


def cast(boxes, origins, directions, reach=60.0):
    """Range (N,) of the first surface along each ray (N,3) from origins (N,3): slabs of the boxes, and the ground z = 0; inf where none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        best = np.where(directions[:, 2] < 0, -origins[:, 2] / directions[:, 2], np.inf)
        for box in boxes:
            a, b = (box[:3] - origins) / directions, (box[3:] - origins) / directions
            enter, leave = np.minimum(a, b).max(1), np.maximum(a, b).min(1)
            best = np.where((enter > 0.1) & (enter <= leave), np.minimum(best, enter), best)
    return np.where(best < reach, best, np.inf)


def ego_pose(seconds, speed=9.0, yaw_rate=0.06, pitch=0.004):
    """world_from_ego (4,4) of a steady left turn at `seconds`."""
    yaw = yaw_rate * seconds
    radius = speed / yaw_rate
    c, s = np.cos(pitch), np.sin(pitch)
    tilt = from_rotation_translation(np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]), (radius * np.sin(yaw), radius * (1 - np.cos(yaw)), 0))
    return tilt @ rotation_z(yaw)


@functools.cache
def sweep_of(index, rolling, noise_m, seed, stamp_ns):
    """Points (N,3) f32 and times (N,) i32 of one turn."""
    azimuth = np.pi - 2 * np.pi * (np.arange(COLUMNS) + 0.5) / COLUMNS
    elevation = np.deg2rad(np.linspace(-22, 6, RINGS))
    a, e = (m.ravel() for m in np.meshgrid(azimuth, elevation, indexing="ij"))
    directions = np.stack((np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)), 1)
    offsets = np.repeat((PERIOD_NS * ((np.arange(COLUMNS) + 0.5) / COLUMNS - 0.5)).astype(np.int32), RINGS)

    rng = np.random.default_rng((seed, index))
    times = offsets if rolling else np.zeros_like(offsets)
    instants, row = np.unique(times, return_inverse=True)
    poses_then = np.stack([ego_pose((stamp_ns + int(t) - START_NS) / 1e9) @ EGO_FROM_LIDAR for t in instants])[row]
    rays = np.einsum("nij,nj->ni", poses_then[:, :3, :3], directions)
    ranges = cast(street(seed), poses_then[:, :3, 3], rays)
    kept = np.isfinite(ranges)
    # without noise, rings of flat ground would move along with the car
    measured = ranges[kept] + rng.normal(0, noise_m, int(kept.sum()))
    return (directions[kept] * measured[:, None]).astype(np.float32), times[kept]


def make_log(count=12, *, rolling=False, poses=None, noise_m=0.02, seed=0, broken=()):
    """A log of `count` sweeps; rolling: the car moves within a sweep, points carry their times. poses: a Trajectory or None."""
    stamps = START_NS + PERIOD_NS * np.arange(count, dtype=np.int64)

    def read_sweep(lidar, index):
        if index in broken:
            raise RecordError(f"sweep {index}: cut off")
        points, times = sweep_of(int(index), rolling, noise_m, seed, int(stamps[index]))
        return Sweep(lidar, int(stamps[index]), points, np.full(len(points), 0.5, np.float32), time_ns=times if rolling else None)

    return Log(
        "made/street", "made", "none", "rear axle", {"top": Lidar("top", EGO_FROM_LIDAR, 10.0, beams=RINGS)}, {}, poses, {"top": stamps}, {},
        read_sweep, lambda camera, index: None, counts=Counter(),
    )  # fmt: skip


def true_poses(log):
    stamps = log.sweep_stamps_ns["top"]
    return np.stack([ego_pose((s - stamps[0]) / 1e9) for s in stamps])


def trajectory_of(log, disturb=lambda seconds: np.eye(4), source="gnss"):
    stamps = log.sweep_stamps_ns["top"]
    poses = np.stack([ego_pose(t) @ disturb(t) for t in (stamps - stamps[0]) / 1e9])
    return Trajectory(stamps, poses, source)


def relative_errors(found, true):
    """Metres (N-1,) by which each step differs from the true one."""
    a, b = inverse(found[:-1]) @ found[1:], inverse(true[:-1]) @ true[1:]
    return np.linalg.norm(a[:, :3, 3] - b[:, :3, 3], axis=1)


@pytest.fixture(scope="session")
def drive_0001():
    root = os.environ.get("WM_TEST_LOGS")
    folder = Path(root or ".") / "2011_09_26" / "2011_09_26_drive_0001_sync"
    if not root or not folder.is_dir():
        pytest.skip("KITTI drive 0001 is not there (WM_TEST_LOGS)")
    return next(iter(open_source(folder)))


@pytest.fixture(scope="session")
def drive_0005():
    root = os.environ.get("WM_TEST_LOGS")
    folder = Path(root or ".") / "2011_09_26" / "2011_09_26_drive_0005_sync"
    if not root or not folder.is_dir():
        pytest.skip("KITTI drive 0005 is not there (WM_TEST_LOGS)")
    return next(iter(open_source(folder)))
