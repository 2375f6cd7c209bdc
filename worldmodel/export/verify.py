"""What every target's export goes through: found by name, written once, read back as its target would read it.

A target is one file beside this one with

    export(trained, folder, about, sample, parts) -> manifest      # writes the new folder by `sensors.files.commit_folder`
    verify(folder) -> {"loaded", "tensors", "expected", "missing", "unexpected", "mismatched", "difference"}      # reads it as the target would
    snippet(folder) -> str                                         # what the user does next
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sensors.clips import clips_of
from sensors.data import Part
from sensors.errors import UsageError, WmError, one_line
from sensors.files import check_folder, parse_json, read_whole
from sensors.rays import history_of
from worldmodel.batches import clouds_of, joined, past_clouds, rng_of
from worldmodel.trained import Trained

TOLERANCE = 1e-5


def targets() -> list[str]:
    package = importlib.import_module("worldmodel.export")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "verify")


def export(run: Path, target: str, folder: Path, parts: list[Part]) -> dict[str, Any]:
    """Export a run's encoder for a target into a new folder, verify it, and give the report of `verify` with the manifest beside it.

    parts: data to take the stored cloud from; without any a made-up one of fixed seed stands in."""
    if target not in targets():
        raise UsageError(f"--to {one_line(target)}: not one of {', '.join(targets())}")
    trained = Trained(run)
    environment = parse_json(read_whole(run / "environment.json", 1 << 26), "environment.json")
    config = trained.config
    about = {
        "run": run.name, "checkpoint": trained.checkpoint, "objectives": config.objectives, "licence": environment["licence"],
        "logs": environment["logs"], "versions": environment["versions"],
        "input": {"features": list(config.encoder.features), "frame": "LiDAR: x forward, y left, z up, metres", "intensity": "0..1",
                  "dt": "seconds before the newest sweep, >= 0", "low": list(config.encoder.low), "high": list(config.encoder.high),
                  "voxel": list(config.encoder.voxel), "bn_eps": config.encoder.bn_eps, "bn_momentum": config.encoder.bn_momentum,
                  "padded_slots": config.encoder.padded_slots, "input_yaw_deg": config.encoder.input_yaw_deg},
    }  # fmt: skip
    module = importlib.import_module(f"worldmodel.export.{target}")
    module.export(trained, folder, about, sample_cloud(trained, parts), parts)
    return verify(folder)


def sample_cloud(trained: Trained, parts: list[Part]) -> torch.Tensor:
    """(N,F) f32: what the encoder sees of the first clip of the data, else points of fixed seed spread over the encoder's range."""
    encoder = trained.config.encoder
    for part in parts:
        m = trained.config.model
        clips = clips_of(part.log, past=m.past, future=m.future, rate_hz=m.rate_hz, from_ns=part.from_ns, to_ns=part.to_ns)
        if clips:
            clouds = joined(past_clouds(clips[0], history_of(clips[0]), trained.config), trained.config)
            return clouds_of(clouds[:1], encoder).points
    rng = rng_of("sample")
    cloud = np.concatenate((rng.uniform(encoder.low, encoder.high, (5000, 3)), rng.random((5000, 2))), 1).astype(np.float32)
    return clouds_of([cloud], encoder).points


def verify(folder: Path) -> dict[str, Any]:
    """Read an export as its target would; {"target", "passed", "loaded", "tensors", "missing", "unexpected", "mismatched", "difference"}."""
    manifest = check_folder(folder)
    target = manifest.get("target")
    if target not in targets():
        raise WmError(f"{one_line(folder)}: target {one_line(repr(target))} is not one of {', '.join(targets())}; made by another version?")
    report = importlib.import_module(f"worldmodel.export.{target}").verify(folder)
    passed = (report["loaded"] == report["tensors"] == report["expected"] and report["difference"] <= TOLERANCE
              and not (report["missing"] or report["unexpected"] or report["mismatched"]))  # fmt: skip
    return {"target": target, "passed": bool(passed), "licence": manifest.get("licence"), **report}
