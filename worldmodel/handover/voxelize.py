"""From a cloud to the inputs of `encoder.onnx` or `encoder.pt2`, with numpy alone.

    config = json.loads(Path("config.json").read_text())["encoder"]
    session = onnxruntime.InferenceSession("encoder.onnx")
    (bev,) = session.run(None, inputs(cloud, config))       # (1,C,H,W); rows go along y, columns along x, both upwards from `low`

The cloud (N,F) carries the columns that config["features"] names; `input` of config.json says their units and which way x points. A point is in cell
a = (p - low) / voxel, in float32, truncated, when 0 <= a < grid on every axis: the rule of spconv, OpenPCDet and mmcv.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def inputs(cloud: np.ndarray, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the graph takes, by name. Pillars without slots: points (N,F) f32, those inside; pillar (N,) i64, whose each is; cells (V,2) i64,
    row and column of each pillar. With slots: voxels (V,P,F) f32, unused slots zero; num_points (V,) i64; cells (V,2) i64.
    ValueError for a cloud of another shape, or with no point inside."""
    cloud = np.ascontiguousarray(cloud, np.float32)
    if cloud.ndim != 2 or cloud.shape[1] != len(config["features"]):
        raise ValueError(f"a cloud of shape {cloud.shape}; its columns are {', '.join(config['features'])}")
    grid = [round((high - low) / size) for low, high, size in zip(config["low"], config["high"], config["voxel"])]
    with np.errstate(invalid="ignore", over="ignore"):
        at = (cloud[:, :3] - np.float32(config["low"])) / np.float32(config["voxel"])
        inside = np.flatnonzero(((at >= 0) & (at < np.float32(grid))).all(1))
    if not len(inside):
        raise ValueError(f"none of {len(cloud)} points lies between {config['low']} and {config['high']}; the map of such a cloud is a constant")
    points, at = cloud[inside], at[inside].astype(np.int64)
    _, first, pillar = np.unique(at[:, 1] * grid[0] + at[:, 0], return_index=True, return_inverse=True)
    cells = at[first][:, [1, 0]]
    if not config["padded_slots"]:
        return {"points": points, "pillar": pillar.astype(np.int64), "cells": np.ascontiguousarray(cells)}
    number = np.empty(len(cells), np.int64)
    number[np.argsort(first)] = np.arange(len(cells))  # pillars are counted as they appear: those after max_pillars are left out
    pillar = number[pillar]
    order = np.argsort(pillar, kind="stable")
    starts = np.searchsorted(pillar[order], np.arange(len(cells)))
    slot = np.arange(len(order)) - starts[pillar[order]]
    keep = (slot < config["max_points_per_pillar"]) & (pillar[order] < config["max_pillars"])
    count = min(len(cells), config["max_pillars"])
    voxels = np.zeros((count, config["max_points_per_pillar"], cloud.shape[1]), np.float32)
    voxels[pillar[order[keep]], slot[keep]] = points[order[keep]]
    filled = np.bincount(pillar[order[keep]], minlength=count)
    return {"voxels": voxels, "num_points": filled.astype(np.int64), "cells": cells[np.argsort(first)][:count]}
