"""Clips: what a model is shown and asked, cut from a log by time and never by index.

A frame is the reference LiDAR's sweep nearest to a nominal instant, within about half a sweep's period; a clip is `past` frames that end at
t = 0 and `future` frames after it, at a nominal rate. Where an instant has no sweep, no pose, or lies outside the range asked for,
there is no clip: nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.errors import UsageError
from sensors.geometry import pose_at
from sensors.records import Clip, Frame, Log, RecordError

Array = NDArray[Any]

# of a sweep's period, that a frame may be off: at 12.5 Hz instants 0.2 s apart fall between two sweeps
TOLERANCE = 0.55


def nearest_index(stamps_ns: Array, wanted_ns: Array) -> Array:
    """(N,) i64: index of the stamp (ascending (M,), M >= 1) nearest to each wanted (N,) instant; the earlier one of two equally near."""
    right = np.clip(np.searchsorted(stamps_ns, wanted_ns), 1, max(len(stamps_ns) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(stamps_ns) - 1)
    return np.where(np.abs(wanted_ns - stamps_ns[left]) <= np.abs(stamps_ns[right] - wanted_ns), left, right)


def frames_at(log: Log, stamps_index: Array, lidar: str) -> list[Frame]:
    """One frame per index (N,) into the LiDAR's sweeps: other sensors' nearest items within half their period, with their skew."""
    stamps = log.sweep_stamps_ns[lidar][stamps_index]
    if log.poses is None:
        raise RecordError(f"log {log.id}: no poses; ingest it with --poses odometry")
    poses = pose_at(log.poses, stamps)
    other_sweeps: list[dict[str, tuple[int, int]]] = [{} for _ in stamps]
    images: list[dict[str, tuple[int, int]]] = [{} for _ in stamps]
    sensors = [(other_sweeps, name, log.sweep_stamps_ns[name], log.lidars[name].rate_hz) for name in log.lidars if name != lidar]
    sensors += [(images, name, log.image_stamps_ns[name], log.cameras[name].rate_hz) for name in log.cameras]
    for into, name, known, rate_hz in sensors:
        if not len(known):
            continue
        nearest = nearest_index(known, stamps)
        for row, (index, skew_ns) in enumerate(zip(nearest, known[nearest] - stamps, strict=True)):
            if abs(int(skew_ns)) <= 0.5e9 / rate_hz:
                into[row][name] = (int(index), int(skew_ns))
    return [Frame(int(s), int(i), p, o, m) for s, i, p, o, m in zip(stamps, stamps_index, poses, other_sweeps, images, strict=True)]


def clips_of(
    log: Log,
    *,
    past: int = 5,
    future: int = 5,
    rate_hz: float = 5.0,
    every_s: float = 0.5,
    at_ns: Array | None = None,
    from_ns: int | None = None,
    to_ns: int | None = None,
) -> list[Clip]:
    """The clips of a log in order: t = 0 every `every_s`, the earliest with a full past first, or at the sweeps nearest to the ascending
    instants at_ns (K,) i64; no past or future frame leaves from_ns <= stamp < to_ns, and none lies in a gap of the sweeps or of the poses. An
    empty list where the log is too short, has no LiDAR or no poses."""
    if not rate_hz > 0 or not every_s > 0 or past < 1 or future < 0:
        raise UsageError(f"clips of {past} past and {future} future frames at {rate_hz} Hz every {every_s} s: give numbers above 0")
    if not log.lidars or log.poses is None:
        return []
    lidar = log.reference_lidar
    stamps = log.sweep_stamps_ns[lidar]
    low = stamps[0] if from_ns is None and len(stamps) else (from_ns or 0)
    high = 2**62 if to_ns is None else to_ns
    allowed = np.flatnonzero((stamps >= low) & (stamps < high))
    slack_ns = int(0.1e9)
    allowed = allowed[(stamps[allowed] >= log.poses.stamps_ns[0] - slack_ns) & (stamps[allowed] <= log.poses.stamps_ns[-1] + slack_ns)]
    if not len(allowed):
        return []
    period_ns = 1e9 / rate_hz
    tolerance_ns = TOLERANCE * 1e9 / log.lidars[lidar].rate_hz
    steps = np.round(np.arange(-past + 1, future + 1) * period_ns).astype(np.int64)
    clips: list[Clip] = []
    known = stamps[allowed]
    presents = at_ns if at_ns is not None else _every(known, int(known[0]) - int(steps[0]), int(every_s * 1e9))
    last_ns = -1
    for present_ns in presents:
        present_at = known[nearest_index(known, np.array([present_ns]))[0]]
        if present_at == last_ns:
            continue  # instants closer than sweeps
        last_ns = present_at
        wanted = present_at + steps
        index = allowed[nearest_index(known, wanted)]
        near = np.abs(stamps[index] - wanted) <= tolerance_ns
        if near.all() and len(set(index.tolist())) == len(index) and not _pose_gap(log, stamps[index]):
            frames = frames_at(log, index, lidar)
            clips.append(Clip(log, lidar, tuple(frames[:past]), tuple(frames[past:])))
    return clips


def _every(known_ns: Array, first_ns: int, every_ns: int) -> Iterator[int]:
    """Instants from first_ns to the last of known_ns, every_ns apart, those in long gaps left out."""
    at_ns = first_ns
    while at_ns <= known_ns[-1]:
        following = int(np.searchsorted(known_ns, at_ns))
        before_ns = at_ns - int(known_ns[following - 1]) if following else every_ns
        following_ns = int(known_ns[following]) - at_ns
        if following_ns > every_ns and before_ns > every_ns:
            at_ns += following_ns // every_ns * every_ns  # a clock that jumps leaves a gap of years: over it at once, on the same grid
            continue
        yield at_ns
        at_ns += every_ns


def clips_at(log: Log, stamps_ns: Array, *, past: int = 5, rate_hz: float = 5.0, from_ns: int | None = None) -> list[Clip]:
    """Clips without future, t = 0 at the reference LiDAR's sweep of each stamp (S,) i64. Their past has up to `past` frames: as many as there
    are from t = 0 backwards without a gap of sweeps or poses, none before from_ns. A stamp without sweep or pose gives no clip."""
    if not log.lidars:
        return []
    lidar = log.reference_lidar
    stamps = log.sweep_stamps_ns[lidar]
    if log.poses is None or not len(stamps):
        return []
    known, slack_ns = log.poses.stamps_ns, int(0.1e9)
    usable = (stamps >= max(from_ns or 0, known[0] - slack_ns)) & (stamps <= known[-1] + slack_ns)
    tolerance_ns = TOLERANCE * 1e9 / log.lidars[lidar].rate_hz
    back = np.round(np.arange(past) * 1e9 / rate_hz).astype(np.int64)
    clips = []
    for stamp in stamps_ns:
        index = nearest_index(stamps, stamp - back)
        good = usable[index] & (np.abs(stamps[index] - (stamp - back)) <= tolerance_ns)
        good[0] &= stamps[index[0]] == stamp
        good[1:] &= np.diff(index) < 0
        count = past if good.all() else int(np.argmin(good))
        while count and _pose_gap(log, stamps[index[:count]]):
            count -= 1
        if count:
            clips.append(Clip(log, lidar, tuple(frames_at(log, index[:count][::-1], lidar)), ()))
    return clips


def _pose_gap(log: Log, stamps_ns: Array, longest_s: float = 0.5) -> bool:
    """Whether poses are farther apart than longest_s around any of the stamps (N,)."""
    if log.poses is None or len(log.poses.stamps_ns) < 2:
        return False
    known = log.poses.stamps_ns
    right = np.clip(np.searchsorted(known, stamps_ns), 1, len(known) - 1)
    return bool(((known[right] - known[right - 1]) > longest_s * 1e9).any())
