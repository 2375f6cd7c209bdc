"""Encoders from outside the package: pretrained by name, and handed back as they came. One of them is made of OpenPCDet's own modules."""

import dataclasses
import sys

import pytest
import torch
from safetensors.torch import load_file

from sensors.errors import WmError
from sensors.files import check_folder, commit_folder
from tests.worldmodel.conftest import tiny, train
from worldmodel.checkpoint import load as load_checkpoint
from worldmodel.export.verify import export, verify
from worldmodel.handover.against import against
from worldmodel.handover.openpcdet_modules import Detector, load_params
from worldmodel.tools.cli import main

ADAPTER = '''
"""What somebody who trains OpenPCDet writes: their detector's modules, and clouds in the form these take."""

from worldmodel.handover.openpcdet_modules import Detector, Settings, collated


class Theirs(Detector):
    def __init__(self, settings, cell_m):
        super().__init__(settings)
        self.channels, self.cell_m = sum(settings.upsample_widths), cell_m

    def forward(self, clouds):
        return super().forward(collated(clouds.points.split(clouds.sizes), self.settings))


def build(config):
    names = tuple({"dt": "timestamp"}.get(name, name) for name in config.features)
    return Theirs(Settings(
        base="", detector="PointPillar", vfe=VFE, filters=(16,), low=config.low, high=config.high, voxel=config.voxel, columns=names, used=names,
        max_points=8, max_voxels=4000, layers=(1, 1), strides=(2, 2), widths=(16, 16), upsample_strides=(1, 2), upsample_widths=(8, 8),
    ), 2 * config.voxel[0])
'''


@pytest.fixture(scope="module", params=["PillarVFE", "DynPillarVFE"])
def pretrained(request, parts, tmp_path_factory):
    """A run of three steps over a mirror of OpenPCDet's modules, and its export."""
    root = tmp_path_factory.mktemp("foreign")
    (root / f"their_{request.param}.py").write_text(ADAPTER.replace("VFE,", f'"{request.param}",', 1))
    sys.path.insert(0, str(root))
    try:
        config = tiny("train.steps=3")
        config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, build=f"their_{request.param}:build"))
        run = train(parts[:2], root / "run", config)
        report = export(run, "torch", root / "export", [])
        yield run, root / "export", report, config
    finally:
        sys.path.remove(str(root))


def test_the_state_dict_comes_back_unchanged(pretrained):
    run, folder, report, _ = pretrained
    stored = {k.removeprefix("encoder."): v for k, v in load_checkpoint(run).weights.items() if k.startswith("encoder.")}
    back = load_file(folder / "model.safetensors")
    assert stored.keys() == back.keys() and all(torch.equal(v, back[k]) for k, v in stored.items())
    assert {"vfe.pfn_layers.0.linear.weight", "backbone_2d.blocks.0.1.weight", "global_step"} <= back.keys()
    assert report["passed"] and report["loaded"] == report["tensors"] == len(back) and report["difference"] <= 1e-5


def test_it_has_learned(pretrained):
    from worldmodel.encoders.contract import build_encoder

    _, folder, _, config = pretrained
    torch.manual_seed(config.seed)
    fresh, back = build_encoder(config.encoder).state_dict(), load_file(folder / "model.safetensors")
    assert all(not torch.equal(fresh[k], back[k]) for k in back if k.endswith("running_mean"))


def test_the_detector_it_came_from_takes_all_of_it(pretrained):
    import importlib

    _, folder, _, config = pretrained
    theirs = importlib.import_module(config.encoder.build.partition(":")[0]).build(config.encoder)
    detector = Detector(theirs.settings)
    loaded = load_params(detector, load_file(folder / "model.safetensors"))
    assert loaded.log == (f"==> Done (loaded {len(detector.state_dict())}/{len(detector.state_dict())})",)


def test_verify_runs_their_code_only_where_they_name_it(pretrained, monkeypatch, capsys):
    _, folder, _, config = pretrained
    build = config.encoder.build
    monkeypatch.delitem(sys.modules, build.partition(":")[0])
    assert main(["verify", str(folder)]) == 0
    assert build.partition(":")[0] not in sys.modules and f"--against {build}" in capsys.readouterr().out
    report = against(folder, build)
    assert report["passed"] and report["loaded"] == report["tensors"] and not report["traps"]
    assert main(["verify", str(folder), "--against", build]) == 0


def test_code_that_computes_something_else_is_a_trap(pretrained):
    import importlib

    _, folder, _, config = pretrained
    module = importlib.import_module(config.encoder.build.partition(":")[0])
    module.other = lambda c: (lambda m: (setattr(m.backbone_2d.blocks[0][2], "eps", 0.5), m)[1])(module.build(c))
    report = against(folder, config.encoder.build.replace(":build", ":other"))
    assert not report["passed"] and report["loaded"] == report["tensors"] and "differs by up to" in report["traps"][0]


def test_a_changed_tensor_is_named(pretrained, tmp_path):
    from safetensors.torch import save

    _, folder, _, _ = pretrained
    manifest = check_folder(folder)
    files = {row["path"]: (folder / row["path"]).read_bytes() for row in manifest["files"]}
    weights = load_file(folder / "model.safetensors")
    weights["backbone_2d.blocks.0.2.bias"] += 1
    weights["new"] = weights.pop("global_step")
    commit_folder(
        tmp_path / "other", files | {"model.safetensors": save(weights)}, {k: v for k, v in manifest.items() if k not in ("files", "digest")}
    )
    report = verify(tmp_path / "other")
    assert not report["passed"] and report["missing"] == ["global_step"] and report["unexpected"] == ["new"]
    assert report["reasons"] == ["backbone_2d.blocks.0.2.bias holds other values than were exported"]


ODD = """
import torch
from torch import nn


class Net(nn.Module):
    channels, cell_m = 4, 1.6

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Parameter(torch.ones(4))

    def forward(self, clouds):
        return self.first[:, None, None] * torch.ones(len(clouds.sizes), 4, 32, 32)


def tied(config):
    return Net()


def raises(config):
    raise KeyError("mine")


def attribute(config):
    net = Net()
    net.forward = lambda clouds: clouds.nothing
    return net


def listed(config):
    net = Net()
    net.forward = lambda clouds: [1]
    return net


def double(config):
    net = Net()
    net.forward = lambda clouds: torch.ones(2, 4, 32, 32, dtype=torch.float64)
    return net


def flat(config):
    net = Net()
    net.cell_m = 0
    return net


def halves(config):
    net = Net()
    net.channels = 4.0
    return net


def extra(config):
    class Other(Net):
        def get_extra_state(self):
            return {"a": 1}

    return Other()
"""


@pytest.mark.parametrize(
    ("build", "says"),
    [("raises", "KeyError"), ("attribute", "AttributeError"), ("listed", "gave list"), ("double", "float64"), ("flat", "cell_m 0"),
     ("halves", "channels 4.0"), ("extra", "_extra_state")],
)  # fmt: skip
def test_a_mistake_in_an_encoder_is_one_line_and_leaves_the_folder_free(store, tmp_path, monkeypatch, capsys, build, says):
    (tmp_path / "odd.py").write_text(ODD)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("odd", None)
    command = ["pretrain", "--config", "tiny", "--data", str(store), "-o", str(tmp_path / "run"), "--encoder", f"odd:{build}"]
    for _ in range(2):  # the second time as at first: nothing is in the way
        assert main(command) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_parameters_that_are_shared_are_stored(parts, tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text(ODD)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("odd", None)
    run = train(parts[:2], tmp_path / "run", tiny("train.steps=1", "encoder.build=odd:tied"))
    weights = load_checkpoint(run, "latest").weights
    assert torch.equal(weights["encoder.first"], weights["encoder.second"])


FORGETFUL = """
import torch
from torch import nn


class Net(nn.Module):
    made = 0

    def __init__(self, config):
        super().__init__()
        Net.made += 1
        self.bias, self.channels, self.cell_m = float(Net.made), 4, 1.6
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, clouds):
        return self.scale * torch.full((len(clouds.sizes), 4, 32, 32), self.bias)


def build(config):
    return Net(config)
"""


def test_an_encoder_that_keeps_things_outside_of_its_state_is_refused(untrained, tmp_path, monkeypatch):
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = untrained(tmp_path / "run", "encoder.build=forgetful:build")
    with pytest.raises(WmError, match="not all in its state_dict"):
        export(run, "torch", tmp_path / "export", [])
