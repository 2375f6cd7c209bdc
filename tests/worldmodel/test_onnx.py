"""Exports as ONNX and as a program of torch.export: they compute what we compute at any size, and files of others are looked through first."""

import io
import json
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from sensors.errors import UsageError, WmError
from sensors.files import BadFile, check_folder, commit_folder
from sensors.kernels.voxels import hard_voxels, pillars
from tests.worldmodel.conftest import tiny, train
from worldmodel.export.onnx import inspected
from worldmodel.export.pt2 import inspect
from worldmodel.export.verify import export, verify
from worldmodel.handover import voxelize
from worldmodel.tools.cli import main


@pytest.fixture(scope="module")
def padded_run(parts, tmp_path_factory):
    """Slots, two layers in the pillars, a first lift that shrinks, and a grid that is not square."""
    config = tiny("encoder.padded_slots=true", "encoder.max_points_per_pillar=6", "encoder.max_pillars=400", "encoder.pfn_widths=[16,12]",
                  "encoder.upsample_strides=[0.5,1,2]", "encoder.low=[-25.6,-12.8,-3]", "encoder.high=[25.6,12.8,3]", "train.steps=2")  # fmt: skip
    return train(parts, tmp_path_factory.mktemp("padded") / "run", config)


@pytest.fixture(scope="module", params=["grouped", "padded"])
def either(request):
    return request.getfixturevalue("run" if request.param == "grouped" else "padded_run")


@pytest.fixture(scope="module")
def as_onnx(either, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "export"
    return folder, export(either, "onnx", folder, parts)


@pytest.fixture(scope="module")
def as_pt2(either, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pt2") / "export"
    return folder, export(either, "pt2", folder, parts)


def settings(folder):
    return json.loads((folder / "config.json").read_text())["encoder"]


def test_onnx_computes_the_same_at_two_sizes(as_onnx):
    folder, report = as_onnx
    assert report["passed"] and report["loaded"] == report["tensors"] == report["expected"] > 15 and report["difference"] < 1e-5
    (points, cells), (fewer_points, fewer_cells) = report["sizes"]
    assert points > fewer_points > 0 and cells > fewer_cells > 0
    assert set(report["latency_ms"]) == {"onnxruntime", "torch"} and min(report["latency_ms"].values()) > 0
    assert main(["verify", str(folder)]) == 0


def test_one_file_says_what_it_expects(as_onnx):
    folder, _ = as_onnx
    model = onnx.load(folder / "encoder.onnx")
    assert model.opset_import[0].version == 18 and not [p for p in folder.iterdir() if p.suffix == ".data"]
    said = {row.key: row.value for row in model.metadata_props}
    config = settings(folder)
    assert json.loads(said["range"]) == [*config["low"], *config["high"]] and json.loads(said["features"]) == config["features"]
    assert said["intensity"] == "0..1" and "x forward" in said["frame"] and len(said["config_sha256"]) == 64 and said["licence"]
    axes = {row.name: [d.dim_param or d.dim_value for d in row.type.tensor_type.shape.dim] for row in model.graph.input}
    if config["padded_slots"]:
        assert axes == {"voxels": ["pillars", 6, 5], "num_points": ["pillars"], "cells": ["pillars", 2]}
    else:
        assert axes == {"points": ["points", 5], "pillar": ["points"], "cells": ["pillars", 2]}
    notes = [row for part in (*model.graph.node, *model.graph.value_info) for row in part.metadata_props]
    assert not notes and b"graph.py" not in (folder / "encoder.onnx").read_bytes()


def test_the_snippet_runs_without_torch(as_onnx, tmp_path):
    from safetensors.numpy import load_file

    from worldmodel.export.onnx import snippet

    sample = load_file(as_onnx[0] / "sample.safetensors")
    np.save(tmp_path / "cloud.npy", sample["points"])
    code = f"import numpy\ncloud = numpy.load({str(tmp_path / 'cloud.npy')!r})\n{snippet(as_onnx[0])}\n"
    code += f"import sys\nassert 'torch' not in sys.modules\nnumpy.save({str(tmp_path / 'bev.npy')!r}, bev)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "bev.npy"), sample["map"], atol=1e-5 * max(1, np.abs(sample["map"]).max()))


def test_stderr_says_nothing_of_torchvision(run, tmp_path, capfd):
    assert main(["export", str(run), "--to", "onnx", "-o", str(tmp_path / "export")]) == 0
    out, err = capfd.readouterr()
    assert "torchvision" not in out + err and "onnxruntime.InferenceSession" in out


@pytest.mark.parametrize("target", ["onnx", "pt2"])
def test_the_scale_of_intensity_is_folded(run, parts, tmp_path, target):
    report = export(run, target, tmp_path / "export", parts, intensity=255.0)
    assert report["passed"] and check_folder(tmp_path / "export")["input"]["intensity"] == "0..255"
    from safetensors.numpy import load_file

    sample = load_file(tmp_path / "export" / "sample.safetensors")
    assert sample["points"][:, 3].max() > 1


def test_voxels_are_those_of_the_kernels():
    rng = np.random.Generator(np.random.Philox(4))
    cloud = rng.normal(0, 3, (3000, 4)).astype(np.float32)
    cloud[::50, 0] = np.nan
    cloud[::70, 1] = 1e30
    config = {"features": ["x", "y", "z", "intensity"], "low": [-4, -2.4, -3], "high": [4, 2.4, 3], "voxel": [0.4, 0.4, 6], "padded_slots": False,
              "max_points_per_pillar": 5, "max_pillars": 90}  # fmt: skip
    got = voxelize.inputs(cloud, config)
    found = pillars(cloud, config["low"], config["voxel"], (20, 12))
    np.testing.assert_array_equal(got["cells"] @ [20, 1], found.cells)
    np.testing.assert_array_equal(got["pillar"], found.of[found.of >= 0])
    np.testing.assert_array_equal(got["points"], cloud[found.of >= 0])
    voxels, coords, counts = hard_voxels(cloud, config["low"], config["high"], config["voxel"], 5, 90)
    got = voxelize.inputs(cloud, config | {"padded_slots": True})
    np.testing.assert_array_equal(got["voxels"], voxels)
    np.testing.assert_array_equal(got["cells"], coords[:, 1:])
    np.testing.assert_array_equal(got["num_points"], counts)
    with pytest.raises(ValueError, match="none of 2 points"):
        voxelize.inputs(cloud[:2] * 0 + 50, config)
    with pytest.raises(ValueError, match="columns"):
        voxelize.inputs(cloud[:, :3], config)


def test_a_missing_library_is_named(run, parts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"onnxscript: pip install driving-worldmodel\[onnx\]"):
        export(run, "onnx", tmp_path / "export", parts)


def edited(folder, target, **changes):
    """A copy of an export with changed files, under a manifest that agrees with them."""
    manifest = check_folder(folder)
    about = {k: v for k, v in manifest.items() if k not in ("files", "digest")}
    files = {e["path"]: (folder / e["path"]).read_bytes() for e in manifest["files"]}
    for name, change in changes.items():
        name = name.replace("__", ".")
        files[name] = change(files[name])
    commit_folder(target, files, about)
    return target


def with_model(change):
    def changed(data):
        model = onnx.load_from_string(data)
        change(model)
        return model.SerializeToString()

    return changed


def weight(model, least=2):
    return next(t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 4 and t.dims[0] == t.dims[1] >= least)


def transposed(model):
    tensor = weight(model)
    values = onnx.numpy_helper.to_array(tensor).transpose(1, 0, 2, 3)
    tensor.raw_data = np.ascontiguousarray(values).tobytes()


def renamed(model):
    old = weight(model).name
    for node in model.graph.node:
        node.input[:] = ["other" if name == old else name for name in node.input]
    weight(model).name = "other"


@pytest.mark.parametrize("change, kind", [
    (transposed, "difference"), (renamed, "missing"), (lambda m: helper.set_model_props(m, {"range": "[0]"}), "reasons"),
], ids=["transposed", "renamed", "metadata"])  # fmt: skip
def test_another_graph_is_told(as_onnx, tmp_path, change, kind):
    report = verify(edited(as_onnx[0], tmp_path / "edited", encoder__onnx=with_model(change)))
    assert not report["passed"] and (report["difference"] > 1e-5 if kind == "difference" else report[kind])


def outside(location):
    def change(model):
        tensor = weight(model)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return change


def in_attribute(model):
    tensor = helper.make_tensor("x", TensorProto.FLOAT, [1], [0.0])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))


def claims(model):
    tensor = weight(model)
    tensor.dims[:] = [1 << 20, 1 << 20]


def branch(model):
    graph = helper.make_graph([], "g", [], [])
    model.graph.node.append(helper.make_node("Identity", [model.graph.output[0].name], ["y"], body=graph))


def bomb(model):
    model.graph.initializer.append(helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]))
    model.graph.initializer.append(helper.make_tensor("huge", TensorProto.INT64, [2], [1 << 20, 1 << 20]))
    model.graph.node.append(helper.make_node("Expand", ["one", "huge"], ["z"]))


def cycle(model):
    first = model.graph.node[0]
    model.graph.node.append(helper.make_node("Add", [first.output[0], "b"], ["a"]))
    model.graph.node.append(helper.make_node("Add", ["a", "a"], ["b"]))


HOSTILE = {
    "above": (outside("../secret"), "lies outside"), "absolute": (outside("/etc/passwd"), "/etc/passwd"), "attribute": (in_attribute, "lies outside"),
    "huge": (claims, "claims 1099511627776 elements"), "twice": (lambda m: m.graph.initializer.append(weight(m)), "twice"),
    "custom": (lambda m: m.graph.node.append(helper.make_node("Run", [], ["x"], domain="evil")), "evil::Run"),
    "domain": (lambda m: m.opset_import.append(helper.make_opsetid("com.microsoft", 1)), "custom domains"),
    "loop": (lambda m: m.graph.node.append(helper.make_node("Loop", [], ["x"])), "Loop"), "branch": (branch, "graph inside"),
    "function": (lambda m: m.functions.add(name="f", domain=""), "functions"), "bomb": (bomb, "more than 1073741824"), "cycle": (cycle, "checker"),
    "text": (lambda m: m.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [1], [b"x"])), "type or shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_onnx_is_refused_before_it_is_used(as_onnx, tmp_path, monkeypatch, name):
    import onnxruntime

    change, words = HOSTILE[name]
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: pytest.fail("it was opened"))
    with pytest.raises(BadFile, match=words):
        verify(edited(as_onnx[0], tmp_path / "edited", encoder__onnx=with_model(change)))


def test_what_is_no_onnx_is_refused(as_onnx):
    data = (as_onnx[0] / "encoder.onnx").read_bytes()
    for bad in (data[: len(data) // 2], b"\xff" * 100, b"\x0a" * 4096, data[1:]):
        with pytest.raises(BadFile):
            inspected(bad, "m.onnx")


def test_pt2_computes_the_same_at_two_sizes(as_pt2):
    folder, report = as_pt2
    assert report["passed"] and report["loaded"] == report["tensors"] == report["expected"] > 20 and report["difference"] < 1e-5
    assert report["sizes"][0][1] > report["sizes"][1][1] > 0
    assert b"graph.py" not in (folder / "encoder.pt2").read_bytes()


def test_the_pt2_snippet_runs(as_pt2):
    from safetensors.torch import load_file

    from worldmodel.export.pt2 import snippet

    sample = load_file(as_pt2[0] / "sample.safetensors")
    known = {"cloud": sample["points"].numpy()}
    path = list(sys.path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecations inside torch.export.load
            exec(snippet(as_pt2[0]), known)
    finally:
        sys.path[:] = path
        sys.modules.pop("voxelize", None)
    assert float((known["bev"] - sample["map"]).abs().max()) <= 1e-5 * max(1.0, float(sample["map"].abs().max()))


def with_table(member, change, also=()):
    """The archive with one of its tables changed, and further members."""

    def changed(data):
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
            for row in old.infolist():
                content = old.read(row)
                if row.filename.endswith(member):
                    table = json.loads(content)
                    change(table)
                    content = json.dumps(table).encode()
                new.writestr(row.filename, content)
            for name, content in also:
                new.writestr(name, content)
        return buffer.getvalue()

    return changed


def pickled(table):
    next(iter(table["config"].values()))["use_pickle"] = True


def called(table):
    table["graph_module"]["graph"]["nodes"][0]["target"] = "torch.load"


def guarded(table):
    table["guards_code"].append("__import__('os').system('touch marker')")


def expressed(table):
    text = json.dumps(table["graph_module"]["graph"]["tensor_values"])
    at = text.index("Symbol(")
    end = text.index('"', at)
    table["graph_module"]["graph"]["tensor_values"] = json.loads(text[:at] + "__import__('os').system('touch marker')" + text[end:])


@pytest.mark.parametrize("changed, words", [
    (with_table("model_weights_config.json", pickled), "pickle"), (with_table("model.json", called), r"torch\.load"),
    (with_table("model.json", guarded), "guards"), (with_table("model.json", expressed), "expression"),
    (with_table("x", None, [("archive/data/constants/custom_obj_0", b"\x80\x04.")]), "has no place"),
    (with_table("x", None, [("../x", b"")]), "has no place"), (lambda data: data[: len(data) // 2], "cut off"), (lambda data: b"", "cut off"),
], ids=["pickle", "function", "guards", "expression", "object", "path", "half", "empty"])  # fmt: skip
def test_a_hostile_pt2_is_refused_before_it_is_loaded(as_pt2, tmp_path, monkeypatch, changed, words):
    monkeypatch.setattr(torch.export, "load", lambda *a, **k: pytest.fail("it was loaded"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadFile, match=words):
        verify(edited(as_pt2[0], tmp_path / "edited", encoder__pt2=changed))
    assert not (tmp_path / "marker").exists()


def test_an_untouched_archive_survives_being_rewritten(as_pt2):
    """What makes the tests above fail is what they change, not that they rewrite the archive."""
    inspect(with_table("x", None)((as_pt2[0] / "encoder.pt2").read_bytes()), "m.pt2")


@pytest.mark.parametrize("change, words", [
    (lambda c: c["encoder"].update(widths=[16, 1 << 29, 16]), "does not fit"), (lambda c: c["encoder"].update(layers=[1 << 29, 1, 1]), "more layers"),
    (lambda c: c["encoder"].update(voxel=[1e-9, 1e-9, 6]), "pillars"), (lambda c: c.pop("encoder"), "missing"),
    (lambda c: c["encoder"].pop("low"), "low"), (lambda c: c["encoder"].update(widths="x"), "widths"),
])  # fmt: skip
def test_another_config_is_refused_before_memory_is_taken(as_onnx, tmp_path, change, words):
    def changed(data):
        tree = json.loads(data)
        change(tree)
        return json.dumps(tree).encode()

    with pytest.raises(WmError, match=words):
        verify(edited(as_onnx[0], tmp_path / "edited", config__json=changed))
