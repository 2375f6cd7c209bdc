"""The adapter that docs/ADAPTERS.md shows, on what fleets have lying about. `tests/test_readme.py` runs the contract on it."""

import dataclasses
import errno
import importlib.util
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from sensors.adapters import base
from sensors.adapters.base import guess, open_source
from sensors.alignment.survey import survey
from sensors.errors import UsageError
from sensors.ingest import ingest
from sensors.records import Box, Labels, Log
from sensors.store.writer import write_log
from worldmodel.tools.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "ADAPTERS.md"


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    """The example, announced as another distribution would."""
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "fleet.py").write_text(block)
    spec = importlib.util.spec_from_file_location("fleet", tmp_path / "fleet.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fleet", module)
    spec.loader.exec_module(module)
    entry = type("Entry", (), {"name": "fleet", "value": "fleet", "load": staticmethod(lambda: module)})
    monkeypatch.setattr(base, "entry_points", lambda group: [entry])
    return module


@pytest.fixture
def drives(fleet, tmp_path):
    """A folder with drive-1 and drive-2."""
    (tmp_path / "raw").mkdir()
    root = fleet.write_sample(tmp_path / "raw")
    (root / "drive-1").rename(root / "drive-2")
    return fleet.write_sample(root)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("poses.csv", "1000,east,0,0,1,0,0,0"),
        ("poses.csv", "1000,0,0,0,1,0,0,0,0"),
        ("poses.csv", "1000,nan,0,0,1,0,0,0"),
        ("poses.csv", "1000,,,,,,,"),
        ("poses.csv", "-1,0,0,0,1,0,0,0"),
        ("sweeps.csv", "9" * 30 + ",0.bin"),
        ("sweeps.csv", "1e9,0.bin"),
        ("sweeps.csv", "1000"),
    ],
)
def test_a_line_that_is_no_number_costs_its_drive_by_name(drives, file, line):
    with open(drives / "drive-1" / file, "a") as out:
        out.write(f"{line}\n")
    error, healthy = open_source(drives, "fleet")
    assert str(error).startswith("fleet/drive-1: ") and "Error: " not in str(error) and "\n" not in str(error)
    assert healthy.id == "fleet/drive-2"


def test_names_of_files_may_hold_spaces_and_commas(drives, tmp_path):
    one = drives / "drive-1"
    (one / "0.bin").rename(one / "turn 0, north.bin")
    (one / "sweeps.csv").write_text("1000,turn 0, north.bin\r\n\r\n2000,2.bin\r\n")
    log = next(open_source(drives, "fleet"))
    assert log.sweep_stamps_ns["top"].tolist() == [1000, 2000] and len(log.read_sweep("top", 0).points) == 480
    assert one / "turn 0, north.bin" in log.files and one / "poses.csv" in log.files


def test_a_folder_that_may_not_be_looked_into_is_told_and_hides_no_other(drives, monkeypatch):
    (drives / "drive-0").mkdir()
    for name in ("stat", "open", "listdir", "scandir"):  # root, who may run this, can read every one
        real = getattr(os, name)

        def locked(path, *args, real=real, **more):
            if not isinstance(path, int) and "drive-0/" in os.fspath(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return real(path, *args, **more)

        monkeypatch.setattr(os, name, locked)
    assert guess(drives) == "fleet"
    error, *healthy = open_source(drives, "fleet")
    assert str(error).startswith("fleet/drive-0: sweeps.csv: Permission denied") and [log.id for log in healthy] == ["fleet/drive-1", "fleet/drive-2"]


def test_a_folder_that_may_not_be_looked_into_is_no_fleet(fleet, tmp_path, monkeypatch):
    (tmp_path / "lost+found").mkdir()
    monkeypatch.setattr(Path, "is_file", lambda path: (_ for _ in ()).throw(PermissionError(path)))
    assert fleet.recognise(tmp_path) == 0


def test_what_it_did_not_foresee_is_told_with_its_line(fleet, drives, tmp_path, monkeypatch):
    real = fleet._Drive._poses
    monkeypatch.setattr(fleet._Drive, "_poses", lambda self, counts: real(self, None if self.drive.name == "drive-1" else counts))
    found = ingest([drives], tmp_path / "s")
    assert (found.stored, found.quarantined, found.logs) == (1, 1, ("fleet/drive-2",))
    assert re.match(r"TypeError: .* in the adapter at fleet\.py:\d+$", found.reasons[0].reason)


def test_a_source_that_cannot_be_opened_costs_no_other_source(fleet, drives, tmp_path, monkeypatch):
    real = fleet.open_logs
    monkeypatch.setattr(fleet, "open_logs", lambda path, options: real(path if path.name != "bad" else None, options))
    (tmp_path / "bad").mkdir()
    found = ingest([tmp_path / "bad", drives], tmp_path / "s", dataset="fleet")
    assert (found.stored, found.quarantined) == (2, 1) and found.reasons[0].log == "bad#0"


def test_a_generator_says_that_it_ends_with_its_first_error(fleet, drives, monkeypatch):
    def generator(path, options):
        yield fleet._open(drives / "drive-2")
        raise ValueError("no number")

    monkeypatch.setattr(fleet, "open_logs", generator)
    log, error, end = open_source(drives, "fleet")
    assert isinstance(log, Log) and str(error).startswith("ValueError: no number") and "let its open_logs give map" in str(end)


def announced(monkeypatch, **loads):
    """Other distributions that announce adapters: name -> what loading it does."""
    entries = [type("Entry", (), {"name": name, "value": f"{name}:it", "load": staticmethod(load)}) for name, load in loads.items()]
    known = base.entry_points(group=base.GROUP)
    monkeypatch.setattr(base, "entry_points", lambda group: [*known, *entries])


def test_an_adapter_that_does_not_load_stands_in_nobodys_way(fleet, drives, tmp_path, monkeypatch):
    def wrong():
        raise SyntaxError("invalid syntax (theirs.py, line 3)")

    asked = type("Module", (), {"recognise": staticmethod(lambda path: 1 / 0), "__name__": "asks"})
    announced(monkeypatch, theirs=wrong, asks=lambda: asked, kitti_raw=lambda: asked)
    assert guess(drives) == "fleet" and {"fleet", "asks", "kitti_raw"} < set(base.adapters())
    assert base.broken() == {"theirs": "SyntaxError: invalid syntax (theirs.py, line 3)",
                             "kitti_raw": "there is an adapter of this name already; announce kitti_raw:it under another"}  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no adapter recognises it .*; theirs could not be asked, SyntaxError.*; asks could not be asked, ZeroDiv"):
        guess(tmp_path / "empty")
    with pytest.raises(UsageError, match="dataset 'theirs': its adapter cannot be used, SyntaxError"):
        next(open_source(drives, "theirs"))


def test_what_is_no_log_and_no_sweep_is_told(fleet, drives, tmp_path, monkeypatch):
    real = fleet._Drive.read_sweep
    monkeypatch.setattr(fleet._Drive, "read_sweep", lambda self, lidar, index: real(self, lidar, index) if self.drive.name == "drive-2" else None)
    found = ingest([drives], tmp_path / "s")
    assert (found.stored, found.quarantined) == (1, 1)
    assert "drive-1, top: item 0 was read as a NoneType where a Sweep belongs" in found.reasons[0].reason
    monkeypatch.setattr(fleet, "open_logs", lambda path, options: iter([None]))
    (error,) = open_source(drives, "fleet")
    assert "gave a NoneType where a Log belongs" in str(error)
    monkeypatch.setattr(fleet, "open_logs", lambda path, options: None)
    (error,) = open_source(drives, "fleet")
    assert "TypeError: 'NoneType' object is not iterable" in str(error)
    monkeypatch.setattr(fleet, "open_logs", lambda path, options: [])
    with pytest.raises(UsageError, match="fleet finds no log there"):
        list(open_source(drives, "fleet"))


def test_a_check_goes_on_behind_what_an_adapter_did_not_foresee(fleet, drives, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fleet._Drive, "read_sweep", lambda self, lidar, index: np.zeros(3)[index + 3 * (self.drive.name == "drive-1")])
    assert main(["check", str(drives), "-o", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"drive-1: top: 3 of 3 sampled sweeps cannot be read; the first: IndexError: index 3 is out of bounds", said)
    assert "drive-2: top: 3 of 3 sampled sweeps cannot be read; the first: log fleet/drive-2, top: item 0 was read as a float64" in said
    assert (tmp_path / "page.html").is_file()


def test_labels_that_are_none_are_told_and_the_log_is_stored(fleet, drives, tmp_path, monkeypatch):
    real = fleet._open
    monkeypatch.setattr(fleet, "_open", lambda drive: dataclasses.replace(real(drive), open_labels=lambda: []))
    found = ingest([drives], tmp_path / "s")
    assert (found.stored, found.items, found.items_quarantined, found.labels_quarantined, found.exit_code) == (2, 14, 0, 2, 3)
    assert found.reasons[0].sensor == "labels" and "open_labels gave a list; give Labels(boxes=...)" in found.reasons[0].reason


def test_boxes_in_degrees_and_in_the_world_are_told(drives):
    log = next(open_source(drives, "fleet"))
    boxes = [Box(int(stamp), "1", "car", (4e5, 5e6, 1), (4, 2, 1.5), 120.0) for stamp in log.sweep_stamps_ns["top"]]
    turned, far = [line for line in survey(dataclasses.replace(log, open_labels=lambda: Labels(boxes))).warnings if line.startswith("labels")]
    assert "3 of 3 boxes are turned by more than 2 pi" in turned and "3 of 3 boxes are more than 1000 m away" in far


def test_boxes_beside_all_sweeps_are_counted_and_told(fleet, drives, tmp_path, monkeypatch):
    log = next(open_source(drives, "fleet"))
    stamps = log.sweep_stamps_ns["top"].tolist()
    boxes = [Box(stamp + off, "1", "car", (9, 0, 1), (4, 2, 1.5), 0.0) for stamp, off in zip(stamps, (0, 37_000_000, 37_000_000), strict=True)]
    log = dataclasses.replace(log, open_labels=lambda: Labels(tuple(boxes)))
    assert not [line for line in survey(log, labels=False).warnings if line.startswith("labels")]
    (line,) = [line for line in survey(log).warnings if line.startswith("labels")]
    assert line.startswith("labels: 2 of 3 boxes lie at no sweep's stamp (37.0 ms off") and line.endswith("a sweep of top")
    assert write_log(tmp_path / "s", log)["counts"]["labels: boxes at the stamp of no sweep of top, of no use"] == 2


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_a_drive_ends_the_reading(fleet, drives, monkeypatch, error):
    def ends(drive):
        raise error

    monkeypatch.setattr(fleet, "_open", ends)
    with pytest.raises(error):
        list(open_source(drives, "fleet"))
