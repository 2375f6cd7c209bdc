"""A point renderer in plain numpy: perspective, soft round points, exact blending front to back. For pictures, not for speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NEAR_M = 0.5
MAX_RADIUS_PX = 3


@dataclass(frozen=True)
class Viewpoint:
    """An eye that looks at `target` (m) from `distance_m` away: azimuth_rad 0 looks along +x, elevation_rad is how far it looks down;
    field_rad is the vertical field of view."""

    target: tuple[float, float, float] = (10.0, 0.0, 0.0)
    distance_m: float = 52.0
    azimuth_rad: float = 0.0
    elevation_rad: float = float(np.deg2rad(42))
    field_rad: float = float(np.deg2rad(42))

    def eye(self) -> Array:
        """(3,) f64, where it stands."""
        a, e = self.azimuth_rad, self.elevation_rad
        return np.asarray(self.target) + self.distance_m * np.array([-np.cos(e) * np.cos(a), -np.cos(e) * np.sin(a), np.sin(e)])

    def axes(self) -> Array:
        """(3,3) f64: rows are the picture's right, down and forward in the world."""
        a, e = self.azimuth_rad, self.elevation_rad
        forward = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), -np.sin(e)])
        right = np.array([np.sin(a), -np.cos(a), 0.0])
        return np.stack([right, np.cross(forward, right), forward])

    def project(self, points: Array, width: int, height: int) -> tuple[Array, Array]:
        """Pixels (N,2) f64 (centres at integers) and depths (N,) m of points (N,3); depths below NEAR_M are not in the picture."""
        seen = (np.asarray(points, np.float64) - self.eye()) @ self.axes().T
        focal = 0.5 * height / np.tan(0.5 * self.field_rad)
        depth = np.maximum(seen[:, 2], NEAR_M)
        pixels = seen[:, :2] / depth[:, None] * focal + (0.5 * (width - 1), 0.5 * (height - 1))
        return pixels, seen[:, 2]


def render(
    points: Array,
    colours: Array,
    viewpoint: Viewpoint,
    width: int,
    height: int,
    opacity: Array | None = None,
    radius_m: float = 0.11,
    background: tuple[int, int, int] | Array = (10, 13, 20),
) -> Array:
    """(height, width, 3) u8: points (N,3) with colours (N,3) in 0..255 and opacity (N,) in 0..1 (None: 1) as round points of radius_m,
    at least 0.8 px, nearer ones over farther ones. background: one colour, or a picture (height, width, 3). Points that are not finite
    are not drawn."""
    canvas = np.empty((height * width, 3), np.float32)
    canvas[:] = np.asarray(background, np.float32).reshape(-1, 3)
    points, colours = np.asarray(points, np.float32).reshape(-1, 3), np.asarray(colours, np.float32).reshape(-1, 3)
    opacity = np.ones(len(points), np.float32) if opacity is None else np.asarray(opacity, np.float32)
    pixels, depth = viewpoint.project(np.nan_to_num(points), width, height)
    margin = MAX_RADIUS_PX
    inside = np.isfinite(points).all(axis=1) & (depth > NEAR_M) & (opacity > 0)
    inside &= (pixels > -margin).all(axis=1) & (pixels[:, 0] < width + margin) & (pixels[:, 1] < height + margin)
    kept = np.flatnonzero(inside)
    kept = kept[np.argsort(depth[kept], kind="stable")]
    x, y = pixels[kept].astype(np.float32).T
    focal = 0.5 * height / np.tan(0.5 * viewpoint.field_rad)
    radius = np.clip(radius_m * focal / depth[kept], 0.8, MAX_RADIUS_PX - 0.5).astype(np.float32)
    left, top = np.round(x).astype(np.int32), np.round(y).astype(np.int32)
    at_pixel, of_point, cover = [], [], []
    for dy in range(-margin, margin + 1):
        for dx in range(-margin, margin + 1):
            column, row = left + dx, top + dy
            # how much of the pixel the disc covers: 1 inside, falling to 0 over one pixel at its rim
            covered = np.clip(radius + 0.5 - np.hypot(column - x, row - y), 0, 1)
            used = np.flatnonzero((covered > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height))
            at_pixel.append(row[used] * width + column[used])
            of_point.append(used)
            cover.append(covered[used])
    pixel, point = np.concatenate(at_pixel), np.concatenate(of_point)
    alpha = np.clip(np.concatenate(cover) * opacity[kept][point], 0, 0.999).astype(np.float64)
    # within a pixel from front to back: what shows of a point is its alpha times what all before it let through
    order = np.lexsort((point, pixel))
    pixel, point, alpha = pixel[order], point[order], alpha[order]
    through = np.cumsum(np.log1p(-alpha)) - np.log1p(-alpha)
    first = np.flatnonzero(np.diff(pixel, prepend=-1) != 0)
    through -= np.repeat(through[first], np.diff(np.append(first, len(pixel))))
    weight = alpha * np.exp(through)
    painted = np.stack([np.bincount(pixel, weight * colours[kept][point, c], height * width) for c in range(3)], axis=-1)
    canvas = canvas * (1 - np.bincount(pixel, weight, height * width))[:, None].astype(np.float32) + painted
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8).reshape(height, width, 3)


def polyline(points: Array, viewpoint: Viewpoint, width: int, height: int) -> list[list[tuple[float, float]]]:
    """The path (N,3) in pixels, cut where it passes behind the eye: lists of (x, y) for a drawing library."""
    pixels, depth = viewpoint.project(points, width, height)
    parts: list[list[tuple[float, float]]] = [[]]
    for (x, y), d in zip(pixels, depth, strict=True):
        if d > NEAR_M and abs(x) < 8 * width and abs(y) < 8 * height:
            parts[-1].append((float(x), float(y)))
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if len(part) > 1]
