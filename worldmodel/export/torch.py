"""`wm export RUN --to torch`: the encoder as safetensors, its configuration, and one Python file that depends on torch alone.

The folder: `model.safetensors`, `config.json`, `encoder.py`, `manifest.json`, and `sample.safetensors`: a cloud and our encoder's map of it.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from sensors.data import Part
from sensors.errors import UsageError, WmError, one_line
from sensors.files import check_folder, commit_folder, read_whole
from worldmodel.encoders import standalone
from worldmodel.encoders.contract import Clouds
from worldmodel.trained import Trained

LIMIT = 1 << 32


def export(trained: Trained, folder: Path, about: dict[str, Any], sample: torch.Tensor, parts: Sequence[Part]) -> dict[str, Any]:
    """Write the export of a trained run's encoder to the new folder; sample (N,F) f32 is a cloud with the encoder's columns."""
    config = trained.config.encoder
    if config.build:
        raise UsageError(
            f"the run's encoder is {one_line(config.build)}, your own: take model.safetensors of its checkpoint, keys `encoder.*`, unchanged"
        )
    encoder = trained.model.encoder.float().eval().cpu()
    with torch.no_grad():
        bev = encoder(Clouds(sample, (len(sample),)))
    weights = {name: value.contiguous().cpu() for name, value in encoder.state_dict().items()}
    return commit_folder(folder, {
        "model.safetensors": save_tensors(weights, metadata={"format": "pt"}),
        "config.json": json.dumps(dataclasses.asdict(config), indent=1).encode(),
        "encoder.py": Path(standalone.__file__).read_bytes(),
        "sample.safetensors": save_tensors({"points": sample.contiguous(), "map": bev.contiguous()}),
    }, {**about, "target": "torch", "tensors": len(weights)})  # fmt: skip


def snippet(folder: Path) -> str:
    """What a user pastes to have the encoder outside of this package."""
    return (f"import sys; sys.path.insert(0, {str(folder)!r})\nfrom encoder import load\nencoder = load({str(folder)!r})   # torch.nn.Module\n"
            "maps = encoder([points])          # (N,F) float32 -> (1,C,H,W)")  # fmt: skip


def verify(folder: Path) -> dict[str, Any]:
    """Load the export in a fresh interpreter that sees nothing but torch and the folder, run the stored cloud through it, compare.

    Gives {"loaded", "tensors", "missing", "unexpected", "mismatched", "difference"}; WmError where a file is not what the manifest says."""
    manifest = check_folder(folder)
    done = subprocess.run([sys.executable, "-I", "-c", _PROBE, str(folder)], capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise WmError(
            f"{one_line(folder)}: does not load outside of the package ({one_line(done.stderr.strip().splitlines()[-1] if done.stderr else '', 200)})"
        )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    sample = load_tensors(read_whole(folder / "sample.safetensors", LIMIT))
    if not torch.isfinite(sample["map"]).all() or float(sample["map"].abs().max()) == 0:
        raise WmError(f"{one_line(folder)}: the stored map is empty or not finite; export the run again")
    return {**found, "expected": int(manifest["tensors"])}


_PROBE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import encoder as e
folder = sys.argv[1]
stored = e.read_safetensors(folder + "/model.safetensors")
module = e.Encoder(json.loads(open(folder + "/config.json").read()))
own = module.state_dict()
fits = {k: v for k, v in stored.items() if k in own and own[k].shape == v.shape and own[k].dtype == v.dtype}
module.load_state_dict(fits, strict=False)
module.eval()
sample = e.read_safetensors(folder + "/sample.safetensors")
with torch.no_grad():
    difference = float((module([sample["points"]])[0] - sample["map"][0]).abs().max())
print(json.dumps({"loaded": len(fits), "tensors": len(own), "missing": sorted(own.keys() - stored.keys()),
                  "unexpected": sorted(stored.keys() - own.keys()),
                  "mismatched": sorted(k for k in stored.keys() & own.keys() if k not in fits), "difference": difference}))
"""
