"""The folder for a model hub: the card says what the run says, its code runs, and neither can be talked into more."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from sensors.errors import WmError
from sensors.files import check_folder, commit_folder
from worldmodel.config import load_config
from worldmodel.export import hf
from worldmodel.export.verify import export, verify


@pytest.fixture(scope="module")
def handed(run, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "hf"
    return folder, export(run, "hf", folder, parts)


def front_of(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def edited(folder, to, files, **about):
    manifest = check_folder(folder)
    content = {entry["path"]: (folder / entry["path"]).read_bytes() for entry in manifest["files"]} | files
    commit_folder(to, content, {k: v for k, v in manifest.items() if k not in ("files", "digest")} | about)
    return to


def test_it_arrives_whole(handed):
    folder, report = handed
    assert report["passed"] and report["loaded"] == report["tensors"] > 20 and report["difference"] < 1e-5 and report["reasons"] == []
    assert {"model.safetensors", "config.json", "README.md", "encoder.py", "manifest.json"} <= {p.name for p in folder.iterdir()}
    config = json.loads((folder / "config.json").read_text())
    assert config["num_features"] == 24 and config["architectures"] == ["Encoder"] and config["features"][:3] == ["x", "y", "z"]


def test_the_card_is_filled_from_the_run(handed, run):
    folder, _ = handed
    text, manifest = (folder / "README.md").read_text(), check_folder(folder)
    front = front_of(text)
    assert front["license"] == "cc0-1.0" and front["library_name"] == "driving-worldmodel" and "lidar" in front["tags"]
    last = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "val/l1_model" in line][-1]
    measured = {row["name"]: row["value"] for row in front["model-index"][0]["results"][0]["metrics"]}
    assert measured["val/l1_model"] == pytest.approx(last["val/l1_model"], abs=1e-6) and set(front["metrics"]) == {
        "mae",
        "median_absolute_error",
        "nll",
    }
    assert all(row["log"] in text and row["digest"] in text for row in manifest["logs"])
    assert all(f"`{name}`" in text for name in load_config("tiny").objectives) and manifest["checkpoint"] in text


def test_the_code_of_the_card_runs_with_torch_alone(handed, tmp_path):
    folder, _ = handed
    shutil.copytree(folder, tmp_path / "elsewhere")
    (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    code = (
        f"import sys\nsys.path.insert(0, '.')\n{code}\nassert not {{'worldmodel', 'sensors', 'numba'}} & set(sys.modules)\nprint(tuple(maps.shape))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path / "elsewhere", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "(1, 24, 32, 32)", done.stderr


@pytest.mark.parametrize("licence, wanted", [
    ("CC BY-NC-SA 3.0", {"license": "cc-by-nc-sa-3.0"}), ("CC0-1.0", {"license": "cc0-1.0"}), ("CC BY 4.0", {"license": "cc-by-4.0"}),
    ("none", {"license": "other", "license_name": "none"}), ("ours: ask!", {"license": "other", "license_name": "ours-ask"}),
    ("", {"license": "other", "license_name": "unknown"}),
])  # fmt: skip
def test_licences_get_the_names_that_the_hub_knows(handed, licence, wanted):
    front = hf._front_matter({**check_folder(handed[0]), "licence": licence})
    assert {key: front.get(key) for key in ("license", "license_name") if key in front} == wanted


def test_a_card_that_says_something_else_is_flagged(handed, tmp_path):
    folder, _ = handed
    text = (folder / "README.md").read_text()
    for number, (old, new) in enumerate(
        [
            ("license: cc0-1.0", "license: mit"),
            ("value: ", "value: 9"),
            (
                "---\n",
                "",
            ),
            ("tags:", "tags: !!python/name:os.system"),
        ]
    ):
        other = edited(folder, tmp_path / str(number), {"README.md": text.replace(old, new).encode()})
        report = verify(other)
        assert not report["passed"] and report["reasons"], old
    report = verify(edited(folder, tmp_path / "manifest", {}, licence="CC BY-NC-SA 3.0"))
    assert report["reasons"] == ["README.md: its license is not that of the manifest"]


def test_columns_in_another_order_are_flagged(handed, tmp_path):
    config = json.loads((handed[0] / "config.json").read_text())
    swapped = json.dumps({**config, "features": ["x", "y", "z", "dt", "intensity"]}).encode()
    report = verify(edited(handed[0], tmp_path / "other", {"config.json": swapped}))
    assert not report["passed"] and any("features is" in reason for reason in report["reasons"])


def test_code_that_is_not_ours_is_not_run(handed, tmp_path):
    marker = tmp_path / "ran"
    other = edited(
        handed[0], tmp_path / "other", {"encoder.py": (handed[0] / "encoder.py").read_bytes() + f"\nopen({str(marker)!r}, 'w')\n".encode()}
    )
    with pytest.raises(WmError, match=r"encoder\.py is not the one"):
        verify(other)
    assert not marker.exists()


def test_names_from_outside_are_no_markup(handed):
    """Log names and licences stay text: no metadata, no table cell, no HTML, no link, no second code block."""
    about = check_folder(handed[0])
    evil = "a/b`\n---\nlicense: mit\n---\n```python\nimport os\n```\n<script>x</script> [l](javascript:x) | y"
    about = {**about, "run": evil, "licence": evil, "logs": [{"log": evil, "licence": evil, "poses": evil, "digest": None}]}
    config = load_config("tiny").encoder
    text = hf.card(about, config, 1.6, 10, "no time")
    assert front_of(text)["license"] == "other"
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 and len(re.findall(r"^---$", text, re.MULTILINE)) == 2
    prose = re.sub(r"`[^`\n]*`", "", text.partition("\n---\n")[2])
    assert not re.search(r"(?<!\\)<script|(?<!\\)\[l(?<!\\)\]", prose)
