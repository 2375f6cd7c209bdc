"""`wm select`: conditions that are parsed and not run, measures with a known answer, and data that the other commands take."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import yaml
from PIL import Image as Pillow

from sensors.clips import clips_of
from sensors.data import open_data
from sensors.errors import UsageError
from sensors.records import Camera, Image, RecordError
from sensors.selection import MEASURES, Moment, condition, ranges, select
from sensors.simulator.log import simulate
from sensors.store.writer import write_log
from tests.alignment.conftest import ego_pose, make_log, trajectory_of
from worldmodel.tools import select as command
from worldmodel.tools.cli import main

VALUES = {"speed": 10.0, "movers": 3.0, "turn": 0.0, "brightness": math.nan}


@pytest.mark.parametrize(("text", "holds"), [
    ("speed > 5", True),
    ("speed>5 and movers>=4", False),
    ("speed > 5 or movers >= 4", True),
    ("not speed > 5", False),
    ("not (speed < 5 or movers < 3)", True),
    ("5 < speed <= 10", True),
    ("0 < movers < 3", False),
    ("speed / movers - 1 > 2.3", True),
    ("-speed == -10", True),
    ("speed / turn > 0", False),
    ("brightness < 2", False),
    ("brightness != 0", False),
    (" speed != 10 ", False),
])  # fmt: skip
def test_conditions_mean_what_they_say(text, holds):
    assert condition(text).holds(VALUES.__getitem__) is holds


@pytest.mark.parametrize(("text", "words"), [
    ("", "not a condition"),
    ("speed >", "not a condition"),
    ("speed", "a number, not a condition"),
    ("3 + 4", "a number, not a condition"),
    ("sped > 3", "'sped' is not one of speed, "),
    ("speed > 3 and movers", "'movers' stands where a condition belongs"),
    ("(speed > 3) + 1 > 2", "'(speed > 3) + 1' has no place"),
    ("(speed > 3) > 1", "'speed > 3' stands where a number belongs"),
    ("speed in (1, 2)", "compare with"),
    ("speed > 'a'", "has no place"),
    ("speed > True", "has no place"),
    ("speed > 1j", "has no place"),
    ("speed > 1" + "0" * 400, "has no place"),
    ("speed > 1e999", "has no place"),
    ("speed > [3][0]", "has no place"),
    ("__import__('os').system('true') > 0", "has no place"),
    ("speed.real > 0", "has no place"),
    ("speed ** 999999 > 0", "has no place"),
    ("(x := 3) > 0", "has no place"),
    ("speed > " + "(" * 300 + "1" + ")" * 300, "not a condition"),
    ("speed > 0" + " " * 2000, "of 2009 characters"),
    ("speed > \x00", "not a condition"),
    ("a\nb", "not a condition"),
    ("speed > " + "-" * 900 + "1", "not a condition"),
])  # fmt: skip
def test_what_is_no_condition_is_refused_in_a_line(text, words):
    with pytest.raises(UsageError) as found:
        condition(text)
    assert words in str(found.value) and "\n" not in str(found.value)


def test_a_measure_is_taken_when_the_condition_comes_to_it():
    asked = []

    def measure(name):
        asked.append(name)
        return VALUES[name]

    wanted = condition("speed > 50 and movers > 1")
    assert wanted.names == ("speed", "movers") and not wanted.holds(measure) and asked == ["speed"]


def test_measures_of_a_known_drive():
    log = make_log(20)
    steady = dataclasses.replace(log, poses=trajectory_of(log))
    (clip,) = clips_of(steady)[:1]
    moment = Moment(clip)
    seconds = 1.8  # four past steps and five future ones of 0.2 s
    assert moment.value("speed") == pytest.approx(9.0, abs=0.01) and moment.value("acceleration") == pytest.approx(0, abs=0.02)
    assert moment.value("turn") == pytest.approx(np.rad2deg(0.06 * seconds), abs=0.05)
    assert moment.value("movers") == moment.value("moving") == moment.value("fastest") == 0
    assert moment.value("returns") == len(moment.history.points[-1]) > 1000 and 0 < moment.value("far") < 1
    assert math.isnan(moment.value("brightness"))
    braking = dataclasses.replace(log, poses=trajectory_of(log, lambda t: ego_pose(0) @ _ahead(10 * t - 2.5 * t * t)))
    assert Moment(clips_of(braking)[0]).value("acceleration") == pytest.approx(-5, abs=0.1)


def _ahead(metres):
    out = np.eye(4)
    out[0, 3] = metres
    return out


def test_brightness_is_that_of_the_images():
    log = make_log(20)
    picture = io.BytesIO()
    Pillow.new("RGB", (8, 4), (51, 51, 51)).save(picture, "PNG")
    stamps = log.sweep_stamps_ns["top"]
    camera = Camera("front", np.eye(4), [[8, 0, 3.5], [0, 8, 1.5], [0, 0, 1]], 8, 4)
    log = dataclasses.replace(log, poses=trajectory_of(log), cameras={"front": camera}, image_stamps_ns={"front": stamps},
                              read_image=lambda name, index: Image(name, int(stamps[index]), picture.getvalue(), 8, 4))  # fmt: skip
    assert Moment(clips_of(log)[0]).value("brightness") == pytest.approx(0.2)


def test_what_moves_is_found_without_labels():
    """A street with traffic, beside what the simulator says of each point."""
    log = simulate(9, seconds=2.4, lidar="hdl64", every=2)
    (clip, *_) = clips_of(log)
    moment = Moment(clip)
    log.read_sweep(clip.lidar, clip.past[-1].sweep_index)
    truth = log.open_labels().read_point_labels(clip.lidar, clip.past[-1].sweep_index).moving.mean()
    assert truth > 0.003 and 0.4 * truth < moment.value("moving") < 2 * truth
    assert moment.value("movers") >= 1 and 2 < moment.value("fastest") < 40


def test_overlapping_clips_are_one_stretch_and_unreadable_ones_are_told(tmp_path):
    log = make_log(60)
    log = dataclasses.replace(log, poses=trajectory_of(log))
    write_log(tmp_path / "s", log)
    (part,) = open_data(tmp_path / "s")
    clips = clips_of(part.log)
    broken = dataclasses.replace(part.log, read_sweep=_refuse)
    some = [clip if i != 2 else dataclasses.replace(clip, log=broken) for i, clip in enumerate(clips)]
    unreadable = []
    assert all(hit.values.keys() == {"speed"} for hit in select(some, condition("speed > 5 or returns > 0"), unreadable)) and not unreadable
    found = [hit for hit in select(some, condition("returns > 0"), unreadable) if hit]
    assert len(unreadable) == 1 and "cut off" in unreadable[0] and len(found) == len(clips) - 1
    (stretch,) = ranges(found)
    assert stretch == (log.id, clips[0].past[0].stamp_ns, clips[-1].future[-1].stamp_ns + 1)
    ends = ranges([found[0], found[-1]])
    assert len(ends) == 2 and ends[0][2] == clips[0].future[-1].stamp_ns + 1


def _refuse(lidar, index):
    raise RecordError("cut off")


def test_the_command_writes_what_data_takes(tmp_path, capsys):
    log = make_log(60)
    write_log(tmp_path / "s", dataclasses.replace(log, poses=trajectory_of(log)))
    (tmp_path / "lists").mkdir()
    output = tmp_path / "lists" / "fast.yaml"
    assert main(["select", str(tmp_path / "s"), "speed > 5 and speed < 50", "-o", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["looked_at"] == len(found["clips"]) > 5 and found["clips"][0]["speed"] == pytest.approx(9, abs=0.1)
    (entry,) = yaml.safe_load(output.read_text())
    assert entry["store"] == "../s" and {key: entry[key] for key in ("log", "from_ns", "to_ns")} == found["parts"][0]
    (part,) = open_data(output)
    clips = clips_of(part.log, from_ns=part.from_ns, to_ns=part.to_ns)
    assert [clip.id for clip in clips] == [row["clip"] for row in found["clips"]]
    assert main(["select", str(tmp_path / "s"), "speed > 5", "-o", str(output)]) == 2  # it is there
    assert main(["select", str(tmp_path / "s"), "speed > 50", "-o", str(tmp_path / "none.yaml")]) == 2 and not (tmp_path / "none.yaml").exists()
    assert main(["select", str(tmp_path / "s"), "speed > 50"]) == 0 and "0 of" in capsys.readouterr().out
    assert main(["select", str(tmp_path), "speed > 50"]) == 2
    for every in ("0", "1e-10", "inf", "nan"):
        assert main(["select", str(tmp_path / "s"), "speed > 5", "--every", every]) == 2
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    assert main(["select", str(tmp_path / "s"), "speed > 5", "-o", str(tmp_path / "link" / "x.yaml")]) == 0
    assert open_data(tmp_path / "link" / "x.yaml") and open_data(tmp_path / "deep" / "er" / "x.yaml")


def test_the_command_names_every_measure():
    assert tuple(MEASURES) == command.MEASURES
