"""What a frozen latent knows: a linear probe per cell, beside the same network untrained, and beside raw height and density.

Labels come from the simulator (or any log with complete boxes) and are used here only. Questions, per cell of the encoder's map that
the newest sweep touched: *vehicle* and *moving* (covered by such a box), *occupied* (something stands there within the clip's past and
future: a return more than 0.5 m above the lowest one around). Average precision on logs that the probe was not fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sensors.clips import clips_of
from sensors.data import Part
from sensors.geometry import transform_points
from sensors.rays import History, history_of, rays_of
from sensors.records import Clip, Labels
from worldmodel.batches import clouds_of, past_clouds, rng_of, state_from_ego
from worldmodel.downstream.bev_segmentation import covered, footprints, is_vehicle
from worldmodel.encoders.contract import build_encoder
from worldmodel.finetune import set_statistics
from worldmodel.labelled import grid_of, labelled_stamps
from worldmodel.trained import Trained
from worldmodel.validation import to

Array = NDArray[Any]

TASKS = ("occupied", "vehicle", "moving")
MOVING_MPS = 1.0
STANDS_M = 0.5
CELLS_PER_CLIP = 3000
EVERY_S = 0.5


def average_precision(score: Array, truth: Array) -> float:
    """Area under the precision-recall steps of scores (N,) against truth (N,) bool; NaN without positives."""
    if not truth.any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    hits = truth[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean())


def raw_features(points: Array, low: Sequence[float], cell_m: float, shape: tuple[int, int]) -> Array:
    """(H,W,6) f32 of points (N,5): log count, lowest, highest and mean height, their spread, mean intensity; zero where empty."""
    height, width = shape
    row = np.floor((points[:, 1] - low[1]) / cell_m).astype(int)
    column = np.floor((points[:, 0] - low[0]) / cell_m).astype(int)
    ok = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    cell, z, i = row[ok] * width + column[ok], points[ok, 2], points[ok, 3]
    count = np.bincount(cell, minlength=height * width).astype(np.float32)
    lowest, highest = np.full(height * width, np.inf, np.float32), np.full(height * width, -np.inf, np.float32)
    np.minimum.at(lowest, cell, z)
    np.maximum.at(highest, cell, z)
    many = np.maximum(count, 1)
    mean = np.bincount(cell, z, height * width) / many
    bright = np.bincount(cell, i, height * width) / many
    there = count > 0
    columns = (np.log1p(count), np.where(there, lowest, 0), np.where(there, highest, 0), mean, np.where(there, highest - lowest, 0), bright)
    return np.stack(columns, 1).astype(np.float32).reshape(height, width, 6)


def _targets(clip: Clip, labels: Labels, history: History, trained: Trained, shape: tuple[int, int]) -> dict[str, Array]:
    encoder, cell = trained.config.encoder, trained.model.cell_m
    to_state = state_from_ego(clip, encoder)
    here = [box for box in labels.boxes if box.stamp_ns == clip.stamp_ns]
    asked = {
        "vehicle": [box for box in here if is_vehicle(box.category)],
        "moving": [box for box in here if box.velocity is not None and np.hypot(*box.velocity) > MOVING_MPS],
    }
    out = {name: covered(footprints(boxes, to_state), grid_of(encoder, cell)) for name, boxes in asked.items()}
    clouds = [transform_points(to_state, p) for p in history.points]
    for frame in clip.future:
        rays = rays_of(clip, frame, None)
        clouds.append(transform_points(to_state @ rays.present_from_sensor, rays.directions * rays.ranges[:, None]))
    everything = np.concatenate(clouds)
    raw = raw_features(np.concatenate((everything, np.zeros((len(everything), 2), np.float32)), 1), encoder.low, cell, shape)
    out["occupied"] = raw[:, :, 4] > STANDS_M
    return out


def fit(features: Array, truth: Array, steps: int = 60) -> tuple[Array, Array, Array, float]:
    """Logistic regression with a small ridge by L-BFGS on standardised features (N,F); mean, deviation, weights and bias."""
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    x = torch.from_numpy((features - mean) / deviation).float()
    y = torch.from_numpy(truth).float()
    w = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x @ w[:-1] + w[-1], y) + 1e-4 * w[:-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return mean, deviation, w[:-1].detach().numpy(), float(w[-1].detach())


def probe(trained: Trained, parts: Sequence[Part], *, most_clips: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """Rows {task, features, ap, positives}: features are `latent` (of the exported encoder, newest sweep), `state` (after fusion), `random` (the
    same encoder untrained), `raw` (height and density); ap is None where there is no positive. Half of the logs fit the probe, the other half
    score it, at instants that have boxes; an empty list where fewer than two logs have complete labels."""
    clips: list[tuple[Clip, Labels]] = []
    m = trained.config.model
    for part in parts:
        labels = part.log.open_labels()
        if labels is None or labels.complete_fov_rad < np.pi:
            continue
        cut = partial(clips_of, part.log, past=m.past, future=m.future, rate_hz=m.rate_hz, from_ns=part.from_ns, to_ns=part.to_ns)
        boxed = {box.stamp_ns for box in labels.boxes}
        found = [clip for clip in cut() if clip.stamp_ns in boxed] or cut(at_ns=labelled_stamps(part, labels, EVERY_S))  # keyframes are on no grid
        clips += [(clip, labels) for clip in found]
    if len({clip.log.id for clip, _ in clips}) < 2:
        return []
    clips = [clips[i] for i in np.unique(np.linspace(0, len(clips) - 1, min(most_clips, len(clips))).astype(int))]
    torch.manual_seed(seed)
    untrained = build_encoder(trained.config.encoder)
    rows: dict[str, list[Array]] = {name: [] for name in ("latent", "state", "random", "raw", *TASKS)}
    sides: list[Array] = []
    logs = sorted({clip.log.id for clip, _ in clips})
    histories = [history_of(clip) for clip, _ in clips]
    newest = [past_clouds(clip, history, trained.config)[0] for (clip, _), history in zip(clips, histories, strict=True)]
    inputs = [clouds_of([cloud], trained.config.encoder) for cloud in newest]
    set_statistics(untrained, inputs[:16])
    untrained.eval()
    for (clip, labels), history, points, cloud in zip(clips, histories, newest, inputs, strict=True):
        with torch.no_grad():
            latents = trained.latents(clip, history)
            present = torch.ones(latents.shape[:2], dtype=torch.bool, device=latents.device)
            state = trained.model.fusion(latents, present)[0].float().cpu().numpy()
            latent = trained.model.encoder(to(cloud, trained.device))[0].float().cpu().numpy()
            blank = untrained(cloud)[0].numpy()
        shape = latent.shape[1:]
        raw = raw_features(points, trained.config.encoder.low, trained.model.cell_m, shape)
        targets = _targets(clip, labels, history, trained, shape)
        touched = np.flatnonzero(raw[:, :, 0].reshape(-1) > 0)
        touched = np.sort(rng_of("probe", clip.id).permutation(touched)[:CELLS_PER_CLIP])
        for name, maps in (("latent", latent), ("state", state), ("random", blank)):
            rows[name].append(maps.reshape(len(maps), -1).T[touched])
        rows["raw"].append(raw.reshape(-1, raw.shape[2])[touched])
        for name in TASKS:
            rows[name].append(targets[name].reshape(-1)[touched])
        sides.append(np.full(len(touched), logs.index(clip.log.id) % 2))
    side = np.concatenate(sides)
    joined = {name: np.concatenate(columns) for name, columns in rows.items()}
    out = []
    for task in TASKS:
        truth = joined[task]
        for name in ("latent", "state", "random", "raw"):
            mean, deviation, weight, bias = fit(joined[name][side == 0], truth[side == 0])
            score = (joined[name][side == 1] - mean) / deviation @ weight + bias
            ap = average_precision(score, truth[side == 1])
            out.append({"task": task, "features": name, "ap": ap if np.isfinite(ap) else None, "positives": float(truth[side == 1].mean()),
                        "clips": len(clips), "logs": len(logs)})  # fmt: skip
    return out
