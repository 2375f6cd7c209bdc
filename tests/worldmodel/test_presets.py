"""The presets as they stand: range, cells and widths of the target, on little data, from `wm pretrain` to an export that is proven."""

import pytest
import torch

from worldmodel import checkpoint
from worldmodel.config import load_config
from worldmodel.export.mmdet3d import renamed
from worldmodel.handover.mmdet3d_modules import BASES
from worldmodel.tools.cli import main

LITTLE = ("model.latent_sweeps=[0]", "train.clips=1", "train.dense_clips=0", "train.prior_clips=1", "train.rays=16", "train.prior_rays=16",
          "train.stored_rays=64", "train.instants=1", "train.validation=0", "train.autocast=off", "train.channels_last=off",
          "train.threads=2")  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name, steps, target, file, folded", [
    ("openpcdet_kitti", 20, "openpcdet", "wm_openpcdet.pth", None),
    ("openpcdet_nuscenes", 2, "openpcdet", "wm_openpcdet.pth", "vfe.pfn_layers.0.linear.weight"),
    ("mmdet3d_centerpoint", 2, "mmdet3d", "wm_mmdet3d.pth", "pts_voxel_encoder.pfn_layers.0.linear.weight"),
])  # fmt: skip
def test_a_preset_trains_at_its_own_range_and_what_it_trains_is_what_leaves(store, tmp_path, name, steps, target, file, folded):
    """One sweep and few rays a step, else as the preset has it. 20 steps of the quickest preset, 2 of the others: a step is 4 to 6 CPU seconds."""
    run = tmp_path / "run"
    assert main(["pretrain", "--config", name, "--data", str(store), "-o", str(run), "--set", *LITTLE, f"train.steps={steps}"]) == 0
    found = checkpoint.load(run)
    assert found.step == steps and found.weights["encoder.vfe.pfn_layers.0.norm.num_batches_tracked"] > 0
    trained = {key.removeprefix("encoder."): value for key, value in found.weights.items() if key.startswith("encoder.")}
    if target == "mmdet3d":
        trained = renamed(trained, load_config(name).encoder, BASES["centerpoint"])
    assert main(["export", str(run), "--to", target, "-o", str(tmp_path / "out"), "--data", str(store)]) == 0
    stored = torch.load(tmp_path / "out" / file, weights_only=True)
    stored = stored["model_state" if target == "openpcdet" else "state_dict"]
    assert len(stored) == 120 and set(stored) == set(trained)
    assert [key for key in stored if not torch.equal(stored[key], trained[key])] == ([folded] if folded else [])
