"""The text files of the KITTI family: calibration, time stamps, OXTS packets and tracking labels (Geiger et al., IJRR 2013)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.geometry import from_rotation_translation
from sensors.records import RecordError

Array = NDArray[Any]

EARTH_RADIUS_M = 6378137.0
OXTS_FIELDS = 30
_STAMP = re.compile(r"(\d{4})-(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?")


def read_stamps(text: str) -> list[int | None]:
    """ns since 1970 of each line `YYYY-MM-DD HH:MM:SS.nnnnnnnnn`, None for a blank or unreadable one; all nine digits count.

    The format names no time zone. It is read as UTC, whatever the zone of this process: a constant offset that nothing here depends on."""
    stamps: list[int | None] = []
    for line in text.splitlines():
        match = _STAMP.fullmatch(line.strip())
        stamp = None
        if match:
            try:
                whole = datetime(*(int(part) for part in match.groups()[:6]), tzinfo=UTC)  # type: ignore[misc, arg-type]
                stamp = int(whole.timestamp()) * 10**9 + int((match[7] or "0").ljust(9, "0"))
            except ValueError:
                pass
        stamps.append(stamp if stamp is not None and stamp >= 0 else None)
    return stamps


def read_calibration(text: str, file: str) -> dict[str, Array]:
    """Arrays (n,) f64 by key of the lines `KEY: numbers`; lines whose value is no list of numbers (dates) are left out."""
    values = {}
    for line in text.splitlines():
        key, colon, rest = line.partition(":")
        try:
            numbers = np.array([float(word) for word in rest.split()])
        except ValueError:
            continue
        if colon and len(numbers):
            values[key.strip()] = numbers
    if not values:
        raise RecordError(f"{file}: no line `KEY: numbers`; is it a calibration file?")
    return values


def matrix(values: dict[str, Array], key: str, shape: tuple[int, ...], file: str) -> Array:
    """The value `key` of a calibration file in `shape`; RecordError when absent, of another length or not finite."""
    if key not in values or values[key].size != np.prod(shape) or not np.isfinite(values[key]).all():
        found = "absent" if key not in values else f"{values[key].size} numbers"
        raise RecordError(f"{file}: {key} is {found}, expected {'x'.join(map(str, shape))} finite ones")
    return values[key].reshape(shape)


def rigid(values: dict[str, Array], file: str) -> Array:
    """4x4 of the keys R and T."""
    return from_rotation_translation(matrix(values, "R", (3, 3), file), matrix(values, "T", (3,), file))


@dataclass(frozen=True)
class Packet:
    """One OXTS packet: position (deg, m), attitude (rad; yaw 0 = east, counter-clockwise), forward speed m/s (NaN where not given)."""

    latitude_deg: float
    longitude_deg: float
    altitude_m: float
    roll_rad: float
    pitch_rad: float
    yaw_rad: float
    forward_mps: float


def read_packet(text: str) -> Packet | None:
    """The packet of one OXTS file; None where fields are missing, the position or attitude is not a finite number in its bounds, or the
    position is 0 north, 0 east to the last digit: what a unit writes that has no fix yet."""
    words = text.split()
    if len(words) != OXTS_FIELDS:
        return None
    try:
        latitude, longitude, altitude, roll, pitch, yaw, _, _, forward = (float(word) for word in words[:9])
    except ValueError:
        return None
    place = np.array([latitude, longitude, altitude, roll, pitch, yaw])
    if not bool((np.abs(place) <= (89.9, 360.0, 1e5, 7.0, 7.0, 7.0)).all()) or latitude == longitude == 0:
        return None
    return Packet(latitude, longitude, altitude, roll, pitch, yaw, forward)


def poses_of_packets(packets: Sequence[Packet]) -> Array:
    """world_from_imu (N,4,4): Mercator projection scaled by cos(latitude of the first packet), attitude Rz(yaw) Ry(pitch) Rx(roll), as in
    KITTI's development kit. The world is east, north, up with its origin at the first packet: positions stay small numbers."""
    lat = np.radians([p.latitude_deg for p in packets])
    lon = np.radians([p.longitude_deg for p in packets])
    scale = np.cos(lat[0]) * EARTH_RADIUS_M
    place = np.stack((scale * lon, scale * np.log(np.tan(np.pi / 4 + lat / 2)), np.array([p.altitude_m for p in packets])), 1)
    roll, pitch, yaw = np.array([(p.roll_rad, p.pitch_rad, p.yaw_rad) for p in packets]).T
    (sr, cr), (sp, cp), (sy, cy) = ((np.sin(a), np.cos(a)) for a in (roll, pitch, yaw))
    poses = np.tile(np.eye(4), (len(packets), 1, 1))
    poses[:, :3, :3] = np.moveaxis(
        np.array([
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]),
        2,
        0,
    )  # fmt: skip
    poses[:, :3, 3] = place - place[0]
    return poses


@dataclass(frozen=True)
class TrackedBox:
    """One line of a tracking label file: frame number, track, category; size (l, w, h) m; centre of the bottom face (x, y, z) m and turn
    about the y axis (rad) in the rectified frame of camera 0."""

    frame: int
    track: str
    category: str
    size: tuple[float, float, float]
    bottom: tuple[float, float, float]
    turn_rad: float


def read_tracking_labels(text: str) -> tuple[list[TrackedBox], int, int]:
    """The boxes of a KITTI tracking label file, the number of DontCare regions (they have no box), and of unreadable lines."""
    boxes, regions, unreadable = [], 0, 0
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if len(words) >= 3 and words[2] == "DontCare":
            regions += 1
            continue
        try:
            height, width, length, x, y, z, turn = (float(word) for word in words[10:17])
            box = TrackedBox(int(words[0]), words[1], words[2], (length, width, height), (x, y, z), turn)
        except (ValueError, IndexError):
            unreadable += 1
            continue
        if np.isfinite((*box.size, *box.bottom, turn)).all() and min(box.size) > 0 and box.frame >= 0:
            boxes.append(box)
        else:
            unreadable += 1
    return boxes, regions, unreadable
