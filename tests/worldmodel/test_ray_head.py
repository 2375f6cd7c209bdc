"""What the ray head may know of evidence that it is told, half told and not told."""

import dataclasses

import pytest
import torch

from sensors.evidence import ALONG_M, AROUND_RAD, DISPLACED, MOVED
from worldmodel.heads.rays import MOST_OFFSET, Mixture, RayHead, RayInput
from worldmodel.planes import plane_ranges

SWEEPS = 3
READINGS = SWEEPS + MOVED


def rays(count=6, *, told=True, with_evidence=True):
    g = torch.Generator().manual_seed(0)
    uniform = lambda *shape: torch.rand(*shape, generator=g)  # noqa: E731
    direction = torch.nn.functional.normalize(uniform(count, 3) - 0.5, dim=1)
    return RayInput(
        origin=uniform(count, 3), direction=direction, of=torch.zeros(count, dtype=torch.long), step=torch.ones(count, dtype=torch.long),
        horizon_s=torch.full((count,), 0.4), bearing=uniform(count, 3), with_evidence=torch.full((count,), with_evidence),
        told=torch.full((count,), told), quadrants=5 + 30 * uniform(count, READINGS, 4), interpolated=5 + 30 * uniform(count, READINGS),
        nearest=5 + 30 * uniform(count, READINGS), offsets=0.01 * uniform(count, READINGS, 4, 2), angle=0.01 * uniform(count, READINGS),
        seen=uniform(count, SWEEPS, SWEEPS) - 0.5, along=uniform(count, 2, len(ALONG_M)) - 0.5,
        around=5 + 30 * uniform(count, len(AROUND_RAD)), paced=5 + 30 * uniform(count, SWEEPS - 1),
    )  # fmt: skip


@pytest.fixture
def head():
    torch.manual_seed(0)
    return RayHead(SWEEPS, READINGS, bins=6, width=16, latent_channels=4, latent_width=8).eval()


def test_readings_that_are_not_told_are_positions_and_nothing_else(head):
    untold = rays(told=False)
    prior = head.prior(untold)
    assert not prior.shift.any()
    assert prior.candidate.sum(1).eq(5 * READINGS + SWEEPS).all()
    planes, _ = plane_ranges(untold.quadrants[:, :SWEEPS], untold.offsets[:, :SWEEPS], untold.bearing[:, 0].cos(), untold.interpolated[:, :SWEEPS])
    expected = torch.cat((torch.cat((untold.quadrants, untold.interpolated[:, :, None]), 2).flatten(1), planes, head.bin_centre.expand(6, -1)), 1)
    torch.testing.assert_close(prior.position, expected.sort(1).values)
    other = dataclasses.replace(
        untold,
        quadrants=untold.quadrants.flip(0),
        nearest=untold.nearest * 2,
        offsets=untold.offsets * 3,
        angle=untold.angle * 2,
        seen=-untold.seen,
        along=-untold.along,
        around=untold.around * 2,
        paced=untold.paced * 2,
    )
    torch.testing.assert_close(head.prior(other).hidden, prior.hidden)
    by_kind = lambda raw, kind: torch.stack([raw[:, 0][kind == k].mean() for k in range(READINGS + 2)])  # noqa: E731
    found = head.prior(other)
    torch.testing.assert_close(by_kind(found.raw, found.kind), by_kind(prior.raw, prior.kind))


def test_told_readings_matter(head):
    asked = rays()
    hidden = head.prior(asked).hidden
    assert not torch.allclose(hidden, head.prior(dataclasses.replace(asked, seen=-asked.seen)).hidden)
    assert not torch.allclose(hidden, head.prior(dataclasses.replace(asked, along=-asked.along)).hidden)
    assert not torch.allclose(hidden, head.prior(dataclasses.replace(asked, around=asked.around * 2)).hidden)
    assert not torch.allclose(hidden, head.prior(dataclasses.replace(asked, paced=asked.paced * 2)).hidden)
    assert not torch.allclose(hidden, head.prior(dataclasses.replace(asked, told=~asked.told)).hidden)


def test_displaced_readings_are_told_by_how_far_they_lie_from_the_newest_sweeps_own(head):
    asked = rays()
    prior = head.prior(asked)
    newest = torch.cat((asked.quadrants[:, 0], asked.interpolated[:, :1]), 1)
    for copy in range(SWEEPS, SWEEPS + DISPLACED):
        own = torch.cat((asked.quadrants[:, copy], asked.interpolated[:, copy, None]), 1)
        wanted = (own - newest).gather(1, own.argsort(1))
        mine = prior.kind == copy
        torch.testing.assert_close(prior.shift[mine].view(len(own), 5), wanted)
    assert not prior.shift[prior.kind < SWEEPS].any() and not prior.shift[prior.kind >= SWEEPS + DISPLACED].any()


def test_withheld_readings_leave_no_trace(head):
    blind = rays(with_evidence=False)
    first, second = head.prior(blind), head.prior(dataclasses.replace(blind, quadrants=blind.quadrants * 2, nearest=blind.nearest * 2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert not first.candidate.any()


def test_surfaces_say_where_a_ray_meets_the_heights_that_the_state_tells(head):
    """On flat ground everywhere 1.7 m below the frame, and a roof 1.2 m above it, every ray that comes near one of them at a position is told how
    far along itself it meets it, and whether it is above or below there."""
    heights = torch.tensor([-1.7, 1.2])
    with torch.no_grad():
        head.heights.weight.zero_()
        head.heights.bias.copy_(heights)
    asked = rays(200)
    steep = asked.direction[:, 2].abs() > 0.05
    position = head.prior(asked).position
    height = asked.origin[:, 2:] + asked.direction[:, 2:] * position
    told = head.surfaces(asked, torch.randn(*position.shape, 4), position, height)
    meets = (heights - asked.origin[:, 2:]) / asked.direction[:, 2:]
    checked = 0
    for k in range(2):
        torch.testing.assert_close(told[..., k].sign(), (heights[k] - height).sign())
        assert (told[..., k].abs() <= told[..., 2 + k].abs() + 1e-6).all()
        share = torch.atanh(told[..., 4 + k]) * MOST_OFFSET
        clear = (told[..., 4 + k].abs() < 0.99) & steep[:, None]
        torch.testing.assert_close((position * (1 + share))[clear], meets[:, k, None].expand_as(position)[clear], rtol=1e-3, atol=1e-3)
        checked += int(clear.sum())
    assert checked > 100


def test_crps_of_the_kernel_is_that_of_all_pairs_and_so_is_what_is_learned_from_it(head):
    ranges, weight = 5 + 20 * torch.rand(40), torch.rand(40)
    learned = []
    for crps in (Mixture.crps, Mixture.crps_anywhere):
        head.zero_grad()
        prior = head.prior(rays(40))
        value = crps(head.mixture(prior.position, prior.raw, prior.candidate), ranges)
        (value * weight).sum().backward()
        learned.append([value.detach()] + [p.grad for p in head.parameters() if p.grad is not None])
    assert len(learned[0]) > 4
    for one, other in zip(*learned, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
