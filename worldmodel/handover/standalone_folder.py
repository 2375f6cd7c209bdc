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
from sensors.files import read_whole
from worldmodel.config import Encoder
from worldmodel.encoders import standalone
from worldmodel.encoders.contract import Clouds
from worldmodel.handover import check_in_target
from worldmodel.handover.checkpoints import read_tensors

CODE_BYTES = 1 << 20


def files_of(encoder: nn.Module, config: Encoder, sample: Tensor, also: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """Names and contents; sample (N,F) f32 is a cloud with the encoder's columns, also: further keys of config.json. The encoder is left in eval
    mode on the CPU."""
    if config.build:
        raise UsageError(
            f"the run's encoder is {one_line(config.build)}, your own: take model.safetensors of its checkpoint, keys `encoder.*`, unchanged"
        )
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
