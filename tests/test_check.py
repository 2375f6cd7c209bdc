"""`wm check`: one page that opens without running or fetching anything, whatever the names in a log are; and the same as JSON."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from sensors.adapters.kitti_raw import write_sample
from sensors.alignment.survey import survey
from sensors.alignment.timing import timing
from sensors.geometry import from_rotation_translation
from sensors.records import Camera, Image, Lidar, Log, Sweep, Trajectory
from sensors.store.writer import prepare_store, write_log
from worldmodel.drawing.check_page import Checked, check_page, overlay_image
from worldmodel.tools.cli import main

HOSTILE = "<script>alert(1)</script>\" onerror=alert(2) ']]> javascript:alert(3) {{7*7}} \u2028[x](javascript:1) \x1b[31m"
STAMPS = 10**9 + 10**8 * np.arange(20, dtype=np.int64)
FORWARD = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])


def street_log(name="made/street", sensor="top", camera="front", note="", poses=True, unreadable=()):
    """A wall beside and one before a car that drives at 1 m/s."""
    rng = np.random.default_rng(0)
    walls = np.concatenate((
        np.stack((rng.uniform(-20, 30, 3000), np.full(3000, 4.0), rng.uniform(-1.5, 3, 3000)), 1),
        np.stack((np.full(1500, 25.0), rng.uniform(-8, 8, 1500), rng.uniform(-1.5, 3, 1500)), 1),
        np.stack((rng.uniform(-20, 30, 4000), rng.uniform(-8, 4, 4000), np.full(4000, -1.5)), 1),
    ))  # fmt: skip
    picture = io.BytesIO()
    Pillow.new("RGB", (80, 40), (90, 120, 150)).save(picture, "PNG")

    def read_sweep(lidar, index):
        if index in unreadable:
            from sensors.records import RecordError

            raise RecordError(f"sweep {index} of {HOSTILE}: cut off")
        points = (walls - (0.1 * index, 0, 0)).astype(np.float32)
        return Sweep(lidar, int(STAMPS[index]), points, np.full(len(points), 0.5, np.float32))

    trajectory = Trajectory(STAMPS, np.stack([from_rotation_translation(np.eye(3), (0.1 * i, 0, 0)) for i in range(len(STAMPS))]), "gnss")
    return Log(
        name, name.split("/")[0], f"none {note}", f"rear axle {note}", {sensor: Lidar(sensor, np.eye(4), 10.0)},
        {camera: Camera(camera, from_rotation_translation(FORWARD, (0, 0, 0)), np.array([[40.0, 0, 39.5], [0, 40, 19.5], [0, 0, 1]]), 80, 40)},
        trajectory if poses else None, {sensor: STAMPS}, {camera: STAMPS[:-1]},
        read_sweep, lambda c, i: Image(c, int(STAMPS[i]), picture.getvalue(), 80, 40),
        measured_speed=(STAMPS, np.full(len(STAMPS), 1.0)), ego_box=(-1, -1, -1.4, 1, 1, 1), counts=Counter({f"{sensor}: lost {note}": 3}),
        notes=(f"note {note}",),
    )  # fmt: skip


def checked(log):
    return Checked(log, timing(log), survey(log))


class Audit(HTMLParser):
    """What a page could run or fetch."""

    def __init__(self):
        super().__init__()
        self.bad, self.policy, self.tags = [], "", Counter()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        for key, value in attrs:
            if key.startswith("on") or (key in ("src", "href", "srcset", "data", "action", "xlink:href") and not value.startswith("data:image/")):
                self.bad.append((tag, key, value))
            if key == "style":
                self.bad.append((tag, key, value))
        if tag in ("script", "iframe", "object", "embed", "link", "form", "base"):
            self.bad.append((tag, "", ""))
        if tag == "meta" and dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"]


def audited(page):
    audit = Audit()
    audit.feed(page)
    assert audit.bad == []
    assert audit.policy.startswith("default-src 'none'") and "unsafe" not in audit.policy and "http" not in audit.policy
    return audit


def test_the_page_shows_every_part_and_fetches_nothing():
    page = check_page("here", [checked(street_log())], [])
    audit = audited(page)
    assert audit.tags["img"] == 3  # sweep, overlay, camera
    wanted = ("made/street", "nothing to object to", "poses minus measured", "skew to the LiDAR, ms", "points per sweep", "way from above", "lost")
    for text in wanted:
        assert text in page


@pytest.mark.parametrize("poses", [True, False])
def test_hostile_names_stay_text(poses):
    name = "made/" + "".join(c for c in HOSTILE if c.isprintable() and c != "\\").replace("/", "-").strip()
    log = street_log(name, HOSTILE, HOSTILE + "2", HOSTILE, poses, unreadable=range(len(STAMPS)) if not poses else ())
    page = check_page(HOSTILE, [checked(log)], [HOSTILE], notes=[HOSTILE])
    audited(page)
    assert "<script" not in page and "\u2028" not in page and "\x1b" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_runs_nothing_of_it(tmp_path):
    """The page's title would be changed by any script that ran."""
    page = check_page(HOSTILE, [checked(street_log("made/x", HOSTILE, HOSTILE + "2", HOSTILE))],
                      [HOSTILE.replace("alert(1)", "document.title='run'")])  # fmt: skip
    (tmp_path / "x.html").write_text(page, encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom", str(tmp_path / "x.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S).group(1)
    assert title.startswith("Check of") and "run" not in title
    assert "Refused" not in done.stderr and "violates" not in done.stderr


def test_pages_stay_small_however_many_logs_sensors_and_lines_there_are():
    log = street_log()
    many = dataclasses.replace(
        log,
        lidars={f"l{i}": Lidar(f"l{i}", np.eye(4), 10.0) for i in range(40)},
        sweep_stamps_ns={f"l{i}": STAMPS[:1] if i else STAMPS for i in range(40)},
        counts=Counter({f"thing {i}": 1 for i in range(500)}),
    )
    rest = [Checked(dataclasses.replace(log, id=f"made/{i}"), timing(log), None) for i in range(700)]
    page = check_page("many", [checked(many), *rest], [f"problem {i}" for i in range(5000)], not_opened=12)
    audited(page)
    assert len(page) < 1_500_000
    left_out = ("700 logs were looked at by their stamps", "further logs are not listed", "further sensors not listed", "and 4960 more")
    for text in (*left_out, "12 further"):
        assert text in page


def test_images_that_do_not_fit_their_camera_are_told():
    log = street_log()
    wrong = dataclasses.replace(log, cameras={"front": dataclasses.replace(log.cameras["front"], width=160, height=80)})
    assert "front: images of 80x40 pixels, its calibration is for 160x80; scale K in the adapter" in survey(wrong).warnings
    cut = dataclasses.replace(log, read_image=lambda camera, index: dataclasses.replace(log.read_image(camera, index), width=40))
    assert any(line.startswith("front: 4 of 4 sampled images cannot be read; the first: ") and "the file says 80x40" in line
               for line in survey(cut).warnings)  # fmt: skip


def test_the_timeline_of_a_very_long_log_is_bounded():
    log = street_log(unreadable=range(10**7))
    stamps = 10**9 + np.cumsum(np.where(np.arange(10**6) % 50 == 0, 10**9, 10**8)).astype(np.int64)
    log = dataclasses.replace(log, sweep_stamps_ns={"top": stamps}, poses=None, measured_speed=None)
    one = Checked(log, timing(log), survey(log))
    page = check_page("long", [one], [])
    audited(page)
    assert len(page) < 1_000_000 and "gaps, about" in page


def test_clouds_that_agree_are_white_in_the_overlay():
    cloud = np.stack((np.linspace(-30, 30, 500), np.full(500, 5.0), np.full(500, 1.0)), 1)
    cloud = np.concatenate((cloud, np.stack((np.linspace(-20, 20, 400), np.zeros(400), np.full(400, -1.5)), 1)))
    same = overlay_image(cloud, cloud)
    assert ((same > 230).all(axis=2)).sum() > 300 and not (same == (60, 150, 255)).all(axis=2).any()
    apart = overlay_image(cloud, cloud + np.array([0, 1.0, 0]))
    assert (apart == (60, 150, 255)).all(axis=2).any() and (apart == (255, 150, 50)).all(axis=2).any()


def test_a_raw_log_is_checked_and_the_page_is_not_overwritten(tmp_path, capsys, monkeypatch):
    source = write_sample(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(source)]) == 0
    out = capsys.readouterr().out
    assert "kitti_raw/2011_09_26_drive_0001_sync" in out and "page: check.html" in out
    audited((tmp_path / "check.html").read_text(encoding="utf-8"))
    assert main(["check", str(source)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["check", str(source), "--overwrite"]) == 0
    assert main(["check", str(source), "-o", "x.html", "--deep"]) == 2
    assert main(["check", str(source), "-o", "x.html", "--log", "no/such"]) == 2
    assert not Path("x.html").exists()


def test_a_page_that_could_not_be_written_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    from sensors.alignment import survey

    source = write_sample(tmp_path)
    monkeypatch.setattr(survey, "survey", lambda log: pytest.fail("looked at a log"))
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file" / "x.html", tmp_path, tmp_path / "file"):
        assert main(["check", str(source), "-o", str(place)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(place) in line and "-o" in line


def test_one_log_without_lidar_or_with_poses_that_jump_does_not_stop_the_page():
    log = street_log()
    blind = dataclasses.replace(log, id="made/blind", lidars={}, sweep_stamps_ns={})
    far = np.array(log.poses.world_from_ego)
    far[:7, 0, 3] -= 6e6
    jumped = dataclasses.replace(log, id="made/jumped", poses=Trajectory(STAMPS, far, "gnss"))
    page = check_page("here", [checked(blind), checked(jumped), checked(log)], [])
    audited(page)
    for text in ("no LiDAR sweeps", "m apart by the poses", "made/street", "No overlay"):
        assert text in page


def test_of_several_lidars_the_one_that_frames_are_built_on_is_told_once(tmp_path, capsys, monkeypatch):
    several = "logs with several LiDARs: frames are built on the highest of those with most sweeps"
    one = street_log()
    two = dataclasses.replace(
        one,
        id="made/two",
        lidars={name: Lidar(name, np.eye(4), 10.0) for name in ("side", "top")},
        sweep_stamps_ns={"side": STAMPS[: len(STAMPS) // 2], "top": STAMPS},
    )
    for name, log in (("one", one), ("two", two), ("three", dataclasses.replace(two, id="made/three"))):
        write_log(tmp_path / ("single" if name == "one" else "several"), log)
    for command in (["info"], ["check", "-o", str(tmp_path / "page.html"), "--overwrite"]):
        assert main([command[0], str(tmp_path / "single"), *command[1:]]) == 0 and several not in capsys.readouterr().out
        assert main([command[0], str(tmp_path / "several"), *command[1:]]) == 0
        assert [line for line in capsys.readouterr().out.splitlines() if several in line and "(top in 2)" in line and "no option" in line]
    assert main(["info", str(tmp_path / "several"), "--json"]) == 0
    assert [log["reference"] for log in json.loads(capsys.readouterr().out)["logs"]] == ["top", "top"]


def test_of_lidars_with_as_many_sweeps_the_highest_is_taken():
    def taken(heights_m, missing):
        lidars = {name: Lidar(name, np.eye(4) + height * np.outer([0, 0, 1, 0], [0, 0, 0, 1]), 10.0) for name, height in heights_m.items()}
        stamps = {name: np.arange(100 - missing.get(name, 0)) * 100_000_000 for name in lidars}
        return dataclasses.replace(street_log(camera="eye"), lidars=lidars, sweep_stamps_ns=stamps, poses=None).reference_lidar

    assert taken({"front": 0.6, "roof": 1.9, "side": 0.6}, {}) == taken({"front": 0.6, "roof": 1.9, "side": 0.6}, {"roof": 10}) == "roof"
    assert taken({"front": 0.6, "roof": 1.9}, {"roof": 11}) == taken({"front": 1.0, "side": 1.0}, {}) == "front"


def test_ingest_tells_of_several_lidars_too(tmp_path, capsys, monkeypatch):
    from sensors import intake

    def source(path, dataset, options):
        one = street_log()
        lidars = {name: Lidar(name, np.eye(4), 10.0) for name in ("side", "top")}
        return iter(
            [one, dataclasses.replace(one, id="made/two", lidars=lidars, sweep_stamps_ns={"side": STAMPS, "top": STAMPS[: len(STAMPS) // 2]})]
        )

    monkeypatch.setattr(intake, "open_source", source)
    assert main(["ingest", str(tmp_path / "raw"), str(tmp_path / "store"), "--dataset", "kitti_raw"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "several LiDARs" in line)
    assert "(side in 1)" in line


def test_json_is_one_object_and_writes_no_page(tmp_path, capsys, monkeypatch):
    source = write_sample(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == "check" and found["page"] is None and not Path("check.html").exists()
    (log,) = found["logs"]
    assert {"ok", "warnings", "sensors", "poses", "survey"} <= set(log) and log["ok"] == (not log["warnings"])


def test_damage_in_a_store_is_found_and_fails(tmp_path, capsys):
    store = tmp_path / "store"
    prepare_store(store)
    write_log(store, street_log())
    assert main(["check", str(store), "--deep", "-o", str(tmp_path / "a.html")]) == 0
    assert "all as written" in capsys.readouterr().out
    pack = max((p for p in store.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    os.chmod(pack, 0o644)
    pack.write_bytes(data)
    assert main(["check", str(store), "--deep", "-o", str(tmp_path / "b.html")]) == 1
    out = capsys.readouterr().out
    assert "problem:" in out and pack.name in out
    assert pack.name in (tmp_path / "b.html").read_text(encoding="utf-8")
