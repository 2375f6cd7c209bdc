"""Pictures from straight above, as (H,W,3) u8 arrays for TensorBoard and the report: x (forward) points up, y (left) points left."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldmodel.drawing import colours

Array = NDArray[Any]


def cloud_image(points: Array, reach_m: float = 40.0, cell_m: float = 0.25, ground_z: float | None = None) -> Array:
    """(n,n,3) u8, n = 2 reach / cell: points (N,3) of the ego frame within |x|, |y| < reach_m, a cell coloured by the height of its highest
    point over ground_z (None: guessed from the points) and lit by how many it holds."""
    n = round(2 * reach_m / cell_m)
    points = np.asarray(points, np.float32).reshape(-1, 3)
    points = points[np.isfinite(points).all(axis=1)]
    row, column = np.floor((reach_m - points[:, 0]) / cell_m), np.floor((reach_m - points[:, 1]) / cell_m)
    inside = (row >= 0) & (row < n) & (column >= 0) & (column < n)
    cell = (row[inside] * n + column[inside]).astype(np.int64)
    highest = np.full(n * n, -np.inf, np.float32)
    np.maximum.at(highest, cell, points[inside, 2])
    count = np.bincount(cell, minlength=n * n)
    ground = colours.ground_of((points,)) if ground_z is None else ground_z
    image = np.empty((n * n, 3), np.float32)
    image[:] = colours.BACKGROUND
    used = count > 0
    light = (0.55 + 0.45 * np.minimum(np.log2(count[used]) / 4, 1))[:, None]
    image[used] = light * colours.ramp(highest[used] - ground, colours.HEIGHT, *colours.HEIGHT_SPAN_M)
    return np.round(image).astype(np.uint8).reshape(n, n, 3)


def latent_image(latent: Array) -> Array:
    """(W,H,3) u8 of a latent map (C,H,W) whose rows are y and columns x, both ascending: its three strongest principal components as red,
    green and blue, each from its 1st to its 99th percentile. Signs are fixed so that a picture does not flip from step to step: a component's
    largest weight is positive. Maps with fewer than three channels leave blue, or green and blue, at mid grey."""
    channels, height, width = latent.shape
    cells = np.nan_to_num(np.asarray(latent, np.float64).reshape(channels, -1).T)
    cells = cells - cells.mean(axis=0)
    _, vectors = np.linalg.eigh(cells.T @ cells)
    vectors = vectors[:, ::-1][:, :3]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])])
    image = np.full((height * width, 3), 127, np.uint8)
    for c, component in enumerate((cells @ vectors).T):
        low, high = np.percentile(component, (1, 99))
        if high - low > 1e-12:
            image[:, c] = np.round(np.clip((component - low) / (high - low), 0, 1) * 255)
    return np.ascontiguousarray(image.reshape(height, width, 3).transpose(1, 0, 2)[::-1, ::-1])


def map_image(values: Array, low: float | None = None, high: float | None = None) -> Array:
    """(W,H,3) u8 of one map (H,W), rows y and columns x: dark to light from low to high (None: its smallest and largest finite value)."""
    values = np.asarray(values, np.float32)
    finite = values[np.isfinite(values)]
    low = float(finite.min(initial=0)) if low is None else low
    high = float(finite.max(initial=low)) if high is None else high
    image = colours.ramp(values.ravel(), colours.LATENT, low, high).astype(np.uint8)
    return np.ascontiguousarray(image.reshape(*values.shape, 3).transpose(1, 0, 2)[::-1, ::-1])
