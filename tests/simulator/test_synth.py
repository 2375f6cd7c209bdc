"""`wm synth`: stores and datasets from seeds, the same every time, and nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sensors.simulator.log import MOST_SEED, simulate
from sensors.store.reader import open_store
from worldmodel.tools.cli import main

SMALL = ["--seconds", "0.3", "--lidar", "hdl32"]


def test_a_store_is_filled_once_and_holds_what_was_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    assert main(["synth", str(store), "--logs", "2", "--seed", "5", *SMALL, "--cameras", "front", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["command"] == "synth" and said["written"] == ["synthetic/street-000005", "synthetic/street-000006"] and said["present"] == []
    assert main(["synth", str(store), "--logs", "3", "--seed", "5", *SMALL, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["written"] == ["synthetic/street-000007"] and len(said["present"]) == 2

    stored, made = open_store(store).open_log("synthetic/street-000006"), simulate(6, seconds=0.3, lidar="hdl32", cameras="front")
    assert np.abs(stored.read_sweep("hdl32", 1).points - made.read_sweep("hdl32", 1).points).max() < 0.0021
    assert stored.read_image("front", 2).encoded == made.read_image("front", 2).encoded
    ours, theirs = made.open_labels(), stored.open_labels()
    assert ours is not None and theirs is not None and len(ours.boxes) == len(theirs.boxes) > 20
    mine, kept = ours.read_point_labels("hdl32", 1), theirs.read_point_labels("hdl32", 1)
    assert mine is not None and kept is not None
    assert (mine.category == kept.category).all() and (mine.instance == kept.instance).all() and (mine.moving == kept.moving).all()


def test_the_nuscenes_format_is_read_back_as_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sensors.adapters.base import open_source
    from sensors.records import Log

    assert main(["synth", str(tmp_path / "set"), "--logs", "1", *SMALL, "--format", "nuscenes"]) == 0
    (log,) = open_source(tmp_path / "set")
    assert isinstance(log, Log) and len(log.sweep_stamps_ns[log.reference_lidar]) == 3 and log.licence == "CC0-1.0"
    assert "1 logs" in capsys.readouterr().out


def test_no_logs_is_a_question_of_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", str(tmp_path / "store"), "--logs", "0"]) == 2
    assert "give at least 1" in capsys.readouterr().err and not (tmp_path / "store").exists()
    for what in (["--seconds", "0.1"], ["--seed", str(MOST_SEED), "--logs", "2"]):
        assert main(["synth", str(tmp_path / "store"), *what]) == 2
        assert "simulator: " in capsys.readouterr().err and not (tmp_path / "store").exists()
    assert simulate(MOST_SEED, seconds=0.2).sweep_stamps_ns["hdl64"][-1] < 2**62


@pytest.mark.slow
@pytest.mark.parametrize("at_a_terminal", [True, False])
def test_an_interrupt_ends_it_before_all_logs_are_made(tmp_path: Path, at_a_terminal: bool) -> None:
    """At a terminal the signal reaches the workers too."""
    store = tmp_path / "store"
    command = [sys.executable, "-m", "worldmodel", "synth", str(store), "--logs", "12", "--workers", "2", *SMALL]
    # who runs the tests in the background of a shell has Ctrl-C ignored, and so would the command
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    deadline = time.monotonic() + 120
    while not list(store.glob("logs/*")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    (os.killpg if at_a_terminal else os.kill)(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert len(open_store(store).ids) < 9 and open_store(store).verify() == []
