"""`wm verify --against`: what would arrive in a model of the user's own, and what would arrive and mean something else."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sensors.errors import UsageError, WmError
from worldmodel.export.verify import export
from worldmodel.handover import mmdet3d_modules, openpcdet_modules
from worldmodel.handover.against import _reference, against
from worldmodel.tools.cli import main

SMALL = ["encoder.layers=[1,1,1]", "encoder.low=[-6.4,-6.4,-5]", "encoder.high=[6.4,6.4,3]", "encoder.voxel=[0.2,0.2,8]", "encoder.padded_slots=true",
         "encoder.max_points_per_pillar=20", "encoder.max_pillars=30000", "encoder.pfn_widths=[64]", "encoder.widths=[64,128,256]",
         "encoder.upsample_strides=[0.5,1,2]", "encoder.upsample_widths=[128,128,128]", "encoder.input_yaw_deg=90"]  # fmt: skip


@pytest.fixture(scope="module")
def exports(untrained, tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    run = untrained(root / "run", *SMALL)
    return {target: (export(run, target, root / target, []), root / target)[1] for target in ("openpcdet", "mmdet3d", "torch")}


def reference(folder):
    return _reference(folder, json.loads((folder / "manifest.json").read_text()))


@pytest.fixture
def model_of(exports, monkeypatch):
    """Put a model into a module that can be named; gives its name for `--against`."""
    import sys
    import types

    def named(model):
        module = types.ModuleType("my_detector")
        module.build = (lambda: model) if isinstance(model, torch.nn.Module) else model
        monkeypatch.setitem(sys.modules, "my_detector", module)
        return "my_detector:build"

    return named


@pytest.mark.parametrize("target", ["openpcdet", "mmdet3d", "torch"])
def test_everything_arrives_in_the_model_it_is_made_for(exports, model_of, target, tmp_path, capsys):
    model = reference(exports[target])
    report = against(exports[target], model_of(model))
    assert report["passed"] and report["loaded"] == report["tensors"] == 60 and not report["traps"], report
    assert report["untouched"] == (len(model.state_dict()) - report["tensors"]) and (report["untouched"] > 0) == (target == "openpcdet")
    for path, save in ((tmp_path / "w.pth", torch.save), (tmp_path / "w.safetensors", save_file)):
        save({k: v.contiguous() for k, v in model.state_dict().items()}, path)
        assert against(exports[target], str(path))["passed"]
        assert main(["verify", str(exports[target]), "--against", str(path)]) == 0
    assert "would arrive" in capsys.readouterr().out


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s}, lambda s: {"model_state": s}, lambda s: {f"module.{k}": v for k, v in s.items()}])
def test_their_wrappers_and_data_parallel_names_are_seen_through(exports, tmp_path, wrap):
    torch.save(wrap(dict(reference(exports["mmdet3d"]).state_dict())), tmp_path / "w.pth")
    assert against(exports["mmdet3d"], str(tmp_path / "w.pth"))["passed"]


def test_a_wrapped_model_is_seen_through(exports, model_of):
    wrapped = torch.nn.Module()
    wrapped.module = reference(exports["openpcdet"])
    assert against(exports["openpcdet"], model_of(wrapped))["passed"]


def test_what_would_not_arrive_is_listed(exports, tmp_path, capsys):
    state = dict(reference(exports["openpcdet"]).state_dict())
    state["backbone_2d.blocks.0.4.weight"] = torch.zeros(32, 64, 3, 3)
    state["vfe.other"] = state.pop("vfe.pfn_layers.0.norm.bias")
    torch.save(state, tmp_path / "w.pth")
    report = against(exports["openpcdet"], str(tmp_path / "w.pth"))
    assert not report["passed"] and report["loaded"] == report["tensors"] - 2
    assert report["unexpected"] == ["vfe.pfn_layers.0.norm.bias"] and report["missing"] == ["vfe.other"]
    assert report["mismatched"] == ["backbone_2d.blocks.0.4.weight 64x64x3x3, theirs 32x64x3x3"]
    assert main(["verify", str(exports["openpcdet"]), "--against", str(tmp_path / "w.pth")]) == 1
    assert "NOT everything" in capsys.readouterr().out
    assert main(["verify", str(exports["openpcdet"]), "--against", str(tmp_path / "w.pth"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["loaded"] == report["loaded"]


def test_the_other_framework_is_recognised(exports, model_of):
    report = against(exports["openpcdet"], model_of(reference(exports["mmdet3d"])))
    assert report["loaded"] == 0 and report["hints"] == ["theirs has the names of mmdet3d: export with --to mmdet3d"]
    report = against(exports["mmdet3d"], model_of(reference(exports["openpcdet"])))
    assert report["loaded"] == 0 and report["hints"] == ["theirs has the names of openpcdet: export with --to openpcdet"]


def test_a_model_that_has_it_below_a_prefix_is_recognised(exports, model_of):
    outer = torch.nn.Module()
    outer.net = torch.nn.Module()
    outer.net.encoder = reference(exports["torch"])
    report = against(exports["torch"], model_of(outer))
    assert report["loaded"] == 0 and "below `net.encoder.`" in report["hints"][0]


def test_other_columns_and_layers_are_explained(exports, model_of):
    other = reference(exports["openpcdet"])
    other.vfe.pfn_layers[0].linear = torch.nn.Linear(10, 32, bias=False)
    hints = against(exports["openpcdet"], model_of(other))["hints"]
    assert any("reads 4 columns per point, the export 5" in line for line in hints) and any("two PFN layers" in line for line in hints)


def trap(exports, model_of, target, change):
    model = reference(exports[target])
    change(model)
    report = against(exports[target], model_of(model))
    assert report["loaded"] == report["tensors"] and not report["missing"] and not report["unexpected"] and not report["mismatched"]
    return report


def dynamic(model):
    model.vfe.__class__ = openpcdet_modules.DynPillarVFE


def flat(model):
    model.backbone_2d.deblocks[1][0] = torch.nn.Conv2d(128, 128, 1, bias=False)


def lifted(model):
    model.pts_neck.deblocks[1][0] = torch.nn.ConvTranspose2d(128, 128, 1, bias=False)


@pytest.mark.parametrize("target, change, says", [
    ("mmdet3d", lifted, "pts_neck.deblocks.1.0: Conv2d here, ConvTranspose2d in theirs"),
    ("openpcdet", flat, "backbone_2d.deblocks.1.0: ConvTranspose2d here, Conv2d in theirs"),
    ("openpcdet", dynamic, "theirs is DynPillarVFE"),
    ("mmdet3d", lambda m: setattr(m.pts_voxel_encoder, "legacy", True), "legacy=True"),
    ("openpcdet", lambda m: setattr(m.backbone_2d.blocks[0][2], "eps", 1e-5), "BatchNorm eps 0.001 here, 1e-05 in theirs"),
    ("openpcdet", lambda m: setattr(m.backbone_2d.blocks[0][4], "stride", (2, 2)), "stride"),
    ("openpcdet", lambda m: setattr(m.vfe, "use_absolute_xyz", False), "USE_ABSLOTE_XYZ"),
    ("mmdet3d", lambda m: vars(m.pts_voxel_encoder).update(vx=0.25, x_offset=-6.4 + 0.125), "along x voxels of 0.2 m"),
    ("mmdet3d", lambda m: vars(m.pts_voxel_encoder).update(vz=8, z_offset=0.0), "from -5 m here, of 8 m from -4 m"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_what_would_load_and_be_wrong_is_a_trap(exports, model_of, target, change, says):
    report = trap(exports, model_of, target, change)
    assert not report["passed"] and len(report["traps"]) == 1 and says in report["traps"][0], report["traps"]


def test_another_momentum_is_noted(exports, model_of):
    report = trap(exports, model_of, "openpcdet", lambda m: [setattr(n, "momentum", 0.1) for n in m.modules() if isinstance(n, torch.nn.BatchNorm2d)])
    assert report["passed"] and len(report["notes"]) == 1 and "momentum 0.01 here, 0.1 in theirs" in report["notes"][0]


def test_from_a_checkpoint_it_is_said_what_does_not_show(exports, tmp_path):
    torch.save(reference(exports["mmdet3d"]).state_dict(), tmp_path / "w.pth")
    assert "module:function" in against(exports["mmdet3d"], str(tmp_path / "w.pth"))["notes"][0]


def test_what_cannot_be_compared_is_refused(exports, model_of, tmp_path):
    def broken():
        raise KeyError("no\nconfig")

    for wrong in ("no_such_module:build", "json:no_such", "json:loads", "json:JSONDecoder", model_of(broken)):
        with pytest.raises(UsageError, match="--against") as error:
            against(exports["torch"], wrong)
        assert "\n" not in str(error.value)
    for wrong in (str(tmp_path / "none.pth"), "nothing"):
        with pytest.raises(WmError):
            against(exports["torch"], wrong)


def test_their_checkpoint_is_never_unpickled(exports, tmp_path):
    import os

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    torch.save({"model_state": Payload()}, tmp_path / "w.pth")
    assert main(["verify", str(exports["torch"]), "--against", str(tmp_path / "w.pth")]) == 1
    assert not (tmp_path / "marker").exists()


def test_the_mirrors_are_those_of_the_export(exports):
    assert isinstance(reference(exports["openpcdet"]), openpcdet_modules.Detector) and isinstance(
        reference(exports["mmdet3d"]), mmdet3d_modules.Detector
    )
