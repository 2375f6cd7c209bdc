"""The held-out clips of a training: how well ranges are forecast there, how sure the model may be, whether the encoder is healthy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensors.errors import UsageError, WmError, one_line
from sensors.kernels.mixture import quantiles
from sensors.records import Clip
from worldmodel import calibration, health
from worldmodel.batches import collate, prepare, visit
from worldmodel.config import Config
from worldmodel.drawing.bev import latent_image
from worldmodel.forecast import EVIDENCE_ONLY, EVIDENCE_POSITIONS, MODEL, NO_EVIDENCE, POSITIONS
from worldmodel.heads.rays import Mixture, Prior, RayInput
from worldmodel.model import Batch, WorldModel, shared
from worldmodel.objectives.future_latent import change_of, foretold, future_and_newest

MOST_CLIPS = 24
RAYS = 160


def medians(mixture: Mixture) -> NDArray[Any]:
    """(N,) f64: the median of each ray's distribution."""
    return np.asarray(quantiles(mixture.masses().cpu().numpy(), mixture.centre.cpu().numpy(), mixture.scale.cpu().numpy(), np.array([0.5]))[:, 0])


class HeldOut:
    """At most MOST_CLIPS of the clips given, spread over them, as batches of one clip each."""

    def __init__(self, clips: Sequence[Clip], config: Config) -> None:
        rows = np.unique(np.linspace(0, len(clips) - 1, min(MOST_CLIPS, len(clips))).astype(int)) if clips else []
        self.clips = [clips[i] for i in rows]
        self.config = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, rays=RAYS, prior_rays=1, instants=config.model.future),
        )
        self.unreadable: dict[str, str] = {}
        self._batches: list[Batch] | None = None

    @property
    def batches(self) -> list[Batch]:
        """Of the clips that can be read; the others are named in `unreadable`. WmError where there are clips and none can."""
        if self._batches is None:
            self._batches = []
            for position, clip in enumerate(self.clips):
                try:
                    seen = visit(prepare(clip, self.config), self.config, 0, position, augment=False)
                except WmError as error:
                    self.unreadable[clip.id] = one_line(error)
                    continue
                self._batches.append(collate([seen], self.config))
        if self.clips and not self._batches:
            raise WmError(f"no held-out clip is readable ({next(iter(self.unreadable.values()))}); run `wm check` on the store")
        return self._batches

    @torch.no_grad()
    def rank_of(self, model: WorldModel, autocast: AbstractContextManager[Any], device: torch.device) -> float:
        """Effective rank of the encoder's latents as they are."""
        model.eval()
        with autocast:
            latents = torch.cat([model.encoder(to(batch, device).clouds)[:1] for batch in self.batches[:8]])
        return health.measure(latents).rank

    @torch.no_grad()
    def measure(self, model: WorldModel, autocast: AbstractContextManager[Any], device: torch.device) -> dict[str, Any]:
        """loss (validation ray_forecast: with evidence and without, averaged), scalars, health, the calibration table and the share."""
        model.eval()
        told: list[tuple[RayInput, Prior, Tensor]] = []
        parts: dict[str, list[Mixture]] = {EVIDENCE_ONLY: [], POSITIONS: [], EVIDENCE_POSITIONS: [], NO_EVIDENCE: []}
        truth, latents, rolled, errors, copies = [], [], [], 0.0, 0.0
        for batch in self.batches:
            batch = to(batch, device)
            with autocast:
                output = model(batch)
                blind = model(dataclasses.replace(batch, rays=without_evidence(batch.rays)))
                untold = model(dataclasses.replace(batch, rays=untold_evidence(batch.rays)))
                n = batch.stateful
                rays = batch.rays.take(slice(0, n))
                told.append((rays, model.rays.prior(rays), output.change))
            parts[EVIDENCE_ONLY].append(output.prior.take(slice(n)))
            parts[POSITIONS].append(untold.model.take(slice(n)))
            parts[EVIDENCE_POSITIONS].append(untold.prior.take(slice(n)))
            parts[NO_EVIDENCE].append(blind.model.take(slice(n)))
            truth.append((batch.ranges[:n].cpu(), batch.rays.horizon_s[:n].cpu(), batch.rays.step[:n].cpu(), batch.weight[:n].cpu()))
            latents.append(output.latents[:, 0].float().cpu())
            start = output.states[:, 0].float()
            rolled += [health.rolled(start, model.dynamics.roll_out(start, batch.times_s)[:, -1])] if batch.times_s.numel() else []
            if batch.future is not None:
                with autocast:
                    change, busy = change_of(model.encoder(future_and_newest(batch)).float())
                    expected = foretold(model, batch, output)
                errors += float(((expected - change).square().mean(3) * busy).sum())
                copies += float((change.square().mean(3) * busy).sum())
        # rays where something changed are drawn more often than they are; their weights undo it
        ranges, horizon, step, weight = (torch.cat(column) for column in zip(*truth, strict=True))
        even = weight.numpy() / weight.sum().item()

        by_share = [[model.changed(prior, change, shared(rays, share)) for rays, prior, change in told] for share in calibration.SHARES.tolist()]
        share = calibration.fit_share([Mixture.joined(answers) for answers in by_share], ranges, weight)
        parts[MODEL] = by_share[calibration.SHARES.tolist().index(share)]
        scalars: dict[str, float] = {}
        table = {}
        for arm, mixtures in parts.items():
            joined = Mixture.joined(mixtures)
            table[arm] = calibration.fit(joined, ranges, horizon, step, weight)
            error = np.abs(medians(joined) - ranges.numpy())
            order = np.argsort(error)
            scalars[f"val/nll_{arm}"] = calibration.surprise_of(joined, ranges, weight)
            scalars[f"val/l1_{arm}"] = float(error @ even)
            scalars[f"val/median_{arm}"] = float(error[order][np.searchsorted(even[order].cumsum(), 0.5)])
        skill = 1 - errors / copies if copies > 1e-9 else math.nan
        state = health.measure(torch.cat(latents), skill, float(np.mean(rolled)) if rolled else math.nan)
        scalars |= state.scalars()
        loss = 0.5 * (scalars[f"val/nll_{MODEL}"] + scalars[f"val/nll_{NO_EVIDENCE}"])
        scalars["val/ray_forecast"] = loss
        return {"loss": loss, "scalars": scalars, "health": state, "calibration": table, "share": share}

    @torch.no_grad()
    def pictures(self, model: WorldModel, autocast: AbstractContextManager[Any], device: torch.device) -> dict[str, NDArray[Any]]:
        """For TensorBoard, of the first held-out clip: its latent as a picture, and the clouds of truth and forecast at the last horizon."""
        model.eval()
        if not self.batches:
            return {}
        batch = to(self.batches[0], device)
        with autocast:
            output = model(batch)
        last = batch.rays.step[: batch.stateful] == batch.rays.step.max()
        rows = torch.nonzero(last)[:, 0]
        origin, direction = batch.rays.origin[rows].cpu().numpy(), batch.rays.direction[rows].cpu().numpy()
        mixture = output.model
        forecast = medians(mixture.take(rows))[:, None].astype(np.float32)
        return {
            "bev/latent": latent_image(output.latents[0, 0].float().cpu().numpy()),
            "clouds/truth": origin + direction * batch.ranges[rows].cpu().numpy()[:, None],
            "clouds/forecast": origin + direction * forecast,
        }


def without_evidence(rays: RayInput) -> RayInput:
    return dataclasses.replace(rays, with_evidence=torch.zeros_like(rays.with_evidence))


def untold_evidence(rays: RayInput) -> RayInput:
    return dataclasses.replace(rays, told=torch.zeros_like(rays.told))


def device_of(name: str) -> torch.device:
    """What `--device` names: cpu, cuda, cuda:N, or auto, which is cuda where there is a GPU."""
    gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {one_line(name)}: not one of cpu, cuda, cuda:N, auto")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UsageError(f"--device {one_line(name)}: torch finds {gpus} GPUs here, counted from 0; `wm doctor` says why, cpu works everywhere")
    return device


def to(value: Any, device: torch.device) -> Any:
    """A batch, or any record or dictionary of tensors, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=device.type != "cpu")
    if isinstance(value, dict):
        return {name: to(each, device) for name, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: to(getattr(value, f.name), device) for f in dataclasses.fields(value)})
    return value


def probe_bf16(config: Config, device: torch.device) -> tuple[str, str]:
    """(autocast, channels_last) as resolved: what is left on `auto` is timed once on a convolution of the state's size, forward and back."""
    import time

    auto, last = config.train.autocast, config.train.channels_last
    if auto not in ("auto", "bf16", "off") or last not in ("auto", "on", "off"):
        raise UsageError(f"train.autocast is {auto!r} and train.channels_last {last!r}; they are auto, bf16 or off, and auto, on or off")
    if "auto" not in (auto, last):
        return auto, last
    width = config.encoder.widths[0]
    ny, nx = config.encoder.grid[1] // config.encoder.strides[0], config.encoder.grid[0] // config.encoder.strides[0]

    def seconds(bf16: bool, channels_last: bool) -> float:
        conv = torch.nn.Conv2d(width, width, 3, padding=1, bias=False).to(device)
        x = torch.randn(2, width, ny, nx, device=device, requires_grad=True)
        if channels_last:
            conv, x = conv.to(memory_format=torch.channels_last), x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()  # type: ignore[call-overload]
        times = []
        for _ in range(6):
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                conv(x).float().sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[2:])

    options = [
        (b, c) for b in ((False, True) if auto == "auto" else (auto == "bf16",)) for c in ((False, True) if last == "auto" else (last == "on",))
    ]
    best = min(options, key=lambda option: seconds(*option))
    return ("bf16" if best[0] else "off"), ("on" if best[1] else "off")
