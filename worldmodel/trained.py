"""A trained model as a library: `worldmodel.load("runs/x").forecast(clip)`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sensors.errors import UsageError, one_line
from sensors.files import read_json
from sensors.rays import History, Rays, hide_sector, history_of, in_sector, rays_of
from sensors.records import Clip
from worldmodel import calibration, checkpoint, forecast, rundir
from worldmodel.batches import clouds_of, joined, past_clouds, ray_input, ray_table, scene_clouds, state_from_ego
from worldmodel.detail import Kept
from worldmodel.encoders.contract import Clouds
from worldmodel.forecast import EVIDENCE_ONLY, EVIDENCE_POSITIONS, MODEL, NO_EVIDENCE, POSITIONS
from worldmodel.heads.rays import Mixture, RayInput
from worldmodel.model import WorldModel
from worldmodel.scene import scene_of
from worldmodel.validation import untold_evidence, without_evidence

Array = NDArray[Any]

CHUNK = 8192
OFF_RATE = 0.3  # of the spacing of the past sweeps, that it may differ from the run's


class Trained:
    """A run's model, ready to answer. `arms`: the model itself and what its evidence says alone, the same two told nothing of the readings but
    where they lie and of which sweep they are, and the model with all evidence withheld."""

    arms = (MODEL, EVIDENCE_ONLY, POSITIONS, EVIDENCE_POSITIONS, NO_EVIDENCE)

    def __init__(self, run: Path, which: str = "best", device: str | torch.device = "cpu") -> None:
        self.run, self.device = run, torch.device(device)
        self.config = rundir.read_config(run)
        found = checkpoint.load(run, which)
        self.step = found.step
        self.calibration = calibration.checked(found.state.get("calibration"))
        self.share = calibration.checked_share(found.state.get("share"))
        self.model = WorldModel(self.config)
        checkpoint.fill(self.model, found, run)
        self.model.to(self.device).eval()
        scales = run / "point_scales.json"
        self.point_scales = read_json(scales) if scales.exists() else {}

    @property
    def checkpoint(self) -> str:
        return f"step_{self.step:06d}"

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.train.autocast == "bf16" else nullcontext()

    def _check_past(self, clip: Clip) -> None:
        """UsageError where the clip's past is not what the model has learned from."""
        model, stamps = self.config.model, np.array([frame.stamp_ns for frame in clip.past])
        spacing_s = float(np.median(np.diff(stamps))) / 1e9 if len(stamps) > 1 else 1 / model.rate_hz
        if len(stamps) != model.past or abs(spacing_s * model.rate_hz - 1) > OFF_RATE:
            raise UsageError(
                f"{one_line(clip.id)}: {len(stamps)} past sweeps {spacing_s:.2f} s apart, where the run learned from {model.past} that are "
                f"{1 / model.rate_hz:.2f} s apart; give it such clips (`wm evaluate` needs model.past=5 model.rate_hz=5)"
            )

    def _clouds(self, clip: Clip, history: History) -> Clouds:
        return clouds_of(joined(past_clouds(clip, history, self.config), self.config), self.config.encoder, self.device)

    @torch.no_grad()
    def latents(self, clip: Clip, history: History) -> torch.Tensor:
        """(1,T,C',H,W) f32 of the past sweeps that the encoder sees, newest first."""
        clouds = self._clouds(clip, history)
        with self._autocast():
            return self.model.encode(clouds, len(clouds.sizes)).float()

    @torch.no_grad()
    def raw_mixtures(self, clip: Clip, history: History, rays: Sequence[Rays], arms: Sequence[str] = arms) -> dict[str, list[Mixture]]:
        """Per arm the head's mixtures of each set of rays, calibrated, on the CPU."""
        self._check_past(clip)
        ahead = sorted({asked.horizon_s for asked in rays if asked.horizon_s > 1e-6})
        times = torch.tensor([ahead], dtype=torch.float32, device=self.device)
        clouds, to_state = self._clouds(clip, history), state_from_ego(clip, self.config.encoder)
        scene = scene_of(history, to_state, self.config.encoder)
        with self._autocast():
            latents = self.model.encode(clouds, len(clouds.sizes)).float()
            present = torch.ones(latents.shape[:2], dtype=torch.bool, device=self.device)
            states = self.model.dynamics.roll_out(self.model.fusion(latents, present), times)
            detail = self.model.detail(*scene_clouds([scene], [[0.0, *ahead]], self.device))
        steps = [ahead.index(asked.horizon_s) + 1 if asked.horizon_s > 1e-6 else 0 for asked in rays]
        out: dict[str, list[Mixture]] = {arm: [] for arm in arms}
        for asked, step in zip(rays, steps, strict=True):
            table = ray_table(history, [asked], to_state, [step])
            parts: dict[str, list[Mixture]] = {arm: [] for arm in arms}
            for first in range(0, len(table), CHUNK):
                rows = np.arange(first, min(first + CHUNK, len(table)))
                whole = ray_input(table.take(rows), np.zeros(len(rows), np.int64), self.device)
                for arm, mixture in self._answers(states, detail, whole, arms).items():
                    parts[arm].append(calibration.widened(mixture, calibration.at(self.calibration, arm, asked.horizon_s)))
            for arm in arms:
                out[arm].append(Mixture.joined(parts[arm]))
        return out

    def _answers(self, states: torch.Tensor, detail: Kept, rays: RayInput, arms: Sequence[str]) -> dict[str, Mixture]:
        head, answers = self.model.rays, {}
        with self._autocast():
            for arm, alone, asked in (
                (MODEL, EVIDENCE_ONLY, rays),
                (POSITIONS, EVIDENCE_POSITIONS, untold_evidence(rays)),
                (NO_EVIDENCE, None, without_evidence(rays)),
            ):
                if arm in arms or alone in arms:
                    prior = head.prior(asked)
                if alone is not None and alone in arms:
                    answers[alone] = head.mixture(prior.position, prior.raw, prior.candidate)
                if arm in arms:
                    answers[arm] = self.model.read(states, detail, asked, prior, self.share)
        return answers

    def mixtures(self, clip: Clip, history: History, rays: Sequence[Rays], arms: Sequence[str] = arms) -> dict[str, list[forecast.Mixture]]:
        """Per arm the range distributions of each set of rays: what evaluation asks for."""
        return {arm: [_plain(m) for m in mixtures] for arm, mixtures in self.raw_mixtures(clip, history, rays, arms).items()}

    def forecast(self, clip: Clip, hide_sector_rad: tuple[float, float] | None = None, count: int | None = None) -> forecast.Forecast:
        """Forecast of every future frame of the clip along the rays of its true returns, beside what the baselines say; without colour where no
        camera was in the training. count: rays a sweep (None: all). hide_sector_rad (centre, width): a sector about the ego that is taken out of
        all past input; the present is then forecast too, and rays into the sector are marked."""
        from worldmodel.evaluate import baselines, conditional_quantiles

        history = history_of(clip)
        frames = [*clip.future]
        if hide_sector_rad is not None:
            history = hide_sector(history, *hide_sector_rad)
            frames = [clip.past[-1], *frames]
        if not frames:
            raise UsageError(f"{one_line(clip.id)}: no future frame, whose sweep says along which rays to forecast; cut the clip by `clips_of`")
        rays = [rays_of(clip, frame, count) for frame in frames]
        answers = self.raw_mixtures(clip, history, rays, (MODEL,))[MODEL]
        saw_colour = self.model.rays.has_learned_colour
        futures = []
        for asked, mixture in zip(rays, answers, strict=True):
            levels = conditional_quantiles(_plain(mixture), np.array(forecast.LEVELS))
            local = asked.directions * asked.ranges[:, None]
            ends = local @ asked.present_from_sensor[:3, :3].T + asked.present_from_sensor[:3, 3]
            hidden = in_sector(ends, *hide_sector_rad) if hide_sector_rad is not None else None
            futures.append(forecast.RayForecast(
                asked.horizon_s, asked.present_from_sensor, asked.directions, levels[:, forecast.LEVELS.index(0.5)].astype(np.float32),
                levels.astype(np.float32), asked.ranges, {name: predict(history, asked) for name, predict in baselines().items()},
                _numpy(mixture.intensity), _numpy(mixture.colour) if saw_colour else None, hidden,
            ))  # fmt: skip
        return forecast.Forecast(clip.id, self.run.name, history.points, history.times_s, tuple(futures),
                                 clip.log.poses.source if clip.log.poses else "none", _best_baseline(futures))  # fmt: skip


def _best_baseline(futures: Sequence[forecast.RayForecast]) -> str:
    """The baseline with the least mean error over all instants (over the hidden rays where there are any), a missing answer counting as the
    farthest."""

    def error(name: str) -> float:
        errors = [np.abs(np.nan_to_num(f.baselines[name], nan=56.0) - f.truth)[slice(None) if f.hidden is None else f.hidden] for f in futures]
        return float(np.concatenate(errors).mean()) if sum(map(len, errors)) else float("inf")

    return min(futures[0].baselines, key=error)


def _numpy(value: torch.Tensor | None) -> Array | None:
    return None if value is None else value.float().cpu().numpy()


def _plain(mixture: Mixture) -> forecast.Mixture:
    return forecast.Mixture(mixture.masses().numpy(), mixture.centre.numpy(), mixture.scale.numpy())
