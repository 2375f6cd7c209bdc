"""Export for mmdetection3d: all of it arrives under their names, and what does not is told apart."""

import importlib

import numpy as np
import pytest
import torch

from sensors.errors import UsageError, WmError
from sensors.files import check_folder, commit_folder
from tests.worldmodel.conftest import tiny, train
from tests.worldmodel.test_encoder import with_statistics
from worldmodel.config import load_config
from worldmodel.encoders.contract import Clouds
from worldmodel.encoders.pillars import PillarEncoder
from worldmodel.export.mmdet3d import _changes, child_config, columns, model_of, refuse, renamed
from worldmodel.export.verify import export, verify
from worldmodel.handover.folding import as_target, folded
from worldmodel.handover.mmdet3d_modules import BASES, Detector, PillarFeatureNet, hard_voxelize, load_checkpoint, merged, read_config
from worldmodel.tools.cli import main

NARROW = ["encoder.low=[-3.2,-3.2,-5]", "encoder.high=[3.2,3.2,3]"]
SMALL = ["train.autocast=off", "train.channels_last=off", "train.threads=1", "train.validation=0.2", "train.warmup=2", "train.rays=32",
         "train.prior_rays=64", "train.stored_rays=256", "train.instants=1", "train.validate_every=20", "train.save_every=20",
         "train.cache_gb=0.5"]  # fmt: skip
PRESETS = {"mmdet3d_centerpoint": "centerpoint", "openpcdet_kitti": "kitti"}


@pytest.fixture(scope="module")
def handed(parts, tmp_path_factory):
    """The preset at its true widths, trained for 20 steps on a narrow range, exported."""
    root = tmp_path_factory.mktemp("mmdet3d")
    run = train(parts, root / "run", load_config("mmdet3d_centerpoint", [*SMALL, *NARROW, "train.steps=20"]))
    return root / "export", export(run, "mmdet3d", root / "export", parts)


@pytest.fixture(scope="module")
def kitti(parts, tmp_path_factory):
    """A run as KITTI's configuration reads it, of other widths than it has, with two layers in the pillars."""
    root = tmp_path_factory.mktemp("mmdet3d_kitti")
    config = tiny("encoder.features=[x,y,z,intensity]", "encoder.padded_slots=true", "encoder.max_points_per_pillar=8", "encoder.max_pillars=500",
                  "encoder.pfn_widths=[16,12]", "model.join_sweeps=false", "encoder.bn_eps=0.01", "train.steps=2")  # fmt: skip
    return root / "export", export(train(parts, root / "run", config), "mmdet3d", root / "export", parts)


def test_the_preset_arrives_whole(handed):
    folder, report = handed
    assert report["passed"] and report["loaded"] == report["tensors"] == report["expected"] == 120 and report["difference"] < 1e-5
    assert main(["verify", str(folder)]) == 0
    manifest = check_folder(folder)
    assert manifest["input"]["intensity"] == "0..255" and manifest["detector"] == "CenterPoint"
    checkpoint = torch.load(folder / "wm_mmdet3d.pth", weights_only=True)
    assert set(checkpoint) == {"state_dict", "meta"} and all(type(v) is torch.Tensor for v in checkpoint["state_dict"].values())
    assert {v.dtype for k, v in checkpoint["state_dict"].items() if "num_batches" not in k} == {torch.float32}


def test_a_run_without_time_leaves_for_kitti(kitti):
    folder, report = kitti
    assert report["passed"] and report["tensors"] == 6 * 2 + 6 * (2 * 3 + 3)
    child = read_config((folder / "wm_mmdet3d.py").read_text())
    assert child["model"]["voxel_encoder"]["legacy"] is False and child["model"]["voxel_encoder"]["norm_cfg"] == {
        "type": "BN1d",
        "eps": 0.01,
        "momentum": 0.01,
    }
    assert child["_base_"] == "./pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py"
    box = [-25.6, -25.6, -3.0, 25.6, 25.6, 3.0]
    assert child["model"]["data_preprocessor"]["voxel_layer"]["point_cloud_range"] == child["model"]["voxel_encoder"]["point_cloud_range"] == box
    assert "PointsRangeFilter" in (folder / "GUIDE.txt").read_text()


@pytest.mark.parametrize("name, kind", PRESETS.items())
def test_presets_need_no_change_but_legacy(name, kind):
    encoder = load_config(name).encoder
    changes = _changes(model_of(encoder, BASES[kind]), BASES[kind].model)
    assert changes == ({"voxel_encoder": {"legacy": False}} if kind == "kitti" else {})
    names = renamed(PillarEncoder(encoder).state_dict(), encoder, BASES[kind])
    own = Detector(merged(BASES[kind].model, changes), BASES[kind].prefix).state_dict()
    assert len(own) == 120 and {k: v.shape for k, v in names.items()} == {k: v.shape for k, v in own.items()}


@pytest.mark.parametrize("name, kind", PRESETS.items())
def test_modules_compute_what_ours_compute(name, kind):
    config = load_config(name, [f"encoder.low=[0,-3.2,{-5 if kind == 'centerpoint' else -3}]",
                                f"encoder.high=[6.4,3.2,{3 if kind == 'centerpoint' else 1}]", "encoder.max_pillars=300"]).encoder  # fmt: skip
    ours = with_statistics(PillarEncoder(config)).eval()
    rng = np.random.Generator(np.random.Philox(3))
    points = torch.from_numpy(rng.uniform((-1, -4, -4, 0, 0)[: len(config.features)], (8, 4, 2, 1, 0.5)[: len(config.features)],
                                          (6000, len(config.features))).astype(np.float32))  # fmt: skip
    theirs, base = columns(config, None), BASES[kind]
    weights = renamed(ours.state_dict(), config, base)
    first = f"{base.prefix}voxel_encoder.pfn_layers.0.linear.weight"
    weights[first] = folded(weights[first], config.features, theirs)
    child = read_config(child_config(config, base))
    detector = Detector(merged(base.model, child["model"]), base.prefix).eval()
    done = load_checkpoint(detector, {"state_dict": {f"module.{k}": v for k, v in weights.items()}, "meta": {}})
    assert len(done.loaded) == 120 and not done.missing + done.unexpected + done.mismatched
    with torch.no_grad():
        mine, other = ours(Clouds(points, (len(points),))), detector(as_target(points, config.features, theirs))
    assert float((mine - other).abs().max() / mine.abs().max()) < 2e-6


def test_voxels_are_numbered_by_appearance_and_capped():
    points = np.float32([[0.5, 0.5, 0], [1.5, 0.5, 0], [0.6, 0.5, 0], [0.7, 0.5, 0], [9, 0, 0], [0.5, 1.5, 0], [1.6, 0.5, 0], [np.nan, 0, 0]])
    voxels, coors, counts = hard_voxelize(points, [1, 1, 2], [0, 0, -1, 2, 2, 1], 2, 2)
    assert coors.tolist() == [[0, 0, 0], [0, 0, 1]] and counts.tolist() == [2, 2]
    np.testing.assert_array_equal(voxels[:, :, 0], np.float32([[0.5, 0.6], [1.5, 1.6]]))


def test_legacy_loses_absolute_coordinates():
    kwargs = {"in_channels": 4, "feat_channels": (8,), "voxel_size": (1, 1, 4), "point_cloud_range": (0, 0, -3, 4, 4, 1)}
    voxels, there = torch.rand(2, 3, 4), torch.tensor([[1.0, 1, 1], [1, 1, 0]])[:, :, None]
    voxels = voxels * there
    coors = torch.tensor([[0, 0, 0, 1], [0, 0, 2, 3]])
    moved = torch.tensor([[0.0, 0, 0, 2], [0, 0, 2, 1]]).long()
    shift = torch.zeros(2, 1, 4)
    shift[:, 0, :2] = (moved - coors)[:, [3, 2]].float()
    for legacy in (True, False):
        net = PillarFeatureNet(**kwargs, legacy=legacy).eval()
        before, kept = net(voxels, torch.tensor([3, 2]), coors), voxels.clone()
        after = net(voxels + shift * there, torch.tensor([3, 2]), moved)
        assert torch.allclose(before, after, atol=1e-5) is legacy
        assert torch.equal(kept, voxels)


def edited(folder, target, weights=lambda w: w, text=lambda t: t):
    """A copy of an export with changed weights or configuration and a manifest that agrees with them."""
    import io

    manifest = check_folder(folder)
    about = {k: v for k, v in manifest.items() if k not in ("files", "digest")}
    files = {e["path"]: (folder / e["path"]).read_bytes() for e in manifest["files"]}
    stored = torch.load(io.BytesIO(files["wm_mmdet3d.pth"]), weights_only=True)
    buffer = io.BytesIO()
    torch.save({"state_dict": weights(dict(stored["state_dict"])), "meta": {}}, buffer)
    files["wm_mmdet3d.pth"] = buffer.getvalue()
    files["wm_mmdet3d.py"] = text(files["wm_mmdet3d.py"].decode()).encode()
    commit_folder(target, files, about)
    return target


FIRST, LIFT = "pts_voxel_encoder.pfn_layers.0.linear.weight", "pts_neck.deblocks.1.0.weight"
CONV, ONE, OTHER = "pts_backbone.blocks.1.3.weight", "pts_backbone.blocks.1.4.running_mean", "pts_backbone.blocks.1.7.running_mean"


@pytest.mark.parametrize(
    "change, kind",
    [
        (lambda w: {("backbone.blocks.1.3.weight" if k == CONV else k): v for k, v in w.items()}, "missing"),
        (lambda w: {k.removeprefix("pts_"): v for k, v in w.items()}, "unexpected"),
        (lambda w: w | {CONV: w[CONV][:-1].clone()}, "mismatched"),
        (lambda w: {k: v for k, v in w.items() if k != "pts_backbone.blocks.1.4.num_batches_tracked"}, "missing"),
        (lambda w: w | {LIFT: w[LIFT].transpose(0, 1).contiguous()}, "reasons"),
        (lambda w: w | {CONV: w[CONV].transpose(2, 3).contiguous()}, "reasons"),
        (lambda w: w | {ONE: w[OTHER] + 0.1, OTHER: w[ONE]}, "reasons"),
        (lambda w: w | {FIRST: torch.cat((w[FIRST][:, :3], w[FIRST][:, [4, 3]], w[FIRST][:, 5:]), 1)}, "reasons"),
        (lambda w: w | {FIRST: w[FIRST] * torch.tensor([1, 1, 1, 255.0, *[1] * 7])}, "reasons"),
    ],
    ids=["renamed", "prefix", "width", "counter", "lift transposed", "kernel transposed", "norms swapped", "column order", "intensity unfolded"],
)
def test_what_did_not_arrive_is_told(handed, tmp_path, change, kind):
    report = verify(edited(handed[0], tmp_path / "edited", weights=change))
    assert not report["passed"] and report[kind]
    if kind == "reasons":
        assert report["loaded"] == report["tensors"] and report["difference"] > 1e-5
    assert main(["verify", str(tmp_path / "edited")]) == 1


def test_the_default_legacy_is_flagged(kitti, tmp_path):
    report = verify(edited(kitti[0], tmp_path / "edited", text=lambda t: t.replace("legacy=False", "legacy=True")))
    assert not report["passed"] and report["loaded"] == report["tensors"] and report["difference"] > 1e-5
    assert "legacy" in report["reasons"][0]


@pytest.mark.parametrize("old, new, words", [
    ("_base_ = './centerpoint", "_base_ = '../x/centerpoint", "_base_"),
    ("load_from", "import os\nload_from", "not one that"),
    ("pts_voxel_encoder=dict(", "pts_voxel_encoder=dict(type='DynamicPillarFeatureNet', ", "DynamicPillarFeatureNet"),
    ("model = dict(", "model = dict(pts_voxel_encoder=dict(), ", "twice"),
    ("pts_middle_encoder=dict(", "pts_middle_encoder=dict(sparse_shape=[1], ", "would not build"),
    ("model = dict(", "model = dict(pts_backbone=dict(norm_cfg=dict(eps=0.001)), ", "needs a `type`"),
    ("'wm_mmdet3d.pth'", "'wm_mmdet3d.pth' + __import__('os').name", "not one that"),
])  # fmt: skip
def test_another_configuration_is_refused(handed, tmp_path, old, new, words):
    with pytest.raises(WmError, match=words):
        verify(edited(handed[0], tmp_path / "edited", text=lambda t: t.replace(old, new)))


@pytest.mark.parametrize("overrides, words", [
    (["encoder.padded_slots=false"], "padded slots"), (["encoder.voxel=[0.2,0.2,4.0]"], "on top of each other"),
    (["encoder.max_pillars=0"], "max_pillars"), (["encoder.build=a:b"], "your own"),
])  # fmt: skip
def test_what_their_modules_cannot_be_is_refused(overrides, words):
    with pytest.raises(UsageError, match=words):
        refuse(load_config("mmdet3d_centerpoint", overrides).encoder)


def test_a_dynamic_run_is_refused(run, parts, tmp_path):
    with pytest.raises(UsageError, match="padded slots"):
        export(run, "mmdet3d", tmp_path / "export", parts)
    assert not (tmp_path / "export").exists()


def test_autowares_columns_and_widths():
    """x, y, z and time, two layers, stride 1 first: the lift of stride 1 is their Conv2d, wherever it stands."""
    encoder = load_config("mmdet3d_centerpoint", [
        "encoder.features=[x,y,z,dt]", "encoder.low=[-121.6,-121.6,-3]", "encoder.high=[121.6,121.6,5]", "encoder.voxel=[0.32,0.32,8]",
        "encoder.pfn_widths=[32,32]", "encoder.max_points_per_pillar=32", "encoder.max_pillars=64000", "encoder.strides=[1,2,2]",
        "encoder.upsample_strides=[1,2,4]"]).encoder  # fmt: skip
    base = BASES["centerpoint"]
    changes = _changes(model_of(encoder, base), base.model)
    assert changes["pts_voxel_encoder"]["in_channels"] == 4 and changes["pts_middle_encoder"]["output_shape"] == [760, 760]
    assert changes["train_cfg"]["pts"]["out_size_factor"] == changes["test_cfg"]["pts"]["out_size_factor"] == 1
    weights = PillarEncoder(encoder).state_dict()
    out = renamed(weights, encoder, base)
    assert torch.equal(out["pts_neck.deblocks.0.0.weight"], weights["backbone_2d.deblocks.0.0.weight"].transpose(0, 1))
    own = Detector(merged(base.model, changes), "pts_").state_dict()
    assert {k: v.shape for k, v in out.items()} == {k: v.shape for k, v in own.items()}


def test_the_guide_names_the_command(handed):
    text = importlib.import_module("worldmodel.export.mmdet3d").snippet(handed[0])
    assert "python tools/train.py configs/centerpoint/wm_mmdet3d.py" in text and "--cfg-options load_from=" in text and "0..255" in text
