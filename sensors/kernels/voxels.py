"""Points into cells: pillars and voxels in CSR form, the features of a pillar encoder, and the fixed-size voxels of spconv.

One cell rule for all of them, that of spconv and OpenPCDet bit for bit: a = (p - low) / size in float32 (a division: multiplying by 1 / size
moves points on borders), inside when 0 <= a < shape on every axis, tested as floats so that NaN, infinities and huge coordinates never reach
an integer; the cell is a truncated. The linear cell of (x, y, z) is (z * ny + y) * nx + x; pillars are voxels with nz = 1.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import float32, int32, njit, types, uint32, uint64
from numba.extending import intrinsic
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 256
AHEAD = 16
# counts ride in float32 beside the sums
MAX_POINTS = 1 << 24
MAX_SIDE = 1 << 24
MAX_CELLS = (1 << 31) - 1


@intrinsic
def _popcount(typingctx, word):
    return types.uint64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


@intrinsic
def _trailing_zeros(typingctx, word):
    def generate(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@intrinsic
def _prefetch(typingctx, array, index):
    """Asks for the cache line of array[index] (one-dimensional, contiguous), to be written soon. Never faults, whatever the index."""

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32]))
        builder.call(function, [pointer, i32(1), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(array, types.uint64), generate


@njit(nogil=True, cache=True, error_model="numpy")
def _cells(points, low, size, nx, ny, nz, of, oid, oix):
    """The linear cell of each point, or -1, into `of`; the inside ones side by side into `oid` (cell) and `oix` (point). Their number."""
    n = points.shape[0]
    px, py, pz = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    ids = np.empty(BLOCK, np.int32)
    lx, ly, lz = low[0], low[1], low[2]
    sx, sy, sz = size[0], size[1], size[2]
    fx, fy, fz = float32(nx), float32(ny), float32(nz)
    inx, iny = int32(nx), int32(ny)
    zero = float32(0)
    m = uint64(0)
    for start in range(0, n, BLOCK):
        count = min(BLOCK, n - start)
        for k in range(count):
            px[k], py[k], pz[k] = points[start + k, 0], points[start + k, 1], points[start + k, 2]
        for k in range(count):
            a, b, c = (px[k] - lx) / sx, (py[k] - ly) / sy, (pz[k] - lz) / sz
            inside = (a >= zero) & (a < fx) & (b >= zero) & (b < fy) & (c >= zero) & (c < fz)
            x, y, z = int32(a if inside else zero), int32(b if inside else zero), int32(c if inside else zero)
            cell = int32(int32(int32(int32(z * iny) + y) * inx) + x)
            ids[k] = cell if inside else int32(-1)
        for k in range(count):
            cell = ids[k]
            of[start + k] = cell
            oid[m] = cell
            oix[m] = start + k
            m += uint64(cell >= 0)
    return m


@njit(nogil=True, cache=True, error_model="numpy")
def _group(points, low, size, nx, ny, nz, words, summary, before):
    """CSR by an occupancy bitmap and popcount ranks: sorted cells without sorting. `words` and `summary` come in and go out all zero."""
    n = points.shape[0]
    of = np.empty(n, np.int32)
    # one slot more than points: the compaction always writes and advances only where a point is inside
    oid = np.zeros(n + AHEAD + 1, np.int32)
    oix = np.empty(n + 1, np.int32)
    m = _cells(points, low, size, nx, ny, nz, of, oid, oix)
    for j in range(m, m + uint64(AHEAD + 1)):
        oid[j] = 0
    one, low6 = uint64(1), uint64(63)
    six = uint64(6)
    for j in range(m):
        _prefetch(words, uint64(oid[j + uint64(AHEAD)]) >> six)
        cell = uint64(oid[j])
        word = cell >> six
        words[word] |= one << (cell & low6)
        summary[word >> six] |= one << (word & low6)
    count = 0
    for s in range(summary.shape[0]):
        left = summary[s]
        while left != uint64(0):
            word = (uint64(s) << six) + _trailing_zeros(left)
            left &= left - one
            before[word] = count
            count += int(_popcount(words[word]))
    cells = np.empty(count, np.int32)
    at = 0
    for s in range(summary.shape[0]):
        left = summary[s]
        while left != uint64(0):
            word = (uint64(s) << six) + _trailing_zeros(left)
            left &= left - one
            bits = words[word]
            while bits != uint64(0):
                cells[at] = int32((word << six) + _trailing_zeros(bits))
                bits &= bits - one
                at += 1
    # x, y, z and the count share one 16-byte slot
    sums = np.zeros(4 * count, np.float32)
    for j in range(m):
        cell = uint64(oid[j])
        word = cell >> six
        bit = one << (cell & low6)
        rank = uint64(before[word]) + _popcount(words[word] & (bit - one))
        i = uint64(oix[j])
        oid[j] = rank
        of[i] = rank
        slot = rank << uint64(2)
        # all loads before all stores: one vector add
        x, y, z = points[i, 0], points[i, 1], points[i, 2]
        s0, s1, s2, s3 = sums[slot], sums[slot + one], sums[slot + uint64(2)], sums[slot + uint64(3)]
        sums[slot], sums[slot + one], sums[slot + uint64(2)], sums[slot + uint64(3)] = s0 + x, s1 + y, s2 + z, s3 + float32(1)
    for s in range(summary.shape[0]):
        left = summary[s]
        while left != uint64(0):
            words[(uint64(s) << six) + _trailing_zeros(left)] = uint64(0)
            left &= left - one
        summary[s] = uint64(0)
    mean = np.empty((count, 3), np.float32)
    row = np.empty(count + 1, np.int32)
    fill = np.empty(count, np.int32)
    total = 0
    for v in range(count):
        number = sums[4 * v + 3]
        mean[v, 0], mean[v, 1], mean[v, 2] = sums[4 * v] / number, sums[4 * v + 1] / number, sums[4 * v + 2] / number
        row[v] = total
        fill[v] = total
        total += int(number)
    row[count] = total
    order = np.empty(total, np.int32)
    for j in range(m):
        rank = uint64(oid[j])
        at_point = uint64(fill[rank])
        order[at_point] = oix[j]
        fill[rank] += int32(1)
    return cells, row, order, of, mean


@njit(nogil=True, cache=True, error_model="numpy")
def _features(points, cells, order, of, mean, low, size, nx, ny, out):
    width = points.shape[1]
    half = float32(0.5)
    ox, oy, oz = low[0] + size[0] * half, low[1] + size[1] * half, low[2] + size[2] * half
    sx, sy, sz = size[0], size[1], size[2]
    number = cells.shape[0]
    # a division of float64 is exact for cells below 2^31, and several times as fast as one of integers
    fx, fy = float(nx), float(ny)
    inx, iny = int32(nx), int32(ny)
    around = np.empty(8 * number, np.float32)
    for v in range(number):
        cell = cells[v]
        line = int32(cell / fx)
        layer = int32(line / fy)
        slot = uint64(v) << uint64(3)
        around[slot], around[slot + uint64(1)], around[slot + uint64(2)] = mean[v, 0], mean[v, 1], mean[v, 2]
        around[slot + uint64(3)] = float32(float32(int32(cell - line * inx)) * sx) + ox
        around[slot + uint64(4)] = float32(float32(int32(line - layer * iny)) * sy) + oy
        around[slot + uint64(5)] = float32(float32(layer) * sz) + oz
    for k in range(order.shape[0]):
        i = uint64(order[k])
        slot = uint64(of[i]) << uint64(3)
        x, y, z = points[i, 0], points[i, 1], points[i, 2]
        out[k, 0], out[k, 1], out[k, 2] = x, y, z
        for f in range(3, width):
            out[k, f] = points[i, f]
        m0, m1, m2 = around[slot], around[slot + uint64(1)], around[slot + uint64(2)]
        c0, c1, c2 = around[slot + uint64(3)], around[slot + uint64(4)], around[slot + uint64(5)]
        out[k, width], out[k, width + 1], out[k, width + 2] = x - m0, y - m1, z - m2
        out[k, width + 3], out[k, width + 4], out[k, width + 5] = x - c0, y - c1, z - c2


@njit(nogil=True, cache=True, error_model="numpy")
def _hard(points, low, size, nx, ny, nz, max_points, max_voxels, shift, table, table_bits, voxels, coords, counts):
    """Voxels in order of first appearance. A table entry is cell << 32 | voxel << shift | points in it; all ones is empty."""
    n, width = points.shape
    of = np.empty(n, np.int32)
    oid = np.zeros(n + AHEAD + 1, np.int32)
    oix = np.empty(n + 1, np.int32)
    m = _cells(points, low, size, nx, ny, nz, of, oid, oix)
    for j in range(m, m + uint64(AHEAD + 1)):
        oid[j] = 0
    empty, one = uint64(0xFFFFFFFFFFFFFFFF), uint64(1)
    thirty_two = uint64(32)
    word_mask = uint64(0xFFFFFFFF)
    golden, down = uint32(2654435769), uint64(32 - table_bits)
    last = uint64((1 << table_bits) - 1)
    left, limit = uint64(shift), uint64(max_points)
    count_mask = (one << left) - one
    most = uint64(max_voxels)
    number, zeroed = uint64(0), uint64(0)
    for j in range(m):
        # uint32 * uint32 is uint64 here: cut it back to 32 bits
        _prefetch(table, uint64(uint32(uint32(oid[j + uint64(AHEAD)]) * golden)) >> down)
        cell = uint64(oid[j])
        slot = uint64(uint32(uint32(cell) * golden)) >> down
        entry = table[slot]
        while entry != empty and (entry >> thirty_two) != cell:
            slot = (slot + one) & last
            entry = table[slot]
        new = entry == empty
        if new and number >= most:
            continue
        if number >= zeroed:
            more = min(zeroed + uint64(64), most)
            voxels[zeroed:more] = float32(0)
            zeroed = more
        word = (number << left) if new else (entry & word_mask)
        number += uint64(new)
        voxel, k = word >> left, word & count_mask
        coords[voxel, 0] = int32(cell)
        if k < limit:
            table[slot] = (cell << thirty_two) | (word + one)
            counts[voxel] = int32(k + one)
            i = uint64(oix[j])
            if width == 4:
                voxels[voxel, k, 0] = points[i, 0]
                voxels[voxel, k, 1] = points[i, 1]
                voxels[voxel, k, 2] = points[i, 2]
                voxels[voxel, k, 3] = points[i, 3]
            else:
                for f in range(width):
                    voxels[voxel, k, f] = points[i, f]
    for v in range(number):
        cell_of = coords[v, 0]
        coords[v, 0] = cell_of // (nx * ny)
        coords[v, 1] = cell_of // nx % ny
        coords[v, 2] = cell_of % nx
    return number


_workspace = threading.local()


def _bitmaps(cells: int) -> tuple[Array, Array, Array]:
    """All-zero bitmap, its summary, and a rank per word, kept per thread: the kernel hands the first two back all zero."""
    words = (cells + 63) // 64
    kept: tuple[Array, Array, Array] | None = getattr(_workspace, "bitmaps", None)
    if kept is None or len(kept[0]) < words:
        kept = np.zeros(words, np.uint64), np.zeros((words + 63) // 64, np.uint64), np.empty(words, np.int32)
        _workspace.bitmaps = kept
    return kept[0][:words], kept[1][: (words + 63) // 64], kept[2][:words]


@dataclass(frozen=True)
class Pillars:
    """The occupied cells of a grid and the points in them. cells (V,) i32 linear, ascending; row (V+1,) i32: the points of cell v are
    order[row[v]:row[v+1]], in their own order (M,) i32; of (N,) i32: each point's v, or -1 outside; mean (V,3) f32 of the points' xyz.
    low (3,), size (3,) f32 and shape (nx, ny, nz) are the grid's."""

    cells: Array
    row: Array
    order: Array
    of: Array
    mean: Array
    low: Array
    size: Array
    shape: tuple[int, int, int]


def _checked(what: str, points: Array, low: Any, size: Any, shape: Sequence[int]) -> tuple[Array, Array, Array, tuple[int, int, int]]:
    if not isinstance(points, np.ndarray) or points.dtype != np.float32 or points.ndim != 2 or points.shape[1] < 3:
        found = f"{points.dtype} {points.shape}" if isinstance(points, np.ndarray) else type(points).__name__
        raise ValueError(f"{what}: points are {found}; give float32 (N, F) with F >= 3, xyz first")
    if len(points) >= MAX_POINTS:
        raise ValueError(f"{what}: {len(points)} points; at most {MAX_POINTS - 1} at a time")
    low32, size32 = np.array(low, np.float32), np.array(size, np.float32)
    if low32.shape != (3,) or size32.shape != (3,) or not np.isfinite(low32).all() or not np.isfinite(size32).all() or not (size32 > 0).all():
        raise ValueError(f"{what}: low {low} and size {size} must be three finite numbers each, sizes above 0")
    whole = tuple(int(s) for s in shape)
    if len(whole) == 2:
        whole = (*whole, 1)
    if len(whole) != 3 or min(whole) < 1 or max(whole) >= MAX_SIDE or whole[0] * whole[1] * whole[2] > MAX_CELLS:
        raise ValueError(f"{what}: shape {tuple(shape)} must be (nx, ny) or (nx, ny, nz), each below 2^24, below 2^31 cells in all")
    return np.ascontiguousarray(points), low32, size32, (whole[0], whole[1], whole[2])


def grid_shape(low: Any, high: Any, size: Any) -> tuple[int, int, int]:
    """(nx, ny, nz) of the box low..high (3,) in cells of size (3,): rounded in float64, halves up, as spconv does."""
    low64, high64, size64 = (np.array(v, np.float64) for v in (low, high, size))
    if not (low64.shape == high64.shape == size64.shape == (3,)) or not np.isfinite([low64, high64, size64]).all() or not (size64 > 0).all():
        raise ValueError(f"grid_shape: low {low}, high {high}, size {size} must be three finite numbers each, sizes above 0")
    sides = np.floor((high64 - low64) / size64 + 0.5)
    if not ((sides >= 1) & (sides < MAX_SIDE)).all():
        raise ValueError(f"grid_shape: {sides.tolist()} cells from {low} to {high} by {size}; give 1 to 2^24 on each axis")
    return int(sides[0]), int(sides[1]), int(sides[2])


def pillars(points: Array, low: Any, size: Any, shape: Sequence[int]) -> Pillars:
    """Groups points (N,F) f32, xyz first, by the cell they fall in. low, size (3,) m; shape (nx, ny) for pillars (the z range low[2] ..
    low[2] + size[2] is tested too) or (nx, ny, nz) for voxels. Cells come sorted as torch.unique gives them, means are float32 sums in
    point order over counts. Points outside, NaN or infinite in xyz are in no cell. ValueError for anything of another type or shape."""
    points, low32, size32, whole = _checked("pillars", points, low, size, shape)
    cells, row, order, of, mean = _group(points, low32, size32, *whole, *_bitmaps(whole[0] * whole[1] * whole[2]))
    return Pillars(cells, row, order, of, mean, low32, size32, whole)


def pillar_features(points: Array, grouped: Pillars) -> Array:
    """Per inside point what OpenPCDet's pillar encoders see, (M, F+6) f32: the raw F values, xyz minus its pillar's mean, xyz minus its
    pillar's centre. Row k is point `grouped.order[k]`, so the rows of a pillar are row[v]:row[v+1]. points: those that were grouped."""
    points, low, size, shape = _checked("pillar_features", points, grouped.low, grouped.size, grouped.shape)
    if len(points) != len(grouped.of):
        raise ValueError(f"pillar_features: {len(points)} points, but {len(grouped.of)} were grouped; give the same ones")
    out = np.empty((len(grouped.order), points.shape[1] + 6), np.float32)
    _features(points, grouped.cells, grouped.order, grouped.of, grouped.mean, low, size, shape[0], shape[1], out)
    return out


def hard_voxels(points: Array, low: Any, high: Any, size: Any, max_points: int, max_voxels: int) -> tuple[Array, Array, Array]:
    """Voxels of at most max_points points as spconv's Point2VoxelCPU makes them: numbered by first appearance, new ones dropped after
    max_voxels (older ones go on filling), points dropped from full ones, unused slots zero.
    Returns voxels (V, max_points, F) f32, coords (V,3) i32 as z, y, x, counts (V,) i32. points (N,F) f32; low, high, size (3,) m."""
    points, low32, size32, shape = _checked("hard_voxels", points, low, size, grid_shape(low, high, size))
    if max_points < 1 or max_voxels < 1:
        raise ValueError(f"hard_voxels: max_points {max_points} and max_voxels {max_voxels} must be at least 1")
    most = max(min(int(max_voxels), len(points)), 1)
    shift = int(max_points).bit_length()
    if (most << shift) >= 1 << 32:
        raise ValueError(f"hard_voxels: {most} voxels of {max_points} points; their product must stay below 2^31")
    table_bits = max((most + most // 2).bit_length(), 4)
    table = np.full(1 << table_bits, 0xFFFFFFFFFFFFFFFF, np.uint64)
    voxels = np.empty((most, int(max_points), points.shape[1]), np.float32)
    coords, counts = np.empty((most, 3), np.int32), np.empty(most, np.int32)
    number = int(_hard(points, low32, size32, *shape, int(max_points), most, shift, table, table_bits, voxels, coords, counts))
    return voxels[:number], coords[:number], counts[:number]
