"""`wm export RUN --to torch`: the encoder as safetensors, its configuration, and one Python file that depends on torch alone.

The folder: what `worldmodel.handover.standalone_folder` says, `check_in_target.py` and `manifest.json`. An encoder of the user's own comes back as
it is: its tensors unchanged under its own names, and no `encoder.py`. Its code is built and run where the run names it, at export, and where
the user names it, in `wm verify --against`; reading an export imports nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sensors.data import Part
from sensors.errors import WmError, one_line
from sensors.files import check_folder, commit_folder, read_json
from worldmodel.config import encoder_of
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
    most = read_json(folder / "config.json").get("max_points")
    cloud, older = (f"thinned(points, {most})", ", older sweeps to half as many") if most else ("points", "")
    return (f"import sys; sys.path.insert(0, {str(folder)!r})\nfrom encoder import load, thinned\n"
            f"encoder = load({str(folder)!r})   # torch.nn.Module\nmaps = encoder([{cloud}])   # (N,F) float32 -> (1,C,H,W){older}")  # fmt: skip


def verify(folder: Path) -> dict[str, Any]:
    """Load the export where nothing but torch is seen, run the stored cloud through it, compare; see `standalone_folder.prove`.

    Beside what that gives: "expected", and "reasons": tensors of other values than were exported, and where config.json, manifest.json and the
    stored cloud speak of different inputs. WmError where a file is not what the manifest says, or not what it should be."""
    manifest = check_folder(folder)
    weights = read_tensors(folder / "model.safetensors")
    config = encoder_of(read_json(folder / "config.json"), one_line(folder / "config.json"))
    reasons = [*standalone_folder.inputs_that_differ(folder, config, manifest.get("input")), *_values_that_differ(weights, manifest.get("digests"))]
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
