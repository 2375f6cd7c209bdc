"""Labelled frames for the fine-tuning tasks: where labels are, what the encoder sees there, and the grid that its map lies on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.data import Part
from sensors.geometry import rotation_z
from sensors.rays import History
from sensors.records import Clip, Labels
from worldmodel.batches import joined, past_clouds
from worldmodel.config import Config, Encoder

Array = NDArray[Any]


@dataclass(frozen=True)
class Grid:
    """The cells of an encoder's map: rows along y, columns along x, from low (x, y) upwards, metres."""

    low: tuple[float, float]
    cell_m: float
    rows: int
    columns: int

    def centres(self) -> tuple[Array, Array]:
        """x and y (rows, columns) f64 of the cells' centres."""
        x = self.low[0] + (np.arange(self.columns) + 0.5) * self.cell_m
        y = self.low[1] + (np.arange(self.rows) + 0.5) * self.cell_m
        across, up = np.meshgrid(x, y)
        return across, up


def grid_of(encoder: Encoder, cell_m: float) -> Grid:
    columns, rows = (round((encoder.high[axis] - encoder.low[axis]) / cell_m) for axis in (0, 1))
    return Grid(encoder.low[:2], cell_m, rows, columns)  # type: ignore[arg-type]


def labelled_stamps(part: Part, labels: Labels, every_s: float) -> Array:
    """(S,) i64: instants of the part that have a box, those nearest to every every_s. A sweep without any box is left out: nothing tells it
    from one that nobody labelled (nuScenes' tables hold boxes of every tenth sweep)."""
    stamps = np.array(sorted({box.stamp_ns for box in labels.boxes}), np.int64)
    low, high = part.from_ns or 0, 2**62 if part.to_ns is None else part.to_ns
    stamps = stamps[(stamps >= low) & (stamps < high)]
    if len(stamps) < 2:
        return stamps
    slack_ns = np.median(np.diff(stamps)) / 2
    kept, due = [], float(stamps[0])
    for stamp in stamps:
        if stamp + slack_ns >= due:
            kept.append(stamp)
            due += every_s * 1e9 * max(1, np.ceil((stamp - due) / (every_s * 1e9) + 1e-6))
    return np.array(kept, np.int64)


def cloud_of(clip: Clip, history: History, config: Config) -> Array:
    """(N,5) f32 x y z intensity dt in the state frame: the cloud that the encoder saw in pretraining (the newest sweep, unless sweeps are
    joined), of those past sweeps that the clip has."""
    sweeps = tuple(back for back in config.model.latent_sweeps if back < len(clip.past)) or (0,)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, latent_sweeps=sweeps))
    return joined(past_clouds(clip, history, config), config)[0]


def turned_xy(xy: Array, yaw_rad: float, mirror: bool) -> Array:
    """(N,2): places or velocities mirrored in y where asked, then turned about z."""
    linear = rotation_z(yaw_rad)[:2, :2] @ np.diag((1.0, -1.0 if mirror else 1.0))
    return (xy @ linear.T).astype(xy.dtype)


def turned_angle(angle_rad: Any, yaw_rad: float, mirror: bool) -> Any:
    """What becomes of an angle about z."""
    return (-angle_rad if mirror else angle_rad) + yaw_rad


def in_view(x: Array, y: Array, ahead_rad: float, fov_rad: float) -> Array:
    """Bool like x: places whose azimuth is within fov_rad of ahead_rad, which is where labels are complete."""
    return np.abs((np.arctan2(y, x) - ahead_rad + np.pi) % (2 * np.pi) - np.pi) <= fov_rad
