"""What the detail keeps of a cloud, and what a ray finds of it."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.worldmodel.test_ray_head import rays
from worldmodel.config import load_config
from worldmodel.detail import AROUND, FEATURES, FREE, HEIGHTS, LOWEST_M, SLICES, THICK_M, Detail, slices_at
from worldmodel.encoders.contract import Clouds
from worldmodel.model import WorldModel


@pytest.fixture
def detail():
    torch.manual_seed(0)
    return Detail(load_config("tiny").encoder, 0.8)


def cloud(count, seed, spread=20.0):
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 5, generator=g)
    points[:, :3] = (points[:, :3] - 0.5) * torch.tensor([2 * spread, 2 * spread, 4.0])
    return points


def slow(detail, points):
    """One clip's maps, point by point."""
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
        told = torch.cat((found[:, 2:], offsets, torch.stack([slices_at(z) for z in found[:, 2]])), 1)
        maps[row, column] = detail.of_cell(torch.relu(detail.of_point(told)).amax(0))
    return maps


def test_maps_are_those_of_the_slow_way_and_clips_stay_apart(detail):
    clouds = [cloud(300, 1, 1.0), cloud(0, 2), cloud(200, 3)]
    found = detail(Clouds(torch.cat(clouds), tuple(map(len, clouds))))
    for maps, points in zip(found, clouds, strict=True):
        torch.testing.assert_close(maps, slow(detail, points), atol=1e-5, rtol=1e-4)
    assert not found[1].any() and found[0].any() and found[2].any()


def test_slices_of_height_add_up_to_one_and_are_whole_at_their_middles():
    heights = torch.linspace(LOWEST_M - 2, LOWEST_M + THICK_M * SLICES + 2, 301)
    assert torch.allclose(slices_at(heights).sum(1), torch.ones(301))
    assert torch.allclose(slices_at(LOWEST_M + THICK_M * torch.arange(SLICES)), torch.eye(SLICES), atol=1e-5)


def test_a_ray_finds_what_is_where_it_passes_and_nothing_elsewhere(detail):
    asked = rays(4)
    position = torch.tensor([[5.0, 10.0, 20.0]]).repeat(4, 1)
    maps = torch.zeros(1, *detail.shape, 1 + HEIGHTS + FREE + SLICES)
    assert not detail.read(maps, asked, position).any()
    end = asked.origin[2] + asked.direction[2] * 10.0
    row, column = (int((end[axis] - detail.low[axis]) / detail.cell_m) for axis in (1, 0))
    around = maps[0, row - 3 : row + 4, column - 3 : column + 4]
    around[..., 0] = 1
    around[..., 1] = end[2]
    around[..., -SLICES:] = slices_at(end[2])
    found = detail.read(maps, asked, position)
    assert found.shape == (4, 3, FEATURES)
    assert not found[2, [0, 2]].any()
    there, here, above = (found[2, 1].view(len(AROUND), -1)[:, column] for column in (0, 1, 2 + FREE))
    slope = asked.direction[2, 2] * 10.0
    assert torch.allclose(there, torch.ones(len(AROUND)), atol=1e-5)
    assert torch.allclose(above, torch.tanh(-2 * slope * torch.tensor(AROUND)), atol=1e-4)
    assert (here > 0.4).all()


def test_the_kernel_reads_what_torch_reads_and_so_do_gradients(detail):
    g = torch.Generator().manual_seed(0)
    asked = dataclasses.replace(rays(200), of=torch.randint(0, 2, (200,), generator=g))
    asked.origin[:] += torch.tensor([60.0, 30.0, 0.0]) * (torch.rand(200, 1, generator=g) - 0.5)  # some end beyond the map, on every side
    position = 1 + 60 * torch.rand(200, 5, generator=g)
    maps = torch.randn(2, *detail.shape, 1 + HEIGHTS + FREE + SLICES, generator=g)
    first, second = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    got, want = detail.read_by_kernel(first, asked, position), detail.read_anywhere(second, asked, position)
    assert got.shape == (200, 5, len(AROUND), 2 + FREE + HEIGHTS) and (got == 0).all(3).any() and (got != 0).any()
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-4)  # places of 60 m are known to some micrometres, maps are steep
    weight = torch.randn(got.shape, generator=g)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(first.grad, second.grad, atol=2e-3, rtol=1e-4)


def test_no_ray_reads_nothing_and_neither_does_one_that_is_nowhere(detail):
    maps = torch.ones(1, *detail.shape, 1 + HEIGHTS + FREE + SLICES)
    asked = rays(3)
    assert detail.read(maps, asked.take(slice(0, 0)), torch.zeros(0, 4)).shape == (0, 4, FEATURES)
    asked.direction[0], asked.direction[1] = float("nan"), float("inf")
    found = detail.read(maps, asked, torch.full((3, 4), 5.0))
    assert not found[:2].any() and found[2].any()


def test_all_sweeps_of_a_clip_are_kept_as_one_cloud():
    torch.manual_seed(0)
    model = WorldModel(load_config("tiny", ["model.join_sweeps=false", "model.latent_sweeps=[0,1]"]))
    sweeps = [cloud(50, seed) for seed in range(6)]  # of two clips, and of a dense one behind them
    kept = model.keep(Clouds(torch.cat(sweeps), (50,) * 6), 2, 2)
    whole = model.detail(Clouds(torch.cat(sweeps[:4]), (100, 100)))
    assert kept.shape[0] == 2 and torch.equal(kept, whole)
