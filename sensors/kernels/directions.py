"""What a sweep says about a direction: the readings around a ray, as seen from any point.

A `View` sorts the points of one sweep, already in the frame of the asking sensor, into cells of azimuth and elevation. Against it a ray
can ask for the reading nearest in angle (exact, however far), for the nearest reading in each of the four quadrants around it, for the
value interpolated between those (bilinear in inverse range: planes are linear in 1/r), and for the reading of its pixel.

All of it is float32 and deterministic: ties go to the point that comes first in the sweep's order within a cell.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int32, njit
from numpy.typing import NDArray

from sensors.angles import HALF_PI, PI, atan2, sine_of_half2

Array = NDArray[Any]

AZIMUTH_CELLS = 1024
ELEVATION_STEP_RAD = float(np.deg2rad(0.5))
# half-width of the quadrant search, in cells: +-0.9 deg of azimuth and +-2.5 elevation steps
REACH = 2
MAX_RINGS = 8
BLOCK = 256


@njit(nogil=True, cache=True, error_model="numpy")
def _sort_into_cells(points, pose, n_elevation, step_elevation):
    n, cells = points.shape[0], AZIMUTH_CELLS * n_elevation
    start = np.zeros(cells + 1, np.int32)
    azimuth, elevation, radius, cell = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.int32)
    # a vector loop on blocks of their own, and a scalar one that counts
    px, py, pz = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    angle, height, distance, at = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int32)
    per_azimuth, per_elevation = np.float32(AZIMUTH_CELLS / (2.0 * np.pi)), np.float32(1 / step_elevation)
    last_row = np.float32(n_elevation - 1)
    m00, m01, m02, m03 = pose[0, 0], pose[0, 1], pose[0, 2], pose[0, 3]
    m10, m11, m12, m13 = pose[1, 0], pose[1, 1], pose[1, 2], pose[1, 3]
    m20, m21, m22, m23 = pose[2, 0], pose[2, 1], pose[2, 2], pose[2, 3]
    for first in range(0, n, BLOCK):
        count = min(BLOCK, n - first)
        for k in range(count):
            px[k], py[k], pz[k] = points[first + k, 0], points[first + k, 1], points[first + k, 2]
        for k in range(count):
            x = np.float32(m00 * px[k] + m01 * py[k] + m02 * pz[k] + m03)
            y = np.float32(m10 * px[k] + m11 * py[k] + m12 * pz[k] + m13)
            z = np.float32(m20 * px[k] + m21 * py[k] + m22 * pz[k] + m23)
            flat2 = x * x + y * y
            r = np.sqrt(flat2 + z * z)
            a, e = atan2(y, x), atan2(z, np.sqrt(flat2))
            # NaN and infinities fail here, before anything becomes an integer
            ok = (r > np.float32(1e-3)) & (r < np.float32(1e6))
            column = int32((a + PI if ok else np.float32(0)) * per_azimuth) & int32(AZIMUTH_CELLS - 1)
            row = int32(min((e + HALF_PI if ok else np.float32(0)) * per_elevation, last_row))
            angle[k], height[k], distance[k] = a, e, r
            at[k] = int32(row * int32(AZIMUTH_CELLS)) + column if ok else int32(-1)
        for k in range(count):
            azimuth[first + k], elevation[first + k], radius[first + k], cell[first + k] = angle[k], height[k], distance[k], at[k]
            if at[k] >= 0:
                start[at[k] + 1] += 1
    for c in range(cells):
        start[c + 1] += start[c]
    kept = start[cells]
    order = np.empty(kept, np.int32)
    s_azimuth, s_elevation, s_radius = np.empty(kept, np.float32), np.empty(kept, np.float32), np.empty(kept, np.float32)
    fill = start[:-1].copy()
    for i in range(n):
        if cell[i] >= 0:
            to = fill[cell[i]]
            fill[cell[i]] = to + 1
            order[to], s_azimuth[to], s_elevation[to], s_radius[to] = i, azimuth[i], elevation[i], radius[i]
    return start, order, s_azimuth, s_elevation, s_radius


@njit(nogil=True, cache=True, error_model="numpy")
def turn(angle):
    """An angle difference brought into -pi..pi."""
    if angle > np.float32(np.pi):
        return angle - np.float32(2 * np.pi)
    if angle < np.float32(-np.pi):
        return angle + np.float32(2 * np.pi)
    return angle


@njit(nogil=True, cache=True, error_model="numpy")
def _chord2(azimuth_a, elevation_a, cos_a, azimuth_b, elevation_b):
    """Squared chord between two unit vectors, from small differences (haversine), so that float32 keeps its digits. cos_a: of the first elevation."""
    cos_b = np.float32(1) - np.float32(2) * sine_of_half2(elevation_b)
    return sine_of_half2(elevation_a - elevation_b) + cos_a * cos_b * sine_of_half2(azimuth_a - azimuth_b)


@njit(nogil=True, cache=True, error_model="numpy")
def _columns_within(chord2, cos_e):
    """How many columns away from its own a point within the chord of a ray, at the cosine of the ray's elevation, can be."""
    sine = 2 * np.sqrt(chord2 * max(1 - chord2, 0.0))
    if chord2 >= 0.5 or sine >= cos_e:
        return AZIMUTH_CELLS // 2
    return min(int(np.arcsin(sine / cos_e) * 1.001 * AZIMUTH_CELLS / (2 * np.pi)) + 2, AZIMUTH_CELLS // 2)


@njit(nogil=True, cache=True, error_model="numpy")
def _nearest_by_rows(a, e, row, column, start, order, azimuth, elevation, n_elevation, step_elevation, best, best_at):
    """The search of `_nearest` where nothing is close by: row by row away from the ray's, in each row outwards past the empty cells, until
    the row, or the meridian, is farther than the best so far."""
    cos_e = np.cos(e)
    widest = _columns_within(best, cos_e) if best_at >= 0 else AZIMUTH_CELLS // 2
    for away in range(n_elevation):
        if best_at >= 0 and best <= np.sin(np.float32(max(away - 1, 0)) * np.float32(step_elevation) * np.float32(0.5)) ** 2:
            break
        for side in range(2 if away else 1):
            r = row - away if side else row + away
            if r < 0 or r >= n_elevation or start[r * AZIMUTH_CELLS] == start[(r + 1) * AZIMUTH_CELLS]:
                continue
            off = 0
            while off <= widest:
                for hand in range(2 if off else 1):
                    c = r * AZIMUTH_CELLS + (column - off if hand else column + off) % AZIMUTH_CELLS
                    for at in range(start[c], start[c + 1]):
                        d = _chord2(a, e, cos_e, azimuth[at], elevation[at])
                        if d < best or (d == best and order[at] < order[best_at]):
                            best, best_at = d, at
                            widest = _columns_within(best, cos_e)
                off += 1
    return best, best_at


@njit(nogil=True, cache=True, error_model="numpy")
def _nearest(directions, start, order, azimuth, elevation, radius, n_elevation, step_elevation, limit, out_range, out_angle, out_index):
    step_azimuth = np.float32(2 * np.pi / AZIMUTH_CELLS)
    farthest = np.float32(np.sin(min(limit, np.pi) * 0.5) ** 2) if limit < np.pi else np.float32(np.inf)
    for i in range(directions.shape[0]):
        x, y, z = directions[i, 0], directions[i, 1], directions[i, 2]
        a, e = atan2(y, x), atan2(z, np.sqrt(x * x + y * y))
        column = int((a + PI) / step_azimuth) % AZIMUTH_CELLS
        row = min(max(int((e + HALF_PI) / np.float32(step_elevation)), 0), n_elevation - 1)
        best, best_at = np.float32(np.inf), -1
        cos_e = np.cos(e)
        ring = 0
        while ring <= MAX_RINGS:
            for dr in range(-ring, ring + 1):
                r = row + dr
                if r < 0 or r >= n_elevation:
                    continue
                step = 1 if (dr == -ring or dr == ring) else 2 * ring
                for dc in range(-ring, ring + 1, max(step, 1)):
                    c = r * AZIMUTH_CELLS + (column + dc) % AZIMUTH_CELLS
                    for at in range(start[c], start[c + 1]):
                        d = _chord2(a, e, cos_e, azimuth[at], elevation[at])
                        if d < best or (d == best and order[at] < order[best_at]):
                            best, best_at = d, at
            # whatever is not yet looked at is at least this far: in elevation, or beyond a meridian
            away_e = np.float32(ring) * np.float32(step_elevation)
            away_a = np.float32(ring) * step_azimuth
            sin_a = cos_e * np.sin(away_a)
            bound = min(np.sin(away_e * np.float32(0.5)) ** 2, np.sin(np.arcsin(sin_a) * np.float32(0.5)) ** 2)
            if (best_at >= 0 and best <= bound) or bound > farthest:
                break
            ring += 1
        if ring > MAX_RINGS:
            best, best_at = _nearest_by_rows(a, e, row, column, start, order, azimuth, elevation, n_elevation, step_elevation, best, best_at)
        if best_at >= 0 and best <= farthest:
            out_range[i] = radius[best_at]
            out_angle[i] = np.float32(2) * np.arcsin(min(np.sqrt(best), np.float32(1)))
            out_index[i] = order[best_at]
        else:
            out_range[i], out_angle[i], out_index[i] = np.nan, np.nan, -1


@njit(nogil=True, cache=True, error_model="numpy")
def _quadrants(directions, start, order, azimuth, elevation, radius, n_elevation, step_elevation, out_range, out_daz, out_del):
    step_azimuth = np.float32(2 * np.pi / AZIMUTH_CELLS)
    scale_a, scale_e = np.float32(1) / step_azimuth, np.float32(1 / step_elevation)
    best = np.empty(4, np.float32)
    best_at = np.empty(4, np.int64)
    for i in range(directions.shape[0]):
        x, y, z = directions[i, 0], directions[i, 1], directions[i, 2]
        a, e = atan2(y, x), atan2(z, np.sqrt(x * x + y * y))
        column = int((a + PI) / step_azimuth) % AZIMUTH_CELLS
        row = min(max(int((e + HALF_PI) / np.float32(step_elevation)), 0), n_elevation - 1)
        best[:] = np.float32(np.inf)
        best_at[:] = -1
        for r in range(max(row - REACH, 0), min(row + REACH, n_elevation - 1) + 1):
            for dc in range(-REACH, REACH + 1):
                c = r * AZIMUTH_CELLS + (column + dc) % AZIMUTH_CELLS
                for at in range(start[c], start[c + 1]):
                    da = turn(azimuth[at] - a)
                    de = elevation[at] - e
                    quadrant = (1 if da >= 0 else 0) + (2 if de >= 0 else 0)
                    d = (da * scale_a) ** 2 + (de * scale_e) ** 2
                    if d < best[quadrant]:
                        best[quadrant] = d
                        best_at[quadrant] = at
        for quadrant in range(4):
            at = best_at[quadrant]
            if at >= 0:
                out_range[i, quadrant] = radius[at]
                out_daz[i, quadrant] = turn(azimuth[at] - a)
                out_del[i, quadrant] = elevation[at] - e
            else:
                out_range[i, quadrant] = np.nan
                out_daz[i, quadrant] = np.nan
                out_del[i, quadrant] = np.nan


@njit(nogil=True, cache=True, error_model="numpy")
def _between(low, high, share):
    """Linear between low and high, or whichever is there."""
    if np.isnan(low):
        return high
    if np.isnan(high):
        return low
    return low + (high - low) * share


@njit(nogil=True, cache=True, error_model="numpy")
def _interpolate(ranges, daz, delev, fallback, out):
    for i in range(ranges.shape[0]):
        rows_inverse = np.full(2, np.nan, np.float32)
        rows_elevation = np.full(2, np.nan, np.float32)
        for row in range(2):
            left, right = 2 * row, 2 * row + 1
            width = daz[i, right] - daz[i, left]
            share = -daz[i, left] / width if width > np.float32(1e-9) else np.float32(0.5)
            rows_inverse[row] = _between(np.float32(1) / ranges[i, left], np.float32(1) / ranges[i, right], share)
            rows_elevation[row] = _between(delev[i, left], delev[i, right], share)
        height = rows_elevation[1] - rows_elevation[0]
        share = -rows_elevation[0] / height if height > np.float32(1e-9) else np.float32(0.5)
        inverse = _between(rows_inverse[0], rows_inverse[1], share)
        out[i] = fallback[i] if np.isnan(inverse) else np.float32(1) / inverse


def _triples(values: Array, what: str) -> Array:
    values = np.ascontiguousarray(values, np.float32)
    if values.ndim != 2 or values.shape[1] != 3:
        raise ValueError(f"View: {what} of shape {values.shape}, expected (N, 3)")
    return values


class View:
    """The points of one sweep as seen from the origin of their frame. points (N,3) f32; points that are not finite, or at the origin,
    are left out. elevation_step_rad: spacing of the sensor's beams (cells and the quadrant search follow it). sensor_from_points (4,4): where
    the points are given in another frame than that of the asking sensor."""

    def __init__(self, points: Array, elevation_step_rad: float = ELEVATION_STEP_RAD, sensor_from_points: Array | None = None) -> None:
        points = _triples(points, "points")
        if not elevation_step_rad > 0:
            raise ValueError(f"View: beams {elevation_step_rad} rad apart; give a number above 0")
        self.elevation_step_rad = float(elevation_step_rad)
        self.n_elevation = int(np.ceil(np.pi / self.elevation_step_rad))
        pose = np.eye(4) if sensor_from_points is None else np.ascontiguousarray(sensor_from_points, np.float64)
        self._cells = _sort_into_cells(points, pose, self.n_elevation, self.elevation_step_rad)

    def __len__(self) -> int:
        return len(self._cells[1])

    def nearest(self, directions: Array, limit_rad: float = np.inf) -> tuple[Array, Array, Array]:
        """Per direction (R,3): range (R,) f32 and angle (R,) f32 rad of the reading nearest in angle, and its index (R,) i64 in the
        sweep; NaN, NaN, -1 where none lies within limit_rad. Directions need not be unit vectors."""
        directions = _triples(directions, "directions")
        count = len(directions)
        out = np.empty(count, np.float32), np.empty(count, np.float32), np.empty(count, np.int64)
        _nearest(directions, *self._cells, self.n_elevation, self.elevation_step_rad, float(limit_rad), *out)
        return out

    def quadrants(self, directions: Array) -> tuple[Array, Array, Array]:
        """Per direction (R,3) the nearest reading in each quadrant around it within the search window: ranges, azimuth offsets and
        elevation offsets in rad, each (R,4) f32, NaN where there is none. Order: right-below, left-below, right-above, left-above."""
        directions = _triples(directions, "directions")
        ranges, daz, delev = (np.empty((len(directions), 4), np.float32) for _ in range(3))
        _quadrants(directions, *self._cells[:5], self.n_elevation, self.elevation_step_rad, ranges, daz, delev)
        return ranges, daz, delev

    def interpolate(self, directions: Array) -> Array:
        """Per direction (R,3) the range (R,) f32 between its four quadrant readings, bilinear in inverse range; where quadrants are
        missing, between those that are there, and without any the nearest reading."""
        return interpolate(*self.quadrants(directions), self.nearest(directions)[0])

    def pixel(self, directions: Array, azimuth_step_rad: float = float(np.deg2rad(0.18)), elevation_step_rad: float | None = None) -> Array:
        """Per direction (R,3) the range (R,) f32 of the pixel it falls in: the closest return in a cell of the given steps (elevation: 0.84
        of the beam spacing), or the nearest reading in angle where the pixel is empty."""
        step_e = 0.84 * self.elevation_step_rad if elevation_step_rad is None else elevation_step_rad
        azimuth, elevation, radius = self._cells[2:5]
        width = round(2 * np.pi / azimuth_step_rad)

        def cell(a: Array, e: Array) -> Array:
            return np.floor((e + np.pi / 2) / step_e).astype(np.int64) * width + np.floor((a + np.pi) / (2 * np.pi) * width).astype(np.int64) % width

        image = np.full(width * (int(np.pi / step_e) + 2), np.inf, np.float32)
        np.minimum.at(image, cell(azimuth, elevation), radius)
        d = np.asarray(directions, np.float32)
        read = image[cell(np.arctan2(d[:, 1], d[:, 0]), np.arctan2(d[:, 2], np.hypot(d[:, 0], d[:, 1])))]
        empty = ~np.isfinite(read)
        if empty.any():
            read[empty] = self.nearest(d[empty])[0]
        return read


def interpolate(ranges: Array, daz: Array, delev: Array, fallback: Array) -> Array:
    """Ranges (R,) f32 at offset 0, bilinear in inverse range between four quadrant readings (R,4 each, as `View.quadrants` gives them);
    fallback (R,) where no quadrant has one."""
    out = np.empty(len(ranges), np.float32)
    _interpolate(ranges, daz, delev, fallback, out)
    return out
