"""The encoder in a training loop of one's own, out of runs and out of exports that one need not trust."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch

import worldmodel
from sensors.errors import UsageError, WmError
from sensors.files import check_folder, commit_folder
from worldmodel.encoders.contract import Clouds
from worldmodel.export.verify import export
from worldmodel.tools.cli import main


@pytest.fixture(scope="module")
def exported(run, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone") / "torch"
    assert export(run, "torch", folder, parts)["passed"]
    return folder


@pytest.fixture
def clouds():
    torch.manual_seed(0)
    return [torch.rand(3000, 5) * torch.tensor([40, 40, 4, 1, 0.8]) - torch.tensor([20.0, 20, 2, 0, 0]), torch.rand(500, 5) * 20]


def edited(folder, to, files):
    """A copy of an export with other contents and a manifest that agrees with them, as somebody else can make it."""
    manifest = check_folder(folder)
    content = {entry["path"]: (folder / entry["path"]).read_bytes() for entry in manifest["files"]} | files
    commit_folder(to, {k: v for k, v in content.items() if v is not None}, {k: v for k, v in manifest.items() if k not in ("files", "digest")})
    return to


def with_config(folder, to, **changes):
    tree = json.loads((folder / "config.json").read_text()) | changes
    return edited(folder, to, {"config.json": json.dumps(tree).encode()})


def test_run_and_export_give_the_same_encoder_and_it_is_ours(run, exported, clouds):
    ours = worldmodel.load(run).model.encoder
    joined = Clouds(torch.cat(clouds), tuple(map(len, clouds)))
    for folder in (run, exported):
        encoder = worldmodel.load(folder, features_only=True).eval()
        assert isinstance(encoder, torch.nn.Module) and encoder.state_dict().keys() == ours.state_dict().keys()
        with torch.no_grad():
            assert torch.equal(encoder.forward_features(clouds), ours(joined))
            assert torch.equal(encoder.forward_features(joined), ours(joined))


def test_maps_are_what_the_feature_info_says(run, clouds):
    encoder = worldmodel.load(run, features_only=True)
    info, (nx, ny) = encoder.feature_info, encoder.config.grid
    maps = encoder(clouds)
    assert info.channels() == [m.shape[1] for m in maps] == [16, 16, 16] and info.reduction() == [2, 4, 8]
    assert [tuple(m.shape[2:]) for m in maps] == [(ny // r, nx // r) for r in info.reduction()]
    assert encoder.forward_features(clouds).shape[:2] == (2, encoder.num_features) == (2, 24)
    seen = {}
    for name in info.module_name():
        encoder.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    maps = encoder(clouds)
    assert all(torch.equal(seen[name], m) for name, m in zip(info.module_name(), maps, strict=True))
    assert info.channels(1) == 16 and info.reduction([0, 2]) == [2, 8] and len(info) == 3


def test_out_indices_choose_maps_and_stop_early(run, clouds):
    whole = worldmodel.load(run, features_only=True).eval()
    some = worldmodel.load(run, features_only=True, out_indices=(-2, 0)).eval()
    assert some.out_indices == (0, 1) and some.feature_info.reduction() == [2, 4] and len(some.feature_info.get_dicts()) == 2
    some.backbone_2d.blocks[2].register_forward_hook(lambda *_: pytest.fail("a block was run that nobody asked for"))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(some(clouds), whole(clouds)[:2], strict=True))
    for wrong in ((3,), (), ("a",)):
        with pytest.raises(UsageError, match="blocks 0 to 2"):
            worldmodel.load(run, features_only=True, out_indices=wrong)


def test_it_trains_as_a_whole_and_stands_still_when_frozen(exported, clouds):
    encoder = worldmodel.load(exported, features_only=True)
    assert encoder.training and all(p.requires_grad for p in encoder.parameters())
    before = copy.deepcopy(encoder.state_dict())
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
    encoder.forward_features(clouds).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())
    optimizer.step()
    after = encoder.state_dict()
    assert all(not torch.equal(after[k], v) for k, v in before.items() if k.endswith("running_mean") or "blocks.0.1.weight" in k)
    encoder.eval()
    before = copy.deepcopy(encoder.state_dict())
    encoder(clouds)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_loading_draws_no_random_number(exported):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    worldmodel.load(exported, features_only=True)
    assert torch.equal(torch.rand(3), wanted)


def test_an_export_needs_no_word_more(exported):
    assert type(worldmodel.load(exported)).__name__ == "Backbone"


def test_clouds_of_other_columns_are_refused(exported):
    encoder = worldmodel.load(exported, features_only=True)
    with pytest.raises(ValueError, match=r"cloud 1 is \(9, 4\), expected \(N,5\): x, y, z, intensity, dt"):
        encoder([torch.rand(3, 5), torch.rand(9, 4)])
    with pytest.raises(ValueError, match="no clouds"):
        encoder([])
    assert encoder.eval()([torch.zeros(0, 5)])[0].shape[0] == 1


def test_no_code_of_an_export_is_run(exported, tmp_path):
    """Neither what lies there as Python, nor what the configuration names, nor what a pickle would call."""
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w').write('x')\n".encode()
    foreign = edited(exported, tmp_path / "code", {"encoder.py": code, "torch.py": code})
    worldmodel.load(foreign, features_only=True)
    (tmp_path / "evil.py").write_bytes(code)
    with pytest.raises(WmError, match="something other than the pillar encoder"):
        worldmodel.load(with_config(exported, tmp_path / "named", build="evil:build"), features_only=True)

    class Payload:
        def __reduce__(self):
            return open, (str(marker), "w")

    pickled = edited(exported, tmp_path / "pickled", {"model.safetensors": pickle.dumps(Payload())})
    with pytest.raises(WmError, match=r"model\.safetensors: .* no safetensors file"):
        worldmodel.load(pickled, features_only=True)
    assert main(["verify", str(foreign)]) == 1
    assert not marker.exists()


@pytest.mark.parametrize("changes", [
    {"widths": [1 << 40, 16, 16]}, {"widths": [16, 16, 17]}, {"layers": [1 << 40, 1, 1]}, {"layers": [-9, 1, 1]},
    {"upsample_strides": [0.0, 2.0, 4.0]}, {"low": [-25.5, -25.6, -3.0]}, {"padded_slots": True, "max_points_per_pillar": 3}, {"bn_eps": 0.5},
    {"pfn_widths": []}, {"max_points_per_pillar": 1 << 40}, {"features": ["x", "y", "z"]}, {"strides": [0, 2, 2]}, {"voxel": [1e-9, 0.8, 6.0]},
    {"widths": "many"}, {"bn_eps": None},
], ids=str)  # fmt: skip
def test_a_configuration_that_is_not_of_the_weights_is_refused(exported, tmp_path, changes):
    with pytest.raises(WmError):
        worldmodel.load(with_config(exported, tmp_path / "edited", **changes), features_only=True)


def test_weights_that_are_not_whole_are_refused(exported, tmp_path):
    from safetensors.numpy import load, save

    weights = load((exported / "model.safetensors").read_bytes())
    name = "backbone_2d.blocks.0.1.weight"
    for number, change in enumerate(
        [{}, {"more": np.zeros(2)}, {name: weights[name][:1]}, {name: weights[name].astype(np.float16)}, {name: weights[name] * np.nan}]
    ):
        kept = {k: v for k, v in weights.items() if change or k != name} | change
        bad = edited(exported, tmp_path / str(number), {"model.safetensors": save(kept)})
        with pytest.raises(WmError, match=r"1 tensors are missing|holds NaN"):
            worldmodel.load(bad, features_only=True)


def test_a_changed_file_and_a_wrong_folder_are_named(exported, tmp_path):
    import shutil

    shutil.copytree(exported, tmp_path / "copy")
    data = bytearray((tmp_path / "copy" / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "copy" / "model.safetensors").write_bytes(data)
    with pytest.raises(WmError, match=r"model\.safetensors: content changed"):
        worldmodel.load(tmp_path / "copy", features_only=True)
    with pytest.raises(UsageError, match="is it a run folder"):
        worldmodel.load(tmp_path, features_only=True)
    with pytest.raises(UsageError, match="load takes the run, or an export"):
        worldmodel.load(edited(exported, tmp_path / "without", {"config.json": None}), features_only=True)
