"""Where OpenPCDet or mmdetection3d can be imported, `verify` runs the export through their classes too. Neither can be installed here: stand-ins,
packages laid out as theirs are and made of our mirrors' modules, go the same way, and say nothing about the real ones."""

import sys

import pytest
import torch

from tests.worldmodel.test_openpcdet import VARIANTS, changed, run_of, tiny
from worldmodel.export import openpcdet
from worldmodel.export.verify import export, verify
from worldmodel.tools.cli import main

PCDET = {
    "pcdet/__init__.py": "__version__ = 'stand-in'",
    "pcdet/config.py": """
class EasyDict(dict):
    def __init__(self, tree):
        super().__init__({key: EasyDict(value) if isinstance(value, dict) else value for key, value in tree.items()})
        self.__dict__ = self
""",
    "pcdet/models/__init__.py": "",
    "pcdet/models/detectors/__init__.py": "",
    "pcdet/models/detectors/detector3d_template.py": """
import dataclasses
import torch
from worldmodel.handover.openpcdet_modules import BaseBEVBackbone, DynPillarVFE, PillarVFE, PointPillarScatter, Settings, load_params

class Detector3DTemplate(torch.nn.Module):
    def __init__(self, model_cfg, num_class, dataset):
        super().__init__()
        self.model_cfg, self.dataset = model_cfg, dataset
        self.register_buffer("global_step", torch.zeros(1, dtype=torch.long))

    def build_networks(self):
        vfe, flat, data = self.model_cfg.VFE, self.model_cfg.BACKBONE_2D, self.dataset
        used = tuple("xyzit")[: data.point_feature_encoder.num_point_features]
        box = [float(v) for v in data.point_cloud_range]
        settings = Settings(
            "", "", vfe.NAME, tuple(vfe.NUM_FILTERS), tuple(box[:3]), tuple(box[3:]), tuple(data.voxel_size), used, used, 0, 0,
            tuple(flat.LAYER_NUMS), tuple(flat.LAYER_STRIDES), tuple(flat.NUM_FILTERS), tuple(flat.UPSAMPLE_STRIDES),
            tuple(flat.NUM_UPSAMPLE_FILTERS))
        assert settings.grid == tuple(data.grid_size) and __import__("numpy").int is int
        self.vfe = {"PillarVFE": PillarVFE, "DynPillarVFE": DynPillarVFE}[vfe.NAME](settings)
        self.map_to_bev_module, self.backbone_2d = PointPillarScatter(settings), BaseBEVBackbone(settings)
        return [self.vfe, self.map_to_bev_module, self.backbone_2d]

    def load_params_from_file(self, filename, logger, to_cpu=False):
        logger.info(load_params(self, torch.load(filename, weights_only=True)["model_state"]).log[-1])
""",
}
MMDET3D = {
    "mmdet3d/__init__.py": "__version__ = 'stand-in'",
    "mmdet3d/models.py": "",
    "mmdet3d/registry.py": """
from worldmodel.handover import mmdet3d_modules

class MODELS:
    @staticmethod
    def build(cfg):
        module = getattr(mmdet3d_modules, cfg.pop("type"))(**cfg)
        if isinstance(module, mmdet3d_modules.SECONDFPN):
            whole = module.forward
            module.forward = lambda maps: [whole(maps)]
        return module
""",
    "mmengine/__init__.py": "",
    "mmengine/runner.py": """
import torch
from worldmodel.handover.mmdet3d_modules import load_checkpoint as load

def load_checkpoint(model, filename, map_location, strict, logger):
    load(model, torch.load(filename, map_location=map_location, weights_only=True))
""",
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Lays out packages and takes them, and what was imported of them, away again."""
    monkeypatch.syspath_prepend(tmp_path / "site")

    def lay(files, *edits):
        for name, text in files.items():
            path = tmp_path / "site" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            for old, new in edits:
                text = text.replace(old, new)
            path.write_text(text)

    yield lay
    for name in [name for name in sys.modules if name.split(".")[0] in ("pcdet", "mmdet3d", "mmengine")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def handed(tmp_path_factory):
    """Exports for OpenPCDet with hard and dynamic voxels, and for mmdetection3d."""
    root = tmp_path_factory.mktemp("real")
    for name, target in (("hard", "openpcdet"), ("dynamic", "openpcdet"), ("hard", "mmdet3d")):
        export(run_of(tiny(*VARIANTS[name]), root / f"run {name} {target}"), target, root / f"{name} {target}", [])
    return root


def test_an_export_runs_through_pcdet(handed, packages, capsys):
    packages(PCDET)
    report = verify(handed / "hard openpcdet")
    assert report["passed"] and report["notes"] == [] and report["difference"] <= 1e-5
    assert report["real"] == {"package": "pcdet", "version": "stand-in", "loaded": 60, "tensors": 60, "difference": report["difference"]}
    assert main(["verify", str(handed / "hard openpcdet")]) == 0
    assert "real pcdet stand-in: 60 of 60 tensors, largest difference " in capsys.readouterr().out


@pytest.mark.parametrize("edit, line", [
    (("return [self.vfe", "[setattr(m, 'eps', 1e-5) for m in self.modules() if hasattr(m, 'eps')]; return [self.vfe"), "the maps differ by"),
    (("return [self.vfe", "self.backbone_2d.deblocks[1] = torch.nn.Sequential(self.backbone_2d.deblocks[1]); return [self.vfe"),
     "6 of 60 tensors did not arrive, the first is backbone_2d.deblocks.1.0.0.weight"),
    (('["model_state"]', '["model_state"] and {}'), "60 of 60 tensors did not arrive, the first is vfe.pfn_layers.0.linear.weight"),
    (("def build_networks(self):", "def build_networks(self):\n        raise KeyError('GRID')"), "KeyError('GRID')"),
    (("PointPillarScatter(settings), BaseBEVBackbone(settings)", "PointPillarScatter(settings), torch.nn.Sequential()"), "KeyError"),
])  # fmt: skip
def test_what_pcdet_would_do_otherwise_fails_the_export(handed, packages, edit, line):
    packages(PCDET, edit)
    report = verify(handed / "hard openpcdet")
    assert not report["passed"] and report["loaded"] == report["tensors"] and report["difference"] <= 1e-5
    assert report["reasons"] and all(row.startswith("real pcdet stand-in, wm_") and line in row for row in report["reasons"]), report["reasons"]


def test_a_wrong_weight_shows_in_pcdet_too(handed, packages, tmp_path):
    def turned(weights):
        name = "backbone_2d.blocks.1.4.weight"
        return weights | {name: weights[name].transpose(0, 1).contiguous()}

    packages(PCDET)
    report = verify(changed(handed / "hard openpcdet", tmp_path / "changed", weights=turned))
    assert not report["passed"] and report["real"]["loaded"] == report["real"]["tensors"]
    assert any(row.startswith("real pcdet") and "the maps differ" in row for row in report["reasons"])
    report = verify(changed(handed / "hard openpcdet", tmp_path / "less", weights=lambda w: {k: v for k, v in w.items() if k != openpcdet.FIRST}))
    assert report["real"]["loaded"] == 59 and any("1 of 60 tensors did not arrive" in row for row in report["reasons"])


def test_dynamic_voxels_of_pcdet_need_a_gpu(handed, packages, monkeypatch):
    packages(PCDET)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = verify(handed / "dynamic openpcdet")
    assert report["passed"] and report["real"] is None and "DynPillarVFE of pcdet stand-in needs a GPU" in report["notes"][0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # the stand-in needs none
    assert verify(handed / "dynamic openpcdet")["real"]["loaded"] == 60


def test_an_export_runs_through_mmdet3d(handed, packages):
    packages(MMDET3D)
    report = verify(handed / "hard mmdet3d")
    assert report["passed"] and report["real"]["package"] == "mmdet3d" and report["real"]["loaded"] == report["real"]["tensors"] == 60
    assert report["real"]["difference"] == report["difference"]


@pytest.mark.parametrize("old, new, line", [
    ("return module", "[setattr(m, 'eps', 1e-2) for m in module.modules() if hasattr(m, 'eps')]; return module", "the maps differ by"),
    ("load(model, ", "load(model.neck if hasattr(model, 'neck') else model.pts_neck, ", "did not arrive"),
])  # fmt: skip
def test_what_mmdet3d_would_do_otherwise_fails_the_export(handed, packages, old, new, line):
    packages(MMDET3D, (old, new))
    report = verify(handed / "hard mmdet3d")
    assert not report["passed"] and report["difference"] <= 1e-5 and all(line in row for row in report["reasons"])


LACKING = [("hard openpcdet", "pcdet"), ("hard mmdet3d", "mmdet3d")]


@pytest.mark.parametrize("name, package", LACKING)
def test_a_framework_that_is_not_there_is_a_note(handed, monkeypatch, capsys, name, package):
    monkeypatch.setattr("worldmodel.handover.real.find_spec", lambda name: None)  # whatever this machine has
    assert main(["verify", str(handed / name)]) == 0
    printed = capsys.readouterr().out
    assert f"note: {package} is not installed: compared with our restatement of its modules\n" in printed and "\nreal " not in printed


@pytest.mark.parametrize("name, package", LACKING)
def test_a_framework_that_cannot_be_imported_is_a_note(handed, packages, name, package):
    packages({f"{package}/__init__.py": "__version__ = '1'\nraise ImportError('no iou3d_nms_cuda')"})
    report = verify(handed / name)
    assert report["passed"] and report["real"] is None
    assert report["notes"] == [f"{package} is installed and cannot be imported (ImportError('no iou3d_nms_cuda')): "
                               "compared with our restatement of its modules"]  # fmt: skip
