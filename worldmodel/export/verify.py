"""What every target's export goes through: found by name, written once, read back as its target would read it.

A target is one file beside this one with

    export(trained, folder, about, sample, parts) -> manifest      # writes the new folder by `sensors.files.commit_folder`
    verify(folder) -> {"loaded", "tensors", "expected", "missing", "unexpected", "mismatched", "difference"}      # reads it as the target would
    snippet(folder) -> str                                         # what the user does next

and, where the target's points come in other columns or units than ours,

    columns(encoder, intensity) -> (Column, ...)                   # `worldmodel.handover.folding`; intensity: --intensity, None where not given

`about`, to which a target adds, becomes the manifest. Its `input` says what the exported weights take (after folding), `statistics` what
that looked like in pretraining, in the same columns and units. A report may have `reasons`: one line each for what `difference` cannot say.
"""

from __future__ import annotations

import importlib
import json
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
from worldmodel.config import Config
from worldmodel.handover.folding import Column
from worldmodel.handover.statistics import data_statistics
from worldmodel.trained import Trained

TOLERANCE = 1e-5


def targets() -> list[str]:
    package = importlib.import_module("worldmodel.export")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "verify")


def export(run: Path, target: str, folder: Path, parts: list[Part], *, intensity: float | None = None) -> dict[str, Any]:
    """Export a run's encoder for a target into a new folder, verify it, and give the report of `verify` with the manifest beside it.

    parts: data to take the stored cloud from; without any a made-up one of fixed seed stands in. intensity: the full scale of the intensity
    that the target's loader gives, None for what its data are known to have."""
    if target not in targets():
        raise UsageError(f"--to {one_line(target)}: not one of {', '.join(targets())}")
    module = importlib.import_module(f"worldmodel.export.{target}")
    if intensity is not None and not hasattr(module, "columns"):
        raise UsageError(f"--intensity: the export for {target} takes 0..1, as the store gives it")
    if intensity is not None and not 0 < intensity < 1 << 17:
        raise UsageError(f"--intensity {intensity:g}: give the largest value that the target's loader gives, 1 or 255")
    if folder.exists():
        raise UsageError(f"{one_line(folder)}: is there already; give another folder with -o")
    trained = Trained(run)
    encoder = trained.config.encoder
    columns = module.columns(encoder, intensity) if hasattr(module, "columns") else tuple(Column(name) for name in encoder.features)
    sample, of = sample_cloud(trained, parts)
    about = {**_about(trained), "input": _input(trained.config, columns), "intensity": intensity, "sample": of,
             "statistics": data_statistics(trained, parts, [c.name for c in columns], {c.name: c.scale for c in columns})}  # fmt: skip
    module.export(trained, folder, about, sample, parts)
    report = verify(folder)
    if about["statistics"] is None:
        unknown = "no statistics of the clouds: the data were not where the run had them; with --data, check_in_target.py can compare yours with them"
        report["notes"] = [*report.get("notes", ()), unknown]
    return report


def _about(trained: Trained) -> dict[str, Any]:
    """What the weights are and came from: run, checkpoint, objectives with weights, data with digests, the strictest licence, metrics, versions."""
    environment = parse_json(read_whole(trained.run / "environment.json", 1 << 26), "environment.json")
    config = trained.config
    return {"run": trained.run.resolve().name, "config": config.name, "checkpoint": trained.checkpoint, "objectives": config.objectives,
            "licence": environment["licence"], "logs": environment["logs"], "metrics": _metrics(trained),
            "versions": {"python": environment.get("python"), **environment["versions"]}}  # fmt: skip


def _metrics(trained: Trained) -> dict[str, Any] | None:
    """The validation line of metrics.jsonl that belongs to the checkpoint, else the last one; None for a run that was never validated."""
    path = trained.run / "metrics.jsonl"
    found = None
    for text in read_whole(path, 1 << 30).splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a run that was killed may leave half a line
        measured = {key: value for key, value in line.items() if key.startswith(("val/", "health/"))} if isinstance(line, dict) else {}
        if measured and (found is None or found["step"] != trained.step):
            found = {"step": line.get("step"), **measured}
    return found


def _input(config: Config, columns: tuple[Column, ...]) -> dict[str, Any]:
    """What a cloud for the exported weights is: columns and units, frame, range and cells, norms, slots, sweeps."""
    encoder, model = config.encoder, config.model
    frame = {0.0: "x forward, y left, z up", 90.0: "x right, y forward, z up"}
    turned = f"x forward, y left, z up, then turned by {encoder.input_yaw_deg:g} degrees about z"
    intensity = next((c for c in columns if c.name == "intensity"), None)
    return {
        "features": [c.name for c in columns], "scales": {c.name: c.scale for c in columns},
        "unused": [c.name for c in columns if c.name not in encoder.features],
        "frame": f"LiDAR at t = 0: {frame.get(encoder.input_yaw_deg, turned)}, metres", "input_yaw_deg": encoder.input_yaw_deg,
        "intensity": f"0..{intensity.scale:g}" if intensity else None, "dt": "seconds before the newest sweep, >= 0",
        "sweeps": list(model.latent_sweeps), "sweep_times_s": [round(back / model.rate_hz, 6) for back in model.latent_sweeps],
        "joined": model.join_sweeps, "rate_hz": model.rate_hz,
        "low": list(encoder.low), "high": list(encoder.high), "voxel": list(encoder.voxel),
        "max_points": encoder.max_points, "thinning": encoder.thinning,
        "map": "rows along y, columns along x, both upwards from low", "bn_eps": encoder.bn_eps, "bn_momentum": encoder.bn_momentum,
        "padded_slots": encoder.padded_slots, "max_points_per_pillar": encoder.max_points_per_pillar, "max_pillars": encoder.max_pillars,
    }  # fmt: skip


def sample_cloud(trained: Trained, parts: list[Part]) -> tuple[torch.Tensor, str]:
    """(N,F) f32 and where it is from: what the encoder sees of the first clip of the data, else made up of fixed seed: points all over the range,
    and twice as many close together, so that pillars overflow."""
    encoder = trained.config.encoder
    for part in parts:
        m = trained.config.model
        clips = clips_of(part.log, past=m.past, future=m.future, rate_hz=m.rate_hz, from_ns=part.from_ns, to_ns=part.to_ns)
        if clips:
            clouds = joined(past_clouds(clips[0], history_of(clips[0]), trained.config), trained.config)
            return clouds_of(clouds[:1], encoder).points, clips[0].id
    rng = rng_of("sample")
    low, high = np.array(encoder.low), np.array(encoder.high)
    spread, dense = rng.uniform(low, high, (4000, 3)), rng.normal((low + high) / 2, (high - low) * 0.01, (8000, 3))
    cloud = np.concatenate((np.concatenate((spread, dense)), rng.random((12000, 2))), 1).astype(np.float32)
    return clouds_of([cloud], encoder).points, "made up"


def verify(folder: Path) -> dict[str, Any]:
    """Read an export as its target would; what the target's `verify` gives, "target", "passed" and "licence" beside it."""
    manifest = check_folder(folder)
    target = manifest.get("target")
    if target not in targets():
        raise WmError(f"{one_line(folder)}: target {one_line(repr(target))} is not one of {', '.join(targets())}; made by another version?")
    for key, kind in (("tensors", int), ("licence", str)):
        if not isinstance(manifest.get(key), kind):
            raise WmError(f"{one_line(folder)}: its manifest says no {key}; export again")
    report = importlib.import_module(f"worldmodel.export.{target}").verify(folder)
    passed = (report["loaded"] == report["tensors"] == report["expected"] and report["difference"] <= TOLERANCE
              and not any(report.get(key) for key in ("missing", "unexpected", "mismatched", "reasons")))  # fmt: skip
    return {"target": target, "passed": bool(passed), "licence": manifest["licence"], **report}
