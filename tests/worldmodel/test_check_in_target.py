"""check_in_target.py as a user has it: the file beside an export, batches as loaders give them, each thing that goes wrong once."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from sensors.clips import clips_of
from sensors.rays import history_of
from worldmodel.batches import past_clouds
from worldmodel.config import load_config
from worldmodel.export.verify import export
from worldmodel.handover import check_in_target as ours
from worldmodel.handover.openpcdet_modules import Detector, collated, load_params, settings_of

LOW, HIGH = [-25.6, -25.6, -3.0], [25.6, 25.6, 3.0]
SWEEPS = ["model.latent_sweeps=[0,1,2,3,4]"]
HARD = ["encoder.padded_slots=true", "encoder.max_points_per_pillar=20", "encoder.max_pillars=9000", "encoder.input_yaw_deg=90"]


@pytest.fixture(scope="module", params=["torch", "openpcdet"])
def folder(request, untrained, parts, tmp_path_factory):
    """An export for our frame and 0..1, and one for nuScenes' frame and 0..255."""
    root = tmp_path_factory.mktemp(request.param)
    run = untrained(root / "run", *SWEEPS, *(HARD if request.param == "openpcdet" else ()))
    export(run, request.param, root / "export", parts[:3])
    return root / "export"


@pytest.fixture(scope="module")
def script(folder):
    """The module that lies in the export, not the package's."""
    spec = importlib.util.spec_from_file_location("check_in_target_of_the_export", folder / "check_in_target.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded(folder, parts):
    """Two clouds (N,5) as the target's loader gives them, of streets that the statistics have not seen."""
    manifest = json.loads((folder / "manifest.json").read_text())
    config = load_config("tiny", [*SWEEPS, f"encoder.input_yaw_deg={manifest['input']['input_yaw_deg']}", "encoder.max_points=0"])
    clips = [clips_of(part.log)[-1] for part in parts[3:]]
    scale = np.float32([1, 1, 1, 255 if manifest["target"] == "openpcdet" else 1, 1])
    return [np.concatenate(past_clouds(clip, history_of(clip), config)) * scale for clip in clips]


@pytest.fixture
def full(folder):
    """The largest intensity of the target."""
    return json.loads((folder / "manifest.json").read_text())["input"]["scales"]["intensity"]


def test_a_batch_as_in_pretraining_has_no_findings(script, loaded):
    assert script.check(loaded) == []


def test_batches_of_every_loader_are_understood(script, loaded):
    tensors = [torch.from_numpy(cloud) for cloud in loaded]
    indexed = np.concatenate([np.insert(cloud, 0, i, 1) for i, cloud in enumerate(loaded)])

    class Points:
        tensor = tensors[0]

    for batch in (tensors, tensors[0], {"points": indexed, "batch_size": 2}, {"points": torch.from_numpy(indexed)}, {"inputs": {"points": tensors}},
                  {"points": [Points()]}):  # fmt: skip
        assert script.check(batch) == [], type(batch)
    found = script.clouds_in({"points": indexed}, 5)
    assert [len(cloud) for cloud in found] == [len(cloud) for cloud in loaded] and all(
        np.array_equal(a, b) for a, b in zip(found, loaded, strict=True)
    )


def test_voxels_are_taken_apart(script, loaded):
    points = loaded[0][:60].reshape(6, 10, 5).copy()
    counts = np.array([10, 3, 10, 1, 10, 7])
    coords = np.array([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 1], [1, 0, 1, 0]])
    for batch in ({"voxels": torch.from_numpy(points), "voxel_num_points": torch.from_numpy(counts), "voxel_coords": torch.from_numpy(coords)},
                  {"inputs": {"voxels": {"voxels": points, "num_points": counts, "coors": coords}}}):  # fmt: skip
        found = script.clouds_in(batch, 5)
        assert [len(cloud) for cloud in found] == [23, 18] and np.array_equal(found[1][0], points[3, 0])


def only(lines, *words):
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines


def changed(loaded, change):
    out = [cloud.copy() for cloud in loaded]
    return [new if (new := change(cloud)) is not None else cloud for cloud in out]


def test_another_intensity_scale_is_named(script, loaded, full):
    def scaled(cloud):
        cloud[:, 3] *= 255 if full == 1 else 1 / 255

    only(script.check(changed(loaded, scaled)), *(("reaches 255", "divide it by 255") if full == 1 else ("within 0..1", "multiply it by 255")))


def test_an_intensity_that_is_constant_or_negative_is_named(script, loaded):
    only(script.check(changed(loaded, lambda c: c[:, 3].fill(0))), "intensity is 0 everywhere")

    def shifted(cloud):
        cloud[:, 3] -= cloud[:, 3].max() / 2

    only(script.check(changed(loaded, shifted)), "none below 0")


def test_a_missing_time_column_is_named(script, loaded):
    only(script.check([cloud[:, :4] for cloud in loaded]), "4 columns", "no time (dt) column")
    only(script.check(changed(loaded, lambda c: c[:, 4].fill(0))), "no time column: dt is 0 everywhere", "5 sweeps")


def test_times_of_other_sign_unit_spacing_are_named(script, loaded):
    def times(factor):
        def change(cloud):
            cloud[:, 4] *= factor

        return change

    assert any("dt is negative" in line for line in script.check(changed(loaded, times(-1))))
    assert any("expected seconds" in line for line in script.check(changed(loaded, times(1e3))))
    assert any("another spacing" in line for line in script.check(changed(loaded, times(3))))


def test_another_sweep_count_is_named(script, loaded):
    def two(cloud):
        return cloud[cloud[:, 4] < 0.3]

    assert any("2 different times per cloud, 5 in pretraining: another sweep count" in line for line in script.check(changed(loaded, two)))
    only(script.check([cloud[::4] for cloud in loaded]), "points per cloud", "another sweep count or another sensor")


def test_another_range_is_named(script, loaded):
    near = [cloud[(np.abs(cloud[:, :2]) < 8).all(1)] for cloud in loaded]
    lines = script.check(near)
    assert any(line.startswith("x spans") and "another range" in line for line in lines) and any(line.startswith("y spans") for line in lines)
    far = changed(loaded, lambda c: c.__setitem__((slice(None), slice(0, 3)), c[:, :3] * 100))
    assert "lie in the encoder's range" in script.check(far)[0]


def test_another_origin_is_named(script, loaded):
    only(script.check(changed(loaded, lambda c: c.__setitem__((slice(None), 2), c[:, 2] + 1.7))), "z lies 1.", "m higher", "another origin")


def test_swapped_axes_are_named(script, loaded):
    def turned(cloud):
        return cloud[:, [1, 0, 2, 3, 4]] * np.float32([-1, 1, 1, 1, 1])

    def back(cloud):
        return cloud * np.float32([-1, -1, 1, 1, 1])

    for change in (turned, lambda c: c[:, [1, 0, 2, 3, 4]], back):
        lines = [line for line in script.check(changed(loaded, change)) if "the car drives along" in line]
        assert len(lines) == 1 and "axes swapped or turned" in lines[0]


@pytest.mark.parametrize("order", [[0, 1, 2, 4, 3], [2, 1, 0, 3, 4], [3, 0, 1, 2, 4]])
def test_another_feature_order_is_named(script, loaded, order):
    names = [["x", "y", "z", "intensity", "dt"][i] for i in order]
    lines = script.check(changed(loaded, lambda c: c[:, order]))
    if order == [0, 1, 2, 4, 3]:
        only(lines, f"the columns look like {' '.join(names)}", "another feature order")
    else:
        assert lines  # what is named depends on how far the columns are apart


def test_too_many_columns_are_named(script, loaded):
    only(script.check([np.insert(cloud, 5, 7.5, 1) for cloud in loaded]), "6 columns", "expected 5")


def test_the_map_is_compared(script, folder):
    sample = script.read_safetensors(folder / "sample.safetensors")
    assert torch.equal(script.stored_cloud(), sample["points"])
    right = sample["map"]
    for bev in (right, right[0], right.numpy(), [right], {"spatial_features_2d": right}, right + 1e-7):
        assert script.check(bev_map=bev) == []
    only(script.check(bev_map=right.transpose(2, 3)), "rows and columns exchanged")
    only(script.check(bev_map=right.flip(2)), "upside down")
    only(script.check(bev_map=right.flip(3)), "mirrored")
    only(script.check(bev_map=right[:, :, ::2, ::2]), "another layer, range or voxel size")
    only(script.check(bev_map=right + 0.01), "differs from ours", "eval mode")
    one = right.clone()
    one[0, 0, :2] += 1
    only(script.check(bev_map=one), "padding or pillar rule")
    assert script.check(bev_map=one, tolerance=10.0) == []


def test_the_map_of_the_target_is_the_stored_one(script, folder):
    """The mirrors of what the user has: OpenPCDet's modules, and the file that comes with the export."""
    import yaml

    if (folder / "encoder.py").exists():
        spec = importlib.util.spec_from_file_location("encoder_of_the_export", folder / "encoder.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.load(folder)
        bev = lambda cloud: model([cloud])  # noqa: E731
    else:
        (path, *_) = sorted(folder.glob("*.yaml"))
        model = Detector(settings_of(yaml.safe_load(path.read_text()), "yaml")).eval()
        load_params(model, torch.load(folder / "wm_openpcdet.pth", weights_only=True)["model_state"])
        bev = lambda cloud: model(collated([cloud], model.settings))  # noqa: E731
    assert script.check(bev_fn=bev) == []
    model.train()
    only(script.check(bev_fn=bev), "eval mode")
    model.eval()
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
    with torch.no_grad():
        first.weight[:, 3] *= 255
    assert len(script.check(bev_fn=bev)) == 1


def test_the_command_runs_without_the_package(script, folder, loaded, tmp_path, capsys):
    np.savez(tmp_path / "batch.npz", points=loaded[0])
    np.savez(tmp_path / "wrong.npz", points=loaded[0][:, :4])
    np.save(tmp_path / "map.npy", ours.read_safetensors(folder / "sample.safetensors")["map"].numpy())
    torch.save({"points": torch.from_numpy(loaded[0])}, tmp_path / "batch.pt")
    command = [sys.executable, "-I", folder / "check_in_target.py", "--batch", tmp_path / "wrong.npz", "--map", tmp_path / "map.npy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout.count("\n") == 1 and "no time (dt)" in done.stdout and not done.stderr, done.stdout + done.stderr
    for name in ("batch.npz", "batch.pt"):
        assert script.main(["--batch", str(tmp_path / name), "--map", str(tmp_path / "map.npy")]) == 0
        assert "as in pretraining" in capsys.readouterr().out
    assert script.main(["--batch", str(tmp_path / "none.npz")]) == 1


def test_files_with_objects_are_not_opened(script, tmp_path, capsys):
    import os

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    np.save(tmp_path / "batch.npy", np.array([Payload()], dtype=object))
    torch.save(Payload(), tmp_path / "batch.pt")
    for name in ("batch.npy", "batch.pt"):
        assert script.main(["--batch", str(tmp_path / name)]) == 1
    assert not (tmp_path / "marker").exists() and "weights_only" not in capsys.readouterr().err


def test_statistics_by_hand():
    cloud = np.float32([[0, 0, 0, 0.5, 0], [2, 0, 0, 0, 0], [1, 0, 0, 1, 0.5], [3, 4, 0, 1, 0.5], [100, 0, 0, 1, 0.5], [np.nan, 0, 0, 1, 0]])
    found = ours.channel_statistics([cloud], ["x", "y", "z", "intensity", "dt"], [-10, -10, -1], [10, 10, 1])
    assert found["points"] == 5 and found["inside"] == pytest.approx(0.8) and found["clouds"] == 1
    assert found["channels"]["x"] == {**found["channels"]["x"], "min": 0.0, "max": 3.0, "mean": 1.5, "zeros": 0.25, "distinct": 4.0}
    assert found["channels"]["dt"]["distinct"] == 2 and found["drift"] == pytest.approx([2.0, 4.0])
    json.dumps(found, allow_nan=False)
    assert ours.channel_statistics([], ["x", "y", "z"])["channels"] == {}


def test_an_export_without_data_checks_what_it_can(untrained, tmp_path):
    report = export(untrained(tmp_path / "run"), "torch", tmp_path / "export", [])
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text())
    assert manifest["statistics"] is None
    cloud = np.zeros((4, 4), np.float32)
    nothing, columns = ours.check(cloud, folder=tmp_path / "export")
    assert "no statistics" in nothing and columns.startswith("4 columns per point, expected 5")
    assert any("no statistics" in note for note in report["notes"])


def test_the_thinning_of_our_training_is_told_and_not_asked_of_others(folder, loaded, script):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "8000 points" in manifest["input"]["thinning"] and manifest["statistics"]["shown"] < manifest["statistics"]["points"]
    assert script.check([script.stored_cloud()]) == []
    assert manifest["statistics"]["of"] == "export" and manifest["statistics"]["points"] == pytest.approx(np.mean([len(c) for c in loaded]), rel=0.3)
    assert dataclasses.asdict(load_config("tiny").encoder)["max_points"] < manifest["statistics"]["points"]
