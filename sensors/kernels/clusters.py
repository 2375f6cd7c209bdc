"""Clusters on the ground plane: local ground, occupancy, connected components, and how well a set of points fits where others were.

Everything here is on square grids of `n` by `n` cells centred on the origin; cell (row, column) holds x, y in
``[-n/2 * cell + row * cell, ...)``. What lies outside is left out.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from sensors.angles import atan2

# a splat reaches this many cells around an occupied one
SPLAT_REACH = 3
# `search` looks at BLOCK x BLOCK velocities at once, on maps pooled by POOL cells
POOL, BLOCK = 4, 5
# bins of the cheap azimuth in `hidden`
SECTORS = 2048


@njit(nogil=True, cache=True, error_model="numpy")
def lowest(points, cell, n, out):
    """Fold the smallest z of points (N,3) into each cell of out (n,n) f32, which the caller fills with inf first."""
    half = np.float32(n // 2)
    per = np.float32(1.0 / cell)
    for i in range(points.shape[0]):
        fx, fy = points[i, 0] * per + half, points[i, 1] * per + half
        if not (fx >= 0 and fx < n and fy >= 0 and fy < n):
            continue
        row, column = int(fx), int(fy)
        if points[i, 2] < out[row, column]:
            out[row, column] = points[i, 2]


@njit(nogil=True, cache=True, error_model="numpy")
def ground_of(low, reach, band, out):
    """The ground of each cell, out (n,n) f32, from the lowest z that each of T sweeps saw there, low (T,n,n) f32, inf where nothing.

    Reflections from under the road and things above it are both outvoted: a cell's level is the (lower) median over the sweeps, the
    ground is the lowest of the levels within `reach` cells that a third of them share within `band` metres; their median where there is
    no such level, inf where there is none at all."""
    sweeps, n = low.shape[0], low.shape[1]
    level = np.empty((n, n), np.float32)
    width = 2 * reach + 1
    values = np.empty(max(width * width, sweeps), np.float32)
    for r in range(n):
        for c in range(n):
            count = 0
            for k in range(sweeps):
                value = low[k, r, c]
                if value < np.float32(np.inf):
                    at = count
                    while at > 0 and values[at - 1] > value:
                        values[at] = values[at - 1]
                        at -= 1
                    values[at] = value
                    count += 1
            level[r, c] = values[(count - 1) // 2] if count else np.float32(np.inf)
    for r in range(n):
        for c in range(n):
            count = 0
            for rr in range(max(r - reach, 0), min(r + reach, n - 1) + 1):
                for cc in range(max(c - reach, 0), min(c + reach, n - 1) + 1):
                    value = level[rr, cc]
                    if value < np.float32(np.inf):
                        at = count
                        while at > 0 and values[at - 1] > value:
                            values[at] = values[at - 1]
                            at -= 1
                        values[at] = value
                        count += 1
            out[r, c] = values[(count - 1) // 2] if count else np.float32(np.inf)
            end = 0
            for at in range(count):
                while end < count and values[end] <= values[at] + band:
                    end += 1
                if 3 * (end - at) >= count:
                    out[r, c] = values[at]
                    break


@njit(nogil=True, cache=True, error_model="numpy")
def heights(points, ground, cell, out):
    """out (N,) f32: z over the ground of the point's cell; NaN outside the grid or where no ground is known."""
    n = ground.shape[0]
    half = np.float32(n // 2)
    per = np.float32(1.0 / cell)
    for i in range(points.shape[0]):
        fx, fy = points[i, 0] * per + half, points[i, 1] * per + half
        out[i] = np.nan
        if fx >= 0 and fx < n and fy >= 0 and fy < n:
            floor = ground[int(fx), int(fy)]
            if floor < np.float32(np.inf):
                out[i] = points[i, 2] - floor


@njit(nogil=True, cache=True, error_model="numpy")
def cells_of(points, cell, n, out):
    """out (N,) i32: row * n + column of each point, -1 outside."""
    half = np.float32(n // 2)
    per = np.float32(1.0 / cell)
    for i in range(points.shape[0]):
        fx, fy = points[i, 0] * per + half, points[i, 1] * per + half
        if fx >= 0 and fx < n and fy >= 0 and fy < n:
            out[i] = int(fx) * n + int(fy)
        else:
            out[i] = -1


@njit(nogil=True, cache=True, error_model="numpy")
def components(occupied, near_cells, out):
    """Label connected components of occupied (n,n) bool into out (n,n) i32, from 0; -1 elsewhere; returns how many. Cells are connected
    with their 8 neighbours, and across one empty cell where they are farther than near_cells from the centre of the grid."""
    n = occupied.shape[0]
    out[:, :] = -1
    stack = np.empty(n * n, np.int32)
    count = 0
    for r0 in range(n):
        for c0 in range(n):
            if not occupied[r0, c0] or out[r0, c0] >= 0:
                continue
            out[r0, c0] = count
            stack[0] = r0 * n + c0
            depth = 1
            while depth:
                depth -= 1
                r, c = stack[depth] // n, stack[depth] % n
                dr, dc = r - n // 2, c - n // 2
                reach = 1 if dr * dr + dc * dc < near_cells * near_cells else 2
                for rr in range(max(r - reach, 0), min(r + reach, n - 1) + 1):
                    for cc in range(max(c - reach, 0), min(c + reach, n - 1) + 1):
                        if occupied[rr, cc] and out[rr, cc] < 0:
                            out[rr, cc] = count
                            stack[depth] = rr * n + cc
                            depth += 1
            count += 1
    return count


@njit(nogil=True, cache=True, error_model="numpy")
def splat(points, keep, cell, sigma, out):
    """Fold into out (n,n) u8, per cell, the largest 255 exp(-d²/2 sigma²) over occupied cells at distance d (of cell centres) within
    SPLAT_REACH cells. points (N,3), keep (N,) bool: which of them count."""
    n = out.shape[0]
    half = np.float32(n // 2)
    per = np.float32(1.0 / cell)
    width = 2 * SPLAT_REACH + 1
    kernel = np.empty((width, width), np.uint8)
    for r in range(width):
        for c in range(width):
            d2 = ((r - SPLAT_REACH) ** 2 + (c - SPLAT_REACH) ** 2) * cell * cell
            kernel[r, c] = np.uint8(255.0 * np.exp(-0.5 * d2 / (sigma * sigma)))
    for i in range(points.shape[0]):
        if not keep[i]:
            continue
        fx, fy = points[i, 0] * per + half, points[i, 1] * per + half
        if not (fx >= SPLAT_REACH and fx < n - SPLAT_REACH and fy >= SPLAT_REACH and fy < n - SPLAT_REACH):
            continue
        row, column = int(fx), int(fy)
        if out[row, column] == 255:
            continue
        for r in range(width):
            for c in range(width):
                at_r, at_c = row + r - SPLAT_REACH, column + c - SPLAT_REACH
                if kernel[r, c] > out[at_r, at_c]:
                    out[at_r, at_c] = kernel[r, c]


@njit(nogil=True, cache=True, error_model="numpy")
def overlap(points, vx, vy, turn, times, maps, cell, first):
    """Mean of maps[k] (n,n) u8 / 255 at points (M,2) moved back to times[k], averaged over sweeps k >= first: each point goes along
    (vx, vy) t, after a rotation by turn t about the points' mean and with the velocity turning along."""
    n = maps.shape[1]
    half = np.float32(n // 2)
    per = np.float32(1.0 / cell)
    m = points.shape[0]
    mean_x, mean_y = np.float32(0), np.float32(0)
    for i in range(m):
        mean_x += points[i, 0]
        mean_y += points[i, 1]
    mean_x /= m
    mean_y /= m
    total = np.int64(0)
    for k in range(first, maps.shape[0]):
        t = times[k]
        c, s = np.float32(np.cos(turn * t)), np.float32(np.sin(turn * t))
        hc, hs = np.float32(np.cos(0.5 * turn * t)), np.float32(np.sin(0.5 * turn * t))
        ox = mean_x + np.float32((vx * hc - vy * hs) * t)
        oy = mean_y + np.float32((vx * hs + vy * hc) * t)
        for i in range(m):
            x, y = points[i, 0] - mean_x, points[i, 1] - mean_y
            fx = (c * x - s * y + ox) * per + half
            fy = (s * x + c * y + oy) * per + half
            if fx >= 0 and fx < n and fy >= 0 and fy < n:
                total += maps[k, int(fx), int(fy)]
    return total / (255.0 * m * (maps.shape[0] - first))


@njit(nogil=True, cache=True, error_model="numpy")
def pool(map_, out):
    """out (n/POOL,n/POOL) u8: the largest of map_ (n,n) u8 within each block of POOL x POOL cells and the eight blocks around it, which
    bounds the map wherever a point of the block is moved by no more than a block."""
    n = out.shape[0]
    largest = np.zeros((n, n), np.uint8)
    for r in range(n):
        for rr in range(r * POOL, (r + 1) * POOL):
            for c in range(n):
                for cc in range(c * POOL, (c + 1) * POOL):
                    largest[r, c] = max(largest[r, c], map_[rr, cc])
    for r in range(n):
        for c in range(n):
            best = np.uint8(0)
            for rr in range(max(r - 1, 0), min(r + 1, n - 1) + 1):
                for cc in range(max(c - 1, 0), min(c + 1, n - 1) + 1):
                    best = max(best, largest[rr, cc])
            out[r, c] = best


@njit(nogil=True, cache=True, error_model="numpy")
def search(points, times, maps, pooled, cell, top, along, aside, step, first, least, peaks, scores):
    """Velocities of a grid of `step`, within `top` m/s or within `along` m/s of x and `aside` m/s of y, whose overlap over the sweeps
    k >= first is a local maximum of more than `least`: the best len(peaks) of them go to peaks (P,2) and scores (P,), best first (unused:
    score -1). pooled (T-1,n/POOL,n/POOL) u8: the maps by `pool`. Velocities are looked at in blocks, and not at all where the pooled maps
    say that none of a block can reach `least`."""
    half_x, half_y = int(max(top, along) / step), int(max(top, aside) / step)
    width_x, width_y = 2 * half_x + 1, 2 * half_y + 1
    grid = np.full((width_x, width_y), np.float32(-1))
    n = maps.shape[1]
    middle = np.float32(n // 2)
    per = np.float32(1.0 / cell)
    m = points.shape[0]
    sweeps = maps.shape[0] - first
    last = n // POOL - 1
    farthest = 0.0
    for k in range(first, maps.shape[0]):
        farthest = max(farthest, abs(times[k]))
    bounded = (BLOCK // 2) * step * farthest * per < POOL - 0.01
    enough = least * 255.0 * m * sweeps
    for a0 in range(0, width_x, BLOCK):
        for b0 in range(0, width_y, BLOCK):
            faster = (a0 + BLOCK - 1 - half_x) * step < -top or (a0 - half_x) * step > top
            if faster and ((b0 + BLOCK - 1 - half_y) * step < -aside or (b0 - half_y) * step > aside):
                continue
            if bounded:
                vx, vy = (a0 + BLOCK // 2 - half_x) * step, (b0 + BLOCK // 2 - half_y) * step
                bound = np.int64(0)
                for k in range(first, maps.shape[0]):
                    ox, oy = np.float32(vx * times[k]) * per + middle, np.float32(vy * times[k]) * per + middle
                    for i in range(m):
                        fx, fy = points[i, 0] * per + ox, points[i, 1] * per + oy
                        if fx > -POOL and fx < n + POOL and fy > -POOL and fy < n + POOL:
                            r, c = int(fx) // POOL, int(fy) // POOL
                            bound += pooled[k, min(max(r, 0), last), min(max(c, 0), last)]
                if bound <= enough:
                    continue
            for a in range(a0, min(a0 + BLOCK, width_x)):
                for b in range(b0, min(b0 + BLOCK, width_y)):
                    vx, vy = (a - half_x) * step, (b - half_y) * step
                    if vx * vx + vy * vy > top * top and (abs(vx) > along or abs(vy) > aside):
                        continue
                    total = np.int64(0)
                    for k in range(first, maps.shape[0]):
                        ox, oy = np.float32(vx * times[k]) * per + middle, np.float32(vy * times[k]) * per + middle
                        for i in range(m):
                            fx, fy = points[i, 0] * per + ox, points[i, 1] * per + oy
                            if fx >= 0 and fx < n and fy >= 0 and fy < n:
                                total += maps[k, int(fx), int(fy)]
                    grid[a, b] = total / (255.0 * m * sweeps)
    scores[:] = -1
    for a in range(1, width_x - 1):
        for b in range(1, width_y - 1):
            value = grid[a, b]
            if value <= scores[-1] or value <= least:
                continue
            best = True
            for da in range(-1, 2):
                for db in range(-1, 2):
                    other = grid[a + da, b + db]
                    if other > value or (other == value and (da < 0 or (da == 0 and db < 0))):
                        best = False
            if not best:
                continue
            at = scores.shape[0] - 1
            while at > 0 and scores[at - 1] < value:
                scores[at], peaks[at] = scores[at - 1], peaks[at - 1]
                at -= 1
            scores[at] = value
            peaks[at, 0], peaks[at, 1] = (a - half_x) * step, (b - half_y) * step


@njit(nogil=True, cache=True, error_model="numpy")
def climb(points, start, times, maps, cell, first, steps, with_turn, out):
    """From start (3,) = vx, vy, turn climb to a maximum of `overlap` by halving steps (L,2) of velocity and turn rate; out (3,);
    returns its overlap."""
    out[:] = start
    best = overlap(points, out[0], out[1], out[2], times, maps, cell, first)
    for level in range(steps.shape[0]):
        for _ in range(12):
            better = best
            choice, sign = -1, 0.0
            for axis in range(3 if with_turn else 2):
                step = steps[level, 0] if axis < 2 else steps[level, 1]
                for side in (-1.0, 1.0):
                    out[axis] += side * step
                    value = overlap(points, out[0], out[1], out[2], times, maps, cell, first)
                    out[axis] -= side * step
                    if value > better:
                        better, choice, sign = value, axis, side
            if choice < 0:
                break
            out[choice] += sign * (steps[level, 0] if choice < 2 else steps[level, 1])
            best = better
    return best


@njit(nogil=True, cache=True, error_model="numpy")
def sort_into_cells(points, keep, cell, n, start, order):
    """Rows of the kept points (N,3) by cell of a grid: start (n*n+1,) i32 zeros to fill, order (N,) i32; returns how many were kept."""
    half = np.float32(n // 2)
    per = np.float32(1.0 / cell)
    for i in range(points.shape[0]):
        if keep[i]:
            fx, fy = points[i, 0] * per + half, points[i, 1] * per + half
            if fx >= 0 and fx < n and fy >= 0 and fy < n:
                start[int(fx) * n + int(fy) + 1] += 1
    for c in range(n * n):
        start[c + 1] += start[c]
    at = start[:-1].copy()
    for i in range(points.shape[0]):
        if keep[i]:
            fx, fy = points[i, 0] * per + half, points[i, 1] * per + half
            if fx >= 0 and fx < n and fy >= 0 and fy < n:
                c = int(fx) * n + int(fy)
                order[at[c]] = i
                at[c] += 1
    return start[n * n]


@njit(nogil=True, cache=True, error_model="numpy")
def settle(points, old, start, order, cell, n, shift, limit, rounds, most, flat_weight):
    """Slide points (M,3) by shift (2,) f64, in place, until they lie on old points: in each round every point is paired with the nearest
    old one within limit[round] and every old one near them with the nearest point, both ways count, and the shift follows the mean
    difference of the pairs. At most `most` old points are looked at. Vertical differences count flat_weight times. Returns the mean
    squared horizontal distance of the last pairs and the smaller share (of the points, of the old points) that is paired."""
    m = points.shape[0]
    half = n // 2
    low_x, low_y = np.float32(np.inf), np.float32(np.inf)
    high_x, high_y = -np.float32(np.inf), -np.float32(np.inf)
    for i in range(m):
        low_x, high_x = min(low_x, points[i, 0]), max(high_x, points[i, 0])
        low_y, high_y = min(low_y, points[i, 1]), max(high_y, points[i, 1])
    margin = limit[0]
    x0, x1 = low_x + shift[0] - margin, high_x + shift[0] + margin
    y0, y1 = low_y + shift[1] - margin, high_y + shift[1] + margin
    r0, r1 = max(int(np.floor(x0 / cell)) + half, 0), min(int(np.floor(x1 / cell)) + half, n - 1)
    c0, c1 = max(int(np.floor(y0 / cell)) + half, 0), min(int(np.floor(y1 / cell)) + half, n - 1)
    count = 0
    for r in range(r0, r1 + 1):
        for at in range(start[r * n + c0] if c0 <= c1 else 0, start[r * n + c1 + 1] if c0 <= c1 else 0):
            j = order[at]
            if old[j, 0] >= x0 and old[j, 0] <= x1 and old[j, 1] >= y0 and old[j, 1] <= y1:
                count += 1
    if count == 0:
        return np.inf, 0.0
    stride = max((count + most - 1) // most, 1)
    near = np.empty((count // stride + 1, 3), np.float32)
    seen, kept = 0, 0
    for r in range(r0, r1 + 1):
        for at in range(start[r * n + c0], start[r * n + c1 + 1]):
            j = order[at]
            if old[j, 0] >= x0 and old[j, 0] <= x1 and old[j, 1] >= y0 and old[j, 1] <= y1:
                if seen % stride == 0:
                    near[kept] = old[j]
                    kept += 1
                seen += 1
    back = np.empty(kept, np.float32)
    back_of = np.empty(kept, np.int32)
    squared, share = np.inf, 0.0
    for turn in range(rounds):
        reach2 = np.float32(limit[turn] * limit[turn])
        sx, sy = np.float32(shift[0]), np.float32(shift[1])
        back[:] = np.float32(np.inf)
        sum_x, sum_y, sum_2, pairs, forward = 0.0, 0.0, 0.0, 0, 0
        for i in range(m):
            x, y, z = points[i, 0] + sx, points[i, 1] + sy, points[i, 2]
            best = np.float32(np.inf)
            best_j = -1
            for j in range(kept):
                dx, dy, dz = near[j, 0] - x, near[j, 1] - y, (near[j, 2] - z) * flat_weight
                d = dx * dx + dy * dy + dz * dz
                if d < best:
                    best, best_j = d, j
                if d < back[j]:
                    back[j], back_of[j] = d, i
            if best < reach2:
                dx, dy = near[best_j, 0] - x, near[best_j, 1] - y
                sum_x += dx
                sum_y += dy
                sum_2 += dx * dx + dy * dy
                pairs += 1
                forward += 1
        backward = 0
        for j in range(kept):
            if back[j] < reach2:
                dx, dy = near[j, 0] - points[back_of[j], 0] - sx, near[j, 1] - points[back_of[j], 1] - sy
                sum_x += dx
                sum_y += dy
                sum_2 += dx * dx + dy * dy
                pairs += 1
                backward += 1
        if pairs == 0:
            return np.inf, 0.0
        shift[0] += sum_x / pairs
        shift[1] += sum_y / pairs
        squared = sum_2 / pairs
        share = min(forward / m, backward / kept)
    return squared, share


@njit(nogil=True, cache=True, error_model="numpy")
def _behind(px, py, pz, m, start, azimuth, elevation, radius, n_elevation, step_elevation, reach_azimuth, reach_elevation):
    """The reading of a view nearest in direction to a point, minus the point's distance; NaN where it has none within reach."""
    columns = (start.shape[0] - 1) // n_elevation
    pi = np.float32(np.pi)
    x = m[0, 0] * px + m[0, 1] * py + m[0, 2] * pz + m[0, 3]
    y = m[1, 0] * px + m[1, 1] * py + m[1, 2] * pz + m[1, 3]
    z = m[2, 0] * px + m[2, 1] * py + m[2, 2] * pz + m[2, 3]
    out = np.float32(np.nan)
    flat2 = x * x + y * y
    distance = np.sqrt(flat2 + z * z)
    if not (distance > np.float32(0.1) and distance < np.float32(1e6)):
        return out
    scale_a, scale_e = np.float32(1 / reach_azimuth), np.float32(1 / reach_elevation)
    a, e = atan2(y, x), atan2(z, np.sqrt(flat2))
    column = int((a + pi) * np.float32(columns / (2 * np.pi))) % columns
    row = min(max(int((e + np.float32(np.pi / 2)) / np.float32(step_elevation)), 0), n_elevation - 1)
    best = np.float32(1)
    for r in range(max(row - 1, 0), min(row + 1, n_elevation - 1) + 1):
        for dc in range(-1, 2):
            c = r * columns + (column + dc) % columns
            for at in range(start[c], start[c + 1]):
                da = azimuth[at] - a
                if da > pi:
                    da -= np.float32(2 * np.pi)
                elif da < -pi:
                    da += np.float32(2 * np.pi)
                de = elevation[at] - e
                d = (da * scale_a) ** 2 + (de * scale_e) ** 2
                if d < best:
                    best = d
                    out = radius[at] - distance
    return out


@njit(nogil=True, cache=True, error_model="numpy")
def towards(points, sensor_from_points, start, azimuth, elevation, radius, n_elevation, step_elevation, reach_azimuth, reach_elevation, out):
    """out (N,) f32: the reading of a view (cells as `View` sorts them) nearest in direction to each point (N,3), within the given reach in
    azimuth and elevation (an ellipse; at most a cell each), minus the point's distance from the sensor; NaN where there is none."""
    m = sensor_from_points.astype(np.float32)
    for i in range(points.shape[0]):
        out[i] = _behind(
            points[i, 0], points[i, 1], points[i, 2],
            m, start, azimuth, elevation, radius, n_elevation, step_elevation, reach_azimuth, reach_elevation,
        )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy")
def _sector(x, y):
    """0..SECTORS - 1, ascending with azimuth, without a trigonometric function; x and y are not both 0."""
    share = y / (abs(x) + abs(y))
    turned = np.float32(2) - share if x < 0 else (share if share >= 0 else np.float32(4) + share)
    return min(int(turned * np.float32(SECTORS / 4)), SECTORS - 1)


@njit(nogil=True, cache=True, error_model="numpy")
def hidden(points, sensor_from_points, start, azimuth, elevation, radius, n_elevation, step_elevation, reach_azimuth, reach_elevation, margin, out):
    """out (N,) bool: points (N,3) in whose direction `towards` finds a reading more than margin nearer than they are. Quick where
    the view fills little of the horizon: what lies in no sector with a reading, or nearer than all of those, needs no search."""
    nearest = np.full(SECTORS, np.float32(np.inf))
    for at in range(azimuth.shape[0]):
        # one sector more on both sides: `_sector` of a point and of its azimuth may differ by rounding
        low = _sector(np.cos(azimuth[at] - reach_azimuth), np.sin(azimuth[at] - reach_azimuth)) - 1
        high = _sector(np.cos(azimuth[at] + reach_azimuth), np.sin(azimuth[at] + reach_azimuth)) + 1
        if high < low:
            high += SECTORS
        for sector in range(low, high + 1):
            if radius[at] < nearest[sector % SECTORS]:
                nearest[sector % SECTORS] = radius[at]
    m = sensor_from_points.astype(np.float32)
    for i in range(points.shape[0]):
        px, py, pz = points[i, 0], points[i, 1], points[i, 2]
        x = m[0, 0] * px + m[0, 1] * py + m[0, 2] * pz + m[0, 3]
        y = m[1, 0] * px + m[1, 1] * py + m[1, 2] * pz + m[1, 3]
        z = m[2, 0] * px + m[2, 1] * py + m[2, 2] * pz + m[2, 3]
        out[i] = False
        if not abs(x) + abs(y) > 0:
            continue
        near = nearest[_sector(x, y)]
        if x * x + y * y + z * z > near * near:
            depth = _behind(px, py, pz, m, start, azimuth, elevation, radius, n_elevation, step_elevation, reach_azimuth, reach_elevation)
            out[i] = depth < -margin


@njit(nogil=True, cache=True, error_model="numpy")
def seen_through(points, vx, vy, times, sweeps, looks, margin, out):
    """out (K,) f64: the share of points (M,3), moved along (vx, vy) to times (K,), behind which the sweep sweeps[k] reads more than margin.
    looks: the sweeps' cells joined, see `sensors.motion`."""
    start, first, azimuth, elevation, radius, poses, n_elevation, step, reach_azimuth, reach_elevation = looks
    for k in range(sweeps.shape[0]):
        s, count = sweeps[k], 0
        sx, sy = np.float32(vx * times[k]), np.float32(vy * times[k])
        low, high = first[s], first[s + 1]
        a, e, r = azimuth[low:high], elevation[low:high], radius[low:high]
        for i in range(points.shape[0]):
            depth = _behind(
                points[i, 0] + sx, points[i, 1] + sy, points[i, 2], poses[s], start[s], a, e, r, n_elevation, step, reach_azimuth, reach_elevation
            )
            if depth > margin:
                count += 1
        out[k] = count / points.shape[0]


@njit(nogil=True, cache=True, error_model="numpy")
def match(points, vx, vy, times, maps, cell, looks, margin, hidden_counts, needed):
    """How well points (M,3) fit the maps (T-1,n,n) u8 when they came at (vx, vy): the mean of maps / 255 at their places, those places
    counting only hidden_counts that fit badly (less than half) and could not be seen, being more than margin behind a reading. 0 where the
    plain mean is less than hidden_counts, or the score is sure not to exceed needed."""
    n = maps.shape[1]
    half = np.float32(n // 2)
    per = np.float32(1.0 / cell)
    m, sweeps = points.shape[0], maps.shape[0]
    size = m * sweeps
    bad = np.empty((sweeps, m), np.bool_)
    total, count = 0.0, 0
    for k in range(sweeps):
        ox, oy = np.float32(vx * times[k]) * per + half, np.float32(vy * times[k]) * per + half
        for i in range(m):
            fx, fy = points[i, 0] * per + ox, points[i, 1] * per + oy
            value = 0
            if fx >= 0 and fx < n and fy >= 0 and fy < n:
                value = int(maps[k, int(fx), int(fy)])
            total += value
            bad[k, i] = 2 * value < 255
            count += bad[k, i]
    total /= 255.0
    if total < hidden_counts * size or total <= needed * (size - (1 - hidden_counts) * count):
        return 0.0
    start, first, azimuth, elevation, radius, poses, n_elevation, step, reach_azimuth, reach_elevation = looks
    unseen = 0
    for k in range(sweeps):
        sx, sy = np.float32(vx * times[k]), np.float32(vy * times[k])
        low, high = first[k], first[k + 1]
        a, e, r = azimuth[low:high], elevation[low:high], radius[low:high]
        for i in range(m):
            if bad[k, i]:
                depth = _behind(
                    points[i, 0] + sx, points[i, 1] + sy, points[i, 2], poses[k], start[k], a, e, r, n_elevation, step, reach_azimuth, reach_elevation
                )
                unseen += depth < -margin
    return total / (size - (1 - hidden_counts) * unseen)


@njit(nogil=True, cache=True, error_model="numpy")
def take_inside(points, height, cos, sin, low, high, lowest_height, inner, outer, free, rows):
    """Rows (N,) i32 of the free points (N,3) within the box low..high (3,) grown by inner, see `inside`; then no point within the box grown
    by outer, which is not smaller, is free (N,) any more. Returns how many rows were taken."""
    count = 0
    for i in range(points.shape[0]):
        along = points[i, 0] * cos + points[i, 1] * sin
        if not (along > low[0] - outer and along < high[0] + outer):
            continue
        left = points[i, 1] * cos - points[i, 0] * sin
        if not (left > low[1] - outer and left < high[1] + outer and height[i] > lowest_height and height[i] < high[2]):
            continue
        if free[i] and along > low[0] - inner and along < high[0] + inner and left > low[1] - inner and left < high[1] + inner:
            rows[count] = i
            count += 1
        free[i] = False
    return count


@njit(nogil=True, cache=True, error_model="numpy")
def inside(points, height, cos, sin, low, high, lowest_height, out):
    """out (N,) bool: points (N,3) whose coordinates along (cos, sin) and left of it lie within low..high (2,), and whose height over the
    ground is lowest_height .. high[2]."""
    for i in range(points.shape[0]):
        along = points[i, 0] * cos + points[i, 1] * sin
        out[i] = False
        if along > low[0] and along < high[0]:
            left = points[i, 1] * cos - points[i, 0] * sin
            out[i] = left > low[1] and left < high[1] and height[i] > lowest_height and height[i] < high[2]


@njit(nogil=True, cache=True, error_model="numpy")
def point_overlap(points, vx, vy, times, maps, cell, out):
    """out (M,T-1) f32: maps[k] / 255 at each point (M,2) moved along (vx, vy) to times[k]."""
    n = maps.shape[1]
    half = np.float32(n // 2)
    per = np.float32(1.0 / cell)
    for k in range(maps.shape[0]):
        ox, oy = np.float32(vx * times[k]) * per + half, np.float32(vy * times[k]) * per + half
        for i in range(points.shape[0]):
            fx, fy = points[i, 0] * per + ox, points[i, 1] * per + oy
            out[i, k] = 0
            if fx >= 0 and fx < n and fy >= 0 and fy < n:
                out[i, k] = maps[k, int(fx), int(fy)] / np.float32(255)
