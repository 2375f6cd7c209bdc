"""`wm export RUN --to torch`: the encoder as safetensors, its configuration, and one Python file that depends on torch alone.

The folder: what `worldmodel.handover.standalone_folder` says, `check_in_target.py` and `manifest.json`. An encoder of the user's own comes back as
it is: its tensors unchanged under its own names, and no `encoder.py`. Its code is built and run where the run names it, at export, and where
the user names it, in `wm verify --against`; reading an export imports nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sensors.data import Part
from sensors.errors import WmError, one_line
from sensors.files import check_folder, commit_folder, read_json
from worldmodel.config import Encoder, encoder_of
from worldmodel.handover import check_in_target, own_folder, standalone_folder
from worldmodel.handover.checkpoints import read_tensors
from worldmodel.trained import Trained


def export(trained: Trained, folder: Path, about: dict[str, Any], sample: torch.Tensor, parts: Sequence[Part]) -> dict[str, Any]:
    """Write the export of a trained run's encoder to the new folder; sample (N,F) f32 is a cloud with the encoder's columns."""
    encoder, config = trained.model.encoder, trained.config.encoder
    files = own_folder.files_of(encoder, config, sample) if config.build else standalone_folder.files_of(encoder, config, sample)
    files["check_in_target.py"] = Path(check_in_target.__file__).read_bytes()
    weights = encoder.state_dict()
    also = {"build": config.build, "difference": own_folder.prove(files, config)} if config.build else {}
    return commit_folder(folder, files, {**about, "target": "torch", "tensors": len(weights), "digests": _digests(weights), **also})


def _digests(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """By name, the start of the sha256 of each tensor's shape and bytes: which tensor was changed, where one was."""
    raw = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    return {name: hashlib.sha256(repr(tuple(value.shape)).encode() + value.numpy().tobytes()).hexdigest()[:16] for name, value in raw.items()}


def snippet(folder: Path) -> str:
    """What a user pastes to have the encoder outside of this package."""
    if build := read_json(folder / "config.json").get("build"):
        return (f"from safetensors.torch import load_file\nencoder.load_state_dict(load_file({str(folder / 'model.safetensors')!r}))\n"
                f"# wm verify {folder} --against {one_line(build)}   loads it so, runs the stored cloud, compares")  # fmt: skip
    return (f"import sys; sys.path.insert(0, {str(folder)!r})\nfrom encoder import load\nencoder = load({str(folder)!r})   # torch.nn.Module\n"
            "maps = encoder([points])          # (N,F) float32 -> (1,C,H,W)")  # fmt: skip


def verify(folder: Path) -> dict[str, Any]:
    """Load the export where nothing but torch is seen, run the stored cloud through it, compare; see `standalone_folder.prove`.

    Beside what that gives: "expected", and "reasons": tensors of other values than were exported, and where config.json, manifest.json and the
    stored cloud speak of different inputs. WmError where a file is not what the manifest says, or not what it should be."""
    manifest = check_folder(folder)
    weights = read_tensors(folder / "model.safetensors")
    config = encoder_of(read_json(folder / "config.json"), one_line(folder / "config.json"))
    reasons = [*_inputs_that_differ(folder, config, manifest.get("input")), *_values_that_differ(weights, manifest.get("digests"))]
    if config.build:
        return {**_own(weights, manifest, config.build), "expected": int(manifest["tensors"]), "reasons": reasons}
    return {**standalone_folder.prove(folder), "expected": int(manifest["tensors"]), "reasons": reasons}


def _own(weights: Mapping[str, torch.Tensor], manifest: Mapping[str, Any], build: str) -> dict[str, Any]:
    """The tensors of an encoder of the user's own beside those that left; `difference` is the one measured when they did."""
    expected, difference = manifest.get("digests"), manifest.get("difference")
    if not isinstance(expected, dict) or not isinstance(difference, float) or manifest.get("build") != build:
        raise WmError(f"manifest.json of an export of {one_line(build, 80)}: no digests, or no difference measured with it; export the run again")
    note = f"the difference is that measured at export; {one_line(build, 80)} is imported only where you name it: --against {one_line(build, 80)}"
    return {"loaded": len(expected.keys() & weights.keys()), "tensors": len(expected), "missing": sorted(expected.keys() - weights.keys()),
            "unexpected": sorted(weights.keys() - expected.keys()), "mismatched": [], "difference": difference, "notes": [note]}  # fmt: skip


def _values_that_differ(weights: Mapping[str, torch.Tensor], digests: Any) -> list[str]:
    if not isinstance(digests, dict):
        return ["manifest.json has no digests of the tensors; export the run again"]
    out = []
    for name, digest in _digests(weights).items():
        if name in digests and digests[name] != digest:
            of = next((other for other, value in digests.items() if value == digest), None)
            out.append(f"{name} holds {f'what {of} had' if of else 'other values than were exported'}")
    return out


def _inputs_that_differ(folder: Path, config: Encoder, said: Any) -> list[str]:
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
    points = standalone_folder.stored(folder)["points"]
    if points.ndim != 2 or points.shape[1] != len(config.features):
        out.append(f"the stored cloud has {points.shape[-1]} columns, config.json names {len(config.features)}")
    elif "intensity" in config.features and len(points) and float(points[:, config.features.index("intensity")].max()) > 1.5:
        largest = float(points[:, config.features.index("intensity")].max())
        out.append(f"the stored cloud's intensity reaches {largest:.3g}; these weights take 0..1")
    return out
