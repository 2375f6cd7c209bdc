"""Orthogonalised momentum beside the singular value decomposition it stands for, and who learns by which rule."""

import pytest
import torch
from torch import nn

from sensors.errors import WmError
from tests.worldmodel.conftest import tiny
from worldmodel import checkpoint
from worldmodel.model import WorldModel
from worldmodel.optimizer import LIKE_ADAMW, Muon, optimizers_of, orthogonalized


def polar_factor(matrix):
    """The slow twin: U V^T of U S V^T."""
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vt


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (2, 64), (48, 432)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_all_directions_get_about_the_same_length(shape, size):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator) * size
    found = orthogonalized(matrix)
    singular = torch.linalg.svdvals(found)
    assert found.dtype == torch.float32 and singular.min() > 0.6 and singular.max() < 1.3
    agreement = (found.double() * polar_factor(matrix)).sum() / found.double().norm() / min(shape) ** 0.5
    assert agreement > 0.95
    assert torch.equal(found, orthogonalized(matrix))


def test_zero_stays_zero():
    assert not orthogonalized(torch.zeros(5, 9)).any()


@pytest.mark.parametrize("layer", [nn.Linear(40, 24), nn.Conv2d(16, 24, 3), nn.ConvTranspose2d(24, 16, 2, stride=2)])
def test_a_step_is_as_long_as_one_of_adamw_whatever_the_gradient(layer):
    weight = nn.Parameter(layer.weight.detach().clone())
    for size in (1e-5, 1.0, 1e5):
        optimizer = Muon([{"params": [weight], "lr": 1e-3}])
        before = weight.detach().clone()
        weight.grad = size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        moved = (weight.detach() - before).square().mean().sqrt()
        assert 0.7e-3 * LIKE_ADAMW < moved < 1.3e-3 * LIKE_ADAMW


def test_memory_format_does_not_matter():
    start, grad = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    ends = []
    for form in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(start.clone(memory_format=form))
        optimizer = Muon([{"params": [weight], "lr": 1e-2}])
        for _ in range(3):
            weight.grad = grad.clone(memory_format=form)
            optimizer.step()
        ends.append(weight.detach().contiguous())
    assert torch.equal(*ends)


def test_every_parameter_learns_once_and_deep_layers_by_muon():
    model = WorldModel(tiny())
    adamw, muon = optimizers_of(model, model.deep, lambda name: 1e-3, 1e-3)
    name_of = {id(p): name for name, p in model.named_parameters()}
    by = [sorted(name_of[id(p)] for group in o.param_groups for p in group["params"]) for o in (adamw, muon)]
    assert sorted(by[0] + by[1]) == sorted(name_of.values())
    assert all(any(name.startswith(part) for name in by[1]) for part in model.deep) and all(name.startswith(model.deep) for name in by[1])
    assert {"rays.evidence_out.weight", "rays.latent_hidden.weight", "occupancy.weight"} <= set(by[0])
    assert {"rays.evidence.2.weight", "encoder.backbone_2d.blocks.0.1.weight"} <= set(by[1])
    assert not [name for name in by[1] if name.endswith("bias") or "embedding" in name]


def test_another_optimizers_tensors_are_refused():
    model = WorldModel(tiny())
    optimizers = optimizers_of(model, model.deep, lambda name: 1e-3, 1e-3)
    weight = model.rays.evidence[2].weight
    for key in ("rays.evidence.2.weight/exp_avg", "rays.evidence_out.weight/momentum"):
        with pytest.raises(WmError, match="another version"):
            checkpoint.restore_optimizers(optimizers, model, {key: torch.zeros_like(weight)})
    checkpoint.restore_optimizers(optimizers, model, {"rays.evidence.2.weight/momentum": torch.ones_like(weight)})
    assert torch.equal(optimizers[1].state[weight]["momentum"], torch.ones_like(weight))
    saved = checkpoint.optimizer_tensors(optimizers, model)
    assert list(saved) == ["rays.evidence.2.weight/momentum"]


def test_a_model_without_matrices_has_adamw_alone():
    (adamw,) = optimizers_of(nn.BatchNorm1d(4), ("",), lambda name: 1e-3, 1e-3)
    assert isinstance(adamw, torch.optim.AdamW)
