"""A small store of simulated streets and a run trained on it for a few steps: made once for all tests of the world model."""

import dataclasses

import pytest
import torch

from sensors.data import open_data
from sensors.simulator.log import simulate
from sensors.store.writer import write_log
from worldmodel import checkpoint, pretrain, rundir
from worldmodel.config import load_config
from worldmodel.model import WorldModel

SEEDS = (7, 8, 9, 10, 11)


def tiny(*overrides):
    """The tiny configuration, fixed to what every CPU has."""
    return load_config("tiny", ["train.autocast=off", "train.channels_last=off", "train.threads=1", "train.validation=0.2", *overrides])


def train(parts, run, config, **kwargs):
    if not (run / "config.yaml").exists():
        rundir.create(run, config, parts)
    return pretrain.train(parts, config, run, device=torch.device("cpu"), **kwargs)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("streets") / "store"
    for seed in SEEDS:
        write_log(root, simulate(seed, seconds=2.4, lidar="hdl32", every=2))
    return root


@pytest.fixture(scope="session")
def parts(store):
    return open_data(store)


@pytest.fixture(scope="session")
def run(parts, tmp_path_factory):
    return train(parts, tmp_path_factory.mktemp("runs") / "run", tiny())


@pytest.fixture(scope="session")
def longer():
    return lambda config, steps: dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


@pytest.fixture(scope="session")
def untrained(parts):
    """Makes a run as training leaves it, without the training: small random weights, norms with statistics of their own."""

    def make(folder, *overrides):
        config = tiny(*overrides)
        rundir.create(folder, config, parts)
        torch.manual_seed(0)
        model = WorldModel(config)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2.0)
        checkpoint.save(folder, 1, model, None, {"best": True})
        return folder

    return make
