"""`wm forecast`: what it writes, what it refuses, and that it says so in one line."""

from __future__ import annotations

import json
import types

import pytest

from worldmodel.tools.cli import main


@pytest.fixture
def run_folder(street, tmp_path, monkeypatch):
    """A run folder whose model answers with the street, over data of two clips."""
    import sensors.data
    import worldmodel
    from worldmodel import rundir, source

    asked = []

    class Model:
        def forecast(self, clip, hide_sector_rad=None, count=None):
            asked.append((clip.id, hide_sector_rad, count))
            return street(clip.id, hidden=hide_sector_rad is not None)

    clips = [types.SimpleNamespace(id=f"synthetic/street-00000{i}@400000000") for i in (1, 2)]
    monkeypatch.setattr(worldmodel, "load", lambda run, which, device: Model())
    monkeypatch.setattr(sensors.data, "open_data", lambda path: [path])
    monkeypatch.setattr(rundir, "read_config", lambda run: None)
    monkeypatch.setattr(source, "clips_of_parts", lambda parts, config: (clips, [1.0, 1.0]))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "data.json").write_text('{"data": ["store"]}')
    folder_and_asked = types.SimpleNamespace(path=folder, asked=asked)
    return folder_and_asked


def test_it_writes_every_format_and_prints_what_it_wrote(run_folder, capsys):
    assert main(["forecast", str(run_folder.path)]) == 0
    (folder,) = (run_folder.path / "forecasts").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert {"forecast.html", "forecast.gif", "forecast.npz", "model_+0.60s.ply"} <= names and "sector.png" not in names
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(names) and all(name in out for name in names)
    assert run_folder.asked == [("synthetic/street-000001@400000000", None, 40000)]


def test_a_clip_and_a_hidden_sector_are_asked_of_the_model(run_folder, tmp_path, capsys):
    out = tmp_path / "out"
    line = ["forecast", str(run_folder.path), "--clip", "synthetic/street-000002@400000000", "--hide-sector", "60", "-o", str(out), "--json"]
    assert main([*line, "--formats", "npz", "--rays", "0"]) == 0
    ((clip, (centre, width), count),) = run_folder.asked
    assert clip.startswith("synthetic/street-000002") and centre == 0 and width == pytest.approx(1.0472, abs=1e-4) and count is None
    said = json.loads(capsys.readouterr().out)
    assert set(said["files"]) == {"forecast.npz", "sector.png"} == {path.name for path in out.iterdir()}
    assert {"method": "none_at_all", "horizon_s": 0.2, "l1_median": None, "rays": 0} in said["errors"]


def test_nothing_is_overwritten_unless_told(run_folder, tmp_path, capsys):
    line = ["forecast", str(run_folder.path), "-o", str(tmp_path / "out"), "--formats", "npz"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "forecast.npz").write_bytes(b"mine")
    assert main(line) == 2
    assert (tmp_path / "out" / "forecast.npz").read_bytes() == b"mine"
    assert "--overwrite" in capsys.readouterr().err
    assert main([*line, "--overwrite"]) == 0 and (tmp_path / "out" / "forecast.npz").read_bytes()[:2] == b"PK"


def test_the_clips_are_listed(run_folder, capsys):
    assert main(["forecast", str(run_folder.path), "--list"]) == 0
    assert capsys.readouterr().out.split() == ["synthetic/street-000001@400000000", "synthetic/street-000002@400000000"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--clip", "no\x1b[31m/such@1"], "none of the 2 clips"),
        (["--formats", "html,pdf"], "pdf"),
        (["--formats", " , "], "names none"),
        (["-o", __file__], "is a file"),
        (["--hide-sector", "400"], "degrees"),
        (["--rays", "-1"], "--rays"),
    ],
)
def test_what_it_cannot_do_is_said_in_one_line(run_folder, more, says, capsys):
    assert main(["forecast", str(run_folder.path), *more]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "\x1b" not in error


def test_a_run_that_does_not_exist_is_named(tmp_path, capsys):
    assert main(["forecast", str(tmp_path / "none")]) == 2
    assert "no such run folder" in capsys.readouterr().err
