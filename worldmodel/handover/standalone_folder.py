"""The folder that rebuilds the encoder with torch alone, and its proof: what the exports for plain torch, for a hub and of features have in common.

`model.safetensors`, `config.json`, `encoder.py` (`worldmodel/encoders/standalone.py` as it is), `check_in_target.py`, and `sample.safetensors`:
a cloud and our encoder's map of it. `encoder.py` is code: `prove` runs it only where it is, byte for byte, the file of this version.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from sensors.errors import UsageError, WmError, one_line
from sensors.files import read_json, read_whole
from worldmodel.config import Encoder, encoder_of
from worldmodel.encoders import standalone
from worldmodel.encoders.contract import Clouds
from worldmodel.handover import check_in_target
from worldmodel.handover.checkpoints import read_tensors

CODE_BYTES = 1 << 20


def files_of(encoder: nn.Module, config: Encoder, sample: Tensor, also: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """Names and contents; sample (N,F) f32 is a cloud with the encoder's columns, also: further keys of config.json. The encoder is left in eval
    mode on the CPU."""
    if config.build:
        raise UsageError(f"the run's encoder is {one_line(config.build)}, your own: `--to torch` gives its tensors back unchanged")
    encoder.float().eval().cpu()
    with torch.no_grad():
        bev = encoder(Clouds(sample, (len(sample),)))
    weights = {name: value.contiguous() for name, value in encoder.state_dict().items()}
    return {
        "model.safetensors": save_tensors(weights, metadata={"format": "pt"}),
        "config.json": json.dumps({**(also or {}), **dataclasses.asdict(config)}, indent=1).encode(),
        "encoder.py": Path(standalone.__file__).read_bytes(),
        "check_in_target.py": Path(check_in_target.__file__).read_bytes(),
        "sample.safetensors": save_tensors({"points": sample.contiguous(), "map": bev.contiguous()}),
    }


def stored(folder: Path, name: str = "sample.safetensors") -> dict[str, Tensor]:
    """The tensors of a file of the folder; of the sample: points (N,F) and map (1,C,H,W)."""
    return read_tensors(folder / name)


def config_of(folder: Path) -> Encoder:
    """The encoder's configuration in config.json; other keys are left to whom they are for."""
    tree, own = read_json(folder / "config.json"), {field.name for field in dataclasses.fields(Encoder)}
    return encoder_of({key: value for key, value in tree.items() if key in own}, one_line(folder / "config.json"))


def inputs_that_differ(folder: Path, config: Encoder, said: Any) -> list[str]:
    """The order of columns is nowhere in the weights: the two files that name it have to agree, and the stored cloud with them."""
    if not isinstance(said, dict):
        raise WmError(f"{one_line(folder)}: manifest.json does not say what the input is; export the run again")
    tree = {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()}
    out = [f"{key} is {one_line(said[key], 80)} in manifest.json, {one_line(tree[key], 80)} in config.json"
           for key in tree if key in said and said[key] != tree[key]]  # fmt: skip
    scales = said.get("scales")
    scale = scales.get("intensity", 1.0) if isinstance(scales, dict) else 1.0
    if scale != 1:
        out.append(f"manifest.json speaks of intensity in 0..{one_line(scale, 20)}; these weights take 0..1")
    points = stored(folder)["points"]
    if points.ndim != 2 or points.shape[1] != len(config.features):
        out.append(f"the stored cloud has {points.shape[-1]} columns, config.json names {len(config.features)}")
    elif "intensity" in config.features and len(points) and float(points[:, config.features.index("intensity")].max()) > 1.5:
        largest = float(points[:, config.features.index("intensity")].max())
        out.append(f"the stored cloud's intensity reaches {largest:.3g}; these weights take 0..1")
    return out


def prove(folder: Path) -> dict[str, Any]:
    """Load the folder in a fresh interpreter that sees nothing but torch and the folder, run the stored cloud through it, compare.

    Gives {"loaded", "tensors", "missing", "unexpected", "mismatched", "difference", "absolute", "largest"}. The digests were checked
    by the caller."""
    if read_whole(folder / "encoder.py", CODE_BYTES) != Path(standalone.__file__).read_bytes():
        raise WmError(f"{one_line(folder)}: encoder.py is not the one that this version writes, and as code it is not run; export the run again")
    sample = stored(folder)
    if not {"points", "map"} <= sample.keys() or not torch.isfinite(sample["map"]).all() or float(sample["map"].abs().max()) == 0:
        raise WmError(f"{one_line(folder)}: the stored map is missing, empty or not finite; export the run again")
    # the package's file, which encoder.py equals: what else lies in the folder (a torch.py, a cached encoder.pyc) must not be imported
    command = [sys.executable, "-I", "-c", _PROBE, str(folder), standalone.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"
        raise WmError(f"{one_line(folder)}: does not load outside of the package ({one_line(last, 200)}); export the run again")
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


_PROBE = """
import importlib.util, json, sys
sys.dont_write_bytecode = True
import torch
torch.set_num_threads(1)
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location("encoder", sys.argv[2])
e = importlib.util.module_from_spec(spec)
spec.loader.exec_module(e)
stored = e.read_safetensors(folder + "/model.safetensors")
module = e.Encoder(json.loads(open(folder + "/config.json").read()))
own = module.state_dict()
fits = {k: v for k, v in stored.items() if k in own and own[k].shape == v.shape and own[k].dtype == v.dtype}
module.load_state_dict(fits, strict=False)
module.eval()
sample = e.read_safetensors(folder + "/sample.safetensors")
with torch.no_grad():
    absolute = float((module([sample["points"]])[0] - sample["map"][0]).abs().max())
largest = float(sample["map"].abs().max())
print(json.dumps({"loaded": len(fits), "tensors": len(own), "missing": sorted(own.keys() - stored.keys()),
                  "unexpected": sorted(stored.keys() - own.keys()),
                  "mismatched": sorted(k for k in stored.keys() & own.keys() if k not in fits),
                  "difference": absolute / max(1.0, largest), "absolute": absolute, "largest": largest}))
"""
