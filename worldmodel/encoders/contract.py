"""What an encoder is: any module that turns clouds into one map each.

    build(config: worldmodel.config.Encoder) -> nn.Module      # named by --encoder my_pkg.my_mod:build

The module has `channels: int`, `cell_m: float` (side of an output cell) and `forward(clouds: Clouds) -> Tensor (B, channels, H, W)`. Rows of
the map go along y, columns along x, both upwards from `config.low`; H and W times `cell_m` span `config.low`..`config.high`. Points outside are
the encoder's to drop. Its state_dict is what `wm export` gives back, unchanged.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sensors.errors import UsageError, one_line
from worldmodel.config import Encoder


@dataclass(frozen=True)
class Clouds:
    """B clouds end to end: points (N,F) f32 with the columns that `Encoder.features` names, in the frame of the state; sizes: points of each."""

    points: Tensor
    sizes: tuple[int, ...]


def build_encoder(config: Encoder) -> nn.Module:
    """The encoder that the configuration names, checked on an empty and a small cloud."""
    if not config.build:
        from worldmodel.encoders.pillars import PillarEncoder

        return PillarEncoder(config)
    module, colon, name = config.build.partition(":")
    try:
        build = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--encoder {one_line(config.build)}: {one_line(error)}; give module:function, importable from here") from error
    if not colon:
        raise UsageError(f"--encoder {one_line(config.build)}: give module:function")
    try:
        encoder = build(config)
    except Exception as error:
        raise UsageError(f"--encoder {one_line(config.build)}: building it failed ({_said(error)})") from error
    _check(encoder, config)
    return encoder  # type: ignore[no-any-return]


def _check(encoder: nn.Module, config: Encoder) -> None:
    what = f"encoder {one_line(config.build)}"
    if not isinstance(encoder, nn.Module) or not hasattr(encoder, "channels") or not hasattr(encoder, "cell_m"):
        raise UsageError(f"{what}: not an nn.Module with `channels` and `cell_m`; see worldmodel/encoders/contract.py")
    if isinstance(encoder.channels, bool) or not isinstance(encoder.channels, int) or not 0 < float(encoder.cell_m) < np.inf:
        raise UsageError(
            f"{what}: channels {one_line(encoder.channels, 40)} is no whole number, or cell_m {one_line(encoder.cell_m, 40)} not above 0"
        )
    if stranger := next((name for name, value in encoder.state_dict().items() if not isinstance(value, Tensor)), None):
        raise UsageError(f"{what}: {one_line(stranger)} in its state_dict is no tensor, and nothing else is stored")
    training = encoder.training
    points = torch.zeros(3, len(config.features))
    points[:, 0] = torch.tensor([1.0, 2.0, 3.0])
    try:
        with torch.no_grad():
            out = encoder.eval()(Clouds(points, (3, 0)))
    except Exception as error:
        raise UsageError(f"{what}: fails on a cloud of 3 points and an empty one ({_said(error)})") from error
    encoder.train(training)
    if not isinstance(out, Tensor) or out.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"{what}: gave {one_line(out.dtype if isinstance(out, Tensor) else type(out).__name__)}, expected a map of 32 bit floats")
    width = round((config.high[0] - config.low[0]) / encoder.cell_m)
    height = round((config.high[1] - config.low[1]) / encoder.cell_m)
    if tuple(out.shape) != (2, encoder.channels, height, width):
        raise UsageError(f"{what}: gave a map of {tuple(out.shape)}, expected {(2, encoder.channels, height, width)}")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error, 160)}"
