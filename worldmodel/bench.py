"""What is quick here, each thing beside its peer in the same run, on the same data, after checking that both say the same.

A section is one function (rounds, log, report) that gives rows; SECTIONS names them.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sensors.records import Log

Report = Callable[[int, int, str], None]

# rings and columns of the synthetic sweeps: 33 and 127 thousand points
SWEEPS = {"32 x 1121": (32, 1121), "64 x 2122": (64, 2122)}
INSTALL_SPCONV = "pip install 'driving-worldmodel[bench]'"


@dataclass(frozen=True)
class Case:
    """One thing against one peer. same(ours, theirs) says how far the answers agree, or raises Different. theirs None: the peer is not
    installed, and `note` says how to get it."""

    name: str
    peer: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any] | None
    same: Callable[[Any, Any], str]
    note: str = ""


@dataclass(frozen=True)
class Row:
    """Milliseconds of process time: medians over the rounds; the ratio is the median of the rounds' ratios, low and high its quartiles."""

    section: str
    name: str
    data: str
    peer: str
    ours_ms: float | None
    peer_ms: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    rounds: int
    answers: str


class Different(Exception):
    """Two answers that should be the same are not."""


def machine() -> dict[str, Any]:
    """Versions and the machine, as far as a time depends on them."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    out: dict[str, Any] = {"python": platform.python_version()}
    for package in ("numpy", "scipy", "numba", "torch", "spconv"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "none"
    from llvmlite.binding import get_host_cpu_name

    out |= {"cpu": get_host_cpu_name(), "cores": os.cpu_count()}
    if hasattr(os, "getloadavg"):
        out["load"] = round(os.getloadavg()[0], 2)
    return out


def measure(section: str, data: str, case: Case, rounds: int) -> Row:
    """Both once for the answers, once more to warm, then in turns."""
    ours_result = case.ours()
    if case.theirs is None:
        case.ours()
        times = [_once(case.ours) for _ in range(rounds)]
        return Row(section, case.name, data, case.peer, statistics.median(times), None, None, None, None, rounds, f"not compared: {case.note}")
    try:
        answers = case.same(ours_result, case.theirs())
    except Different as error:
        answers = f"DIFFERENT: {error}"
    del ours_result
    case.ours()
    case.theirs()
    ours, theirs = [], []
    for r in range(rounds):
        for mine in (r % 2 == 0, r % 2 == 1):
            (ours if mine else theirs).append(_once(case.ours if mine else case.theirs))
    ratios = sorted(b / a for a, b in zip(ours, theirs))
    low, high = ratios[(len(ratios) - 1) // 4], ratios[len(ratios) // 2 + (len(ratios) - 1) // 4]
    return Row(
        section, case.name, data, case.peer, statistics.median(ours), statistics.median(theirs), statistics.median(ratios), low, high, rounds, answers
    )


def _once(act: Callable[[], Any]) -> float:
    """Milliseconds of process time, the collector held."""
    gc.collect()
    gc.disable()
    try:
        start = time.process_time_ns()
        act()
        return (time.process_time_ns() - start) / 1e6
    finally:
        gc.enable()


# --- kernels ---------------------------------------------------------------------------------------------------------------------------


def kernels(rounds: int, log: Path | None, report: Report) -> list[Row]:
    """The numba kernels of sensors/kernels on one thread, on synthetic sweeps, or on the first two of the store or recording at `log`."""
    import torch

    torch.set_num_threads(1)
    clouds = real_sweeps(log) if log else {name: synthetic_sweeps(*size) for name, size in SWEEPS.items()}
    rows = []
    for d, (name, (first, second)) in enumerate(clouds.items()):
        cases = list(kernel_cases(first, second))
        for c, case in enumerate(cases):
            rows.append(measure("kernels", f"{name}: {len(first)}", case, rounds))
            report(d * len(cases) + c + 1, len(clouds) * len(cases), case.name)
    return rows


def synthetic_sweeps(rings: int, columns: int) -> tuple[Any, Any]:
    """Two sweeps (N, 4) f32 of one street, half a second apart: ground, boxes, clutter above the horizon, 2 cm of noise, 4 % of the
    returns missing, in firing order (all rings of an azimuth, then the next)."""
    import numpy as np

    rng = np.random.Generator(np.random.Philox(rings))
    elevation = np.deg2rad(np.linspace(-25, 8, rings))
    azimuth = np.linspace(-np.pi, np.pi, columns, endpoint=False)
    d = np.stack(
        (
            np.cos(elevation)[None] * np.cos(azimuth)[:, None],
            np.cos(elevation)[None] * np.sin(azimuth)[:, None],
            np.broadcast_to(np.sin(elevation), (columns, rings)),
        ),
        -1,
    ).reshape(-1, 3)
    centres = rng.uniform(-60, 60, (120, 2))
    centres = centres[np.hypot(*centres.T) > 6]
    halves, tops = rng.uniform(0.4, 4, (len(centres), 2)), rng.uniform(-0.3, 7, len(centres))
    sweeps = []
    for moved in (0.0, 1.7):
        with np.errstate(divide="ignore"):
            ranges = np.where(d[:, 2] < 0, -1.8 / d[:, 2], np.inf)
            for centre, half, top in zip(centres, halves, tops):
                a = np.array([centre[0] - half[0] - moved, centre[1] - half[1], -1.8]) / d
                b = np.array([centre[0] + half[0] - moved, centre[1] + half[1], top]) / d
                near, far = np.minimum(a, b).max(1), np.maximum(a, b).min(1)
                ranges = np.where((near < far) & (near > 0) & (near < ranges), near, ranges)
        ranges = np.where(ranges > 90, rng.uniform(5, 90, len(d)), ranges) + rng.normal(0, 0.02, len(d))
        kept = rng.random(len(d)) > 0.04
        sweeps.append(np.column_stack((d * ranges[:, None], rng.random(len(d))))[kept].astype(np.float32))
    return sweeps[0], sweeps[1]


def real_sweeps(path: Path) -> dict[str, tuple[Any, Any]]:
    """The first two sweeps (N, 4) f32 of the reference LiDAR of the first log at `path`."""
    import numpy as np

    from sensors.errors import UsageError, one_line

    log = _first_log(path)
    lidar = log.reference_lidar
    if len(log.sweep_stamps_ns[lidar]) < 2:
        raise UsageError(f"{one_line(log.id)}: fewer than two sweeps of {one_line(lidar)}; give another log")
    sweeps = [log.read_sweep(lidar, i) for i in range(2)]
    first, second = (np.ascontiguousarray(np.column_stack((s.points, s.intensity)), np.float32) for s in sweeps)
    return {one_line(log.id.rsplit("/", 1)[-1], 24): (first, second)}


def _first_log(path: Path) -> Log:
    from sensors.errors import UsageError, WmError, one_line

    if path.exists():
        from sensors.store.format import STORE_FILE

        if (path / STORE_FILE).is_file():
            from sensors.store.reader import open_store

            store = open_store(path)
            if store.ids:
                return store.open_log(store.ids[0])
            raise UsageError(f"{one_line(path)}: holds no log; ingest one first")
    from sensors.adapters.base import open_source

    for log in open_source(path):
        if isinstance(log, WmError):
            raise log
        return log
    raise UsageError(f"{one_line(path)}: holds no log; give another folder")


def _equal(ours: Any, theirs: Any) -> str:
    import numpy as np

    for mine, other in zip(ours, theirs, strict=True):
        if not np.array_equal(mine, other):
            raise Different(f"{np.shape(mine)}, {np.shape(other)}")
    return "equal"


def kernel_cases(first: Any, second: Any) -> Iterator[Case]:
    """Every kernel on two sweeps (N, 4) f32 of one sensor."""
    yield from _voxel_cases(first)
    yield from _nearest_cases(first, second)
    yield from _occupancy_cases(first)
    yield from _image_cases(first)
    yield _loss_case()
    yield _crps_case()
    yield _detail_case(first)
    yield _aggregate_case(first, second)


def _voxel_cases(points: Any) -> Iterator[Case]:
    import numpy as np
    import torch

    from sensors.kernels.voxels import grid_shape, hard_voxels, pillar_features, pillars

    low, high = (-51.2, -51.2, -5.0), (51.2, 51.2, 3.0)
    tensor = torch.from_numpy(points)
    for what, size, most, voxels in (("hard voxels 0.1 m", (0.1, 0.1, 0.2), 10, 120_000), ("hard pillars 0.2 m", (0.2, 0.2, 8.0), 20, 60_000)):

        def ours(size: Any = size, most: int = most, voxels: int = voxels) -> Any:
            return hard_voxels(points, low, high, size, most, voxels)

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from spconv.pytorch.utils import PointToVoxel
        except ImportError:
            yield Case(what, "spconv CPU", ours, None, _equal, f"spconv is not installed, {INSTALL_SPCONV}")
            continue
        peer = PointToVoxel(list(size), [*low, *high], points.shape[1], voxels, most)
        yield Case(what, "spconv CPU", ours, lambda peer=peer: peer(tensor), lambda a, b: _equal(a, [v.numpy() for v in b]))

    def by_unique(size: Any, shape: Any) -> tuple[Any, ...]:
        """One flat int64 key, unique, index_add: the features in point order, the points kept, their cells."""
        low_t, size_t, shape_t = (torch.tensor(v, dtype=torch.float32) for v in (low, size, shape))
        a = (tensor[:, :3] - low_t) / size_t
        kept = ((a >= 0) & (a < shape_t)).all(1)
        inside = tensor[kept]
        xyz = a[kept].long()
        cells, of, counts = torch.unique((xyz[:, 2] * shape[1] + xyz[:, 1]) * shape[0] + xyz[:, 0], return_inverse=True, return_counts=True)
        mean = torch.zeros((len(cells), 3)).index_add_(0, of, inside[:, :3]) / counts[:, None]
        centre = xyz.float() * size_t + (low_t + size_t * 0.5)
        return torch.cat((inside, inside[:, :3] - mean[of], inside[:, :3] - centre), 1), kept, cells

    def same(ours: Any, theirs: Any) -> str:
        grouped, features = ours
        found, kept, cells = theirs
        in_order = np.argsort(grouped.order)
        return _equal((features[in_order], grouped.of >= 0, grouped.cells), (found.numpy(), kept.numpy(), cells.numpy()))

    for what, size in (("pillars and features 0.2 m", (0.2, 0.2, 8.0)), ("voxels and features 0.1 m", (0.1, 0.1, 0.1))):
        shape = grid_shape(low, high, size)

        def featured(size: Any = size, shape: Any = shape) -> Any:
            grouped = pillars(points, low, size, shape)
            return grouped, pillar_features(points, grouped)

        yield Case(what, "torch.unique, index_add_", featured, lambda size=size, shape=shape: by_unique(size, shape), same)


def _nearest_cases(first: Any, second: Any) -> Iterator[Case]:
    import numpy as np
    from scipy.spatial import cKDTree

    from sensors.kernels.directions import View
    from sensors.kernels.nearest import both_ways

    a, b = np.ascontiguousarray(first[:, :3]), np.ascontiguousarray(second[:, :3])

    def trees() -> tuple[Any, ...]:
        forth, forth_index = cKDTree(b).query(a)
        back, back_index = cKDTree(a).query(b)
        return forth, forth_index, back, back_index

    def same(ours: Any, theirs: Any) -> str:
        for mine, other in ((ours[0], theirs[0]), (ours[2], theirs[2])):
            if not np.allclose(np.sqrt(mine), other, rtol=1e-6, atol=1e-6):
                raise Different(f"distances off by {np.abs(np.sqrt(mine) - other).max():.1e} m")
        other = int((ours[1] != theirs[1]).sum() + (ours[3] != theirs[3]).sum())
        return f"equal, {other} ties" if other else "equal"

    yield Case("Chamfer, both ways", "scipy cKDTree", lambda: both_ways(a, b), trees, same)

    asked = b / np.linalg.norm(b, axis=1, keepdims=True)

    def by_tree() -> Any:
        far = a.astype(np.float64)
        radius = np.linalg.norm(far, axis=1, keepdims=True)
        return radius[:, 0], cKDTree(far / radius).query(asked)[0]

    def same_angle(ours: Any, theirs: Any) -> str:
        angle = 2 * np.arcsin(np.minimum(theirs[1] / 2, 1))
        if not np.allclose(ours[1], angle, atol=2e-6):
            raise Different(f"angles off by {np.abs(ours[1] - angle).max():.1e} rad")
        return "equal to 2e-6 rad"

    yield Case("nearest direction", "scipy cKDTree", lambda: View(a).nearest(asked), by_tree, same_angle)


def _occupancy_cases(points: Any) -> Iterator[Case]:
    import numpy as np
    from numba import njit

    from sensors.kernels.occupancy import columns
    from sensors.kernels.raycast import first_hit
    from sensors.kernels.traversal import free_space

    low, size, shape, reach = (-70.0, -70.0, -4.5), 0.2, (700, 700, 45), 60.0
    low32, size32 = np.array(low, np.float32), np.full(3, size, np.float32)
    origin = np.array([0.013, 0.021, 0.017])
    ends = points[:, :3].astype(np.float64)

    def by_numpy() -> Any:
        a = (points[:, :3] - low32) / size32
        x, y, z = a[((a >= 0) & (a < np.array(shape, np.float32))).all(1)].astype(np.int64).T
        grid = np.zeros(shape, bool)
        grid[x, y, z] = True
        return grid

    def unpacked(words: Any) -> Any:
        return ((words[:, :, None] >> np.arange(shape[2], dtype=np.uint64)) & np.uint64(1)).astype(bool)

    yield Case("occupancy 0.2 m", "numpy, byte grid", lambda: columns(points, low, size, shape), by_numpy, lambda a, b: _equal([unpacked(a)], [b]))

    @njit(nogil=True, error_model="numpy")
    def walk(ends, origin, low, size, reach, occupied, passed, entry):  # type: ignore[no-untyped-def]
        """Amanatides and Woo, one cell after the other: to the end when reach is 0, else to the first occupied cell within reach."""
        nx, ny, nz = occupied.shape
        for r in range(ends.shape[0]):
            entry[r] = np.nan
            ox, oy, oz = (origin[0] - low[0]) / size[0], (origin[1] - low[1]) / size[1], (origin[2] - low[2]) / size[2]
            dx, dy, dz = (ends[r, 0] - low[0]) / size[0] - ox, (ends[r, 1] - low[1]) / size[1] - oy, (ends[r, 2] - low[2]) / size[2] - oz
            length = np.sqrt((dx * size[0]) ** 2 + (dy * size[1]) ** 2 + (dz * size[2]) ** 2)
            t_end = reach / length if reach > 0 else 1.0
            x, y, z = int(np.floor(ox)), int(np.floor(oy)), int(np.floor(oz))
            sx, sy, sz = (1 if dx > 0 else -1), (1 if dy > 0 else -1), (1 if dz > 0 else -1)
            tx, ty, tz = (x + (sx > 0) - ox) / dx, (y + (sy > 0) - oy) / dy, (z + (sz > 0) - oz) / dz
            ax, ay, az = abs(1 / dx), abs(1 / dy), abs(1 / dz)
            t = 0.0
            while t <= t_end and x >= 0 and y >= 0 and z >= 0 and x < nx and y < ny and z < nz:
                if reach > 0:
                    if occupied[x, y, z]:
                        entry[r] = t * length
                        break
                else:
                    passed[x, y, z] = True
                if tx <= ty and tx <= tz:
                    t = tx
                    tx += ax
                    x += sx
                elif ty <= tz:
                    t = ty
                    ty += ay
                    y += sy
                else:
                    t = tz
                    tz += az
                    z += sz

    words, grid = columns(points, low, size, shape), by_numpy()
    low64, size64 = low32.astype(np.float64), size32.astype(np.float64)
    ranges, nothing = np.empty(len(ends)), np.empty((1, 1, 1), bool)

    def carved() -> Any:
        passed = np.zeros(shape, bool)
        walk(ends, origin, low64, size64, 0.0, grid, passed, ranges)
        passed &= ~grid
        return passed

    def cast() -> Any:
        walk(ends, origin, low64, size64, reach, grid, nothing, ranges)
        return ranges

    def same_ranges(ours: Any, theirs: Any) -> str:
        if not np.allclose(ours, theirs, atol=1e-4, equal_nan=True):
            raise Different(f"{(~np.isclose(ours, theirs, atol=1e-4, equal_nan=True)).sum()} rays")
        return "equal to 0.1 mm"

    def same_cells(ours: Any, theirs: Any) -> str:
        """A return exactly on a cell's border ends in either cell: a few in a hundred thousand."""
        other = int((unpacked(ours) != theirs).sum())
        if other > 1e-4 * theirs.sum():
            raise Different(f"{other} cells")
        return f"{other} cells on borders" if other else "equal"

    plain = "cell by cell, numba"
    yield Case("free space 0.2 m", plain, lambda: free_space(points, origin, low, size, shape, words), carved, same_cells)
    yield Case("first hit 0.2 m", plain, lambda: first_hit(words, low, size, origin, ends - origin, reach), cast, same_ranges)


def _image_cases(points: Any) -> Iterator[Case]:
    import numpy as np

    from sensors.kernels.range_image import depth_maps, range_image

    height, width, low, high = 64, 2048, -0.45, 0.2

    def by_sorting() -> Any:
        x, y, z = points[:, :3].T
        r = np.sqrt(x * x + y * y + z * z)
        column = np.minimum(((np.pi - np.arctan2(y, x)) * (width / (2 * np.pi))).astype(np.int64), width - 1)
        row = (high - np.arcsin(z / r)) * (height / (high - low))
        kept = (row >= 0) & (row < height)
        row, column, r = row[kept].astype(np.int64), column[kept], r[kept]
        image = np.full((height, width), np.inf, np.float32)
        index = np.full((height, width), -1, np.int32)
        order = np.argsort(-r)
        image[row[order], column[order]] = r[order]
        index[row[order], column[order]] = np.flatnonzero(kept)[order]
        return image, index

    def few_pixels(ours: Any, theirs: Any) -> str:
        """Points within float32's reach of a border fall on either side of it: a few in ten thousand."""
        other = sum(int((~np.isclose(a, b, rtol=1e-5, equal_nan=True)).sum()) for a, b in zip(ours, theirs, strict=True))
        if other > 5e-4 * sum(a.size for a in ours):
            raise Different(f"{other} pixels")
        return f"{other} pixels on borders" if other else "equal"

    yield Case(
        "range image 64 x 2048",
        "numpy, argsort",
        lambda: range_image(points, height, width, (low, high)),
        by_sorting,
        lambda a, b: few_pixels(a[:1], b[:1]),
    )

    projections = []
    for turn in np.deg2rad([0, 55, 110, 180, 250, 305]):
        toward = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
        camera_from_body = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]]) @ toward
        k = np.array([[316.0, 0, 200], [0, 316, 112], [0, 0, 1]])
        projections.append(k @ np.column_stack((camera_from_body, [0.0, -0.3, -0.2])))
    matrices = np.array(projections, np.float32)
    sizes = [(225, 400)] * len(matrices)

    def camera_by_camera() -> Any:
        maps = []
        for m, (h, w) in zip(matrices, sizes):
            uvd = points[:, :3] @ m[:, :3].T + m[:, 3]
            uvd = uvd[uvd[:, 2] > 0.1]
            d = uvd[:, 2]
            u, v = np.floor(uvd[:, 0] / d + np.float32(0.5)), np.floor(uvd[:, 1] / d + np.float32(0.5))
            kept = (u >= 0) & (u < w) & (v >= 0) & (v < h)
            u, v, d = u[kept].astype(np.int64), v[kept].astype(np.int64), d[kept]
            order = np.argsort(-d)
            image = np.full((h, w), np.inf, np.float32)
            image[v[order], u[order]] = d[order]
            maps.append(image)
        return maps

    yield Case("depth maps, 6 of 225 x 400", "numpy, argsort", lambda: depth_maps(points, matrices, sizes), camera_by_camera, few_pixels)


def _loss_case() -> Case:
    import numpy as np
    import torch

    from sensors.kernels.ray_loss import hazard_loss

    rng = np.random.Generator(np.random.Philox(7))
    rays, positions = 32_768, 120
    logits = rng.normal(-3, 1, (rays, positions)).astype(np.float32)
    bins = np.minimum(rng.geometric(1 / 30, rays), positions - 1)
    tensor = torch.from_numpy(logits).requires_grad_()
    at = torch.from_numpy(bins)[:, None]
    s = torch.arange(positions)[None]
    weight, target = (s <= at).float(), (s == at).float()

    def by_entropy() -> Any:
        tensor.grad = None
        loss = torch.nn.functional.binary_cross_entropy_with_logits(tensor, target, weight=weight, reduction="none").sum(1)
        loss.sum().backward()
        return loss.detach(), tensor.grad

    def same(ours: Any, theirs: Any) -> str:
        off = max(float(np.abs(a - b.numpy()).max()) for a, b in zip(ours, theirs))
        if off > 1e-4:
            raise Different(f"off by {off:.1e}")
        return f"equal to {off:.0e}"

    return Case(f"hazard loss and gradient, {positions} bins", "torch, weighted BCE", lambda: hazard_loss(logits, bins), by_entropy, same)


def _crps_case() -> Case:
    import numpy as np
    import torch

    from sensors.kernels.ray_loss import crps_loss
    from worldmodel.heads.rays import Mixture

    rng = np.random.Generator(np.random.Philox(9))
    rays, positions = 2048, 69
    log_mass, scale = rng.normal(0, 3, (rays, positions)), 10 ** rng.uniform(-2, 0.5, (rays, positions))
    columns = [a.astype(np.float32) for a in (log_mass, rng.uniform(2, 56, (rays, positions)), scale)]
    truth = rng.uniform(2, 56, rays).astype(np.float32)
    tensors = [torch.from_numpy(column).requires_grad_() for column in columns]

    def by_pairs() -> Any:
        for tensor in tensors:
            tensor.grad = None
        mass, centre, scale = tensors
        loss = Mixture(centre, scale, mass, mass[:, 0], None, None).crps_anywhere(torch.from_numpy(truth))
        loss.sum().backward()
        return loss.detach(), *(tensor.grad for tensor in tensors)

    def same(ours: Any, theirs: Any) -> str:
        off = max(float(np.abs(a - b.numpy()).max()) for a, b in zip(ours, theirs))
        if off > 2e-3:
            raise Different(f"off by {off:.1e}")
        return f"equal to {off:.0e}"

    return Case(f"CRPS and gradient, {positions} positions", "torch, all pairs", lambda: crps_loss(*columns, truth), by_pairs, same)


def _detail_case(points: Any) -> Case:
    import numpy as np
    import torch

    from sensors.kernels import columns
    from worldmodel.detail import AROUND, COLUMN, FREE, HEIGHTS, LOWEST_M, SLICES, THICK_M, slices_at

    rng = np.random.Generator(np.random.Philox(8))
    rays, positions, cells, cell_m = 1024, 76, 512, 0.2
    # a quarter of the cells have something that stands, some have something that moves; peers read both as one map, added up
    row = np.full((2, cells, cells), -1, np.int32)
    there = rng.random(row.shape) < np.array([0.25, 0.02])[:, None, None]
    row[there] = np.arange(there.sum())
    values = rng.normal(0, 1, (int(there.sum()), COLUMN)).astype(np.float32)
    maps = np.where(there[..., None], values[row], np.float32(0))
    direction = points[rng.choice(len(points), rays), :3]
    direction = (direction / np.linalg.norm(direction, axis=1, keepdims=True)).astype(np.float32)
    origin, of = np.zeros((rays, 3), np.float32), np.tile(np.arange(2, dtype=np.int32), (rays, 1))
    position = np.broadcast_to(np.geomspace(2, 56, positions, dtype=np.float32), (rays, positions)).copy()
    around, low = 1 + np.array(AROUND, np.float32), np.full(2, -cells * cell_m / 2, np.float32)
    slabs = np.array([LOWEST_M, THICK_M], np.float32)
    where = (row, of, origin, direction, position, around, low, np.float32(cell_m), slabs, HEIGHTS, FREE)
    weight = rng.normal(0, 1, (rays, positions, len(around), 3 + FREE + HEIGHTS)).astype(np.float32)
    grid_maps, grid_weight = torch.from_numpy(maps.sum(0)[None]).permute(0, 3, 1, 2).contiguous().requires_grad_(), torch.from_numpy(weight)

    middle = cell_m * (torch.arange(cells) + 0.5 - cells / 2)
    middles = torch.stack(torch.meshgrid(middle, middle, indexing="xy"))
    to_the_left = torch.nn.functional.normalize(torch.from_numpy(direction[:, 1::-1] * np.float32([-1, 1])), dim=1)

    def by_kernel() -> Any:
        out, gradient = np.empty_like(weight), np.zeros_like(values)
        columns.read(values, *where, 0, rays, out)
        columns.add_gradient(weight, *where, gradient)
        return out, gradient

    def by_grid_sample() -> Any:
        grid_maps.grad = None
        ranges = torch.from_numpy(position)[..., None] * torch.from_numpy(around)
        places = (torch.from_numpy(direction)[:, None, None] * ranges[..., None]).flatten(0, 2)
        grid = (places[:, :2] / (cells * cell_m / 2))[None, None]
        head, where, rest = grid_maps.split((1 + HEIGHTS + FREE, 2, SLICES), 1)
        absolute = torch.cat((head, where + middles * grid_maps[:, :1], rest), 1)
        read = torch.nn.functional.grid_sample(absolute, grid, align_corners=False)[0, :, 0].T
        there, heights, free, where, slices = read.split((1, HEIGHTS, FREE, 2, SLICES), 1)
        here = (slices * slices_at(places[:, 2])).sum(1, keepdim=True)
        aside = ((where - places[:, :2] * there).view(rays, -1, 2) @ to_the_left[:, :, None]).flatten(0, 1)
        out = torch.cat((there, here, free, heights - places[:, 2:] * there, aside), 1).view(weight.shape)
        (out * grid_weight).sum().backward()
        return out.detach(), grid_maps.grad

    def same(ours: Any, theirs: Any) -> str:
        gradient = np.broadcast_to(theirs[1].permute(0, 2, 3, 1).numpy(), maps.shape)[there]
        off = max(float(np.abs(ours[0] - theirs[0].numpy()).max()), float(np.abs(ours[1] - gradient).max()))
        if off > 1e-2:  # the gradient of a cell near the sensor is a sum over thousands of places
            raise Different(f"off by {off:.1e}")
        return f"equal to {off:.0e}"

    return Case(f"detail along {rays} rays, and gradient", "torch, grid_sample", by_kernel, by_grid_sample, same)


def _aggregate_case(first: Any, second: Any) -> Case:
    import numpy as np

    from sensors.kernels.aggregate import aggregate

    sweeps = [(first, second)[i % 2] for i in range(10)]
    transforms = [np.array([[1.0, -0.01 * i, 0, 0.8 * i], [0.01 * i, 1, 0, 0.1 * i], [0, 0, 1, 0], [0, 0, 0, 1]]) for i in range(10)]
    lags = [0.05 * i for i in range(10)]
    points, intensity = [np.ascontiguousarray(s[:, :3]) for s in sweeps], [np.ascontiguousarray(s[:, 3]) for s in sweeps]

    def chain() -> Any:
        parts = []
        for sweep, m, lag in zip(sweeps, transforms, lags):
            kept = sweep[~((np.abs(sweep[:, 0]) < 1.0) & (np.abs(sweep[:, 1]) < 1.0))]
            moved = m @ np.vstack((kept[:, :3].T, np.ones(len(kept))))
            parts.append(np.column_stack((moved[:3].T, kept[:, 3], np.full(len(kept), lag))).astype(np.float32))
        return np.concatenate(parts)

    def same(ours: Any, theirs: Any) -> str:
        if not np.allclose(ours, theirs, rtol=3e-7, atol=1e-6):
            raise Different("points elsewhere")
        return "equal to rounding"

    return Case("aggregate 10 sweeps", "numpy, homogeneous", lambda: aggregate(points, intensity, transforms, lags, 1.0), chain, same)


SECTIONS: dict[str, Callable[[int, Path | None, Report], list[Row]]] = {"kernels": kernels}
