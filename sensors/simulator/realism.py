"""How alike simulated and recorded sweeps are: `python -m sensors.simulator.realism --real PATH --out FIGURE.png`.

Measured in the same way on both, in the LiDAR's frame: points per sweep, how ranges are distributed, points per degree of elevation (real
KITTI sweeps have no ring), the share of points on the ground (below 0.25 m above the plane under the car) and, where boxes tell, the share of points
on objects faster than 1 m/s within the field of view that is labelled completely, and how often a ray goes through the windows of a car or van.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.geometry import points_in, transform_points
from sensors.records import Box, Log

Array = NDArray[Any]

RANGE_EDGES_M = np.geomspace(2.0, 120.0, 42)
ELEVATION_EDGES_DEG = np.arange(-25.0, 5.1, 1.0)
SCANNER_HEIGHT_M = 1.73
GROUND_M = 0.25
MOVING_MPS = 1.0
WINDOW_HEIGHTS = 0.65, 0.85  # of a car or van, where a ray enters its box


@dataclass(frozen=True, eq=False)
class Likeness:
    """Figures of one log: sweeps looked at, points per sweep, range_share per bin of RANGE_EDGES_M, by_elevation points per sweep and bin
    of ELEVATION_EDGES_DEG, quantiles (10, 50, 90, 99 %) of the range, shares of points on the ground and on movers (NaN: no labels), of
    rays through windows (NaN: no labels of cars or vans), and the median intensity."""

    log: str
    sweeps: int
    points: float
    range_share: Array
    by_elevation: Array
    range_quantiles_m: Array
    ground: float
    moving: float
    through: float
    intensity: float


def likeness(log: Log, every: int = 10) -> Likeness:
    """Measure each `every`-th sweep of a log's reference LiDAR."""
    lidar = log.reference_lidar
    labels = log.open_labels()
    stamps = log.sweep_stamps_ns[lidar]
    counts, ranges, elevations, intensities, grounds, on_movers, in_view, through = [], [], [], [], 0, 0, 0, np.zeros(2)
    for index in range(0, len(stamps), every):
        sweep = log.read_sweep(lidar, index)
        distance = np.linalg.norm(sweep.points, axis=1)
        counts.append(len(distance))
        ranges.append(distance)
        elevations.append(np.degrees(np.arcsin(np.clip(sweep.points[:, 2] / np.maximum(distance, 1e-6), -1, 1))))
        intensities.append(sweep.intensity)
        grounds += int((sweep.points[:, 2] < GROUND_M - SCANNER_HEIGHT_M).sum())
        if labels is not None:
            points = transform_points(log.lidars[lidar].ego_from_lidar, sweep.points)
            view = np.abs(np.arctan2(points[:, 1], points[:, 0])) <= labels.complete_fov_rad
            boxes = [b for b in labels.boxes if b.stamp_ns == sweep.stamp_ns]
            moving = [b for b in boxes if b.velocity is not None and np.hypot(*b.velocity) > MOVING_MPS]
            inside = np.any([points_in(b, points, 0.1) for b in moving], 0) if moving else np.zeros(len(points), bool)
            scanner = log.lidars[lidar].ego_from_lidar[:3, 3]
            through += sum((_through_windows(b, scanner, points - scanner) for b in boxes if b.category.lower() in ("car", "van")), np.zeros(2))
            on_movers += int((inside & view).sum())
            in_view += int(view.sum())
    r, total = np.concatenate(ranges), sum(counts)
    return Likeness(
        log.id,
        len(counts),
        total / len(counts),
        np.histogram(r, RANGE_EDGES_M)[0] / total,
        np.histogram(np.concatenate(elevations), ELEVATION_EDGES_DEG)[0] / len(counts),
        np.percentile(r, (10, 50, 90, 99)),
        grounds / total,
        on_movers / in_view if in_view else float("nan"),
        float(through[0] / through[1]) if through[1] else float("nan"),
        float(np.median(np.concatenate(intensities))),
    )


def _through_windows(box: Box, scanner: Array, rays: Array) -> Array:
    """(2,) f64: how many of the rays (N,3), from the scanner (3,) to returns, enter a box within 25 m by the height of its windows, a tenth off its
    sides and ends, on a way of 0.8 m or more; of these, how many return from 0.4 m or more beyond it (first) and how many there are (second)."""
    c, s = np.cos(box.yaw_rad), np.sin(box.yaw_rad)
    turn = np.array(((c, s, 0.0), (-s, c, 0.0), (0.0, 0.0, 1.0)))
    start, way, half = turn @ (scanner - box.centre), rays @ turn.T, np.asarray(box.size) * (0.45, 0.45, 0.5)
    with np.errstate(divide="ignore", invalid="ignore"):  # parts of the way (0: scanner, 1: return) at which each pair of sides is passed
        a, b = (-half - start) / way, (half - start) / way
    enter, leave, length = np.minimum(a, b).max(1), np.maximum(a, b).min(1), np.linalg.norm(rays, axis=1)
    up = (start[2] + way[:, 2] * enter) / box.size[2] + 0.5
    met = (enter > 0) & ((leave - enter) * length > 0.8) & (enter * length < 25) & (up > WINDOW_HEIGHTS[0]) & (up < WINDOW_HEIGHTS[1])
    met &= (1 - enter) * length > -0.4  # those that end before the box say nothing about it
    return np.array((np.count_nonzero(met & ((1 - leave) * length > 0.4)), np.count_nonzero(met)), np.float64)


def table(rows: Sequence[Likeness]) -> str:
    """The figures as lines of text, one per log."""
    lines = ["log                                        sweeps  points  ground  moving  through  r10  r50  r90  r99   intensity"]
    for row in rows:
        r = " ".join(f"{q:4.1f}" for q in row.range_quantiles_m)
        moving, through = ("     -" if np.isnan(share) else f"{share:6.3f}" for share in (row.moving, row.through))
        lines.append(f"{row.log:42s} {row.sweeps:6d} {row.points:7.0f}  {row.ground:6.3f}  {moving}   {through}  {r}  {row.intensity:6.2f}")
    return "\n".join(lines)


def draw(real: Sequence[Likeness], made: Sequence[Likeness], sweeps: Sequence[tuple[str, Array]], out: Path) -> None:
    """A figure: ranges and elevations of both kinds of logs above, sweeps (title, points (N,3)) from above below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12, 7.5), constrained_layout=True)
    grid = figure.add_gridspec(2, 6, height_ratios=(1, 1.05))
    left, right = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
    middle = np.sqrt(RANGE_EDGES_M[1:] * RANGE_EDGES_M[:-1])
    up = (ELEVATION_EDGES_DEG[1:] + ELEVATION_EDGES_DEG[:-1]) / 2
    for axis, x, name in ((left, middle, "range_share"), (right, up, "by_elevation")):
        many = np.stack([getattr(row, name) for row in made])
        axis.fill_between(x, *np.percentile(many, (10, 90), axis=0), color="tab:blue", alpha=0.2, label="simulated, 10-90 % of logs")
        axis.plot(x, many.mean(0), color="tab:blue", label=f"simulated, mean of {len(made)}")
        for row, style in zip(real, ("-", "--", ":", "-."), strict=False):
            axis.plot(x, getattr(row, name), "k" + style, lw=1, label=row.log.removeprefix("kitti_raw/"))
        axis.legend(fontsize=7, frameon=False)
    left.set(xscale="log", xlabel="range (m)", ylabel="share of points")
    left.set_xticks((2, 5, 10, 20, 50, 100), ("2", "5", "10", "20", "50", "100"))
    right.set(xlabel="elevation (deg)", ylabel="points per sweep and degree")
    for column, (title, points) in enumerate(sweeps[:3]):
        axis = figure.add_subplot(grid[1, 2 * column : 2 * column + 2])
        axis.scatter(points[:, 0], points[:, 1], s=0.08, c=np.clip(points[:, 2], -2.2, 2.0), cmap="turbo", lw=0, rasterized=True)
        axis.set(xlim=(-42, 42), ylim=(-36, 36), aspect="equal", title=title)
        axis.tick_params(labelsize=7)
    figure.savefig(out, dpi=75)
    pyplot.close(figure)
    _shrink(out)


def _shrink(path: Path) -> None:
    """The same picture in 128 colours: a third of the bytes."""
    from PIL import Image as Pillow

    with Pillow.open(path) as picture:
        small = picture.convert("RGB").quantize(128)
    small.save(path, optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sensors.simulator.realism", description="Recorded beside simulated sweeps, in figures and a picture."
    )
    parser.add_argument("--real", type=Path, required=True, metavar="PATH", help="KITTI raw drives")
    parser.add_argument("--out", type=Path, required=True, metavar="FIGURE.png", help="where the picture goes")
    parser.add_argument("--logs", type=int, default=16, metavar="N", help="simulated logs (default 16)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the first of them (default 0)")
    args = parser.parse_args(argv)

    from sensors.adapters.base import open_source
    from sensors.simulator.log import simulate

    real = [log for log in open_source(args.real) if isinstance(log, Log)]
    made = [simulate(args.seed + i) for i in range(args.logs)]
    rows = [[likeness(log, every=13) for log in logs] for logs in (real, made)]
    print(table([*rows[0], *rows[1]]))
    shown = [("recorded: " + log.id.removeprefix("kitti_raw/"), log) for log in real[:1]] + [
        ("simulated: seed " + str(args.seed + i), made[i]) for i in (0, 1)
    ]
    draw(rows[0], rows[1], [(title, log.read_sweep(log.reference_lidar, 20).points) for title, log in shown], args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
