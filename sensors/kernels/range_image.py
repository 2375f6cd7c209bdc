"""Points into pictures: the range image of a LiDAR and the depth maps of cameras, nearest point first, one z-buffer each.

Blocks of points pass through a vector loop (angles, or the projection) and then a scalar one (the z-buffer). The first of equally
near points wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import float32, int32, njit, uint64
from numpy.typing import NDArray

from sensors.angles import PI, atan2

Array = NDArray[Any]

BLOCK = 256
# rows of 2^k pixels put a column of the image into one set of the cache: keep them off
PAD = 16
MAX_SIDE = 1 << 16
REACH_M = np.float32(1e9)


@njit(nogil=True, cache=True, error_model="numpy")
def _range_image(points, width, height, low, high, image, index):
    n = points.shape[0]
    px, py, pz = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    ranges, pixel = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int32)
    pitch = int32(width + PAD)
    per_column = float32(width / (2 * np.pi))
    per_row = float32(height / (high - low))
    top = float32(high)
    zero, last_column, rows = float32(0), float32(width) - float32(0.5), float32(height)
    for start in range(0, n, BLOCK):
        count = min(BLOCK, n - start)
        for k in range(count):
            px[k], py[k], pz[k] = points[start + k, 0], points[start + k, 1], points[start + k, 2]
        for k in range(count):
            x, y, z = px[k], py[k], pz[k]
            flat2 = x * x + y * y
            r = np.sqrt(flat2 + z * z)
            column = (PI - atan2(y, x)) * per_column
            row = (top - atan2(z, np.sqrt(flat2))) * per_row
            # NaN and infinities fail here, before anything becomes an integer
            ok = (r > zero) & (r < REACH_M) & (row >= zero) & (row < rows)
            column = min(max(column if ok else zero, zero), last_column)
            ranges[k] = r
            at = int32(int32(row if ok else zero) * pitch) + int32(column)
            pixel[k] = int32(at) if ok else int32(-1)
        for k in range(count):
            if pixel[k] >= 0:
                at = uint64(pixel[k])
                if ranges[k] < image[at]:
                    image[at] = ranges[k]
                    index[at] = start + k


def range_image(points: Array, height: int, width: int, elevations_rad: tuple[float, float]) -> tuple[Array, Array]:
    """Range (H, W) f32 m, infinite where no point falls, and index (H, W) i32 of that point, -1 there. points (N, F) f32 with xyz first, in
    the sensor's frame. Rows share elevations_rad (lowest, highest) evenly, the highest on top; columns go from azimuth +pi at the left over
    straight ahead in the middle to -pi. Points at the origin, outside, NaN or infinite are left out; the nearest of a pixel wins.
    ValueError for other types and shapes."""
    points = _checked("range_image", points)
    low, high = float(elevations_rad[0]), float(elevations_rad[1])
    if not -2.0 < low < high < 2.0:
        raise ValueError(f"range_image: elevations {elevations_rad} must ascend, in radians")
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and height * (width + PAD) < 1 << 31):
        raise ValueError(f"range_image: {height} x {width} pixels; give 1 to 65536 on each side")
    image, index = np.full((height, width + PAD), np.inf, np.float32), np.full((height, width + PAD), -1, np.int32)
    _range_image(points, int(width), int(height), low, high, image.reshape(-1), index.reshape(-1))
    return np.ascontiguousarray(image[:, :width]), np.ascontiguousarray(index[:, :width])


@njit(nogil=True, cache=True, error_model="numpy")
def _depth_maps(points, projections, sizes, offsets, min_depth, out):
    n = points.shape[0]
    px, py, pz = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    depth, pixel = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int32)
    zero, half = float32(0), float32(0.5)
    for start in range(0, n, BLOCK):
        count = min(BLOCK, n - start)
        for k in range(count):
            px[k], py[k], pz[k] = points[start + k, 0], points[start + k, 1], points[start + k, 2]
        for c in range(projections.shape[0]):
            p00, p01, p02, p03 = projections[c, 0, 0], projections[c, 0, 1], projections[c, 0, 2], projections[c, 0, 3]
            p10, p11, p12, p13 = projections[c, 1, 0], projections[c, 1, 1], projections[c, 1, 2], projections[c, 1, 3]
            p20, p21, p22, p23 = projections[c, 2, 0], projections[c, 2, 1], projections[c, 2, 2], projections[c, 2, 3]
            width, columns, rows = int32(sizes[c, 1]), float32(sizes[c, 1]), float32(sizes[c, 0])
            for k in range(count):
                x, y, z = px[k], py[k], pz[k]
                d = p20 * x + p21 * y + p22 * z + p23
                # pixel centres are at integers: pixel i reaches from i - 1/2 to i + 1/2
                u = (p00 * x + p01 * y + p02 * z + p03) / d + half
                v = (p10 * x + p11 * y + p12 * z + p13) / d + half
                ok = (d > min_depth) & (d < REACH_M) & (u >= zero) & (u < columns) & (v >= zero) & (v < rows)
                at = int32(int32(v if ok else zero) * width) + int32(u if ok else zero)
                pixel[k] = int32(at) if ok else int32(-1)
                depth[k] = d
            base = uint64(offsets[c])
            for k in range(count):
                if pixel[k] >= 0:
                    at = base + uint64(pixel[k])
                    out[at] = min(out[at], depth[k])


def depth_maps(points: Array, projections: Array, sizes: Sequence[tuple[int, int]], min_depth_m: float = 0.1) -> list[Array]:
    """Per camera its depth map (H_c, W_c) f32 m, infinite where no point falls; the nearest of a pixel wins. points (N, F) f32 with xyz
    first; projections (C, 3, 4) = K @ [R | t] of pinholes, from the points' frame to pixels whose centres are at integers; sizes
    (height, width) each. Points nearer than min_depth_m, outside, NaN or infinite are left out. ValueError for other types and shapes."""
    points = _checked("depth_maps", points)
    matrices = np.ascontiguousarray(projections, np.float32)
    if matrices.shape != (len(sizes), 3, 4) or not np.isfinite(matrices).all():
        raise ValueError(f"depth_maps: projections {matrices.shape} for {len(sizes)} sizes; give finite (C, 3, 4)")
    if not min_depth_m > 0:
        raise ValueError(f"depth_maps: min_depth_m {min_depth_m} must be above 0")
    whole = np.array(sizes, np.int64).reshape(-1, 2)
    if not ((whole >= 1) & (whole <= MAX_SIDE)).all() or not (whole.prod(1) < 1 << 31).all():
        raise ValueError(f"depth_maps: sizes {list(sizes)}; give 1 to 65536 on each side, below 2^31 pixels")
    offsets = np.concatenate(([0], np.cumsum(whole.prod(1))))
    out = np.full(int(offsets[-1]), np.inf, np.float32)
    _depth_maps(points, matrices, whole, offsets, np.float32(min_depth_m), out)
    return [out[offsets[c] : offsets[c + 1]].reshape(int(h), int(w)) for c, (h, w) in enumerate(whole)]


def _checked(what: str, points: Array) -> Array:
    if not isinstance(points, np.ndarray) or points.dtype != np.float32 or points.ndim != 2 or points.shape[1] < 3:
        found = f"{points.dtype} {points.shape}" if isinstance(points, np.ndarray) else type(points).__name__
        raise ValueError(f"{what}: points are {found}; give float32 (N, F) with F >= 3, xyz first")
    return np.ascontiguousarray(points)
