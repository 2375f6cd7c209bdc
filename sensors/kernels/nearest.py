"""Exact nearest neighbours between two clouds, for Chamfer distances.

Points are sorted along a Morton curve; sixteen consecutive ones are a leaf, and an implicit complete binary tree of boxes stands over the
leaves. Sixteen queries, a leaf of the other cloud, descend together: the nearer child first, nothing entered whose box is no nearer than
the worst of the sixteen. LiDAR density varies a thousandfold, which a grid of fixed cells does not survive and this does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32, int32, njit, uint64
from numpy.typing import NDArray

Array = NDArray[Any]
# leaves, order and boxes, as `_index` gives them
Index = tuple[Array, Array, Array]

LEAF = 16
# the padding of the last leaf: farther than any point allowed, and its square is finite
NOWHERE = np.float32(1e15)
REACH_M = 1e9
BITS = 11
MAX_POINTS = 1 << 24


@njit(nogil=True, cache=True, error_model="numpy")
def _spread(v):
    """The low 11 bits of v, two zeros between each."""
    v = (v | (v << uint64(16))) & uint64(0xFF0000FF)
    v = (v | (v << uint64(8))) & uint64(0x70F00F00F)
    v = (v | (v << uint64(4))) & uint64(0x430C30C30C3)
    return (v | (v << uint64(2))) & uint64(0x249249249)


@njit(nogil=True, cache=True, error_model="numpy")
def _morton_order(points):
    n = points.shape[0]
    low, high = np.full(3, np.inf, np.float32), np.full(3, -np.inf, np.float32)
    for i in range(n):
        for a in range(3):
            low[a] = min(low[a], points[i, a])
            high[a] = max(high[a], points[i, a])
    extent = max(max(high[0] - low[0], high[1] - low[1]), high[2] - low[2])
    top = float32((1 << BITS) - 1)
    scale = top / extent if extent > float32(1e-30) else float32(0)
    keys, order = np.empty(n, np.uint64), np.empty(n, np.int32)
    counts = np.zeros((3, 1 << BITS), np.int32)
    mask = uint64((1 << BITS) - 1)
    for i in range(n):
        x = uint64(min((points[i, 0] - low[0]) * scale, top))
        y = uint64(min((points[i, 1] - low[1]) * scale, top))
        z = uint64(min((points[i, 2] - low[2]) * scale, top))
        key = _spread(x) | (_spread(y) << uint64(1)) | (_spread(z) << uint64(2))
        keys[i] = key
        order[i] = i
        for digit in range(3):
            counts[digit, (key >> uint64(BITS * digit)) & mask] += 1
    other_keys, other_order = np.empty(n, np.uint64), np.empty(n, np.int32)
    for digit in range(3):
        total = 0
        for b in range(1 << BITS):
            here = counts[digit, b]
            counts[digit, b] = total
            total += here
        shift = uint64(BITS * digit)
        for i in range(n):
            bucket = (keys[i] >> shift) & mask
            at = uint64(counts[digit, bucket])
            counts[digit, bucket] += int32(1)
            other_keys[at] = keys[i]
            other_order[at] = order[i]
        keys, other_keys = other_keys, keys
        order, other_order = other_order, order
    return order


@njit(nogil=True, cache=True, error_model="numpy")
def _index(points):
    """Leaves (L, 3, 16) f32 of the points along the curve, their order (n,) i32, and the boxes (2 P, 6) f32 of the tree: children of node b
    are 2b and 2b + 1, leaf l is node P + l; a box is low xyz, high xyz, inside out where empty."""
    n = points.shape[0]
    order = _morton_order(points)
    n_leaves = (n + LEAF - 1) // LEAF
    width = 1
    while width < n_leaves:
        width *= 2
    leaves = np.full((n_leaves, 3, LEAF), NOWHERE, np.float32)
    boxes = np.empty((2 * width, 6), np.float32)
    boxes[:, :3] = NOWHERE
    boxes[:, 3:] = -NOWHERE
    for at in range(n):
        leaf, lane, i = at // LEAF, at % LEAF, order[at]
        for a in range(3):
            value = points[i, a]
            leaves[leaf, a, lane] = value
            boxes[width + leaf, a] = min(boxes[width + leaf, a], value)
            boxes[width + leaf, 3 + a] = max(boxes[width + leaf, 3 + a], value)
    for b in range(width - 1, 0, -1):
        for a in range(3):
            boxes[b, a] = min(boxes[2 * b, a], boxes[2 * b + 1, a])
            boxes[b, 3 + a] = max(boxes[2 * b, 3 + a], boxes[2 * b + 1, 3 + a])
    return leaves, order, boxes


@njit(nogil=True, cache=True, error_model="numpy")
def _box_distance2(boxes, b, lx, ly, lz, hx, hy, hz):
    zero = float32(0)
    x = max(max(boxes[b, 0] - hx, lx - boxes[b, 3]), zero)
    y = max(max(boxes[b, 1] - hy, ly - boxes[b, 4]), zero)
    z = max(max(boxes[b, 2] - hz, lz - boxes[b, 5]), zero)
    return x * x + y * y + z * z


@njit(nogil=True, cache=True, error_model="numpy")
def _leaf_pair(lanes, leaves, leaf):
    """Sixteen queries against sixteen targets. `lanes` (80,) holds x, y, z, best squared distance and where that was found (a position
    along the curve, exact in float32 below 2^24): one array, so that the vectoriser sees that they do not overlap."""
    first = float32(leaf * LEAF)
    for t in range(0, LEAF, 4):
        x0, x1, x2, x3 = leaves[leaf, 0, t], leaves[leaf, 0, t + 1], leaves[leaf, 0, t + 2], leaves[leaf, 0, t + 3]
        y0, y1, y2, y3 = leaves[leaf, 1, t], leaves[leaf, 1, t + 1], leaves[leaf, 1, t + 2], leaves[leaf, 1, t + 3]
        z0, z1, z2, z3 = leaves[leaf, 2, t], leaves[leaf, 2, t + 1], leaves[leaf, 2, t + 2], leaves[leaf, 2, t + 3]
        at0 = first + float32(t)
        at1, at2, at3 = at0 + float32(1), at0 + float32(2), at0 + float32(3)
        for i in range(LEAF):
            x, y, z = lanes[i], lanes[i + 16], lanes[i + 32]
            a, b, c = x - x0, y - y0, z - z0
            d0 = a * a + b * b + c * c
            a, b, c = x - x1, y - y1, z - z1
            d1 = a * a + b * b + c * c
            a, b, c = x - x2, y - y2, z - z2
            d2 = a * a + b * b + c * c
            a, b, c = x - x3, y - y3, z - z3
            d3 = a * a + b * b + c * c
            at01 = at1 if d1 < d0 else at0
            d01 = d1 if d1 < d0 else d0
            at23 = at3 if d3 < d2 else at2
            d23 = d3 if d3 < d2 else d2
            at = at23 if d23 < d01 else at01
            d = d23 if d23 < d01 else d01
            best, found = lanes[i + 48], lanes[i + 64]
            lanes[i + 64] = at if d < best else found
            lanes[i + 48] = d if d < best else best


@njit(nogil=True, cache=True, error_model="numpy")
def _worst(lanes):
    worst = float32(0)
    for i in range(48, 64):
        worst = max(worst, lanes[i])
    return worst


@njit(nogil=True, cache=True, error_model="numpy")
def _any_lane_near(lanes, boxes, b):
    zero = float32(0)
    lx, ly, lz, hx, hy, hz = boxes[b, 0], boxes[b, 1], boxes[b, 2], boxes[b, 3], boxes[b, 4], boxes[b, 5]
    near = 0
    for i in range(LEAF):
        x = max(max(lx - lanes[i], lanes[i] - hx), zero)
        y = max(max(ly - lanes[i + 16], lanes[i + 16] - hy), zero)
        z = max(max(lz - lanes[i + 32], lanes[i + 32] - hz), zero)
        near += int(x * x + y * y + z * z < lanes[i + 48])
    return near > 0


@njit(nogil=True, cache=True, error_model="numpy")
def _search(q_leaves, q_order, q_boxes, leaves, order, boxes, index):
    n = q_order.shape[0]
    q_width, width = q_boxes.shape[0] // 2, boxes.shape[0] // 2
    lanes = np.empty(5 * LEAF, np.float32)
    stack, stack_d = np.empty(64, np.int64), np.empty(64, np.float32)
    warm = 0
    for q_leaf in range(q_leaves.shape[0]):
        count = min(LEAF, n - q_leaf * LEAF)
        for i in range(LEAF):
            k = min(i, count - 1)
            lanes[i], lanes[i + 16], lanes[i + 32] = q_leaves[q_leaf, 0, k], q_leaves[q_leaf, 1, k], q_leaves[q_leaf, 2, k]
            lanes[i + 48], lanes[i + 64] = float32(3e38), float32(0)
        box = q_boxes[q_width + q_leaf]
        lx, ly, lz, hx, hy, hz = box[0], box[1], box[2], box[3], box[4], box[5]
        _leaf_pair(lanes, leaves, warm)
        worst = _worst(lanes)
        depth = 1
        stack[0], stack_d[0] = 1, float32(0)
        while depth > 0:
            depth -= 1
            node, distance = stack[depth], stack_d[depth]
            if distance >= worst:
                continue
            while node < width:
                near, far = 2 * node, 2 * node + 1
                near_d = _box_distance2(boxes, near, lx, ly, lz, hx, hy, hz)
                far_d = _box_distance2(boxes, far, lx, ly, lz, hx, hy, hz)
                if far_d < near_d:
                    near, far = far, near
                    near_d, far_d = far_d, near_d
                if far_d < worst:
                    stack[depth], stack_d[depth] = far, far_d
                    depth += 1
                node, distance = near, near_d
                if near_d >= worst:
                    break
            leaf = node - width
            if node >= width and leaf != warm and distance < worst and _any_lane_near(lanes, boxes, node):
                _leaf_pair(lanes, leaves, leaf)
                worst = _worst(lanes)
        for i in range(count):
            index[q_order[q_leaf * LEAF + i]] = order[int(lanes[i + 64])]
        warm = int(lanes[count - 1 + 64]) // LEAF


@njit(nogil=True, cache=True, error_model="numpy")
def _distances2(queries, targets, index, out):
    for i in range(index.shape[0]):
        j = index[i]
        x, y, z = float(queries[i, 0]) - targets[j, 0], float(queries[i, 1]) - targets[j, 1], float(queries[i, 2]) - targets[j, 2]
        out[i] = x * x + y * y + z * z


def _checked(name: str, cloud: Array) -> Array:
    if not isinstance(cloud, np.ndarray) or cloud.dtype not in (np.float32, np.float64) or cloud.ndim != 2 or cloud.shape[1] != 3:
        found = f"{cloud.dtype} {cloud.shape}" if isinstance(cloud, np.ndarray) else type(cloud).__name__
        raise ValueError(f"nearest: {name} are {found}; give float32 or float64 (N, 3)")
    if len(cloud) >= MAX_POINTS:
        raise ValueError(f"nearest: {len(cloud)} {name}; at most {MAX_POINTS - 1}")
    if not (np.abs(cloud) <= REACH_M).all():
        raise ValueError(f"nearest: {name} hold NaN, infinite or coordinates beyond 1e9 m; drop those points first")
    return np.ascontiguousarray(cloud, np.float64)


def _result(queries: Array, q_index: Index | None, targets: Array, t_index: Index | None) -> tuple[Array, Array]:
    index = np.full(len(queries), -1, np.int64)
    distance2 = np.full(len(queries), np.inf)
    if q_index is not None and t_index is not None:
        _search(*q_index, *t_index, index)
        _distances2(queries, targets, index, distance2)
    return distance2, index


def _indexed(a: Array, b: Array) -> tuple[Index | None, Index | None]:
    """Both clouds in float32, about the middle of b when far from the origin, so that they keep their digits. Nones where one is empty."""
    if not len(a) or not len(b):
        return None, None
    origin = (b.min(0) + b.max(0)) * 0.5 if max(np.abs(a).max(), np.abs(b).max()) > 1000.0 else np.zeros(3)
    return _index((a - origin).astype(np.float32)), _index((b - origin).astype(np.float32))


def nearest(queries: Array, targets: Array) -> tuple[Array, Array]:
    """For each query (N,3) its nearest target (M,3), f32 or f64, metres: squared distance (N,) f64 and index (N,) i64; inf and -1 where
    there are no targets. Distances are compared in float32 and then computed in float64: no other target is nearer by more than rounding
    (1e-6 of the distance, 1e-7 of the clouds' extent). Of equally near ones, the same every time. ValueError for NaN, infinities, beyond
    1e9 m, other types and shapes."""
    queries, targets = _checked("queries", queries), _checked("targets", targets)
    q_index, t_index = _indexed(queries, targets)
    return _result(queries, q_index, targets, t_index)


def both_ways(a: Array, b: Array) -> tuple[Array, Array, Array, Array]:
    """`nearest(a, b)` and `nearest(b, a)` with each cloud sorted once: squared distances (N,) f64 and indices (N,) i64 of a in b, then
    squared distances (M,) and indices (M,) of b in a."""
    a, b = _checked("points of a", a), _checked("points of b", b)
    a_index, b_index = _indexed(a, b)
    return (*_result(a, a_index, b, b_index), *_result(b, b_index, a, a_index))
