"""Does pretraining pay: the same head and schedule from pretrained weights, from scratch, and on frozen encoders.

A task is one file of `worldmodel/downstream/`, found by its name, with

    SCORE                                          what its score is called; higher is better
    example_of(clip, labels, config) -> example    a labelled frame; `example.log` and `example.points`, the rest is the task's
    turned(example, yaw_rad, mirror) -> example    the same scene seen otherwise, for augmentation
    targets(example, grid) -> {name: array}        what a head should say on the encoder's map
    Head(channels)                                 a module from the map (B,C,H,W) to outputs
    loss(outputs, {name: tensor}) -> tensor
    answers(outputs, grid) -> [answer]             one a frame; outputs are on the CPU
    score(examples, [answer], grid) -> float
    detections(example, answer) -> [Detection]     only of a task that finds boxes: what `worldmodel.results` writes

Labels are drawn by log: the fractions are nested and the same for every arm. Every arm trains by one rule: where its validation score has not
improved for `patience` evaluations the learning rate falls, from the best weights on, and after the last fall the training ends. That is not before
`least_steps` (a score at a threshold may fall before it rises) and not after `most_steps`. The score reported is the test score of the best
validation. Scratch gets no less time than the others.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sensors.clips import clips_at
from sensors.data import Part
from sensors.errors import UsageError, WmError, one_line
from worldmodel.batches import clouds_of, rng_of
from worldmodel.config import Config
from worldmodel.encoders.contract import Clouds
from worldmodel.labelled import grid_of, labelled_stamps
from worldmodel.pretrain import keep_freed_memory
from worldmodel.start import Start, open_start
from worldmodel.validation import to

CPU = torch.device("cpu")
MOMENTUM = 0.1
MOST_GROWTH = 10.0
ARMS = ("scratch", "pretrained", "pretrained_frozen", "random_frozen")


@dataclass(frozen=True)
class Plan:
    """batch: frames per step; rates: of the learning, one after the other; every: steps between validations; validation: share of the training logs
    held out, held_frames: how many of their frames are scored at most; every_s: spacing of the frames taken from a log; device: where it trains."""

    batch: int = 6
    rates: tuple[float, ...] = (4e-3, 1.2e-3, 4e-4)
    least_steps: int = 300
    most_steps: int = 3000
    every: int = 40
    patience: int = 4
    held_frames: int = 72
    validation: float = 0.15
    every_s: float = 0.5
    threads: int = 2
    device: torch.device = CPU

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise UsageError(f"--threads {self.threads}: give at least 1")


@dataclass(frozen=True)
class Result:
    arm: str
    fraction: float
    seed: int
    score: float
    steps: int
    seconds: float
    logs: int
    frames: int
    curve: tuple[tuple[int, float], ...]


def tasks() -> list[str]:
    package = importlib.import_module("worldmodel.downstream")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def examples(
    parts: Sequence[Part], task: ModuleType, config: Config, every_s: float, report: Callable[[int, int], None] | None = None, what: str = "training"
) -> list[Any]:
    """The labelled frames of the data, log by log; report(parts read, parts). WmError where there are none, which names what the data are for."""
    found = []
    model = config.model
    for number, part in enumerate(parts):
        if report:
            report(number, len(parts))
        labels = part.log.open_labels()
        if labels is None:
            continue
        stamps = labelled_stamps(part, labels, every_s)
        clips = clips_at(part.log, stamps, past=model.past, rate_hz=model.rate_hz, from_ns=part.from_ns)
        found += [task.example_of(clip, labels, config) for clip in clips]
    if not found:
        raise WmError(f"no log of the {what} data has labels at an instant that can be used; `wm info` says which logs have boxes, and how many of "
                      "them lie at no sweep's stamp")  # fmt: skip
    return found


def drawn(logs: Sequence[str], fraction: float) -> list[str]:
    """A share of the logs, at least one; smaller shares are part of larger ones."""
    order = rng_of("labels").permutation(sorted(logs)).tolist()
    return order[: max(1, round(fraction * len(order)))]


def _norms(encoder: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    return [m for m in encoder.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


def set_statistics(encoder: nn.Module, batches: Sequence[Any]) -> None:
    """Running statistics of a network that was never trained, as averages over the batches: what a frozen random encoder needs."""
    norms = _norms(encoder)
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    encoder.train()
    with torch.no_grad():
        for batch in batches:
            encoder(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _growth(trained: Tensor, fresh: Tensor) -> float:
    """By what factor a weight is larger than a fresh one, 1 for vectors. A norm behind it makes its size meaningless, but Adam's steps do not grow
    with it: pretrained weights of twice the size would turn half as fast as those from scratch."""
    size = float(fresh.detach().norm())
    if trained.ndim < 2 or size == 0:
        return 1.0
    return min(max(1.0, float(trained.detach().norm()) / size), MOST_GROWTH)


class Trial:
    """One arm and seed: an encoder, a head, and how they are trained."""

    def __init__(self, start: Start, arm: str, seed: int, task: ModuleType, plan: Plan) -> None:
        self.task, self.config, self.plan, self.seed = task, start.config, plan, seed
        self.frozen = arm.endswith("frozen")
        self.random = arm in ("scratch", "random_frozen")
        torch.manual_seed(seed)
        fresh = start.encoder(pretrained=False)
        self.encoder = fresh if self.random else start.encoder(pretrained=True)
        self.share_of_rate = {name: _growth(p, q) for (name, p), q in zip(self.encoder.named_parameters(), fresh.parameters(), strict=True)}
        self.grid = grid_of(start.config.encoder, float(self.encoder.cell_m))  # type: ignore[arg-type]
        torch.manual_seed(seed)
        self.head = task.Head(self.encoder.channels)
        self.encoder, self.head = self.encoder.to(plan.device), self.head.to(plan.device)
        if start.config.train.channels_last == "on":
            self.encoder, self.head = (module.to(memory_format=torch.channels_last) for module in (self.encoder, self.head))  # type: ignore[call-overload]

    def clouds(self, examples: Sequence[Any]) -> Clouds:
        return clouds_of([example.points for example in examples], self.config.encoder, self.plan.device)

    def batch(self, examples: Sequence[Any], step: int) -> tuple[Clouds, dict[str, torch.Tensor]]:
        """Clouds and targets of a step: examples drawn and turned by (seed, step) alone."""
        rng = rng_of(self.seed, "finetune", step)
        chosen = [examples[i] for i in rng.integers(len(examples), size=self.plan.batch)]
        seen = [self.task.turned(example, float(rng.uniform(-np.pi, np.pi)), bool(rng.random() < 0.5)) for example in chosen]
        wanted = [self.task.targets(example, self.grid) for example in seen]
        return self.clouds(seen), to({name: torch.from_numpy(np.stack([w[name] for w in wanted])) for name in wanted[0]}, self.plan.device)

    @torch.no_grad()
    def answers(self, examples: Sequence[Any]) -> list[Any]:
        """What the head says of each example."""
        self.encoder.eval()
        self.head.eval()
        found = []
        for first in range(0, len(examples), 8):
            with self.autocast():
                outputs = self.head(self.encoder(self.clouds(examples[first : first + 8])))
            found += self.task.answers(to(outputs, CPU), self.grid)
        return found

    def score(self, examples: Sequence[Any]) -> float:
        return float(self.task.score(examples, self.answers(examples), self.grid))

    def autocast(self) -> Any:
        return torch.autocast(self.plan.device.type, torch.bfloat16, enabled=self.config.train.autocast == "bf16")

    def train(
        self, frames: Sequence[Any], held: Sequence[Any], report: Callable[[int, float], None] | None = None
    ) -> tuple[int, list[tuple[int, float]]]:
        """Train, and keep the best weights by validation; gives the steps taken and the validation curve, of which report(step, score) hears."""
        plan = self.plan
        if self.random:
            set_statistics(self.encoder, [self.batch(frames, step)[0] for step in range(8)])
        if not self.frozen:
            for norm in _norms(self.encoder):  # a schedule of hundreds of steps needs statistics that keep up with it
                norm.momentum = MOMENTUM
        groups = [{"params": [*self.head.parameters()], "share": 1.0}]
        if not self.frozen:
            groups += [{"params": [p], "share": self.share_of_rate[name]} for name, p in self.encoder.named_parameters()]
        parameters = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
        optimizer = torch.optim.AdamW(groups, plan.rates[0], betas=(0.9, 0.99), weight_decay=1e-2)
        curve: list[tuple[int, float]] = []
        best, since, step, fall = (-float("inf"), self._weights()), 0, 0, 0
        while step < plan.most_steps:
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * plan.rates[fall] * min(1.0, (step + 1) / 30)
            self.encoder.train(not self.frozen)
            self.head.train()
            clouds, wanted = self.batch(frames, step)
            with self.autocast():
                if self.frozen:
                    with torch.no_grad():
                        latent = self.encoder(clouds)
                else:
                    latent = self.encoder(clouds)
                loss = self.task.loss(self.head(latent), wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 10.0)
            optimizer.step()
            step += 1
            if step % plan.every:
                continue
            value = self.score(held)
            curve.append((step, value))
            if report:
                report(step, value)
            if value > best[0] + 1e-4 or value == best[0] == 0:  # at 0 a detector has only not started yet
                best, since = (value, self._weights()), 0
            else:
                since += 1
            if since >= plan.patience and step >= plan.least_steps:
                fall, since = fall + 1, 0
                if fall == len(plan.rates):
                    break
                self._restore(best[1])
        self._restore(best[1])
        return step, curve

    def _weights(self) -> Any:
        return copy.deepcopy((self.encoder.state_dict(), self.head.state_dict()))

    def _restore(self, weights: Any) -> None:
        self.encoder.load_state_dict(weights[0])
        self.head.load_state_dict(weights[1])


def finetune(
    source: Path,
    train_parts: Sequence[Part],
    test_parts: Sequence[Part],
    *,
    task_name: str = "bev_segmentation",
    arms: Sequence[str] = ARMS,
    seeds: Sequence[int] = (0, 1, 2),
    fractions: Sequence[float] = (1.0,),
    plan: Plan | None = None,
    report: Callable[[int, int, str], None] | None = None,
    finished: Callable[[Trial, Result], None] | None = None,
) -> list[Result]:
    """Every arm, fraction and seed, from the run or export in `source`; pairs share their label lists, batches and head initialisation.

    finished: called with each trial after its training and its test, for what else is wanted of it."""
    plan = plan or Plan()
    if task_name not in tasks():
        raise UsageError(f"--task {one_line(task_name)}: not one of {', '.join(tasks())}")
    if wrong := sorted(set(arms) - set(ARMS)):
        raise UsageError(f"--arms {one_line(wrong[0])}: not one of {', '.join(ARMS)}")
    if wrong := [f for f in fractions if not 0 < f <= 1] or [f for i, f in enumerate(fractions) if f in fractions[:i]]:
        raise UsageError(f"--fractions {wrong[0]:g}: give shares above 0 and up to 1, each once")
    if len(set(arms)) < len(arms) or not arms or not seeds:
        raise UsageError("--arms and --seeds: give each arm once, and one seed at least")
    if plan.most_steps < 1:
        raise UsageError(f"--steps {plan.most_steps}: give at least 1")
    keep_freed_memory()
    torch.set_num_threads(plan.threads)
    torch.use_deterministic_algorithms(plan.device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    start = open_start(source)
    task = importlib.import_module(f"worldmodel.downstream.{task_name}")
    todo = [(f, s, a) for f in sorted(fractions) for s in seeds for a in arms]
    say = report or (lambda done, total, text: None)
    reading = lambda done, total: say(0, len(todo), f"logs read: {done} of {total}")  # noqa: E731
    names = sorted({part.log.id for part in train_parts if part.log.open_labels() is not None})
    held_logs = set(rng_of("held").permutation(names)[: max(1, round(plan.validation * len(names)))].tolist()) if len(names) > 2 else set(names)
    pool = [name for name in names if name not in held_logs] or names
    if len(names) <= 2:
        say(0, len(todo), "of one or two labelled logs none is held out: when a rate falls and a trial ends, the training logs decide")
    wanted = held_logs | set(drawn(pool, max(fractions)))
    train_frames = examples([part for part in train_parts if part.log.id in wanted], task, start.config, plan.every_s, reading)
    test_frames = examples(test_parts, task, start.config, plan.every_s, reading, "test")
    if overlap := {frame.log for frame in test_frames} & set(names) if test_parts is not train_parts else set():
        raise UsageError(f"log {one_line(sorted(overlap)[0])} is in the training and in the test data; take it out of one")
    held = [frame for frame in train_frames if frame.log in held_logs]
    held = [held[i] for i in np.unique(np.linspace(0, len(held) - 1, min(plan.held_frames, len(held))).astype(int))]
    results: list[Result] = []

    def heard(number: int, what: str, step: int, value: float) -> None:
        say(number, len(todo), f"{what}: step {step}, {task.SCORE} {value:.3f} on held-out logs")

    for number, (fraction, seed, arm) in enumerate(todo):
        what = f"{arm} {100 * fraction:g}% seed {seed}"
        chosen = set(drawn(pool, fraction))
        frames = [frame for frame in train_frames if frame.log in chosen]
        if not frames or not held:
            raise WmError(f"{'the logs drawn' if held else 'the logs held out'} have no labelled frame that can be used; give more logs")
        began = time.monotonic()
        trial = Trial(start, arm, seed, task, plan)
        steps, curve = trial.train(frames, held, partial(heard, number, what))
        score = trial.score(test_frames)
        result = Result(arm, fraction, seed, score, steps, round(time.monotonic() - began, 1), len(chosen), len(frames), tuple(curve))
        results.append(result)
        if finished:
            finished(trial, result)
        say(number + 1, len(todo), f"{what}: {task.SCORE} {score:.3f} after {steps} steps")
    return results


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Per fraction and arm: mean and standard deviation over seeds, and the mean paired difference to scratch."""
    rows = []
    for fraction in sorted({r.fraction for r in results}):
        scratch = {r.seed: r.score for r in results if r.arm == "scratch" and r.fraction == fraction}
        for arm in [a for a in ARMS if any(r.arm == a for r in results)]:
            these = [r for r in results if r.arm == arm and r.fraction == fraction]
            scores = np.array([r.score for r in these])
            paired = np.array([r.score - scratch[r.seed] for r in these if r.seed in scratch])
            rows.append({"fraction": fraction, "arm": arm, "seeds": len(these), "logs": these[0].logs, "frames": these[0].frames,
                         "score_mean": _finite(scores.mean()), "score_std": _finite(scores.std(ddof=1)) if len(scores) > 1 else None,
                         "minus_scratch": _finite(paired.mean()) if len(paired) else None,
                         "minus_scratch_std": _finite(paired.std(ddof=1)) if len(paired) > 1 else None,
                         "steps_mean": float(np.mean([r.steps for r in these]))})  # fmt: skip
    return rows


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [{**asdict(r), "score": _finite(r.score), "curve": [(step, _finite(value)) for step, value in r.curve]} for r in results]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
