"""The pillar encoder against its restatement in torch alone, which is also what an export carries and what a GPU runs."""

import dataclasses

import numpy as np
import pytest
import torch

from sensors.errors import UsageError
from tests.elsewhere import ELSEWHERE, Elsewhere
from worldmodel.config import load_config
from worldmodel.encoders.contract import Clouds, build_encoder
from worldmodel.encoders.pillars import PillarEncoder
from worldmodel.encoders.standalone import Encoder, thinned
from worldmodel.sampling import sample_maps


def cloud(count: int, seed: int, features: int = 5) -> torch.Tensor:
    rng = np.random.Generator(np.random.Philox(seed))
    points = rng.normal(0, (12, 12, 1, 0.3, 0.3)[:features], (count, features)).astype(np.float32)
    if count > 10:
        points[:5] *= 100
        points[5] = np.nan
    return torch.from_numpy(points)


def with_statistics(encoder: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    return encoder.eval()


@pytest.mark.parametrize("overrides", [(), ("encoder.padded_slots=true", "encoder.max_points_per_pillar=5", "encoder.max_pillars=150"),
                                       ("encoder.pfn_widths=[16, 16]",), ("encoder.upsample_strides=[0.5, 1, 2]",)])  # fmt: skip
def test_the_encoder_and_its_restatement_agree(overrides):
    config = load_config("tiny", overrides).encoder
    ours = with_statistics(build_encoder(config))
    clouds = [cloud(2000, 1), cloud(0, 2), cloud(30, 3)]
    with torch.no_grad():
        got = ours(Clouds(torch.cat(clouds), tuple(len(c) for c in clouds)))
        theirs = Encoder({f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
        theirs.load_state_dict(ours.state_dict(), strict=True)
        want = theirs.eval()(clouds)
    assert got.shape == want.shape and got.abs().max() > 0.1
    assert (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("overrides", [(), ("encoder.padded_slots=true", "encoder.max_points_per_pillar=5", "encoder.max_pillars=150")])
def test_they_agree_while_they_train_too(overrides):
    """Statistics of a norm are those of the batch, not of one cloud; a cloud with one point has none of its own."""
    config = load_config("tiny", overrides).encoder
    ours = with_statistics(build_encoder(config)).train()
    theirs = Encoder({f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    theirs.load_state_dict(ours.state_dict(), strict=True)
    clouds = [cloud(2000, 1), cloud(1, 4), cloud(0, 2), cloud(300, 3)]
    with torch.no_grad():
        got, want = ours(Clouds(torch.cat(clouds), tuple(len(c) for c in clouds))), theirs.train()(clouds)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(mine, other, atol=1e-5), name


def test_a_thinned_sweep_keeps_its_order_and_more_of_what_is_far():
    points = torch.arange(10_000, dtype=torch.float32)[:, None].repeat(1, 5) / 250
    few = thinned(points, 2000)
    assert len(few) == 2000 and (few[1:, 0] > few[:-1, 0]).all() and (few[:, 0] < 5).float().mean() < 0.08  # 0.125 of all
    assert thinned(points, 0) is points and thinned(points, 10_000) is points


@pytest.mark.parametrize("padded", [False, True])
def test_pillars_made_on_the_device_are_the_same(padded):
    over = ("encoder.padded_slots=true", "encoder.max_points_per_pillar=5", "encoder.max_pillars=150") if padded else ()
    encoder = with_statistics(PillarEncoder(load_config("tiny", over).encoder))
    clouds = Clouds(torch.cat((cloud(2000, 1), cloud(40, 2))), (2000, 40))
    with torch.no_grad(), Elsewhere():
        here = encoder.canvas(clouds)
        there = encoder.to(ELSEWHERE).canvas(Clouds(clouds.points.to(ELSEWHERE), clouds.sizes)).cpu()
    assert torch.equal(here != 0, there != 0) and (here - there).abs().max() < 1e-5


ONE_BLOCK = [f"encoder.{name}=[{value}]" for name, value in (("layers", 1), ("strides", 2), ("widths", 32), ("upsample_strides", 1),
                                                             ("upsample_widths", 16))]  # fmt: skip


@pytest.mark.parametrize("wrong", ["encoder.voxel=[0.8,0.4,6.0]", "encoder.high=[51.6,51.2,3.0]"])
def test_cells_that_are_not_square_or_do_not_end_at_the_border_are_refused(wrong):
    with pytest.raises(UsageError, match=r"encoder\.voxel: .* have to be square"):
        build_encoder(load_config("default", [*ONE_BLOCK, wrong]).encoder)
    build_encoder(load_config("default", ONE_BLOCK).encoder)


def test_names_and_shapes_are_openpcdets():
    """Counted from OpenPCDet's kitti_models/pointpillar.yaml: 6 tensors of the VFE, 114 of the backbone, 4,806,400 + 896 parameters."""
    encoder = build_encoder(load_config("openpcdet_kitti").encoder)
    state = encoder.state_dict()
    assert len([k for k in state if k.startswith("vfe.")]) == 6 and len([k for k in state if k.startswith("backbone_2d.")]) == 114
    assert state["vfe.pfn_layers.0.linear.weight"].shape == (64, 10)
    assert state["backbone_2d.blocks.0.1.weight"].shape == (64, 64, 3, 3) and state["backbone_2d.blocks.2.16.weight"].shape == (256, 256, 3, 3)
    assert state["backbone_2d.deblocks.1.0.weight"].shape == (128, 128, 2, 2) and state["backbone_2d.deblocks.2.0.weight"].shape == (256, 128, 4, 4)
    assert sum(p.numel() for p in encoder.backbone_2d.parameters()) == 4_806_400


def test_a_foreign_encoder_is_checked():
    config = dataclasses.replace(load_config("tiny").encoder, build="worldmodel.config:load_config")
    with pytest.raises(UsageError):
        build_encoder(config)
    with pytest.raises(UsageError, match="no_such_module"):
        build_encoder(dataclasses.replace(config, build="no_such_module:build"))


def test_reading_maps_agrees_with_grid_sample_and_so_do_gradients():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 9, 7, 5, generator=generator, dtype=torch.float32)
    of = torch.randint(0, 3, (400,), generator=generator)
    places = torch.rand(400, 2, generator=generator) * torch.tensor([13.0, 11.0]) - 2
    first, second = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    got = sample_maps(first, of, places)
    grid = torch.stack(((places[:, 1] + 0.5) * (2 / 7) - 1, (places[:, 0] + 0.5) * (2 / 9) - 1), 1)
    want = torch.stack([
        torch.nn.functional.grid_sample(second[b].permute(2, 0, 1)[None], g[None, None, None], align_corners=False)[0, :, 0, 0]
        for b, g in zip(of.tolist(), grid)
    ])  # fmt: skip
    assert (got - want).abs().max() < 1e-5
    weight = torch.randn(400, 5, generator=generator)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    assert (first.grad - second.grad).abs().max() < 1e-4
