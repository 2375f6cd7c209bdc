"""What the detail keeps of a cloud, and what a ray finds of it."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.worldmodel.test_ray_head import rays
from worldmodel.config import load_config
from worldmodel.detail import AROUND, COLUMN, FEATURES, FREE, HEIGHTS, LOWEST_M, SLICES, THICK_M, Detail, Kept, slices_at
from worldmodel.encoders.contract import Clouds
from worldmodel.scene import AGE, PAST


@pytest.fixture
def detail():
    torch.manual_seed(0)
    return Detail(load_config("tiny").encoder, 0.8)


def cloud(count, seed, spread=20.0, columns=6):
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(count, columns, generator=g)
    points[:, :3] = (points[:, :3] - 0.5) * torch.tensor([2 * spread, 2 * spread, 4.0])
    return points


def clouds(*parts):
    return Clouds(torch.cat(parts), tuple(map(len, parts)))


def maps_of_kept(kept):
    """Every map (B+B*K,h,w,C) with zeros where nothing is."""
    maps = torch.zeros(*kept.row.shape, kept.columns.shape[1])
    maps[kept.row >= 0] = kept.columns[kept.row[kept.row >= 0].long()]
    return maps


def kept_of_maps(maps, clips=1):
    """Maps (B+B*K,h,w,C) as `Kept` has them, a column for each cell."""
    return Kept(maps.reshape(-1, maps.shape[3]), torch.arange(maps[..., 0].numel(), dtype=torch.int32).view(maps.shape[:3]), clips)


def slow(detail, points, moves):
    """One map, point by point."""
    maps = torch.zeros(*detail.shape, detail.of_cell.out_features)
    size, low = detail.cell_m, np.float32(detail.low)
    members = {}
    for point in points:
        at = ((point[:2].numpy() - low[:2]) / np.float32(size)).astype(int)
        members.setdefault((at[1], at[0]), []).append(point)
    for (row, column), found in members.items():
        found = torch.stack(found)
        centre = torch.tensor([low[0] + (column + 0.5) * size, low[1] + (row + 0.5) * size, low[2] + detail.voxel[2] / 2], dtype=torch.float32)
        offsets = torch.cat((found[:, :3] - found[:, :3].mean(0), found[:, :3] - centre), 1)
        offsets[:, [0, 1, 3, 4]] /= size
        if moves:
            of_point = torch.tensor([[0.0, 0.0, 0.0, 1.0]]).expand(len(found), 4)
        else:
            of_point = torch.stack((found[:, 3], found[:, AGE], torch.tanh(found[:, PAST]), torch.zeros(len(found))), 1)
        told = torch.cat((found[:, 2:3], of_point, offsets, torch.stack([slices_at(z) for z in found[:, 2]])), 1)
        maps[row, column] = detail.of_cell(torch.relu(detail.of_point(told)).amax(0))
    return maps


def test_maps_are_those_of_the_slow_way_and_clips_and_instants_stay_apart(detail):
    still = [cloud(300, 1, 1.0), cloud(200, 3)]
    moving = [cloud(n, seed, 1.0, 3) for seed, n in enumerate((50, 60, 0, 40))]
    kept = detail(clouds(*still), clouds(*moving))
    assert kept.clips == 2 and kept.instants == 2
    maps = maps_of_kept(kept)
    for found, points in zip(maps, still + moving, strict=True):
        torch.testing.assert_close(found, slow(detail, points, points.shape[1] == 3), atol=1e-5, rtol=1e-4)
    assert not maps[4].any() and all(maps[i].any() for i in (0, 1, 2, 3, 5))


def test_a_ray_reads_what_stands_in_its_clip_and_what_moves_there_at_its_instant(detail):
    asked = dataclasses.replace(rays(6), of=torch.tensor([0, 0, 0, 1, 1, 1]), step=torch.tensor([0, 1, 2, 0, 1, 2]))
    maps = torch.zeros(2 + 2 * 3, *detail.shape, COLUMN)
    maps[..., 0] = torch.tensor([100.0, 200.0, 1, 2, 3, 4, 5, 6])[:, None, None]
    read = detail.read_anywhere(kept_of_maps(maps, clips=2), asked, torch.full((6, 1), 5.0))
    assert read[:, 0, 0, 0].tolist() == pytest.approx([101, 102, 103, 204, 205, 206])


def test_without_points_nothing_is_kept_and_nothing_is_read(detail):
    kept = detail(clouds(torch.zeros(0, 6)), clouds(*[torch.zeros(0, 3)] * 2))
    assert kept.columns.shape == (0, COLUMN)
    position = torch.full((6, 4), 5.0)
    assert not detail.read_by_kernel(kept, rays(), position).any() and not detail.read_anywhere(kept, rays(), position).any()


def test_slices_of_height_add_up_to_one_and_are_whole_at_their_middles():
    heights = torch.linspace(LOWEST_M - 2, LOWEST_M + THICK_M * SLICES + 2, 301)
    assert torch.allclose(slices_at(heights).sum(1), torch.ones(301))
    assert torch.allclose(slices_at(LOWEST_M + THICK_M * torch.arange(SLICES)), torch.eye(SLICES), atol=1e-5)


def test_a_ray_finds_what_is_where_it_passes_and_nothing_elsewhere(detail):
    asked = rays(4)
    position = torch.tensor([[5.0, 10.0, 20.0]]).repeat(4, 1)
    maps = torch.zeros(3, *detail.shape, COLUMN)
    assert not detail.read(kept_of_maps(maps), asked, position).any()
    end = asked.origin[2] + asked.direction[2] * 10.0
    row, column = (int((end[axis] - detail.low[axis]) / detail.cell_m) for axis in (1, 0))
    around = maps[0, row - 3 : row + 4, column - 3 : column + 4]
    around[..., 0] = 1
    around[..., 1] = end[2]
    around[..., -SLICES:] = slices_at(end[2])
    found = detail.read(kept_of_maps(maps), asked, position)
    assert found.shape == (4, 3, FEATURES)
    assert not found[2, [0, 2]].any()
    there, here, above = (found[2, 1].view(len(AROUND), -1)[:, column] for column in (0, 1, 2 + FREE))
    slope = asked.direction[2, 2] * 10.0
    assert torch.allclose(there, torch.ones(len(AROUND)), atol=1e-5)
    assert torch.allclose(above, torch.tanh(-2 * slope * torch.tensor(AROUND)), atol=1e-4)
    assert (here > 0.4).all()


def test_a_ray_is_told_how_far_to_its_left_a_thing_is(detail):
    origin, direction = torch.zeros(1, 3), torch.tensor([[0.8, 0.6, 0.0]])
    asked = dataclasses.replace(rays(1), origin=origin, direction=direction)
    maps = torch.zeros(3, *detail.shape, COLUMN)
    row, column = (int((8.0 * direction[0, axis] - detail.low[axis]) / detail.cell_m) for axis in (1, 0))
    where = torch.tensor([0.03, -0.05])
    maps[0, row, column, 0] = 2.0
    maps[0, row, column, -SLICES - 2 : -SLICES] = 2.0 * where
    middle = torch.tensor([detail.low[axis] + (at + 0.5) * detail.cell_m for axis, at in ((0, column), (1, row))])
    for shift in (0.0, 0.1):  # the ray moves to its left, the thing to its right
        asked.origin[0, :2] = shift * torch.tensor([-0.6, 0.8])
        read = detail.read_by_kernel(kept_of_maps(maps), asked, torch.tensor([[8.0]]))[0, 0]
        seen = read[:, 0] > 0
        assert seen.any()
        left = torch.tensor([-0.6, 0.8]) @ (middle + where) - shift
        torch.testing.assert_close(read[seen, -1] / read[seen, 0], left.expand(int(seen.sum())), atol=1e-4, rtol=0)


def test_the_kernel_reads_what_torch_reads_and_so_do_gradients(detail):
    g = torch.Generator().manual_seed(0)
    of, step = (torch.randint(0, most, (200,), generator=g) for most in (2, 3))
    asked = dataclasses.replace(rays(200), of=of, step=step)
    asked.origin[:] += torch.tensor([60.0, 30.0, 0.0]) * (torch.rand(200, 1, generator=g) - 0.5)  # some end beyond the map, on every side
    position = 1 + 60 * torch.rand(200, 5, generator=g)
    row = torch.full((8, *detail.shape), -1, dtype=torch.int32)
    there = torch.rand(row.shape, generator=g) < 0.3
    row[there] = torch.arange(int(there.sum()), dtype=torch.int32)
    first = torch.randn(int(there.sum()), COLUMN, generator=g).requires_grad_()
    second = first.detach().clone().requires_grad_()
    got, want = detail.read_by_kernel(Kept(first, row, 2), asked, position), detail.read_anywhere(Kept(second, row, 2), asked, position)
    assert got.shape == (200, 5, len(AROUND), 3 + FREE + HEIGHTS) and (got == 0).all(3).any() and (got != 0).any()
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-4)  # places of 60 m are known to some micrometres, maps are steep
    weight = torch.randn(got.shape, generator=g)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(first.grad, second.grad, atol=2e-3, rtol=1e-4)


def test_no_ray_reads_nothing_and_neither_does_one_that_is_nowhere(detail):
    kept = kept_of_maps(torch.ones(3, *detail.shape, COLUMN))
    asked = rays(3)
    assert detail.read(kept, asked.take(slice(0, 0)), torch.zeros(0, 4)).shape == (0, 4, FEATURES)
    asked.direction[0], asked.direction[1] = float("nan"), float("inf")
    found = detail.read(kept, asked, torch.full((3, 4), 5.0))
    assert not found[:2].any() and found[2].any()
