"""Exports for plain torch that were tampered with, damaged, or mixed up: each is refused, or fails with the line that says why."""

import io
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from sensors.errors import WmError
from sensors.files import check_folder, commit_folder
from worldmodel.export.verify import export, verify
from worldmodel.tools.cli import main

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(untrained, tmp_path_factory):
    root = tmp_path_factory.mktemp("negative")
    run = untrained(root / "run", "encoder.layers=[1,1,1]")
    assert export(run, "torch", root / "export", [])["passed"]
    return root / "export"


@pytest.fixture
def remade(good, tmp_path):
    """A copy of the export with other files or fields, under a manifest that agrees with them: what a digest cannot find."""

    def make(files=None, about=None, weights=None):
        manifest = check_folder(good)
        contents = {row["path"]: (good / row["path"]).read_bytes() for row in manifest["files"]} | (files or {})
        if weights is not None:
            tensors = {k: v.contiguous() for k, v in weights(dict(load_file(good / WEIGHTS))).items()}
            contents[WEIGHTS] = save(tensors, metadata={"format": "pt"})
        fields = {k: v for k, v in manifest.items() if k not in ("files", "digest")}
        commit_folder(tmp_path / "other", contents, {**fields, **(about or {})})
        return tmp_path / "other"

    return make


def fails(folder, *words):
    report = verify(folder)
    said = " | ".join(str(report[key]) for key in ("missing", "unexpected", "mismatched", "reasons"))
    assert not report["passed"] and all(word in said for word in words), report
    return report


def refused(folder, *words):
    with pytest.raises(WmError) as error:
        verify(folder)
    line = str(error.value)
    assert "\n" not in line and "weights_only" not in line and all(word in line for word in words), line


CONV, NORM_A, NORM_B = "backbone_2d.blocks.0.4.weight", "backbone_2d.blocks.0.2", "backbone_2d.blocks.0.5"


def test_a_remade_copy_of_the_same_passes(remade):
    report = verify(remade())
    assert report["passed"] and report["reasons"] == []


def test_a_renamed_key(remade):
    report = fails(remade(weights=lambda w: {("more" if k == CONV else k): v for k, v in w.items()}), CONV, "more")
    assert report["missing"] == [CONV] and report["unexpected"] == ["more"] and report["loaded"] == report["tensors"] - 1


def test_the_command_says_why(remade, capsys):
    assert main(["verify", str(remade(weights=lambda w: w | {CONV: w[CONV].transpose(0, 1)}))]) == 1
    printed = capsys.readouterr().out
    assert f"reason: {CONV} holds other values" in printed and "NOT everything arrived" in printed


def test_a_wrong_width(remade):
    assert fails(remade(weights=lambda w: w | {CONV: w[CONV][:-1]}), CONV)["mismatched"] == [CONV]


def test_a_wrong_kind_of_number(remade):
    assert fails(remade(weights=lambda w: w | {CONV: w[CONV].half()}), CONV)["mismatched"] == [CONV]


def test_two_norms_swapped(remade):
    def swapped(weights):
        fields = ("weight", "bias", "running_mean", "running_var")
        return weights | {f"{a}.{f}": weights[f"{b}.{f}"] for a, b in ((NORM_A, NORM_B), (NORM_B, NORM_A)) for f in fields}

    report = fails(remade(weights=swapped), f"{NORM_A}.running_mean holds what {NORM_B}.running_mean had")
    assert report["loaded"] == report["tensors"] and report["difference"] > 1e-5


def test_a_kernel_transposed(remade):
    report = fails(remade(weights=lambda w: w | {CONV: w[CONV].transpose(0, 1)}), f"{CONV} holds other values")
    assert report["loaded"] == report["tensors"] and report["difference"] > 1e-5


def test_intensity_folded_for_255(remade):
    def folded(weights):
        first = weights["vfe.pfn_layers.0.linear.weight"].clone()
        first[:, 3] /= 255
        return weights | {"vfe.pfn_layers.0.linear.weight": first}

    assert fails(remade(weights=folded), "vfe.pfn_layers.0.linear.weight holds other values")["difference"] > 1e-5


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_another_feature_order(good, remade):
    config = config_of(good) | {"features": ["x", "y", "z", "dt", "intensity"]}
    report = fails(remade({"config.json": json.dumps(config).encode()}), "features is ['x', 'y', 'z', 'intensity', 'dt'] in manifest.json")
    assert report["difference"] < 1e-5  # nothing else would tell


OTHERS = [
    ("padded_slots", True, "padded_slots is False"),
    ("bn_eps", 1e-5, "bn_eps is 0.001"),
    ("low", [-25.6, -25.6, -2.0], "low is"),
    ("input_yaw_deg", 90.0, "input_yaw_deg is 0.0"),
    ("voxel", [0.4, 0.4, 6.0], ""),
    ("features", ["x", "y", "z", "dt"], ""),
]


@pytest.mark.parametrize("key, value, word", OTHERS)
def test_another_configuration(good, remade, key, value, word):
    extra = {"max_points_per_pillar": 20, "max_pillars": 9000} if key == "padded_slots" else {}
    folder = remade({"config.json": json.dumps(config_of(good) | extra | {key: value}).encode()})
    if word:
        fails(folder, word)
    else:  # a map of another shape, a first layer of another width: nothing to compare
        refused(folder, "does not load")


def test_another_intensity_scale_in_the_manifest(good, remade):
    said = check_folder(good)["input"]
    fails(remade(about={"input": said | {"scales": said["scales"] | {"intensity": 255.0}, "intensity": "0..255"}}), "intensity in 0..255")


def test_a_stored_cloud_of_another_scale(good, remade):
    sample = load_file(good / "sample.safetensors")
    sample["points"][:, 3] *= 255
    fails(remade({"sample.safetensors": save(sample)}), "intensity reaches 25")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "encoder.py", "sample.safetensors", "check_in_target.py", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut at 0", "cut at 1", "cut in half", "cut at the end", "bit", "gone", "link"])
def test_damaged_files(good, tmp_path, name, damage):
    shutil.copytree(good, tmp_path / "copy")
    path = tmp_path / "copy" / name
    data = path.read_bytes()
    if damage == "bit":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])
    elif damage == "gone":
        path.unlink()
    elif damage == "link":
        path.unlink()
        path.symlink_to(good / name)
    else:
        path.write_bytes(data[: {"cut at 0": 0, "cut at 1": 1, "cut in half": len(data) // 2, "cut at the end": len(data) - 1}[damage]])
    refused(tmp_path / "copy", name)


class Payload:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "zip of weights", "nan", "empty", "cut under a manifest that agrees"])
def test_other_things_in_place_of_the_weights(good, remade, tmp_path, kind):
    marker, out = tmp_path / "marker", io.BytesIO()
    if kind == "pickle":
        data = pickle.dumps(Payload(marker))
    elif kind in ("torch.save", "zip of weights"):
        torch.save({"state_dict": Payload(marker)} if kind == "torch.save" else load_file(good / WEIGHTS), out)
        data = out.getvalue()
    elif kind == "nan":
        data = save({k: v * np.nan if v.is_floating_point() else v for k, v in load_file(good / WEIGHTS).items()})
    else:
        data = b"" if kind == "empty" else (good / WEIGHTS).read_bytes()[:-9]
    refused(remade({WEIGHTS: data}), WEIGHTS)
    assert not marker.exists()


def test_code_that_came_with_an_export_never_runs(good, remade, tmp_path):
    marker = tmp_path / "marker"
    code = f"import os\nos.mkdir({str(marker)!r})\n".encode()
    folder = remade()
    for name in ("torch.py", "json.py", "struct.py", "sitecustomize.py", "encoder/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(code)
    assert verify(folder)["passed"] and not marker.exists()
    shutil.rmtree(folder)
    refused(remade({"encoder.py": (good / "encoder.py").read_bytes() + code}), "encoder.py", "not run")
    assert not marker.exists()


def test_a_manifest_that_says_less(remade):
    refused(remade(about={"input": None}), "manifest.json does not say")


def test_a_manifest_without_digests_of_tensors(remade):
    fails(remade(about={"digests": None}), "no digests")


def test_an_export_of_another_count(remade):
    assert not verify(remade(about={"tensors": 41}))["passed"]


def test_a_map_that_proves_nothing(good, remade):
    sample = load_file(good / "sample.safetensors")
    for wrong, why in ((0.0, "stored map"), (np.nan, "map holds NaN")):
        folder = remade({"sample.safetensors": save(sample | {"map": sample["map"] * wrong})})
        refused(folder, why)
        shutil.rmtree(folder)
