"""All of it once, small: streets are simulated, stored, learned from, forecast, probed, drawn and exported, and a page tells what came out.

About ten minutes on two cores. Every number in the page was measured in that run; four minutes of training are a taste, not a result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sensors.adapters.base import guess
from sensors.clips import clips_of
from sensors.data import Part, open_data
from sensors.errors import UsageError, WmError, one_line
from sensors.files import make_folder, write_file, write_json
from sensors.ingest import ingest
from sensors.records import Clip, Labels
from sensors.simulator.log import simulate
from sensors.store.writer import write_log
from worldmodel import pretrain, probe, rundir, validation
from worldmodel.config import Config, load_config
from worldmodel.drawing.animation import gif_bytes
from worldmodel.drawing.charts import line_chart, table
from worldmodel.drawing.page import forecast_page
from worldmodel.drawing.report import Section, picture, playing_page, write_report
from worldmodel.drawing.sector import sector_picture
from worldmodel.evaluate import Table, clips_to_evaluate, evaluate
from worldmodel.export.verify import export
from worldmodel.forecast import EVIDENCE_ONLY, MODEL, NO_EVIDENCE
from worldmodel.trained import Trained

Report = Callable[[str, int, int, str], None]
TEST_SEED = 500_000
SHOWN = (MODEL, NO_EVIDENCE, EVIDENCE_ONLY, "accumulate_nearest", "reproject_interp", "reproject_nearest", "flow", "copy")


@dataclass(frozen=True)
class Size:
    """How much of everything: simulated logs to train on and to test on, their seconds, clips evaluated, rays a sweep."""

    config: str = "demo"
    train_logs: int = 36
    test_logs: int = 8
    seconds: float = 2.6
    clips: int = 10
    rays: int = 4096


@dataclass
class Stages:
    """Wall seconds by stage."""

    report: Report
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def done(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(now - self.began, 1)
        self.began = now
        self.report(name, 1, 1, f"{self.seconds[name]:.0f} s")


def demo(output: Path, logs: Sequence[Path] = (), size: Size | None = None, report: Report | None = None) -> dict[str, Any]:
    """Make `output` with two stores, a run, its export, pictures and `report.html`; logs are raw recordings to use as well. Gives what the
    page says as plain data."""
    size = size or Size()
    say: Report = report or (lambda stage, done, total, text: None)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{one_line(output)}: is there already; delete it, or give another -o")
    if min(size.train_logs, size.test_logs, size.clips) < 1:
        raise UsageError(f"a demo of {size.train_logs} simulated streets: give at least 1")
    config = load_config(size.config)
    for path in logs:
        guess(path)
    make_folder(output)
    stages = Stages(say)
    real_train, real_test = real_parts(output / "recorded", logs, say) if logs else ([], [])
    simulate_into(output / "streets", range(size.train_logs), size.seconds, say)
    simulate_into(output / "other-streets", range(TEST_SEED, TEST_SEED + size.test_logs), size.seconds, say)
    train, test = open_data(output / "streets"), {"simulated streets of other seeds": open_data(output / "other-streets")}
    if logs:
        train += real_train
        test["recorded, not trained on"] = real_test
    stages.done("simulate and ingest")
    run = output / "run"
    train_on(train, config, run, lambda done, total, text: say("train", done, total, text))
    stages.done("train")
    trained = Trained(run)
    tables = {name: evaluate(parts, trained, methods=SHOWN, rays_per_sweep=size.rays, max_clips=size.clips) for name, parts in test.items()}
    stages.done("evaluate")
    probes = probe.probe(trained, test["simulated streets of other seeds"], most_clips=24)
    stages.done("probe")
    clip = busiest(next(iter(test.values())), config)
    forecast = trained.forecast(clip, count=12000)
    hidden = trained.forecast(clip, hide_sector_rad=(0.0, 1.047), count=12000)
    page, moving, sector = forecast_page(forecast), gif_bytes(forecast), sector_picture(hidden)
    for name, content in (("forecast.html", page.encode()), ("forecast.gif", moving), ("sector.png", sector)):
        write_file(output / name, content)
    stages.done("pictures and page")
    handed = export(run, "torch", output / "export", next(iter(test.values())))
    stages.done("export")
    result = {"seconds": stages.seconds, "tables": {name: [row.as_json() for row in rows] for name, rows in tables.items()}, "probe": probes,
              "export": handed, "clip": clip.id}  # fmt: skip
    write_json(output / "report.json", result)
    write_report(output / "report.html", "What came out of the demo", lead(train, config, stages), [
        Section("Forecasts of the next second", ["Ranges along given rays of sweeps that are still to come, in metres; lower is better. "
                                                 "That a return exists on each ray is given, where it lies is asked."],
                [forecast_table(name, rows) for name, rows in tables.items()]),
        Section("Watch it", ["Truth, forecast and the best baseline side by side; drag to turn, use the slider for time."],
                [playing_page(page, "forecast"), picture(moving, "coloured by error"), picture(sector, "a hidden sector of 60 degrees, filled in")]),
        Section("What the encoder knows", ["Average precision of a linear probe per cell on logs it was not fitted on. raw: height and density of "
                                           "the cell; random: the same network untrained."], [probe_table(probes)] if probes else []),
        Section("Training", ["Held-out clips, while it learned."], curves(run)),
        Section("What to do next", [f"The encoder is in export/, verified: {handed['loaded']} of {handed['tensors']} tensors, largest difference "
                                    f"{handed['difference']:.0e}.", "Your own logs: wm check LOG, then wm ingest LOG STORE --poses refined, then "
                                    "wm pretrain --data STORE, wm evaluate RUN --data STORE."]),
    ])  # fmt: skip
    return result


def simulate_into(store: Path, seeds: Sequence[int], seconds: float, say: Report) -> None:
    for number, seed in enumerate(seeds):
        write_log(store, simulate(seed, seconds=seconds, every=2))
        say("simulate", number + 1, len(seeds), "")


def real_parts(store: Path, logs: Sequence[Path], say: Report) -> tuple[list[Part], list[Part]]:
    """Recorded logs, ingested with refined poses: to train on, and to test on (the last log, or the last third of the only one). WmError
    where no log can be stored, or those to test on give no clip; what else is left out is said."""
    found = ingest(list(logs), store, poses="refined")
    for row in found.reasons:
        say("ingest", 0, 0, f"left out: {row.log}: {row.reason}")
    if not found.stored:
        raise WmError(f"no recording could be stored; the first, {found.reasons[0].log}: {found.reasons[0].reason}")
    train, test = (parts := open_data(store))[:-1], parts[-1:]
    if len(parts) == 1:
        log = parts[0].log
        stamps = log.sweep_stamps_ns[log.reference_lidar]
        border = int(stamps[2 * len(stamps) // 3])
        train, test = [Part(log, None, border, 1.0)], [Part(log, border, None, 1.0)]
    if not clips_to_evaluate(test):
        raise WmError(f"{test[0].log.id}: what of it would be tested on gives no clip; give a longer recording, or one more")
    return train, test


def train_on(parts: Sequence[Part], config: Config, run: Path, report: Callable[[int, int, str], None] | None) -> None:
    """Probe the machine, make the run folder, train."""
    import dataclasses

    device = validation.device_of("auto")
    autocast, channels_last = validation.probe_bf16(config, device)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, autocast=autocast, channels_last=channels_last))
    rundir.create(run, config, parts)
    pretrain.train(parts, config, run, device=device, report=report)
    pretrain.fit_point_scales(parts, run)


def busiest(parts: Sequence[Part], config: Config) -> Clip:
    """The clip with the fastest crossing traffic, where there are labels; else the first. A choice of what to show, not of what to score."""

    def motion(clip: Clip, labels: Labels | None) -> float:
        if labels is None:
            return 0.0
        here = [b for b in labels.boxes if b.stamp_ns == clip.stamp_ns and b.velocity is not None and abs(b.centre[0]) < 30 and abs(b.centre[1]) < 15]
        return max(
            (abs(float(b.velocity[1])) + 0.3 * abs(float(b.velocity[0])) for b in here if b.velocity is not None and b.centre[0] > 2), default=0.0
        )

    m = config.model
    found = [(motion(clip, labels), clip) for part in parts for labels in (part.log.open_labels(),)
             for clip in clips_of(part.log, past=m.past, future=m.future, rate_hz=m.rate_hz, from_ns=part.from_ns, to_ns=part.to_ns)]  # fmt: skip
    if not found:
        raise UsageError("the test data hold no clip; give longer logs")
    return max(found, key=lambda pair: pair[0])[1]


def lead(parts: Sequence[Part], config: Config, stages: Stages) -> str:
    seconds = sum((int(s[-1]) - int(s[0])) / 1e9 for p in parts for s in [p.log.sweep_stamps_ns[p.log.reference_lidar]])
    return (f"Trained for {stages.seconds['train']:.0f} s on {len(parts)} logs, {seconds:.0f} s of driving, with the configuration {config.name}. "
            f"Time by stage: {', '.join(f'{name} {value:.0f} s' for name, value in stages.seconds.items())}.")  # fmt: skip


def forecast_table(name: str, rows: Table) -> Any:
    methods = [m for m in SHOWN if any(r.method == m for r in rows)]
    lines = []
    for method in methods:
        line: list[object] = [method]
        for horizon in (0.2, 0.6, 1.0):
            row = next(r for r in rows if r.method == method and r.subset == "all" and r.log is None and r.horizon_s == horizon)
            line += [row.l1_mean, row.l1_median, row.chamfer]
        lines.append(line)
    columns = ["method", *(f"{what} {h} s" for h in (0.2, 0.6, 1.0) for what in ("L1", "median", "Chamfer"))]
    caption = f"{name}: {rows.logs} logs, {rows.clips} clips, {rows.seconds:.0f} s of recording; poses: {', '.join(rows.poses)}"
    return table(columns, lines, caption, lowest=range(1, len(columns)))


def probe_table(rows: Sequence[dict[str, Any]]) -> Any:
    names = list(dict.fromkeys(r["features"] for r in rows))
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    ap = {(r["features"], r["task"]): "-" if r["ap"] is None else r["ap"] for r in rows}
    lines = [[n, *(ap[n, t] for t in tasks)] for n in names]
    return table(["features", *tasks], lines, f"{rows[0]['clips']} clips of {rows[0]['logs']} simulated logs")


def curves(run: Path) -> list[Any]:
    train = {name: rundir.curve(run, f"train/{name}") for name in ("ray_forecast", "masked_rays", "occupancy", "moving", "future_latent")}
    held = {arm: rundir.curve(run, f"val/l1_{arm}") for arm in (MODEL, EVIDENCE_ONLY, NO_EVIDENCE)}
    return [line_chart(train, "step", "loss"), line_chart(held, "step", "held-out L1 (m)")]
