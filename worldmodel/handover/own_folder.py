"""The export of an encoder of the user's own: its tensors under its own names, its configuration, a cloud and the map of it. The code stays with
the user, and is imported only where the run or the user names it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from sensors.errors import WmError, one_line
from sensors.files import read_json
from worldmodel.config import Encoder, encoder_of
from worldmodel.encoders.contract import Clouds, build_encoder
from worldmodel.handover.checkpoints import read_tensors

TOLERANCE = 1e-5


def files_of(encoder: nn.Module, config: Encoder, sample: Tensor) -> dict[str, bytes]:
    """Names and contents; sample (N,F) f32 is a cloud with the encoder's columns. The encoder is left in eval mode on the CPU."""
    encoder.eval().cpu()
    with torch.no_grad():
        bev = encoder(Clouds(sample, (len(sample),)))
    weights = {name: value.detach().contiguous().clone() for name, value in encoder.state_dict().items()}
    return {
        "model.safetensors": save_tensors(weights, metadata={"format": "pt"}),
        "config.json": json.dumps(dataclasses.asdict(config), indent=1).encode(),
        "sample.safetensors": save_tensors({"points": sample.contiguous(), "map": bev.float().contiguous()}),
    }


def prove(files: Mapping[str, bytes], config: Encoder) -> float:
    """Build the encoder anew, load these files into it, run the stored cloud; the largest difference. WmError where it is above TOLERANCE."""
    sample = load_tensors(files["sample.safetensors"])
    found = _difference(build_encoder(config), load_tensors(files["model.safetensors"]), sample)
    if not found <= TOLERANCE:
        raise WmError(f"{one_line(config.build)}: built anew and loaded, it gives another map (by {found:.2g}): what it computes is not all in its "
                      "state_dict; register the rest as buffers")  # fmt: skip
    return found


def config_of(folder: Path) -> Encoder | None:
    """The configuration of an export of this kind, None for one of another."""
    config = encoder_of(read_json(folder / "config.json"), one_line(folder / "config.json"))
    return config if config.build else None


def compared(folder: Path, encoder: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """The line that says how the map of the user's encoder, given these weights, differs from the stored one; [] where it does not."""
    found = _difference(encoder, weights, read_tensors(folder / "sample.safetensors"))
    return [] if found <= TOLERANCE else [f"the map of the stored cloud differs by up to {found:.2g}: it computes something else than in pretraining"]


def _difference(encoder: nn.Module, weights: Mapping[str, Tensor], sample: Mapping[str, Tensor]) -> float:
    encoder.load_state_dict(weights, strict=False)
    with torch.no_grad():
        found = encoder.eval()(Clouds(sample["points"], (len(sample["points"]),)))
    if found.shape != sample["map"].shape:
        return float("inf")
    return float((found - sample["map"]).abs().max()) / max(1.0, float(sample["map"].abs().max()))
