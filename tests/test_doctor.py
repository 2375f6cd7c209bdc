"""`wm doctor`: says what is there, what lacks and the one line that brings it; never fails itself."""

import json
import subprocess
import sys

import pytest

from worldmodel.tools import doctor
from worldmodel.tools.cli import main

PRESENT = {name: {"name": name, "version": "1.0"} for name, _ in doctor.IMPORTS} | {
    "torch": {"name": "torch", "version": "2.0", "threads": 2, "cuda": None, "gpus": [], "bf16": False}
}


@pytest.fixture
def quick(monkeypatch):
    """As if every package had been imported."""
    monkeypatch.setattr(doctor, "probe", lambda modules: {name: dict(PRESENT[name]) for name in modules})


def test_json_names_everything_that_was_looked_at(quick, capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    groups = {row["group"] for row in found["findings"]}
    assert groups == {"system", "processor", "package", "gpu", "cache", "library", "extra", "adapter"}
    assert {row["state"] for row in found["findings"]} <= {"ok", "lacking", "optional"}
    assert {row["name"] for row in found["findings"] if row["group"] == "extra"} >= {"nuscenes", "dev"}
    assert found["ok"] == all(row["state"] != "lacking" for row in found["findings"])


def test_a_missing_library_gives_the_one_apt_line(quick, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "LIBRARIES", (("libno_such.so.9", "libno-such9", "nobody"), ("libno_other.so.1", "libno-other1", "nobody")))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "2 things lack" in out and out.count("apt-get install") == 1
    assert "apt-get install -y --no-install-recommends libno-such9 libno-other1" in out


def test_a_package_that_does_not_import_is_told_with_why(quick, capsys, monkeypatch):
    broken = {"name": "cv2", "error": "ImportError: libGL.so.1: cannot open\x1b[31m shared object file"}
    monkeypatch.setattr(doctor, "probe", lambda modules: PRESENT | {"cv2": broken})
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "LACKING" in out and "libGL.so.1: cannot open" in out and "\x1b" not in out


def test_a_machine_without_numpy_is_told_so(quick, capsys, monkeypatch):
    broken = {"name": "numpy", "error": "ImportError: libopenblas"}
    monkeypatch.setattr(doctor, "probe", lambda modules: PRESENT | {"numpy": broken})
    monkeypatch.setitem(sys.modules, "sensors.adapters.base", None)  # as its import would fail
    assert main(["doctor"]) == 0 and "libopenblas" in capsys.readouterr().out


def test_absent_extras_give_the_one_pip_line():
    rows = [doctor.Finding("extra", name, "optional", "not installed", f"extra:{name}") for name in ("bench", "nuscenes")]
    assert doctor.commands(rows) == ["pip install 'driving-worldmodel[bench,nuscenes]'"]
    assert doctor.commands([doctor.Finding("extra", "dev", "ok", "pytest")]) == []


def test_an_unwritable_cache_is_told_with_the_variable_that_helps(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "deeper"))
    numba = next(row for row in doctor._caches() if row.name == "numba")
    assert numba.state == "optional" and "NUMBA_CACHE_DIR" in numba.remedy
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "new"))
    assert next(row for row in doctor._caches() if row.name == "numba").state == "ok"
    assert not (tmp_path / "new").exists()


def test_a_module_that_ends_the_process_does_not_end_the_others(tmp_path, monkeypatch):
    (tmp_path / "dies_at_import.py").write_text("import os\nprint('noise')\nos._exit(7)\n")
    (tmp_path / "raises_at_import.py").write_text("raise RuntimeError('no display')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = doctor.probe(["json", "dies_at_import", "raises_at_import", "no_such_module_at_all", "colorsys"])
    assert set(found) == {"json", "dies_at_import", "raises_at_import", "no_such_module_at_all", "colorsys"}
    assert "error" not in found["json"] and "error" not in found["colorsys"]
    assert "ended the process (7)" in found["dies_at_import"]["error"]
    assert found["raises_at_import"]["error"] == "RuntimeError: no display"
    assert found["no_such_module_at_all"]["error"].startswith("ModuleNotFoundError")


def test_the_core_of_this_installation_imports():
    """The real probe, on the two modules that are quick."""
    found = doctor.probe(["numpy", "blosc2"])
    assert all("error" not in row and row["version"] for row in found.values())


def test_the_probe_stands_alone():
    """It runs under a plain interpreter: nothing of this project is needed to find out what lacks."""
    done = subprocess.run([sys.executable, "-I", "-c", doctor.PROBE, "json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["name"] == "json"
