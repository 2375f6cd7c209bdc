"""The roll-out of the state: what it adds, how far it can go, and the gauge that sees it stop."""

import math

import pytest
import torch

from worldmodel import health
from worldmodel.dynamics import Dynamics

TIMES_S = torch.tensor([[0.2, 0.4, 0.6, 0.8, 1.0], [0.1, 0.2, 0.3, 0.4, 0.5]])


@pytest.fixture
def dynamics():
    torch.manual_seed(0)
    made = Dynamics(8, 16)
    torch.nn.init.normal_(made.leave.weight, std=0.1)
    return made


@torch.no_grad()
def states(dynamics):
    start = torch.randn(2, 8, 32, 32, generator=torch.Generator().manual_seed(1))
    return dynamics.roll_out(start, TIMES_S)


def test_untrained_it_leaves_the_state_as_it_is():
    rolled = states(Dynamics(8, 16))
    assert torch.equal(rolled, rolled[:, :1].expand_as(rolled))


def test_a_step_adds_what_its_time_allows(dynamics):
    rolled = states(dynamics)
    change = (rolled[:, 1] - rolled[:, 0]).flatten(1)
    again = dynamics.step(rolled[:, 0], torch.tensor([0.1, 0.2]))
    torch.testing.assert_close((again - rolled[:, 0]).flatten(1), change * torch.tensor([[0.5], [2.0]]), rtol=1e-4, atol=1e-5)


def test_it_cannot_run_away_however_large_its_weights(dynamics):
    """Orthogonalised steps make weights grow; without its norms the roll-out of a large state then went to 1e6, or to nothing at all."""
    usual = states(dynamics)
    with torch.no_grad():
        for layer in (dynamics.enter, dynamics.middle):
            layer.weight.mul_(50)
            layer.bias.mul_(50)
    torch.testing.assert_close(states(dynamics), usual, rtol=0.02, atol=0.02)
    with torch.no_grad():
        start = 1000 * usual[:, 0]
        change = dynamics.roll_out(start, TIMES_S) - start[:, None]
    assert change.abs().max() < 4 * (usual - usual[:, :1]).abs().max()


def test_a_roll_out_that_adds_the_same_everywhere_raises_the_alarm(dynamics):
    rolled = states(dynamics)
    lively = health.rolled(rolled[:, 0], rolled[:, -1])
    with torch.no_grad():
        dynamics.leave.weight.zero_()
        dynamics.leave.bias.fill_(0.3)
    rolled = states(dynamics)
    still = health.rolled(rolled[:, 0], rolled[:, -1])
    assert lively > 0.01 and still < 1e-6
    latent = torch.randn(4, 24, 48, 48, generator=torch.Generator().manual_seed(0))
    assert "forecasts nothing" in str(health.alarm(health.measure(latent, rolled=still), 20.0))
    assert health.alarm(health.measure(latent, rolled=lively), 20.0) is None
    assert health.alarm(health.measure(latent, rolled=math.nan), 20.0) is None
