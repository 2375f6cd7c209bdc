"""What a GPU would be asked to do, on a device that only says it is not the CPU: nothing is left behind, and the numbers are those of the CPU."""

import json

import numpy as np
import pytest
import torch

from sensors.rays import history_of, rays_of
from tests.elsewhere import ELSEWHERE, Elsewhere
from tests.worldmodel.conftest import tiny
from worldmodel import finetune, pretrain, rundir
from worldmodel.evaluate import clips_to_evaluate
from worldmodel.trained import Trained

GENTLY = ["train.lr=0.001"]  # rounding differs, and large steps make it large: of a gradient that is all but nothing Muon makes a whole step


def test_the_device_refuses_what_a_gpu_refuses():
    with Elsewhere():
        there = torch.arange(6.0).to(ELSEWHERE).requires_grad_()
        assert there.device == ELSEWHERE and torch.zeros(2, device=ELSEWHERE).device == ELSEWHERE == there.new_tensor([1.0]).device
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(6)
        with pytest.raises(RuntimeError, match="numpy"):
            there.detach().numpy()
        (there[torch.tensor([1, 2])] * 2 + torch.tensor(1.0)).sum().backward()  # indices and single numbers may lie on the CPU
        assert there.grad.device == ELSEWHERE and there.grad.cpu().tolist() == [0, 2, 2, 0, 0, 0]


@pytest.fixture(scope="module")
def runs(parts, tmp_path_factory):
    """The same training on both devices: six steps, then two more after `--resume`."""
    found = {}
    for device in (torch.device("cpu"), ELSEWHERE):
        run = tmp_path_factory.mktemp(device.type) / "run"
        config = tiny("train.steps=6", "train.validate_every=3", *GENTLY)
        rundir.create(run, config, parts)
        with Elsewhere():
            pretrain.train(parts, config, run, device=device)
            pretrain.train(parts, tiny("train.steps=8", "train.validate_every=3", *GENTLY), run, device=device, resume=True)
        found[device.type] = run
    return found


def test_training_and_resuming_are_those_of_the_cpu(runs):
    steps = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs.values()]
    assert [row["step"] for row in steps[0]] == [*range(1, 9)] and any("val/l1_model" in row for row in steps[0])
    for here, there in zip(*steps, strict=True):
        assert here.keys() == there.keys()
        drawn = {"health/rank", "health/cosine"} & here.keys()  # from cells drawn by how many are busy: one more, and all others are drawn
        named = {k for k in here if k.startswith(("train/", "val/", "health/"))} - {"train/clips_per_s", "health/sigreg"}
        for keys, rel in ((sorted(named - drawn), 0.005), (sorted(drawn), 0.1)):
            assert [there[k] for k in keys] == pytest.approx([here[k] for k in keys], rel=rel, abs=2e-3)


def test_a_run_answers_the_same(runs, parts):
    clip = clips_to_evaluate(parts, "native", 1)[0]
    history = history_of(clip)
    rays = [rays_of(clip, frame, 256) for frame in (clip.past[-1], clip.future[0], clip.future[-1])]
    with Elsewhere():
        here, there = (Trained(runs["cpu"], device=device).mixtures(clip, history, rays, Trained.arms) for device in (torch.device("cpu"), ELSEWHERE))
    for arm in Trained.arms:
        for one, other in zip(here[arm], there[arm], strict=True):
            assert all(np.allclose(getattr(one, name), getattr(other, name), atol=1e-3) for name in one.__dataclass_fields__)


@pytest.mark.parametrize("task", ["bev_segmentation", "detection"])
def test_fine_tuning_is_that_of_the_cpu(runs, parts, task):
    curves = []
    for device in (torch.device("cpu"), ELSEWHERE):
        plan = finetune.Plan(batch=2, most_steps=4, every=2, patience=2, threads=1, device=device)
        with Elsewhere():
            results = finetune.finetune(runs["cpu"], parts[:4], parts[4:], task_name=task, seeds=(0,), plan=plan)
        curves.append([value for r in results for value in (r.score, *(score for _, score in r.curve))])
    assert len(curves[0]) == 4 * 3 and curves[1] == pytest.approx(curves[0], abs=0.02)
