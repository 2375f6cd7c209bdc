"""Forecasts as files that other programs read: PLY clouds (CloudCompare, MeshLab, Open3D) and one NPZ with everything."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldmodel.drawing import colours
from worldmodel.forecast import LEVELS, Forecast

Array = NDArray[Any]

NPZ_VERSION = 1


def ply_bytes(points: Array, columns: Mapping[str, Array]) -> bytes:
    """A binary little-endian PLY: x y z float32 in metres from points (N,3), then columns (N,) by name, u8 as uchar and all else float32.
    Column names are plain identifiers (ValueError)."""
    types = {name: "u1" if np.asarray(values).dtype == np.uint8 else "<f4" for name, values in columns.items()}
    for name in types:
        if not (name.isascii() and name.isidentifier()):
            raise ValueError(f"ply: column {name!r} is not a plain identifier")
    table = np.empty(len(points), [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), *types.items()])
    table["x"], table["y"], table["z"] = np.asarray(points, np.float32).reshape(-1, 3).T
    for name, values in columns.items():
        table[name] = values
    kinds = {"u1": "uchar", "<f4": "float"}
    lines = ["ply", "format binary_little_endian 1.0", "comment metres, ego frame of t = 0: x forward, y left, z up", f"element vertex {len(points)}"]
    lines += [f"property float {axis}" for axis in "xyz"] + [f"property {kinds[kind]} {name}" for name, kind in types.items()] + ["end_header", ""]
    return "\n".join(lines).encode() + table.tobytes()


def forecast_plys(forecast: Forecast) -> dict[str, bytes]:
    """PLY files by name: per future instant truth, model and best baseline, ``model_+0.60s.ply``, and the newest past sweep, ``observed.ply``.

    Columns: range_m, error_m (range minus truth, NaN where unknown), red green blue (by height, hot where wrong); the model's also width_m
    (of its 80 % interval), and intensity where it is forecast. Rays without an answer are left out."""
    ground_z = colours.ground_of(forecast.past)
    files = {}
    if forecast.past:
        files["observed.ply"] = ply_bytes(forecast.past[-1], _rgb(colours.by_height(forecast.past[-1], ground_z)))
    for future in forecast.futures:
        for name, ranges in (("truth", future.truth), ("model", future.ranges), ("baseline", future.baselines.get(forecast.best_baseline))):
            if ranges is None:
                continue
            known = np.isfinite(ranges)
            points, error = future.points(ranges)[known], (ranges - future.truth)[known]
            columns = {"range_m": ranges[known], "error_m": error, **_rgb(colours.tinted(colours.by_height(points, ground_z), error))}
            if name == "model":
                columns["width_m"] = (future.quantiles[:, -1] - future.quantiles[:, 0])[known]
                if future.intensity is not None:
                    columns["intensity"] = future.intensity[known]
            files[f"{name}_{future.horizon_s:+.2f}s.ply"] = ply_bytes(points, columns)
    return files


def _rgb(tint: Array) -> dict[str, Array]:
    values = np.clip(np.round(tint), 0, 255).astype(np.uint8)
    return {"red": values[:, 0], "green": values[:, 1], "blue": values[:, 2]}


def npz_bytes(forecast: Forecast) -> bytes:
    """A compressed NPZ without pickled objects (``np.load`` reads it as it is). Scalars: version, clip, run, poses, best_baseline; levels
    (L,), past_times_s (T,), horizons_s (K,); past_0.. (N,3). Per future k: present_from_sensor_k (4,4), directions_k (R,3), ranges_k (R,),
    quantiles_k (R,L), truth_k (R,), and where there are any intensity_k (R,), colour_k (R,3), hidden_k (R,); baselines (B,) names, and
    baseline_k_b (R,) the ranges of the b-th."""
    names = sorted({name for future in forecast.futures for name in future.baselines})
    arrays: dict[str, Array] = {
        "version": np.array(NPZ_VERSION), "clip": np.array(forecast.clip), "run": np.array(forecast.run), "poses": np.array(forecast.poses),
        "best_baseline": np.array(forecast.best_baseline), "levels": np.array(LEVELS), "past_times_s": np.asarray(forecast.past_times_s, np.float64),
        "horizons_s": np.array([future.horizon_s for future in forecast.futures], np.float64), "baselines": np.array(names, np.str_),
    }  # fmt: skip
    arrays |= {f"past_{i}": cloud for i, cloud in enumerate(forecast.past)}
    for k, future in enumerate(forecast.futures):
        for field in ("present_from_sensor", "directions", "ranges", "quantiles", "truth", "intensity", "colour", "hidden"):
            if (value := getattr(future, field)) is not None:
                arrays[f"{field}_{k}"] = np.asarray(value)
        arrays |= {f"baseline_{k}_{names.index(name)}": ranges for name, ranges in future.baselines.items()}
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()
