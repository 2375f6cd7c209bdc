"""The pillar encoder as a graph of plain tensor operations that can be exported: everything but the search for the pillars, whose number
depends on the points. `voxelize.py` does that outside, with numpy. What the targets `onnx` and `pt2` share is here.

Shapes: N points inside, F columns, V pillars, P slots, C channels; one cloud at a time.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from sensors.errors import UsageError, WmError, one_line
from sensors.files import parse_json, read_whole
from worldmodel.config import Encoder, encoder_of
from worldmodel.encoders import standalone
from worldmodel.encoders.contract import Clouds
from worldmodel.handover import check_in_target, voxelize
from worldmodel.handover.checkpoints import read_tensors
from worldmodel.handover.folding import Column, as_target, folded
from worldmodel.trained import Trained

FIRST = "pfn_layers.0.linear.weight"
MOST_POINTS, MOST_PILLARS = 1 << 22, 1 << 20
RUNS, SECONDS = 20, 10.0


class Graph(nn.Module):
    """Pillars -> map (1,C,H,W). Without slots: points (N,F), pillar (N,), cells (V,2) as row, column. With slots: voxels (V,P,F), num_points (V,)
    and cells."""

    def __init__(self, config: Encoder) -> None:
        super().__init__()
        encoder = standalone.Encoder(asdict(config))
        self.nx, self.ny = config.grid
        self.slots = config.padded_slots
        self.pfn_layers = encoder.vfe.pfn_layers
        self.blocks, self.deblocks = encoder.backbone_2d.blocks, encoder.backbone_2d.deblocks
        self.voxel, self.low = config.voxel, config.low

    def forward(self, points: Tensor, pillar: Tensor, cells: Tensor) -> Tensor:
        values = self.padded(points, pillar, cells) if self.slots else self.grouped(points, pillar, cells)
        canvas = values.new_zeros(self.ny * self.nx, values.shape[1]).index_put((cells[:, 0] * self.nx + cells[:, 1],), values)
        x = canvas.t().reshape(1, -1, self.ny, self.nx)
        lifted = []
        for block, deblock in zip(self.blocks, self.deblocks, strict=True):
            x = block(x)
            lifted.append(deblock(x))
        return torch.cat(lifted, 1)

    def centres(self, cells: Tensor) -> Tensor:
        """(V,3) of cells (V,2)."""
        size = torch.tensor(self.voxel, dtype=torch.float32)
        at = torch.cat((cells[:, 1:], cells[:, :1], torch.zeros_like(cells[:, :1])), 1)
        return at.float() * size + (size / 2 + torch.tensor(self.low, dtype=torch.float32))

    def grouped(self, points: Tensor, pillar: Tensor, cells: Tensor) -> Tensor:
        xyz = points[:, :3]
        sums = points.new_zeros(cells.shape[0], 4)
        sums = sums.scatter_add(0, pillar[:, None].expand(-1, 4), torch.cat((xyz, torch.ones_like(xyz[:, :1])), 1))
        mean = sums[:, :3] / sums[:, 3:]
        x = torch.cat((points, xyz - mean.index_select(0, pillar), xyz - self.centres(cells).index_select(0, pillar)), 1)
        for layer in self.pfn_layers:
            y = torch.relu(layer.norm(layer.linear(x)))
            top = y.new_zeros(cells.shape[0], y.shape[1]).scatter_reduce(0, pillar[:, None].expand(-1, y.shape[1]), y, "amax")
            x = top if layer.last else torch.cat((y, top.index_select(0, pillar)), 1)
        return x

    def padded(self, voxels: Tensor, num_points: Tensor, cells: Tensor) -> Tensor:
        xyz = voxels[:, :, :3]
        mean = xyz.sum(1, keepdim=True) / num_points[:, None, None].float()
        there = (torch.arange(voxels.shape[1])[None, :] < num_points[:, None])[:, :, None].float()
        x = torch.cat((voxels, xyz - mean, xyz - self.centres(cells)[:, None]), 2) * there
        for layer in self.pfn_layers:
            y = layer.linear(x)
            y = torch.relu(layer.norm(y.flatten(0, 1))).reshape(y.shape)
            top = y.amax(1, keepdim=True)
            x = top if layer.last else torch.cat((y, top.expand(-1, x.shape[1], -1)), 2)
        return x[:, 0]


def input_names(config: Encoder) -> list[str]:
    return ["voxels", "num_points", "cells"] if config.padded_slots else ["points", "pillar", "cells"]


def dynamic_shapes(config: Encoder) -> tuple[dict[int, Any], ...]:
    """The axes that a cloud decides, by input."""
    pillars = torch.export.Dim("pillars", min=1, max=MOST_PILLARS)
    points = pillars if config.padded_slots else torch.export.Dim("points", min=1, max=MOST_POINTS)
    return {0: points}, {0: points}, {0: pillars}


def example(config: Encoder) -> tuple[Tensor, ...]:
    """Inputs to trace with: no axis of length 1, which would be taken for a constant, and no data of anybody's."""
    cells = torch.tensor([[0, 0], [0, 1], [1, 0]])
    if config.padded_slots:
        return torch.zeros(3, config.max_points_per_pillar, len(config.features)), torch.ones(3, dtype=torch.long), cells
    return torch.zeros(7, len(config.features)), torch.tensor([0, 0, 1, 1, 1, 2, 2]), cells


def columns(encoder: Encoder, intensity: float | None) -> tuple[Column, ...]:
    """Our own columns, in our order; intensity: the full scale of the deployer's, None for 0..1."""
    return tuple(Column(name, (intensity or 1.0) if name == "intensity" else 1.0) for name in encoder.features)


def prepared(trained: Trained, about: dict[str, Any], sample: Tensor) -> tuple[Graph, dict[str, bytes], dict[str, str]]:
    """The graph of a run's encoder with folded weights, the files that go beside it, and what is written into it as metadata.

    sample (N,F): a cloud with the encoder's columns, which is stored as the deployer gives it. UsageError for an encoder of somebody's own."""
    config = trained.config.encoder
    if config.build:
        raise UsageError(
            f"the run's encoder is {one_line(config.build)}, your own: take model.safetensors of its checkpoint, keys `encoder.*`, unchanged"
        )
    theirs = columns(config, about["intensity"])
    encoder = trained.model.encoder.float().eval().cpu()
    with torch.no_grad():
        bev = encoder(Clouds(sample, (len(sample),)))
    weights = {name.partition(".")[2]: value.detach().contiguous().clone() for name, value in encoder.state_dict().items()}
    weights[FIRST] = folded(weights[FIRST], config.features, theirs)
    graph = Graph(config).eval()
    graph.load_state_dict(weights)
    settings = asdict(config)
    files = {
        "config.json": json.dumps({"encoder": settings, "input": about["input"]}, indent=1).encode(),
        "model.safetensors": save_tensors(weights, metadata={"format": "pt"}),
        "sample.safetensors": save_tensors({"points": as_target(sample, config.features, theirs).contiguous(), "map": bev.contiguous()}),
        "voxelize.py": Path(voxelize.__file__).read_bytes(),
        "check_in_target.py": Path(check_in_target.__file__).read_bytes(),
    }
    return graph, files, metadata_of(config, about["input"])


def metadata_of(config: Encoder, expected: dict[str, Any]) -> dict[str, str]:
    """What a file says of its input by itself: texts, of which lists are JSON."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()
    return {
        "wm_version": version("driving-worldmodel"), "config_sha256": digest, "range": json.dumps([*config.low, *config.high]),
        "voxel": json.dumps(config.voxel), "features": json.dumps(config.features), "intensity": str(expected.get("intensity")),
        "frame": str(expected.get("frame")), "map": "rows along y, columns along x, both upwards from the low end of the range",
    }  # fmt: skip


class Stored:
    """An export as it lies there: the graph in torch with its weights, `cloud` (N,F) as the deployer gives it, and our map `bev` (1,C,H,W) of it.
    WmError for anything that is not what `prepared` writes."""

    def __init__(self, folder: Path) -> None:
        what = one_line(folder)
        tree = parse_json(read_whole(folder / "config.json", 1 << 20), f"{what}/config.json")
        if not isinstance(tree, dict) or not isinstance(tree.get("input"), dict):
            raise WmError(f"{what}/config.json: no configuration of an encoder; export the run again")
        self.config = encoder_of(tree.get("encoder", {}), f"{what}/config.json")
        weights, sample = (read_tensors(folder / f"{name}.safetensors") for name in ("model", "sample"))
        if not {"points", "map"} <= sample.keys():
            raise WmError(f"{what}/sample.safetensors: no cloud with its map; export the run again")
        self.cloud, self.bev = sample["points"], sample["map"]
        if self.cloud.ndim != 2 or not torch.isfinite(self.bev).all() or not self.bev.any():
            raise WmError(f"{what}/sample.safetensors: no cloud with a finite map that is not empty; export the run again")
        if sum(self.config.layers) + len(self.config.pfn_widths) > len(weights):
            raise WmError(f"{what}/config.json: more layers than there are tensors; export the run again")
        try:
            with torch.device("meta"):  # nothing is allocated before every shape agrees
                self.graph = Graph(self.config).eval()
            self.graph.load_state_dict(weights, assign=True)
        except (RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise WmError(f"{what}: model.safetensors does not fit config.json ({one_line(error, 160)}); export the run again") from error
        self.metadata = metadata_of(self.config, tree["input"])

    def inputs(self, share: float = 1.0) -> dict[str, np.ndarray]:
        """What the graph takes of the first `share` of the stored cloud."""
        try:
            return voxelize.inputs(self.cloud[: max(1, int(len(self.cloud) * share))].numpy(), asdict(self.config))
        except ValueError as error:
            raise WmError(f"the stored cloud: {one_line(error, 200)}; give other logs by --data") from error

    def differences(self, run: Callable[[dict[str, np.ndarray]], Tensor]) -> dict[str, Any]:
        """Runs two sizes of cloud through `run` and through torch: {"difference", "absolute", "largest", "sizes"}, the first as share of the
        map's largest value where that is above 1 (float32 rounds in proportion), the last (points, pillars) of each."""
        absolute, sizes, largest = 0.0, [], float(self.bev.abs().max())
        for share in (1.0, 0.3):
            given = self.inputs(share)
            with torch.no_grad():
                ours = self.graph(*(torch.from_numpy(value) for value in given.values()))
            theirs = run(given)
            references = [ours, self.bev] if share == 1.0 else [ours]
            if any(theirs.shape != reference.shape for reference in references):
                raise WmError(f"the graph gives a map of {tuple(theirs.shape)}, ours is {tuple(self.bev.shape)}; export the run again")
            worst = [float((theirs - reference).abs().max()) for reference in references]
            absolute = max([absolute, *worst]) if all(value == value for value in worst) else float("nan")
            first = next(iter(given.values()))
            sizes.append([int(given["num_points"].sum()) if self.config.padded_slots else len(first), len(given["cells"])])
        return {"difference": absolute / max(1.0, largest), "absolute": absolute, "largest": largest, "sizes": sizes}


def median_ms(call: Callable[[], Any]) -> float:
    """Median wall time of RUNS calls after one, of fewer where they take longer than SECONDS together."""
    call()
    times: list[float] = []
    while len(times) < RUNS and sum(times) < SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(1000 * statistics.median(times), 3)
