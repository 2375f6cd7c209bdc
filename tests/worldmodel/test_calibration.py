"""Calibration finds what was done to a distribution, and pose errors are small rigid transforms that a seed fixes."""

import numpy as np
import pytest
import torch

from sensors.clips import clips_of
from sensors.errors import WmError
from sensors.rays import history_of, rays_of
from tests.worldmodel.conftest import tiny
from worldmodel import calibration
from worldmodel.batches import _PoseErrors
from worldmodel.forecast import EVIDENCE_ONLY, MODEL, POSITIONS
from worldmodel.heads.rays import Mixture
from worldmodel.trained import Trained


def test_scales_that_are_too_small_are_widened():
    generator = torch.Generator().manual_seed(0)
    count = 4000
    truth = 20 + torch.distributions.Laplace(0, 0.5).sample((count,))
    told = Mixture(torch.full((count, 1), 20.0), torch.full((count, 1), 0.25), torch.zeros(count, 1), torch.full((count,), -9.0), None, None)
    step = torch.randint(0, 2, (count,), generator=generator)
    rows = calibration.fit(told, truth, step * 0.5, step, torch.ones(count))
    assert [row[0] for row in rows] == [0.0, 0.5]
    assert all(1.6 < row[1] < 2.5 for row in rows)
    hard = (truth - 20).abs() > 0.5
    twice = torch.cat([torch.arange(count), torch.nonzero(hard)[:, 0]])  # the hard ones drawn twice, at half their weight
    drawn = Mixture(*(column[twice] for column in told[:4]), None, None)
    assert calibration.fit(drawn, truth[twice], step[twice] * 0.5, step[twice], torch.where(hard[twice], 0.5, 1.0)) == rows
    table = {"model": rows}
    assert calibration.at(table, "model", 0.25) == pytest.approx((rows[0][1] * rows[1][1]) ** 0.5)
    assert calibration.at(table, "other", 0.2) == calibration.at(None, "model", 0.2) == 1.0


def test_wider_scales_leave_masses_as_shares_of_a_return():
    log_mass = torch.log_softmax(torch.randn(50, 7, generator=torch.Generator().manual_seed(1)), 1)
    told = Mixture(torch.rand(50, 7), torch.ones(50, 7), log_mass - 0.7, torch.full((50,), -0.7), None, None)
    wide = calibration.widened(told, 2.0)
    torch.testing.assert_close(wide.log_mass, log_mass)
    assert torch.equal(wide.scale, 2 * told.scale) and torch.equal(wide.centre, told.centre)


def test_a_table_of_another_version_is_refused():
    assert calibration.checked(None) is None and calibration.checked({"model": [[0.2, 1.1]]}) == {"model": [[0.2, 1.1]]}
    with pytest.raises(WmError, match="another version"):
        calibration.checked({"model": [[0.2, 0.9, 1.1]]})


@pytest.mark.parametrize("best", [0.0, 0.25, 1.0])
def test_the_share_whose_answers_are_nearest_is_chosen(best):
    truth, one = 20 + torch.distributions.Laplace(0, 0.2).sample((900,)), torch.ones(900, 1)
    answers = [Mixture((20 + 3 * abs(share - best)) * one, 0.2 * one, 0 * one, torch.full((900,), -9.0), None, None) for share in calibration.SHARES]
    assert calibration.fit_share(answers, truth, torch.ones(900)) == best


def test_only_rays_whose_readings_are_told_are_shared(run, parts):
    trained = Trained(run)
    torch.nn.init.normal_(trained.model.rays.latent_out.weight, std=0.5)
    clip = clips_of(parts[0].log)[0]
    history = history_of(clip)
    asked = [rays_of(clip, clip.future[0], 200), rays_of(clip, clip.past[-1], 200)]
    trained.calibration = None

    def masses(share, arm):
        trained.share = share
        return [m.log_mass for m in trained.raw_mixtures(clip, history, asked, (arm,))[arm]]

    (told, present), (alone, _) = masses(0.0, MODEL), masses(0.0, EVIDENCE_ONLY)
    torch.testing.assert_close(told, alone)
    whole, present_whole = masses(1.0, MODEL)
    assert not torch.allclose(told, whole) and torch.equal(present, present_whole)
    assert all(torch.equal(a, b) for a, b in zip(masses(0.0, POSITIONS), masses(1.0, POSITIONS), strict=True))


def test_a_share_that_is_none_is_refused():
    assert calibration.checked_share(None) == 1.0 and calibration.checked_share(0.5) == 0.5 and calibration.checked_share(0) == 0.0
    for wrong in (1.5, -0.1, float("nan"), [[0.2, 0.5]], [], "1", True):
        with pytest.raises(WmError, match="train the run again"):
            calibration.checked_share(wrong)


def test_pose_errors_are_small_rigid_and_a_function_of_the_clip(parts):
    config = tiny("train.pose_error_m=0.03", "train.pose_error_deg=0.05")
    clip = clips_of(parts[0].log)[0]
    history = history_of(clip)
    first, second = (_PoseErrors(config, clip.id)(history) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first.points, second.points, strict=True))
    assert np.array_equal(first.points[-1], history.points[-1])
    moved = np.linalg.norm(first.points[0] - history.points[0], axis=1)
    assert 0 < moved.max() < 0.5
    pose = first.present_from_sensor[0][:3, :3]
    np.testing.assert_allclose(pose @ pose.T, np.eye(3), atol=1e-4)
    still = _PoseErrors(tiny("train.pose_error_m=0.0", "train.pose_error_deg=0.0"), clip.id)(history)
    assert still is history
