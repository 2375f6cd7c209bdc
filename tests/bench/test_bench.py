"""`wm bench`: what is timed is first shown to be the same, and a peer that is not there is said to be missing."""

import argparse
import json

import numpy as np
import pytest

from worldmodel import bench
from worldmodel.tools import bench as command


@pytest.fixture(scope="module")
def sweeps() -> tuple[np.ndarray, np.ndarray]:
    return bench.synthetic_sweeps(16, 300)


def test_every_kernel_agrees_with_its_peer(sweeps: tuple) -> None:
    cases = list(bench.kernel_cases(*sweeps))
    assert len({case.name for case in cases}) == len(cases) > 10
    for case in cases:
        if case.theirs is not None:
            assert case.same(case.ours(), case.theirs()), case.name


def test_synthetic_sweeps_are_the_same_every_time_and_look_like_a_street(sweeps: tuple) -> None:
    again = bench.synthetic_sweeps(16, 300)
    for sweep, other in zip(sweeps, again):
        np.testing.assert_array_equal(sweep, other)
        assert sweep.dtype == np.float32 and 0.94 < len(sweep) / 4800 < 0.98
        ranges = np.linalg.norm(sweep[:, :3], axis=1)
        assert 1 < ranges.min() < 6 and ranges.max() < 92


def test_a_wrong_answer_and_a_missing_peer_are_said() -> None:
    wrong = bench.Case("wrong", "peer", lambda: [np.zeros(2)], lambda: [np.ones(2)], bench._equal)
    row = bench.measure("kernels", "none", wrong, 3)
    assert row.answers.startswith("DIFFERENT") and row.ratio is not None and row.ratio_low <= row.ratio <= row.ratio_high
    alone = bench.Case("alone", "spconv CPU", lambda: [], None, bench._equal, bench.INSTALL_SPCONV)
    row = bench.measure("kernels", "none", alone, 3)
    assert row.peer_ms is None and "pip install" in row.answers and row.ours_ms is not None


def test_rows_and_machine_come_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    wrong = bench.Case("wrong", "peer", lambda: [np.zeros(2)], lambda: [np.ones(2)], bench._equal)
    monkeypatch.setattr(bench, "SECTIONS", {"kernels": lambda rounds, log, report: [bench.measure("kernels", "none", wrong, rounds)]})
    assert command.run(argparse.Namespace(sections=[], rounds=1, log=None, json=True)) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["command"] == "bench" and printed["rows"][0]["name"] == "wrong" and printed["machine"]["numba"] != "none"
