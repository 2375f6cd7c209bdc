"""What leaves for OpenPCDet: all tensors arrive by its own loading rule, the maps agree, and whatever goes wrong is named."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sensors.errors import UsageError, WmError
from sensors.files import check_folder, commit_folder
from tests.worldmodel.conftest import tiny, train
from worldmodel import checkpoint, rundir
from worldmodel.config import load_config
from worldmodel.encoders.contract import Clouds
from worldmodel.encoders.pillars import PillarEncoder
from worldmodel.export import openpcdet
from worldmodel.export.verify import export, verify
from worldmodel.handover.folding import OFFSETS, Column, as_target, folded
from worldmodel.handover.openpcdet_modules import CENTERPOINT, MULTIHEAD, POINTPILLAR, Detector, collated, load_params, merged, settings_of
from worldmodel.model import WorldModel
from worldmodel.tools.cli import main

HARD = ("encoder.padded_slots=true", "encoder.max_points_per_pillar=6", "encoder.max_pillars=900")
TWO = ("encoder.pfn_widths=[16, 16]",)
NUSCENES = ("encoder.input_yaw_deg=90", "encoder.upsample_strides=[0.5, 1, 2]")
KITTI = ("encoder.features=[x, y, z, intensity]", "model.join_sweeps=false")
VARIANTS = {
    "hard": (*HARD, *NUSCENES), "hard two": (*HARD, *TWO, *NUSCENES), "dynamic": NUSCENES, "dynamic two": (*TWO, *NUSCENES),
    "kitti": (*HARD, *KITTI), "order": (*HARD, *NUSCENES, "encoder.features=[x, y, z, dt, intensity]"), "custom": (),
}  # fmt: skip
NORM = "backbone_2d.blocks.1"


def scrambled(module):
    """Statistics and weights as training leaves them: no norm is like another."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.3, generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
            part.weight.data.uniform_(0.5, 1.5, generator=generator)
            part.bias.data.normal_(0, 0.3, generator=generator)
    return module.eval()


def run_of(config, folder):
    """A run folder whose model nobody trained."""
    torch.manual_seed(0)
    rundir.create(folder, config, [])
    model = WorldModel(config)
    scrambled(model.encoder)
    checkpoint.save(folder, 1, model, None, {"best": True, "calibration": None})
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Variant -> (export folder, report, encoder), each made once."""
    made = {}

    def get(name):
        if name not in made:
            config = tiny(*VARIANTS[name])
            root = tmp_path_factory.mktemp("openpcdet")
            report = export(run_of(config, root / "run"), "openpcdet", root / "out", [])
            encoder = PillarEncoder(config.encoder).eval()
            encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in checkpoint.load(root / "run").weights.items() if k[:8] == "encoder."})
            made[name] = root / "out", report, encoder
        return made[name]

    return get


def changed(folder, to, *, weights=None, files=None, about=None):
    """A copy of an export with other weights, files or manifest, and digests that agree."""
    manifest = check_folder(folder)
    contents = {e["path"]: (folder / e["path"]).read_bytes() for e in manifest["files"]}
    if weights:
        stored = torch.load(folder / openpcdet.CHECKPOINT, weights_only=True)
        stored["model_state"] = weights({k: v.clone() for k, v in stored["model_state"].items()})
        out = io.BytesIO()
        torch.save(stored, out)
        contents[openpcdet.CHECKPOINT] = out.getvalue()
    for name, change in (files or {}).items():
        contents[name] = change(contents[name])
    manifest = {k: v for k, v in manifest.items() if k not in ("files", "digest")}
    commit_folder(to, contents, (about or (lambda m: m))(manifest))
    return to


@pytest.mark.parametrize("name", VARIANTS)
def test_everything_arrives(exports, name):
    folder, report, encoder = exports(name)
    assert report["passed"], report
    assert report["loaded"] == report["tensors"] == report["expected"] == len(encoder.state_dict()) and report["difference"] <= 1e-5
    stored = torch.load(folder / openpcdet.CHECKPOINT, weights_only=True)
    assert set(stored) == {"model_state", "version", "epoch", "it"} and type(stored["version"]) is str and type(stored["epoch"]) is int
    assert set(stored["model_state"]) == set(encoder.state_dict())
    for key, value in stored["model_state"].items():
        assert value.dtype == (torch.int64 if key.endswith("num_batches_tracked") else torch.float32) and value.is_contiguous()
        assert value.untyped_storage().nbytes() == value.numel() * value.itemsize
    assert main(["verify", str(folder)]) == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_other_clouds_than_the_stored_one_agree(exports, name):
    """Two clouds in a batch, points outside in x and y among them, in the units of the target."""
    folder, _, encoder = exports(name)
    path = folder / sorted(json.loads((folder / "manifest.json").read_text())["models"])[0]
    detector = Detector(settings_of(yaml.safe_load(path.read_text()), path.name)).eval()
    load_params(detector, torch.load(folder / openpcdet.CHECKPOINT, weights_only=True)["model_state"])
    rng = np.random.default_rng(3)
    config = encoder.config
    clouds = [torch.from_numpy(np.concatenate((rng.uniform((-30, -30, -2.9), (30, 30, 2.9), (n, 3)), rng.random((n, len(config.features) - 3))), 1))
              .float() for n in (3000, 40)]  # fmt: skip
    theirs = [as_target(cloud, config.features, openpcdet.columns(config, None)) for cloud in clouds]
    with torch.no_grad():
        ours = encoder(Clouds(torch.cat(clouds), (3000, 40)))
        got = detector(collated(theirs, detector.settings))
    assert got.shape == ours.shape and ours.abs().max() > 0.1 and (got - ours).abs().max() <= 1e-5


@pytest.mark.parametrize("name, overrides, base, count, total", [
    ("openpcdet_kitti", (), POINTPILLAR, 120, 127), ("openpcdet_kitti", ("encoder.pfn_widths=[64, 64]",), POINTPILLAR, 126, 133),
    ("openpcdet_nuscenes", (), MULTIHEAD, 120, 421), ("openpcdet_nuscenes", (), CENTERPOINT, 120, 452),
    ("openpcdet_nuscenes", ("encoder.pfn_widths=[64, 64]", "encoder.padded_slots=false"), CENTERPOINT, 126, 458),
])  # fmt: skip
def test_counts_at_true_width(name, overrides, base, count, total):
    """Counted from OpenPCDet's modules: 6 tensors a PFN layer, 114 of the backbone, `global_step`, and the heads."""
    config = load_config(name, overrides)
    assert base in openpcdet.bases(config.encoder, None)
    columns = openpcdet.columns(config.encoder, None)
    found = settings_of(openpcdet.model_yaml(base, config.encoder, config.model, columns, None), base)
    state = PillarEncoder(config.encoder).state_dict()
    loaded = load_params(Detector(found), state)
    assert len(loaded.updated) == len(state) == count and loaded.log[-1] == f"==> Done (loaded {count}/{total})"
    assert not loaded.unknown and not loaded.mismatched
    assert all(key == "global_step" or key.startswith("dense_head.") for key in loaded.left)
    assert all(line.startswith("Not updated weight ") for line in loaded.log[:-1])
    stock = next((s.name for s in openpcdet.STOCKS if s.fits(config.encoder, len(columns))), None)
    if not overrides:
        assert stock == (POINTPILLAR if base == POINTPILLAR else MULTIHEAD)
    else:
        assert stock == (None if base == POINTPILLAR else CENTERPOINT)


def test_known_shapes_at_true_width():
    state = PillarEncoder(load_config("openpcdet_nuscenes").encoder).state_dict()
    assert state["vfe.pfn_layers.0.linear.weight"].shape == (64, 11)
    assert state["backbone_2d.deblocks.0.0.weight"].shape == (128, 64, 2, 2) and state["backbone_2d.deblocks.1.0.weight"].shape == (128, 128, 1, 1)
    assert state["backbone_2d.deblocks.2.0.weight"].shape == (256, 128, 2, 2)
    assert sum(v.numel() for k, v in state.items() if k.startswith("backbone_2d.") and v.ndim and "running" not in k) == 4_388_608


scales = st.floats(1e-3, 1e3)


@settings(max_examples=60, deadline=None)
@given(st.permutations(["intensity", "dt"]), st.permutations(["intensity", "dt", "elongation"]), scales, scales, st.integers(0, 2**32 - 1))
def test_folding_is_exact(ours, theirs, intensity, dt, seed):
    rng = np.random.default_rng(seed)
    features = ("x", "y", "z", *ours)
    columns = tuple(Column(n, {"intensity": intensity, "dt": dt}.get(n, 1.0)) for n in ("x", "y", "z", *theirs))
    weight = torch.from_numpy(rng.normal(0, 1, (16, len(features) + OFFSETS))).float()
    points = torch.from_numpy(rng.normal(0, 1, (200, len(features)))).float()
    offsets = torch.from_numpy(rng.normal(0, 1, (200, OFFSETS))).float()
    want = torch.cat((points, offsets), 1).double() @ weight.double().T
    got = torch.cat((as_target(points, features, columns), offsets), 1).double() @ folded(weight, features, columns).double().T
    size = torch.cat((points, offsets), 1).abs().double() @ weight.abs().double().T
    assert ((got - want).abs() <= 1e-6 * size).all()


def test_folding_refuses_what_it_cannot_undo():
    xyz = (Column("x"), Column("y"), Column("z"))
    weight = torch.ones(4, 5 + OFFSETS)
    with pytest.raises(UsageError, match=r"reads dt, which the target's points .* lack; train without it: --set encoder.features=\[x, y, z, intens"):
        folded(weight, ("x", "y", "z", "intensity", "dt"), (*xyz, Column("intensity")))
    with pytest.raises(UsageError, match=r"tanh\(intensity\), a curve that no weight can undo"):
        folded(weight, ("x", "y", "z", "intensity", "dt"), (*xyz, Column("intensity", curve="tanh"), Column("dt")))
    for columns in ((Column("x", 2.0), *xyz[1:]), (xyz[1], xyz[0], xyz[2])):
        with pytest.raises(UsageError, match="offsets from the pillar"):
            folded(weight[:, 2:], ("x", "y", "z"), columns)
    for scale in (0.0, math.nan, math.inf, -1.0):
        with pytest.raises(UsageError, match="scale"):
            folded(weight, ("x", "y", "z", "intensity", "dt"), (*xyz, Column("intensity", scale), Column("dt")))
    with pytest.raises(UsageError, match="name one twice"):
        folded(weight[:, 2:], ("x", "y", "z"), (*xyz, Column("dt"), Column("dt")))


def swapped_norms(w):
    for field in ("weight", "bias", "running_mean", "running_var"):
        w[f"{NORM}.2.{field}"], w[f"{NORM}.5.{field}"] = w[f"{NORM}.5.{field}"], w[f"{NORM}.2.{field}"]
    return w


def swapped_columns(w):
    w[openpcdet.FIRST] = w[openpcdet.FIRST][:, [0, 1, 2, 4, 3, *range(5, 11)]].contiguous()
    return w


def scaled_intensity(factor):
    def change(w):
        w[openpcdet.FIRST][:, 3] *= factor
        return w

    return change


@pytest.mark.parametrize("name, change, kind, line", [
    ("renamed", lambda w: {("module." + k if k == openpcdet.FIRST else k): v for k, v in w.items()}, "missing", openpcdet.FIRST),
    ("renamed", lambda w: {("module." + k if k == openpcdet.FIRST else k): v for k, v in w.items()}, "unexpected", "module." + openpcdet.FIRST),
    ("missing", lambda w: {k: v for k, v in w.items() if k != f"{NORM}.1.weight"}, "missing", f"{NORM}.1.weight"),
    ("narrow", lambda w: w | {f"{NORM}.1.weight": w[f"{NORM}.1.weight"][:-1].clone()}, "mismatched", f"{NORM}.1.weight"),
    ("transposed", lambda w: w | {f"{NORM}.4.weight": w[f"{NORM}.4.weight"].transpose(0, 1).contiguous()}, "reasons", f"part at {NORM}.5"),
    ("swapped norms", swapped_norms, "reasons", f"part at {NORM}.2"),
    ("feature order", swapped_columns, "reasons", "the columns come as x, y, z, timestamp, intensity"),
    ("not folded", scaled_intensity(255), "reasons", "intensity is multiplied by 1/255"),
    ("folded twice", scaled_intensity(1 / 255), "reasons", "intensity is multiplied by 255"),
])  # fmt: skip
def test_wrong_weights_are_named(exports, tmp_path, name, change, kind, line):
    report = verify(changed(exports("hard")[0], tmp_path / "changed", weights=change))
    assert not report["passed"] and any(line in row for row in report[kind]), report
    if kind == "reasons":
        assert report["difference"] > 1e-5 and report["loaded"] == report["tensors"]
    assert main(["verify", str(tmp_path / "changed")]) == 1


def as_dynamic(text):
    tree = yaml.safe_load(text)
    tree["MODEL"]["VFE"]["NAME"] = "DynPillarVFE"
    tree["DATA_CONFIG"]["DATA_PROCESSOR"][2] = {"NAME": "transform_points_to_voxels_placeholder", "VOXEL_SIZE": [0.8, 0.8, 6.0]}
    return yaml.safe_dump(tree).encode()


def with_order(text):
    return text.replace(b"used_feature_list: [x, y, z, intensity, timestamp]", b"used_feature_list: [x, y, z, timestamp, intensity]")


def with_width(text):
    return text.replace(b"NUM_FILTERS: [16, 16, 16]", b"NUM_FILTERS: [16, 32, 16]")


@pytest.mark.parametrize("name, change, kind, line", [
    ("hard two", as_dynamic, "reasons", "DynPillarVFE under weights trained as PillarVFE, whose empty slots compete in the maximum"),
    ("hard two", with_order, "reasons", "used_feature_list x, y, z, timestamp, intensity, the first layer reads x, y, z, intensity, timestamp"),
    ("hard two", with_width, "mismatched", "backbone_2d.blocks.1.1.weight"),
    ("hard two", lambda t: t.replace(b"[-25.6, -25.6, -3.0, 25.6, 25.6, 3.0]", b"[-25.6, -24.8, -3.0, 25.6, 26.4, 3.0]"), "reasons",
     "low (-25.6, -24.8, -3.0), in training [-25.6, -25.6, -3.0]"),
    ("hard two", lambda t: t.replace(b"MAX_POINTS_PER_VOXEL: 6", b"MAX_POINTS_PER_VOXEL: 9"), "reasons", "max_points_per_pillar 9, in training 6"),
])  # fmt: skip
def test_a_wrong_yaml_is_named(exports, tmp_path, name, change, kind, line):
    report = verify(changed(exports(name)[0], tmp_path / "changed", files={openpcdet.FILES[CENTERPOINT]: change}))
    assert not report["passed"] and report["difference"] > 1e-5 and any(line in row for row in report[kind]), report


@pytest.mark.parametrize("change, line", [
    (lambda t: b"a: [", "not readable as YAML"), (lambda t: b"!!python/object/apply:os.getcwd []", "not readable as YAML"),
    (lambda t: t.replace(b"NUM_FILTERS: [16]", b"NUM_FILTERS: [99999999]"), "NUM_FILTERS"),
    (lambda t: t.replace(b"VOXEL_SIZE: [0.8, 0.8, 6.0]", b"VOXEL_SIZE: [0.001, 0.001, 6.0]"), "cells"),
    (lambda t: t.replace(b"NAME: PillarVFE", b"NAME: DynPillarVFE"), "DynPillarVFE beside transform_points_to_voxels"),
    (lambda t: t.replace(b"NAME: PillarVFE", b"NAME: MeanVFE"), "neither PillarVFE nor DynPillarVFE"),
    (lambda t: t.replace(b"USE_ABSLOTE_XYZ: true", b"USE_ABSLOTE_XYZ: false"), "USE_ABSLOTE_XYZ"),
    (lambda t: t.replace(b"DATA_PROCESSOR:", b"OTHER:"), "DATA_CONFIG.DATA_PROCESSOR"),
])  # fmt: skip
def test_a_yaml_that_builds_nothing_is_refused(exports, tmp_path, change, line):
    with pytest.raises(WmError, match=line) as caught:
        verify(changed(exports("hard")[0], tmp_path / "changed", files={openpcdet.FILES[MULTIHEAD]: change}))
    assert openpcdet.FILES[MULTIHEAD] in str(caught.value)


@pytest.mark.parametrize("spoil, line", [(lambda d: d[:-5] + bytes([d[-5] ^ 4]) + d[-4:], "content changed"), (lambda d: d[: len(d) // 2], "bytes"),
                                         (lambda d: b"", "bytes")])  # fmt: skip
@pytest.mark.parametrize("file", [openpcdet.CHECKPOINT, openpcdet.SAMPLE, openpcdet.FILES[CENTERPOINT]])
def test_a_damaged_file_is_refused(exports, tmp_path, spoil, line, file):
    import shutil

    shutil.copytree(exports("dynamic")[0], tmp_path / "copy")
    path = tmp_path / "copy" / file
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(WmError, match=f"{file}: .*{line}"):
        verify(tmp_path / "copy")
    assert main(["verify", str(tmp_path / "copy")]) == 1


@pytest.mark.parametrize("spoil", [lambda d: d[: len(d) // 2], lambda d: d[:40] + bytes([d[40] ^ 255]) + d[41:], lambda d: b""])
@pytest.mark.parametrize("file", [openpcdet.CHECKPOINT, openpcdet.SAMPLE])
def test_a_damaged_file_with_a_fitting_digest_is_refused_too(exports, tmp_path, spoil, file):
    with pytest.raises(WmError, match=file):
        verify(changed(exports("dynamic")[0], tmp_path / "changed", files={file: spoil}))


def test_what_openpcdet_has_no_modules_for_is_refused(tmp_path):
    encoder = tiny(*VARIANTS["hard"]).encoder
    for change, line in [({"build": "my_pkg:build"}, "my_pkg:build, your own: `wm export --to torch`"), ({"bn_eps": 1e-5}, "bn_eps is 1e-05"),
                         ({"voxel": (0.8, 0.8, 2.0)}, "3 cells on top of each other"),
                         ({"upsample_strides": (4.0, 8.0, 16.0)}, "the map's cell is 0.5 pillars")]:  # fmt: skip
        with pytest.raises(UsageError, match=line):
            openpcdet.refuse(dataclasses.replace(encoder, **change))
    waymo = dataclasses.replace(encoder, input_yaw_deg=0.0, low=(-74.88, -74.88, -2.0), high=(74.88, 74.88, 4.0), voxel=(0.32, 0.32, 6.0))
    assert openpcdet.dataset_of(waymo) == openpcdet.WAYMO
    for features, line in ((("x", "y", "z", "intensity"), "tanh"), (("x", "y", "z", "dt"), "reads dt, which the target's points")):
        with pytest.raises(UsageError, match=line):
            folded(torch.ones(4, len(features) + OFFSETS), features, openpcdet.columns(waymo, None))
    assert folded(torch.ones(4, 3 + OFFSETS), ("x", "y", "z"), openpcdet.columns(waymo, None)).shape == (4, 11)


def test_the_scale_asked_for_is_folded(exports, tmp_path, capsys):
    folder, _, encoder = exports("hard")
    run, weight = folder.parent / "run", encoder.state_dict()[openpcdet.FIRST]
    for asked, scale in ((None, 255.0), ("1", 1.0), ("100", 100.0)):
        out = tmp_path / f"out{asked}"
        assert main(["export", str(run), "--to", "openpcdet", "-o", str(out), *(["--intensity", asked] if asked else [])]) == 0
        stored = torch.load(out / openpcdet.CHECKPOINT, weights_only=True)["model_state"][openpcdet.FIRST]
        torch.testing.assert_close(stored[:, 3] * scale, weight[:, 3])
        assert json.loads((out / "manifest.json").read_text())["input"]["scales"]["intensity"] == scale
        printed = capsys.readouterr().out
        assert f"0..{scale:g}" in printed and "--extra_tag wm_$(date" in printed and "==> Done (loaded 60/361)" in printed and "np.int" in printed
    assert main(["export", str(run), "--to", "torch", "-o", str(tmp_path / "no"), "--intensity", "255"]) == 2
    assert main(["export", str(run), "--to", "openpcdet", "-o", str(tmp_path / "no"), "--intensity", "0"]) == 2


def test_the_manifest_says_what_the_weights_take(exports):
    manifest = json.loads((exports("order")[0] / "manifest.json").read_text())
    given = manifest["input"]
    assert (
        given["features"] == ["x", "y", "z", "intensity", "dt"]
        and given["intensity"] == "0..255"
        and given["frame"].startswith("LiDAR at t = 0: x right")
    )
    assert given["low"] == [-25.6, -25.6, -3.0] and given["voxel"] == [0.8, 0.8, 6.0] and given["padded_slots"] is True and given["bn_eps"] == 0.001
    assert given["sweep_times_s"] == [0.0, 0.4] and manifest["objectives"]["ray_forecast"] == 1.0 and "torch" in manifest["versions"]
    assert {"licence", "logs", "metrics", "checkpoint", "statistics"} <= set(manifest)


def test_what_was_measured_in_training_goes_along(run, parts, tmp_path):
    report = export(run, "openpcdet", tmp_path / "out", parts)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert report["passed"] and report["licence"] == manifest["licence"]
    assert manifest["metrics"]["step"] in (4, 8) and math.isfinite(manifest["metrics"]["val/ray_forecast"])
    assert len(manifest["logs"]) == 5 and all(row["digest"] for row in manifest["logs"])
    assert set(manifest["statistics"]["channels"]) == set(manifest["input"]["features"])


def test_the_yaml_lies_on_the_stock_one_as_openpcdet_merges():
    """Their merge takes the base's top keys whole and does not follow a base's own `_BASE_CONFIG_`: DATA_CONFIG has to name its own."""
    files = {
        POINTPILLAR: {"CLASS_NAMES": ["Car"], "DATA_CONFIG": {"_BASE_CONFIG_": "never read", "DATA_PROCESSOR": ["theirs"]},
                      "MODEL": {"NAME": "PointPillar", "DENSE_HEAD": {"NAME": "AnchorHeadSingle"}, "POST_PROCESSING": 1},
                      "OPTIMIZATION": {"LR": 0.003}},
        openpcdet.DATASETS[openpcdet.KITTI]: {"DATASET": "KittiDataset", "DATA_PROCESSOR": ["base"], "DATA_AUGMENTOR": {"AUG_CONFIG_LIST": ["base"]}},
    }  # fmt: skip
    config = load_config("openpcdet_kitti")
    columns = openpcdet.columns(config.encoder, None)
    tree = openpcdet.model_yaml(POINTPILLAR, config.encoder, config.model, columns, None)
    read = []
    got = merged({"ROOT_DIR": "."}, tree, lambda path: read.append(path) or files[path])
    assert read == [POINTPILLAR, openpcdet.DATASETS[openpcdet.KITTI]]
    assert got["OPTIMIZATION"] == {"LR": 0.003} and got["MODEL"]["POST_PROCESSING"] == 1 and got["MODEL"]["DENSE_HEAD"]["NAME"] == "AnchorHeadSingle"
    assert got["DATA_CONFIG"]["DATASET"] == "KittiDataset" and got["ROOT_DIR"] == "."
    assert [p["NAME"] for p in got["DATA_CONFIG"]["DATA_PROCESSOR"]][2] == "transform_points_to_voxels"
    sampling = got["DATA_CONFIG"]["DATA_AUGMENTOR"]["AUG_CONFIG_LIST"][0]
    assert sampling["SAMPLE_GROUPS"] == ["Car:15", "Pedestrian:15", "Cyclist:15"] and sampling["NUM_POINT_FEATURES"] == 4
    assert settings_of(got, "merged") == settings_of(tree, "ours")


def test_anchors_follow_the_stride_of_the_map():
    config = tiny(*HARD, *KITTI, "encoder.upsample_strides=[0.5, 1, 2]")
    tree = openpcdet.model_yaml(POINTPILLAR, config.encoder, config.model, openpcdet.columns(config.encoder, None), None)
    assert {a["feature_map_stride"] for a in tree["MODEL"]["DENSE_HEAD"]["ANCHOR_GENERATOR_CONFIG"]} == {4}


class Theirs(torch.nn.Module):
    """OpenPCDet's own modules as an encoder of our contract."""

    def __init__(self, config):
        super().__init__()
        model = tiny().model
        columns = openpcdet.columns(config, 1.0)
        self.settings = settings_of(openpcdet.model_yaml(openpcdet.bases(config, 1.0)[0], config, model, columns, 1.0), "theirs")
        detector = Detector(self.settings)
        self.vfe, self.map_to_bev_module, self.backbone_2d = detector.vfe, detector.map_to_bev_module, detector.backbone_2d
        self.channels, self.cell_m = sum(config.upsample_widths), config.voxel[0] * openpcdet.output_stride(config)

    def forward(self, clouds):
        batch = collated(clouds.points.split(clouds.sizes), self.settings)
        return self.backbone_2d(self.map_to_bev_module(self.vfe(batch)))["spatial_features_2d"]


@pytest.mark.parametrize("kind", ["hard", "dynamic two"])
def test_openpcdets_own_modules_can_be_pretrained(parts, tmp_path, kind):
    config = tiny(*VARIANTS[kind], "train.steps=3", f"encoder.build={__name__}:Theirs")
    run = train(parts, tmp_path / "run", config)
    weights = {k.removeprefix("encoder."): v for k, v in checkpoint.load(run).weights.items() if k.startswith("encoder.")}
    module = Theirs(config.encoder)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module.load_state_dict(weights, strict=True)
    assert not torch.equal(before[openpcdet.FIRST], weights[openpcdet.FIRST]) and weights["vfe.pfn_layers.0.norm.num_batches_tracked"] > 0
    assert main(["export", str(run), "--to", "openpcdet", "-o", str(tmp_path / "out")]) == 2
