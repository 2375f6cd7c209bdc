"""The scene as the past sweeps left it: what stands, a point in each small cube that any of them met, and apart from it what moves.

Sixty thousand points drawn of half a million forget half of what stands more than 25 m away, and say the road before the bumper a hundred
times over. One in each cube is as many points, and forgets next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.evidence import view_from
from sensors.geometry import inverse, transform_points
from sensors.kernels.voxels import hard_voxels
from sensors.motion import motion_of, towards
from sensors.rays import History
from worldmodel.config import Encoder

Array = NDArray[Any]

CUBE_M = 0.2
MOST_STILL, MOST_MOVING = 100_000, 20_000
AGE, PAST = 4, 5  # columns of what stands


@dataclass(frozen=True, eq=False)
class Scene:
    """In the state frame. still (N,6) f32: x y z, intensity, seconds before the newest sweep, and by how many metres that one sees past the point
    (negative: it sees something before it; 0: nothing is known). moving (M,5) f32: x y z at t = 0, velocity along x and y."""

    still: Array
    moving: Array

    def moving_at(self, seconds: float) -> Array:
        """(M,3) f32: what moves, where it will be if it goes on."""
        moved = self.moving[:, :3].copy()
        moved[:, :2] += self.moving[:, 3:] * np.float32(seconds)
        return moved


def scene_of(history: History, state_from_present: Array, encoder: Encoder) -> Scene:
    """The scene of a history, within the encoder's range: in each cube of CUBE_M the point that was seen last, of what stands and of what moves;
    where there are more than MOST_STILL and MOST_MOVING, older ones are left out."""
    motion, last = motion_of(history), len(history.points) - 1
    rows = [np.arange(len(points)) for points in history.points]
    rows[last] = np.flatnonzero(motion.cluster < 0)
    everything, at = np.zeros((sum(map(len, rows)), 6), np.float32), 0
    for sweep in range(last, -1, -1):
        own_rows = everything[at : at + len(rows[sweep])]
        own_rows[:, :3], own_rows[:, 3] = history.points[sweep][rows[sweep]], history.intensity[sweep][rows[sweep]]
        own_rows[:, AGE] = abs(history.times_s[sweep])
        at += len(own_rows)
    still = _one_in_each_cube(everything, state_from_present, encoder, MOST_STILL)
    own = inverse(history.present_from_sensor[last])
    older = still[:, AGE] > 0
    still[older, PAST] = np.nan_to_num(towards(view_from(history, last, own, "own"), still[older, :3], own @ inverse(state_from_present)))
    moving = np.concatenate((motion.movers, motion.mover_velocity @ state_from_present[:2, :2].T), 1, dtype=np.float32)
    moving = _one_in_each_cube(moving, state_from_present, encoder, MOST_MOVING)
    return Scene(still, moving)


def _one_in_each_cube(points: Array, state_from_present: Array, encoder: Encoder, most: int) -> Array:
    """Rows (N,3+) f32 brought to the state frame, in place: the first of each cube, in their order."""
    points[:, :3] = transform_points(state_from_present, points[:, :3])
    high = [low + np.ceil((high - low) / CUBE_M) * CUBE_M for low, high in zip(encoder.low, encoder.high, strict=True)]
    return hard_voxels(points, encoder.low, high, [CUBE_M] * 3, 1, most)[0][:, 0]
