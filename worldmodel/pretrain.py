"""The training loop, and what is written down of it. No labels are opened here; which clips it sees is `worldmodel.source`'s to say."""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import pkgutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sensors.data import Part
from sensors.errors import Interrupted, UsageError, WmError, one_line
from sensors.files import write_json
from worldmodel import checkpoint, health, validation
from worldmodel.config import Config
from worldmodel.evaluate import laplace_scales
from worldmodel.model import Batch, WorldModel
from worldmodel.optimizer import optimizers_of
from worldmodel.rundir import Journal
from worldmodel.source import Source, clips_of_parts, split, without_clips

Loss = Callable[[WorldModel, Batch, Any], Tensor | None]  # None: this batch asks nothing of it

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h
SCALE_CLIPS, SCALE_RAYS = 12, 2048
PRIOR = ("rays.evidence", "rays.blind")  # the part of the model that learns at `train.lr`
STATE_RATE = 4.0  # of that, for all others: encoder, state, and how it is read
MOST_POINTLESS = 20  # steps in a row without a finite gradient
NORM_SHARE = 10  # running statistics of norms look back over one in so many of the steps so far, where their own momentum looks back farther


def objectives(weights: dict[str, float]) -> dict[str, Loss]:
    """The objectives that have a weight, by name: the function `loss` of each file in `worldmodel.objectives`,

        loss(model, batch, output) -> Tensor | None      # one number, lower is better; None: this batch asks nothing of it

    of a `WorldModel`, a `Batch` and the `Output` that it gave. UsageError for a name without a file, and where none has a weight."""
    package = importlib.import_module("worldmodel.objectives")
    known = {m.name for m in pkgutil.iter_modules(package.__path__)}
    if unknown := sorted(set(weights) - known):
        raise UsageError(f"objectives.{one_line(unknown[0])}: not one of {', '.join(sorted(known))}")
    if not any(weights.values()):
        raise UsageError("objectives: none has a weight, so there is nothing to learn")
    return {name: importlib.import_module(f"worldmodel.objectives.{name}").loss for name, weight in weights.items() if weight}


def schedule(step: int, progress: float, warmup: int) -> float:
    """Share of the peak learning rate: half a cosine of the progress (0 to 1) down to 1 %, times a linear rise over the first warmup steps."""
    return min(1.0, (step + 1) / (warmup + 1)) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def fit_point_scales(parts: Sequence[Part], run: Path) -> None:
    """Write `point_scales.json`: how far off each baseline is on training clips, which is what turns it into a distribution for its NLL."""
    write_json(run / "point_scales.json", laplace_scales(parts, rays_per_sweep=SCALE_RAYS, max_clips=SCALE_CLIPS))


@contextmanager
def _signals() -> Iterator[list[str]]:
    """A list that names the signal once SIGINT or SIGTERM arrived; a second one acts at once."""
    arrived: list[str] = []

    def note(number: int, frame: object) -> None:
        if arrived:
            raise Interrupted(f"stopped at once by a second {signal.Signals(number).name}; the last checkpoint stands")
        arrived.append(signal.Signals(number).name)

    try:
        old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        yield arrived
        return
    try:
        yield arrived
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _average_gradients(model: nn.Module, world: int) -> None:
    if world == 1:
        return
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= world
    at = 0
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = flat[at : at + grad.numel()].view_as(grad).clone()
        at += grad.numel()


def _average_buffers(model: nn.Module, world: int) -> None:
    if world == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= world


def train(
    parts: Sequence[Part],
    config: Config,
    run: Path,
    *,
    device: torch.device,
    resume: bool = False,
    strict: bool = False,
    report: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Train in the run folder (which holds config.yaml) from step 0, or from its newest whole checkpoint with resume; gives the folder.

    Raises Interrupted after saving on SIGINT and SIGTERM, and WmError where the loss stops being finite, or, with strict, where the
    health alarm sounds. report(done, total, text): progress, and with a total of 0 remarks; all ranks remark on what they alone see."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    tc = config.train
    keep_freed_memory()
    torch.set_num_threads(tc.threads)
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a seventh of a step
    clips, weights = clips_of_parts(parts, config)
    silent = without_clips(parts, clips)
    if report and silent and rank == 0:
        why = "too short, too few sweeps a second, gaps, or no poses at least every 0.5 s"
        report(0, 0, f"{len(silent)} logs give no clip ({why}): {one_line(', '.join(silent))}")
    train_rows, held_rows = split(clips, tc.validation, config.seed)
    if not train_rows:
        raise UsageError("nothing is left to train on after holding clips out; set train.validation=0 or give longer logs")
    source = Source([clips[i] for i in train_rows], [weights[i] for i in train_rows], config, rank=rank, world=world)
    held = validation.HeldOut([clips[i] for i in held_rows], config)
    model = WorldModel(config).to(device)
    if tc.channels_last == "on":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rate_of = lambda name: tc.lr if name.startswith(PRIOR) else STATE_RATE * tc.lr  # noqa: E731
    optimizers = optimizers_of(model, model.deep, rate_of, tc.weight_decay)
    losses = objectives(config.objectives)
    norms = [(m, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.momentum is not None]
    first, elapsed, preparing, best, random_rank = 0, 0.0, 0.0, math.inf, math.nan
    fitted: dict[str, Any] = {"calibration": None, "share": None}  # by the newest validation
    if resume:
        newest, bad = checkpoint.latest_whole(run)
        for line in bad:
            if strict:
                raise WmError(line)
            if report and rank == 0:
                report(0, 0, f"skipped a checkpoint: {line}")
        if newest is not None:
            checkpoint.fill(model, newest, run)
            checkpoint.restore_optimizers(optimizers, model, newest.optimizer)
            first, elapsed, preparing = newest.step, float(newest.state["elapsed_s"]), float(newest.state.get("preparing_s", 0.0))
            best, random_rank = checkpoint.mend_best(run) if rank == 0 else math.inf, float(newest.state["random_rank"] or math.nan)
            fitted = {name: newest.state[name] for name in fitted}
        if first >= tc.steps or (tc.seconds and elapsed >= tc.seconds):
            return run
    autocast = torch.autocast(device.type, torch.bfloat16) if tc.autocast == "bf16" else nullcontext()
    if first == 0 and held.clips:
        random_rank = held.rank_of(model, autocast, device)
    journal = Journal(run, first, enabled=rank == 0)

    def save(step: int, measured: dict[str, Any] | None) -> None:
        _average_buffers(model, world)
        if rank:
            return
        nonlocal best, fitted
        is_best = measured is not None and measured["loss"] < best
        if is_best and measured is not None:
            best = measured["loss"]
        if measured is not None:
            fitted = {name: measured[name] for name in fitted}
        state = {"elapsed_s": elapsed, "preparing_s": preparing, "best_loss": best if math.isfinite(best) else None, "best": is_best,
                 "random_rank": random_rank if math.isfinite(random_rank) else None, "unreadable": source.unreadable, **fitted}  # fmt: skip
        checkpoint.save(run, step, model, optimizers, state)

    with _signals() as arrived, journal:
        began = time.monotonic() - elapsed
        source.fill(report and (lambda done, total, text: report(0, tc.steps, f"clips prepared: {done} of {total}")), lambda: bool(arrived))
        # one clock for all ranks: the learning rate follows it, over the time that preparing the clips leaves
        preparing += _agreed(time.monotonic() - began - elapsed, False, world, device)[0]
        started, waited = time.monotonic(), 0.0
        tick = time.monotonic()
        step = first
        told: set[str] = set()
        pointless = 0
        for batch in source.stream(first, tc.steps):
            waited += time.monotonic() - tick
            for clip, why in {**held.unreadable, **source.unreadable}.items() if report else ():
                if clip not in told:
                    told.add(clip)
                    report(0, 0, f"{clip}: left out: {why}")
            batch = validation.to(batch, device)
            timed = max(0.0, elapsed - preparing) / max(tc.seconds - preparing, 1e-9) if tc.seconds else 0.0
            progress = max(step / tc.steps, timed)
            _set_mode(model, progress < tc.freeze_bn_at)
            for layer, momentum in norms:
                layer.momentum = max(momentum, NORM_SHARE / (NORM_SHARE + step))
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["peak"] * schedule(step, progress, tc.warmup)
            with autocast:
                output = model(batch)
                terms = {name: term for name, loss in losses.items() if (term := loss(model, batch, output)) is not None}
            none = torch.zeros((), device=device, requires_grad=True)  # a step that asks nothing of any objective changes nothing
            total = torch.stack([none, *(config.objectives[name] * term.float() for name, term in terms.items())]).sum()
            if not torch.isfinite(total):
                wrong = [name for name, term in terms.items() if not torch.isfinite(term)]
                raise WmError(f"step {step}: {', '.join(wrong) or 'the loss'} is not finite on clips {', '.join(batch.clips)}; "
                              "lower train.lr, or look at these clips with `wm check`, and resume")  # fmt: skip
            model.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            _average_gradients(model, world)
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), tc.clip_norm, error_if_nonfinite=False))
            if math.isfinite(norm):
                pointless = 0
                for optimizer in optimizers:
                    optimizer.step()
            else:
                pointless += 1
                line = f"step {step}: a gradient is not finite on clips {', '.join(batch.clips)}"
                if pointless == MOST_POINTLESS:
                    raise WmError(f"{line}, the {pointless}th step in a row; lower train.lr, and resume")
                if report:
                    report(0, 0, f"{line}; nothing is learned from it")
            step += 1
            elapsed, stopped = _agreed(time.monotonic() - began, bool(arrived), world, device)
            here_s = max(time.monotonic() - started, 1e-9)
            scalars = {f"train/{name}": float(term.detach()) for name, term in terms.items()}
            scalars |= {"train/loss": float(total.detach()), "train/lr": optimizers[0].param_groups[0]["lr"], "train/grad_norm": norm,
                        "train/clips_per_s": (step - first) * tc.clips * world / here_s, "data/wait_share": waited / here_s,
                        "sys/memory_gib": memory_gib()}  # fmt: skip
            over = step >= tc.steps or bool(tc.seconds and elapsed >= tc.seconds)
            if report:
                in_time = step + math.ceil(max(0.0, tc.seconds - elapsed) * (step - first) / here_s) if tc.seconds else tc.steps
                said = "  ".join(f"{name} {scalars[f'train/{name}']:.3f}" for name in terms)
                said += f"  wait {scalars['data/wait_share']:.0%}  {scalars['sys/memory_gib']:.1f} GiB"
                report(step, step if over else max(step + 1, min(tc.steps, in_time)), said)
            measured = None
            if held.clips and (over or step % tc.validate_every == 0) and not stopped:
                _average_buffers(model, world)
                measured = held.measure(model, autocast, device)
                scalars |= measured["scalars"]
                journal.pictures(step, held.pictures(model, autocast, device))
                line = health.alarm(measured["health"], random_rank)
                if line:
                    if strict:
                        journal.write(step, elapsed, scalars)
                        save(step, measured)
                        raise WmError(f"step {step}: {line}")
                    if report and rank == 0:
                        report(0, 0, f"ALARM at step {step}: {line}")
            journal.write(step, elapsed, scalars)
            if over or stopped or step % tc.save_every == 0 or measured is not None:
                save(step, measured)
                journal.flush()
            if stopped:
                raise Interrupted(f"{(arrived or ['a signal'])[0]}: saved at step {step}; go on with `wm pretrain --resume {run}`")
            if over:
                break
            tick = time.monotonic()
    return run


def _agreed(elapsed_s: float, stopped: bool, world: int, device: torch.device) -> tuple[float, bool]:
    """The longest time that any rank says, and whether any is to stop."""
    if world == 1:
        return elapsed_s, stopped
    said = torch.tensor([elapsed_s, stopped], dtype=torch.float64, device=device)
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return float(said[0]), bool(said[1])


def keep_freed_memory() -> None:
    """Ask glibc's allocator to keep freed memory: a step frees and takes hundreds of megabytes, and fresh pages cost a tenth of it."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 1 << 28)):
        mallopt(option, value)


def _set_mode(model: nn.Module, norms_learn: bool) -> None:
    """Training mode; the running statistics of the encoder's norms stand still for the last part of the training, and are used."""
    model.train()
    if not norms_learn:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eval()


def memory_gib() -> float:
    """Resident memory of this process."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:
        return math.nan
