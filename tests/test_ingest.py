"""Ingest: every log exactly once, everything counted, whatever happens to the source or the process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sensors import crew as workers
from sensors import files, intake
from sensors.adapters import kitti_raw, nuscenes
from sensors.errors import Interrupted, UsageError
from sensors.ingest import ingest
from sensors.store.reader import open_store
from worldmodel.tools import cli


@pytest.fixture
def raw(tmp_path):
    """A date with three drives; the third has no OXTS."""
    (tmp_path / "raw").mkdir()
    drive = kitti_raw.write_sample(tmp_path / "raw")
    for number in (2, 3):
        shutil.copytree(drive, drive.with_name(f"2011_09_26_drive_000{number}_sync"))
    return drive.parent


@pytest.fixture
def odometry(monkeypatch):
    """Stands in for registration, which needs more than a bare wall: the sensor did not move."""
    import importlib

    import numpy as np

    from sensors.records import Trajectory

    real = importlib.import_module("sensors.alignment.odometry")
    stamps = lambda log: log.sweep_stamps_ns[log.reference_lidar]  # noqa: E731

    def still(name):
        def compute(log, report):
            for done in range(len(stamps(log)) + 1):
                report(done, len(stamps(log)), name)
            return Trajectory(stamps(log), np.tile(np.eye(4), (len(stamps(log)), 1, 1)), name)

        return compute

    for name in ("odometry", "refined"):
        monkeypatch.setattr(real, name, still(name))


def drive(raw, number):
    return raw / f"2011_09_26_drive_000{number}_sync"


def content(store):
    """{log id: digests of its files}, after comparing every byte."""
    opened = open_store(store)
    assert opened.verify() == [] and opened.strangers() == []
    return {log_id: [row["sha256"] for row in opened.manifest(log_id)["files"]] for log_id in opened.ids}


def test_every_log_is_stored_once_and_the_second_run_filters_all(tmp_path, raw):
    first = ingest([raw], tmp_path / "s")
    assert (first.seen, first.stored, first.filtered, first.quarantined, first.exit_code) == (3, 3, 0, 0, 0)
    assert (first.items, first.items_quarantined) == (3 * 7, 0) and len(first.logs) == 3
    before = content(tmp_path / "s")
    again = ingest([raw, raw], tmp_path / "s")
    assert (again.seen, again.stored, again.already, again.exit_code) == (3, 0, 3, 0) and content(tmp_path / "s") == before


@pytest.mark.slow
def test_workers_give_what_one_process_gives(tmp_path, raw):
    shutil.rmtree(drive(raw, 2) / "velodyne_points")
    ours, theirs = ingest([raw], tmp_path / "one"), ingest([raw], tmp_path / "two", workers=2)
    assert vars(ours) == vars(theirs) and content(tmp_path / "one") == content(tmp_path / "two")


def test_shards_share_the_logs_out_without_loss(tmp_path, raw):
    reports = [ingest([raw], tmp_path / "s", shard_index=i, num_shards=3) for i in range(3)]
    assert sum(report.stored for report in reports) == 3 and all(report.seen == 3 == report.stored + report.other_shards for report in reports)
    assert ingest([raw], tmp_path / "s").already == 3


def test_an_unreadable_sweep_costs_itself_and_an_unreadable_log_itself(tmp_path, raw):
    (drive(raw, 1) / "velodyne_points/data/0000000002.bin").write_bytes(b"1234567")
    (drive(raw, 2) / "image_02/data/0000000000.png").write_bytes(b"GIF89a")
    for path in (drive(raw, 3) / "velodyne_points/data").iterdir():
        path.write_bytes(b"")
    shutil.rmtree(drive(raw, 3) / "image_02")
    found = ingest([raw], tmp_path / "s")
    assert (found.seen, found.stored, found.quarantined, found.exit_code) == (3, 2, 1, 3)
    assert found.items == 12 and found.items_quarantined == 2
    assert [(row.log[-6], row.sensor) for row in found.reasons] == [("1", "velodyne"), ("2", "image_02"), ("3", None)]
    assert "0000000002.bin" in found.reasons[0].reason
    (kept,) = (tmp_path / "s/quarantine").iterdir()
    assert json.loads(kept.read_text())["log"].endswith("0003_sync")


def test_a_log_whose_files_are_not_there_is_quarantined_and_taken_once_they_are(tmp_path):
    root = nuscenes.write_sample(tmp_path / "raw")
    for folder in ("samples", "sweeps"):
        (root / folder).rename(tmp_path / folder)
    found = ingest([root], tmp_path / "s")
    assert (found.seen, found.stored, found.quarantined, found.exit_code) == (1, 0, 1, 3)
    assert "it holds none, fetch its files" in found.reasons[0].reason and "LIDAR_TOP: listed, file absent: 13" in found.reasons[0].reason
    for folder in ("samples", "sweeps"):
        (tmp_path / folder).rename(root / folder)
    assert ingest([root], tmp_path / "s").stored == 1 and list((tmp_path / "s/quarantine").iterdir()) == []


def test_a_pipe_or_a_link_out_in_place_of_a_file_is_not_waited_for(tmp_path, raw):
    first, second, *_ = sorted((drive(raw, 1) / "velodyne_points/data").iterdir())
    first.unlink()
    os.mkfifo(first)
    second.unlink()
    second.symlink_to("/dev/zero")
    found = ingest([drive(raw, 1)], tmp_path / "s")
    assert (found.stored, found.items_quarantined, found.exit_code) == (1, 2, 3)


def test_a_log_that_cannot_be_opened_is_told_by_name_and_taken_once_mended(tmp_path, raw):
    calibration = raw / "calib_imu_to_velo.txt"
    text = calibration.read_text()
    calibration.write_text("R: 1 2 3\n")
    found = ingest([raw], tmp_path / "s")
    assert (found.seen, found.quarantined, found.exit_code) == (3, 3, 3) and "drive_0001_sync" in found.reasons[0].reason
    assert len(list((tmp_path / "s/quarantine").iterdir())) == 3
    calibration.write_text(text)
    assert ingest([raw], tmp_path / "s").stored == 3 and list((tmp_path / "s/quarantine").iterdir()) == []


def test_a_source_that_changes_while_it_is_read_is_quarantined(tmp_path, raw, monkeypatch):
    real = intake.write_log

    def slow_write(store, log, *, before_commit, **rest):
        def grown_meanwhile():
            if log.id.endswith("0002_sync"):
                with open(drive(raw, 2) / "velodyne_points/data/0000000000.bin", "ab") as file:
                    file.write(bytes(16))
            before_commit()

        return real(store, log, before_commit=grown_meanwhile, **rest)

    monkeypatch.setattr(intake, "write_log", slow_write)
    found = ingest([raw], tmp_path / "s")
    assert (found.stored, found.quarantined) == (2, 1) and "changed while they were read" in found.reasons[0].reason
    assert len(content(tmp_path / "s")) == 2


def test_a_stored_log_whose_source_is_another_now_is_not_taken_for_the_same(tmp_path, raw):
    ingest([drive(raw, 1)], tmp_path / "s")
    with open(drive(raw, 1) / "velodyne_points/data/0000000000.bin", "ab") as file:
        file.write(bytes(16))
    found = ingest([drive(raw, 1)], tmp_path / "s")
    assert found.quarantined == 1 and "--overwrite" in found.reasons[0].reason
    assert ingest([drive(raw, 1)], tmp_path / "s", overwrite=True).stored == 1
    assert open_store(tmp_path / "s").manifest("kitti_raw/2011_09_26_drive_0001_sync")["generation"] == 2


def test_a_log_without_poses_gets_odometry_and_says_so(tmp_path, raw, odometry):
    shutil.rmtree(drive(raw, 3) / "oxts")
    ingest([raw], tmp_path / "s")
    store = open_store(tmp_path / "s")
    assert [store.manifest(log_id)["pose_source"] for log_id in store.ids] == ["gnss", "gnss", "odometry"]
    assert store.open_log(store.ids[2]).poses.source == "odometry"
    ingest([raw], tmp_path / "r", poses="refined")
    assert open_store(tmp_path / "r").manifest(store.ids[0])["pose_source"] == "refined"


def test_a_log_whose_odometry_fails_is_kept_without_poses_and_says_so(tmp_path, raw, odometry, monkeypatch):
    from sensors.alignment import odometry as real
    from sensors.records import RecordError

    def fails(log, report):
        raise RecordError("too few sweeps")

    monkeypatch.setattr(real, "odometry", fails)
    shutil.rmtree(drive(raw, 3) / "oxts")
    assert ingest([drive(raw, 3)], tmp_path / "s").stored == 1
    store = open_store(tmp_path / "s")
    assert store.open_log(store.ids[0]).poses is None and "too few sweeps" in store.manifest(store.ids[0])["notes"][0]
    assert ingest([drive(raw, 3)], tmp_path / "t", poses="odometry").quarantined == 1
    assert ingest([drive(raw, 3)], tmp_path / "s").already == 1
    (row,) = ingest([drive(raw, 3)], tmp_path / "s", poses="odometry").reasons
    assert row.reason.endswith("is stored with --poses log, asked is --poses odometry; --overwrite stores it as asked now")


def test_what_is_stored_in_another_way_than_asked_is_told(tmp_path, raw, odometry, capsys):
    one, store = drive(raw, 1), tmp_path / "s"
    assert ingest([one], store).stored == 1
    for asked, said in (
        ({"poses": "refined"}, "--poses refined"),
        ({"lossless": True}, "--poses log --lossless"),
        ({"reference": True}, "--poses log --reference"),
    ):
        found = ingest([one], store, **asked)
        assert (found.quarantined, found.already, found.exit_code) == (1, 0, 3)
        assert found.reasons[0].reason == (
            f"log kitti_raw/{one.name}: is stored with --poses log, asked is {said}; --overwrite stores it as asked now"
        )
        assert ingest([one], store).already == 1 and list((store / "quarantine").iterdir()) == []
    assert cli.main(["ingest", str(one), str(store), "--poses", "refined"]) == 3 and "asked is --poses refined" in capsys.readouterr().out
    asked = {"poses": "refined", "reference": True}
    assert ingest([one], store, overwrite=True, **asked).stored == 1 and ingest([one], store, **asked).already == 1
    assert ingest([one], store, lossless=True, **asked).already == 1  # nothing is copied that could lose something
    assert ingest([one], store).quarantined == 1 and open_store(store).manifest(f"kitti_raw/{one.name}")["pose_source"] == "refined"


def test_odometry_for_want_of_poses_is_odometry_as_asked(tmp_path, raw, odometry):
    shutil.rmtree(drive(raw, 3) / "oxts")
    for first, then in (("log", "odometry"), ("odometry", "log")):
        store = tmp_path / first
        assert ingest([drive(raw, 3)], store, poses=first).stored == 1
        assert ingest([drive(raw, 3)], store, poses=first).already == ingest([drive(raw, 3)], store, poses=then).already == 1
        assert ingest([drive(raw, 3)], store, poses="refined").quarantined == 1


def other_content(folder):
    """Change what the recording holds, and neither names nor sizes."""
    for path in folder.rglob("*.bin"):
        path.write_bytes(path.read_bytes()[::-1])


@pytest.fixture
def twins(tmp_path, raw):
    """Two folders that hold drives of the same names and sizes and of other content."""
    for number in (2, 3):
        shutil.rmtree(drive(raw, number))
    other = tmp_path / "other" / raw.name
    shutil.copytree(raw, other)
    other_content(other)
    return raw, other


def test_two_recordings_of_one_name_are_not_taken_for_one(tmp_path, twins):
    for more in ({}, {"overwrite": True}):
        found = ingest(twins, tmp_path / "s", **more)
        assert (found.seen, found.stored, found.quarantined, found.exit_code) == (2, 1, 1, 3)
        assert all(str(folder) in found.reasons[0].reason for folder in twins)
    assert open_store(tmp_path / "s").manifest("kitti_raw/2011_09_26_drive_0001_sync")["generation"] == 2
    found = ingest(twins, tmp_path / "s")  # told again
    assert (found.already, found.quarantined) == (1, 1) and str(twins[1]) in found.reasons[0].reason
    found = ingest([twins[1]], tmp_path / "s")
    assert found.quarantined == 1 and f"other files than those in {twins[1]}; --overwrite" in found.reasons[0].reason


def test_a_recording_that_was_moved_or_copied_is_stored_before(tmp_path, twins):
    twin, _ = twins
    shutil.copytree(twin, tmp_path / "copy" / twin.name)
    found = ingest([twin, tmp_path / "copy" / twin.name], tmp_path / "s")
    assert (found.stored, found.already, found.exit_code) == (1, 1, 0)
    twin.rename(tmp_path / "moved")
    assert ingest([tmp_path / "moved"], tmp_path / "s").already == 1


@pytest.mark.slow
def test_workers_that_reach_two_recordings_of_one_name_take_one(tmp_path, twins):
    found = ingest(twins, tmp_path / "s", workers=2)
    assert (found.seen, found.stored, found.quarantined) == (2, 1, 1)
    assert all(str(folder) in found.reasons[0].reason for folder in twins)


def test_workers_at_one_log_go_on_one_by_one(tmp_path):
    from multiprocessing import Pipe

    tally = workers.Tally(lambda done, total, text: None)
    pipes = [Pipe() for _ in range(3)]
    crew = [workers._Worker(None, ours, (i, 0), log, True) for i, ((ours, _), log) in enumerate(zip(pipes, ("d/a", "d/a", "d/b")))]
    workers._let_on(crew, tally)
    assert [worker.waits for worker in crew] == [False, True, False] and [theirs.poll() for _, theirs in pipes] == [True, False, True]
    crew[0].task = None
    tally.add(intake.Outcome("stored", "d/a", folder="/x1"), more=True)
    workers._let_on(crew, tally)
    assert not crew[1].waits and pipes[0][1].recv() is None and pipes[1][1].recv() == "/x1"


def surprise(monkeypatch, name, number, error):
    """The adapter meets what it did not foresee in one drive."""
    real = getattr(kitti_raw._Drive, name)

    def raises(self, *rest):
        if self.folder.name.endswith(f"000{number}_sync"):
            raise error
        return real(self, *rest)

    monkeypatch.setattr(kitti_raw._Drive, name, raises)


def test_a_value_that_the_adapter_did_not_foresee_costs_its_log(tmp_path, raw, monkeypatch, capsys):
    surprise(monkeypatch, "_read_calibration", 1, ValueError("could not\nconvert"))
    surprise(monkeypatch, "read_sweep", 2, KeyError("token"))
    assert cli.main(["ingest", str(raw), str(tmp_path / "s")]) == 3
    printed = capsys.readouterr()
    assert "3 logs seen = 1 stored + 2 quarantined" in printed.out and "Traceback" not in printed.err
    opening, reading = (line for line in printed.out.splitlines() if line.startswith("quarantined"))
    assert re.fullmatch(rf"quarantined: {raw.name}#0: ValueError: could not\\nconvert in the adapter at kitti_raw\.py:\d+", opening)
    assert re.search(r"log kitti_raw/2011_09_26_drive_0002_sync: KeyError: 'token' at test_ingest\.py:\d+$", reading)
    assert content(tmp_path / "s").keys() == {"kitti_raw/2011_09_26_drive_0003_sync"}
    assert cli.main(["ingest", str(raw), str(tmp_path / "s"), "--debug"]) == 3
    said = capsys.readouterr().err
    assert said.count("\nValueError: could not") == said.count("\nKeyError: 'token'") == 1
    monkeypatch.undo()
    assert ingest([raw], tmp_path / "s").stored == 2 and list((tmp_path / "s/quarantine").iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_a_program_ends_the_ingest(tmp_path, raw, monkeypatch, error):
    surprise(monkeypatch, "read_sweep", 1, error())
    with pytest.raises(Interrupted if error is KeyboardInterrupt else error):
        ingest([raw], tmp_path / "s")
    assert content(tmp_path / "s") == {}


def test_how_far_a_long_log_is_is_told(tmp_path, raw, odometry):
    texts, one = [], drive(raw, 1)
    ingest([one], tmp_path / "s", poses="refined", report=lambda done, total, text: texts.append((done, total, text)))
    poses, sweeps, images = ([text for _, _, text in texts if f"log kitti_raw/{one.name}: {what} " in text] for what in ("poses", "sweeps", "images"))
    assert poses[0].endswith("poses 0 of 4 sweeps") and poses[-1].endswith("poses 4 of 4 sweeps")
    assert [text[-6:] for text in sweeps if "sweeps 0" not in text] == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"] and "images 3 of 3" in images[-1]
    assert texts.index((0, 1, poses[-1])) < texts.index((0, 1, sweeps[0]))


@pytest.mark.slow
def test_workers_tell_how_far_they_are(tmp_path, raw):
    texts = []
    ingest([raw], tmp_path / "s", workers=2, report=lambda done, total, text: texts.append(text))
    assert any(text.startswith("log kitti_raw/") for text in texts), texts


def test_synth_says_that_what_is_there_is_not_what_is_asked(tmp_path, capsys):
    command = ["synth", str(tmp_path / "s"), "--logs", "1", "--lidar", "hdl32", "--every", "3", "--seconds", "0.5"]
    assert cli.main(command) == 0 and "1 logs" in capsys.readouterr().out
    assert cli.main(command) == 0 and "stay as they are" not in capsys.readouterr().out
    for asked in (["--seconds", "1"], ["--lidar", "hdl64"], ["--every", "2"], ["--cameras", "front"]):
        assert cli.main([*command, *asked]) == 0
        assert "1 of those that were there are of another length, rate, LiDAR or cameras" in capsys.readouterr().out
    assert cli.main([*command, "--lidar", "hdl64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["otherwise"] == ["synthetic/street-000000"]


def test_references_need_no_copies(tmp_path, raw):
    copied, referred = ingest([raw], tmp_path / "c"), ingest([raw], tmp_path / "r", reference=True)
    assert referred.items == copied.items and referred.bytes < copied.bytes
    store = open_store(tmp_path / "r")
    assert len(store.open_log(store.ids[2]).read_sweep("velodyne", 3).points) == 480


def test_a_store_in_its_source_and_nonsense_are_refused_before_anything_is_made(tmp_path, raw):
    for store in (raw, raw / "s", raw.parent):
        with pytest.raises(UsageError, match="within one another"):
            ingest([raw], store)
    for wrong in ({"poses": "best"}, {"workers": 0}, {"shard_index": 2, "num_shards": 2}, {"dataset": "cityscapes"}, {"options": {"speed": "fast"}}):
        with pytest.raises(UsageError):
            ingest([raw], tmp_path / "s", **wrong)
    with pytest.raises(UsageError, match="does not exist"):
        ingest([tmp_path / "absent"], tmp_path / "s")


def test_a_log_that_another_writes_is_named_after_all_else_is_stored(tmp_path, raw):
    from sensors.store import format as layout

    log_id = "kitti_raw/2011_09_26_drive_0001_sync"
    with files.lock(layout.lock_path(tmp_path / "s", log_id), log_id), pytest.raises(files.Busy, match=f"process {os.getpid()}"):
        ingest([raw], tmp_path / "s")
    assert len(open_store(tmp_path / "s").ids) == 2 and ingest([raw], tmp_path / "s").stored == 1


@pytest.mark.parametrize("where", ["open", "read"])
def test_a_signal_stops_between_items_also_where_it_strikes_inside_an_adapter(tmp_path, raw, monkeypatch, where):
    """An adapter may take the exception of the signal for an error of its own file."""
    struck = []

    def strike():
        if not struck:
            struck.append(1)
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
            except Interrupted:
                raise kitti_raw.RecordError("looks like a bad file") from None

    name = "_read_calibration" if where == "open" else "read_sweep"
    real = getattr(kitti_raw._Drive, name)
    monkeypatch.setattr(kitti_raw._Drive, name, lambda self, *rest: (strike(), real(self, *rest))[1])
    with pytest.raises(Interrupted, match="same command again"):
        ingest([raw], tmp_path / "s")
    assert struck and content(tmp_path / "s") == {}
    assert ingest([raw], tmp_path / "s").stored == 3


def start(raw, store, *more):
    code = "import sys; from worldmodel.tools.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, "ingest", str(raw), str(store), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path, process):
    end = time.monotonic() + 60
    while not list(path[0].glob(path[1])) and process.poll() is None:
        assert time.monotonic() < end, "the process got nowhere"
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_ends_with_130_and_the_next_run_completes(tmp_path, raw, workers):
    ingest([raw], tmp_path / "whole")
    for number in range(4, 10):
        shutil.copytree(drive(raw, 1), drive(raw, number))
    process = start(raw, tmp_path / "s", "--workers", workers)
    wait_for((tmp_path / "s/logs", "*"), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    if process.returncode != 0:  # it may have been faster
        assert process.returncode == 130 and "give the same command again" in err and "Traceback" not in err
    found = ingest([raw], tmp_path / "s")
    assert found.seen == 9 == found.stored + found.already
    assert content(tmp_path / "whole").items() <= content(tmp_path / "s").items()


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_log_and_the_rest_is_stored(tmp_path, raw):
    code = f"""
import os, signal, sys
from pathlib import Path
from sensors import ingest
from sensors.adapters import kitti_raw, nuscenes
if __name__ == "__main__":
    found = ingest.ingest([Path({str(raw)!r})], {str(tmp_path / "s")!r}, workers=2)
    print(found.seen, found.stored, found.quarantined)
    for row in found.reasons:
        print(row.log, row.reason)
elif not hasattr(kitti_raw, "patched"):
    kitti_raw.patched = True
    real = kitti_raw._Drive.read_sweep
    def read(self, *rest):
        if self.folder.name.endswith("0001_sync"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *rest)
    kitti_raw._Drive.read_sweep = read
"""
    (tmp_path / "run.py").write_text(code)
    done = subprocess.run([sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("drive_0001_sync" in line and "signal 9" in line for line in lines[1:]), lines
    counts = list(map(int, lines[0].split()))
    assert counts[0] == 3 == counts[1] + counts[2]
    assert open_store(tmp_path / "s").verify() == [] and "kitti_raw/2011_09_26_drive_0003_sync" in open_store(tmp_path / "s").ids


@pytest.mark.slow
def test_a_source_on_whose_opening_every_worker_dies_ends_the_call(tmp_path, raw):
    code = f"""
import os
from sensors.adapters import kitti_raw
if __name__ == "__main__":
    import sys
    from worldmodel.tools.cli import main
    sys.exit(main(["ingest", {str(raw)!r}, {str(tmp_path / "s")!r}, "--dataset", "kitti_raw", "--workers", "2"]))
kitti_raw.open_logs = lambda path, options: os._exit(7)
"""
    (tmp_path / "run.py").write_text(code)
    done = subprocess.run([sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True, timeout=120)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "6 workers in a row" in last and str(raw) in last and "code 7" in last and "0 logs were stored" in last
    assert list((tmp_path / "s/quarantine").iterdir()) == []


@pytest.mark.slow
def test_a_worker_that_dies_before_it_is_given_work_is_one_that_died(tmp_path, raw, monkeypatch):
    hire, hired = workers._hire, []

    def dead_at_first(job):
        hired.append(hire(job))
        if len(hired) == 1:
            hired[0].process.kill()
            hired[0].process.join()
        return hired[-1]

    monkeypatch.setattr(workers, "_hire", dead_at_first)
    found = ingest([raw], tmp_path / "s", workers=2)
    assert (found.seen, found.stored, found.quarantined) == (3, 2, 1) and "signal 9" in found.reasons[0].reason and len(hired) == 3


def test_the_commands_say_what_happened(tmp_path, raw, capsys):
    (drive(raw, 1) / "velodyne_points/data/0000000002.bin").write_bytes(b"1234567")
    assert cli.main(["ingest", str(raw), str(tmp_path / "s")]) == 3
    out = capsys.readouterr().out
    assert "3 logs seen = 3 stored + 0 quarantined + 0 filtered" in out and "21 sweeps and images seen = 20 stored + 1 quarantined" in out
    assert cli.main(["ingest", str(raw), str(tmp_path / "s"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == "ingest" and found["filtered"] == found["already"] == found["seen"] == 3
    assert cli.main(["info", str(tmp_path / "s"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["store"] and len(found["logs"]) == 3 and found["logs"][0]["sensors"]["velodyne"]["count"] == 3
    assert found["logs"][0]["quarantined"][0]["sensor"] == "velodyne" and found["logs"][1]["pose_source"] == "gnss"
    (pack,) = (tmp_path / "s").glob("**/*0001_sync/**/frames.parquet")
    pack.write_bytes(pack.read_bytes()[:-9])
    assert cli.main(["info", str(tmp_path / "s"), "--json"]) == 1
    found_torn = json.loads(capsys.readouterr().out)
    assert len(found_torn["logs"]) == 2 and len(found_torn["problems"]) == 1 and "0001_sync" in found_torn["problems"][0]
    assert cli.main(["info", str(raw), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["store"] and found["logs"][0]["sensors"]["velodyne"]["count"] == 4
    assert cli.main(["info", str(raw)]) == 0 and "CC BY-NC-SA 3.0" in capsys.readouterr().out
    assert cli.main(["ingest", str(tmp_path / "absent"), str(tmp_path / "t")]) == 2
    assert "does not exist" in capsys.readouterr().err and not (tmp_path / "t").exists()


def test_a_real_log_survives_the_store(tmp_path):
    root = os.environ.get("WM_TEST_LOGS")
    source = Path(root or "absent") / "2011_09_26" / "2011_09_26_drive_0001_sync"
    if not source.is_dir():
        pytest.skip("KITTI drive 0001 is not under $WM_TEST_LOGS")
    import numpy as np

    from sensors.adapters.base import open_source
    from sensors.records import Log
    from sensors.store.codec import MAX_ERROR_M, decode, encode

    log = next(open_source(source))
    assert isinstance(log, Log)
    for index in (0, len(log.sweep_stamps_ns["velodyne"]) - 1):
        sweep = log.read_sweep("velodyne", index)
        small, exact = encode(sweep), encode(sweep, lossless=True)
        assert np.abs(decode(small).points.astype(float) - sweep.points).max() <= MAX_ERROR_M and len(small) < 3.5 * len(sweep.points)
        assert (decode(exact).points.view(np.uint32) == sweep.points.view(np.uint32)).all() and len(exact) < 4.5 * len(sweep.points)
        assert (decode(small).intensity == sweep.intensity).all()
