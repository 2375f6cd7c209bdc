"""Every fine-tuning task, found by discovery, does what the loop asks of it."""

import importlib

import numpy as np
import pytest
import torch

from sensors.clips import clips_at
from sensors.simulator.log import simulate
from worldmodel import finetune
from worldmodel.config import load_config
from worldmodel.labelled import grid_of

TASKS = finetune.tasks()
CONFIG = load_config("tiny")


@pytest.fixture(scope="module")
def log():
    return simulate(5, seconds=0.6, lidar="hdl32", every=2)


@pytest.fixture(scope="module", params=TASKS)
def seen(request, log):
    """A task, its examples and the grid of the encoder's map."""
    task = importlib.import_module(f"worldmodel.downstream.{request.param}")
    clips = clips_at(log, log.sweep_stamps_ns["hdl32"], past=CONFIG.model.past, rate_hz=CONFIG.model.rate_hz)
    labels = log.open_labels()
    return task, [task.example_of(clip, labels, CONFIG) for clip in clips], grid_of(CONFIG.encoder, 1.6)


def batch(task, examples, grid):
    wanted = [task.targets(example, grid) for example in examples]
    return {name: torch.from_numpy(np.stack([w[name] for w in wanted])) for name in wanted[0]}


def test_there_are_tasks():
    assert {"bev_segmentation", "detection"} <= set(TASKS)


def test_an_example_is_what_the_encoder_saw_and_its_labels(seen):
    task, examples, _ = seen
    assert len(examples) == 3 and isinstance(task.SCORE, str)
    for example in examples:
        assert example.log == "synthetic/street-000005" and example.points.dtype == np.float32 and example.points.shape[1] == 5
        assert len(example.points) > 1000


def test_mirrored_twice_and_turned_back_is_the_same(seen):
    task, examples, grid = seen
    whole, before = examples[-1], batch(task, examples[-1:], grid)
    assert any((np.nan_to_num(v) != np.nan_to_num(batch(task, [task.turned(whole, 0.5, False)], grid)[k])).any() for k, v in before.items())
    for back in (task.turned(task.turned(whole, 0.0, True), 0.0, True), task.turned(task.turned(whole, 0.7, False), -0.7, False)):
        np.testing.assert_allclose(back.points, whole.points, atol=1e-4)
        for name, values in batch(task, [back], grid).items():
            np.testing.assert_allclose(values.double(), before[name].double(), atol=1e-3)


def test_a_head_learns_the_targets_of_its_frames(seen):
    """On a map that is different in every cell, so that what the head says can only be wrong by want of steps."""
    task, examples, grid = seen
    torch.manual_seed(0)
    head, wanted = task.Head(8), batch(task, examples, grid)
    latent = torch.randn(len(examples), 8, grid.rows, grid.columns)
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    losses = []
    for _ in range(6):
        loss = task.loss(head(latent), wanted)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        found = task.answers(head.eval()(latent), grid)
    assert len(found) == len(examples) and 0 <= task.score(examples, found, grid) <= 1


def test_unlabelled_cells_cost_nothing(seen):
    import dataclasses

    task, examples, grid = seen
    blind = [dataclasses.replace(example, fov_rad=-1.0) for example in examples]
    torch.manual_seed(0)
    head = task.Head(8)
    loss = task.loss(head(torch.randn(len(blind), 8, grid.rows, grid.columns)), batch(task, blind, grid))
    assert float(loss.detach()) == 0
