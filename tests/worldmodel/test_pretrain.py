"""Training: it learns, resumes to the bit, stops cleanly, sees collapse, and neither labels nor the future get into the input."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sensors.clips import clips_of
from sensors.data import Part
from sensors.errors import UsageError, WmError
from sensors.geometry import points_in, transform_points
from sensors.rays import rays_of
from sensors.records import Image
from sensors.simulator.log import simulate
from tests.test_check import STAMPS, street_log
from tests.worldmodel.conftest import tiny, train
from worldmodel import checkpoint, health, pretrain, rundir, validation
from worldmodel import source as source_module
from worldmodel.batches import _colours, collate, prepare, state_from_ego, visit
from worldmodel.model import WorldModel
from worldmodel.scene import AGE, PAST
from worldmodel.source import ORDERS_KEPT, Source, clips_of_parts


def digest(run, which="latest"):
    found = checkpoint.load(run, which)
    return {name: value.numpy().tobytes() for name, value in found.weights.items()}, found.step


def test_a_run_holds_what_it_promises(run):
    assert {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "tensorboard"} <= {p.name for p in run.iterdir()}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    asked = {f"train/{name}" for name in ("ray_forecast", "masked_rays", "occupancy", "moving", "future_latent")}
    assert asked | {"data/wait_share"} <= set().union(*lines)
    assert lines[-1]["val/ray_forecast"] == pytest.approx(0.5 * (lines[-1]["val/nll_model"] + lines[-1]["val/nll_model@no_evidence"]))
    environment = json.loads((run / "environment.json").read_text())
    assert environment["licence"] and len(environment["logs"]) == 5
    assert not list(run.rglob("*.pt")) + list(run.rglob("*.pkl"))


def test_half_precision_goes_all_the_way(parts, tmp_path):
    run = train(parts, tmp_path / "run", tiny("train.autocast=bf16", "train.channels_last=on", "train.steps=2"))
    _, values = rundir.curve(run, "val/nll_model")
    assert np.isfinite(values).all() and len(values) == 1


def test_training_on_one_clip_learns_it(parts, tmp_path):
    config = tiny("train.steps=40", "train.validation=0.0", "train.clips=1", "train.rotate=false", "train.flip=false", "train.scale=0.0",
                  "train.hidden_share=0.0", "train.lr=0.01")  # fmt: skip
    one = [dataclasses.replace(parts[0], to_ns=int(parts[0].log.sweep_stamps_ns[parts[0].log.reference_lidar][10]) + 1)]
    train(one, tmp_path / "run", config)
    _, losses = rundir.curve(tmp_path / "run", "train/ray_forecast")
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1.0


def test_resuming_gives_the_bits_of_the_unbroken_run(parts, tmp_path, run):
    config = tiny()
    broken = tmp_path / "run"
    rundir.create(broken, config, parts)

    def stop_at_five(done, total, text):
        if done == 5:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="plug"):
        train(parts, broken, config, report=stop_at_five)
    assert digest(broken)[1] == 4
    torch.rand(17)
    train(parts, broken, config, resume=True)
    assert digest(broken) == digest(run)
    steps = [json.loads(line)["step"] for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize("what", ["weights", "optimizer", "step"])
def test_each_thing_a_resume_restores_is_needed(parts, tmp_path, run, monkeypatch, what):
    """The control of the test above: leave one out, and the bits differ."""
    config, broken = tiny(), tmp_path / "run"
    rundir.create(broken, config, parts)

    def stop_at_five(done, total, text):
        if done == 5:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="plug"):
        train(parts, broken, config, report=stop_at_five)
    whole = checkpoint.read

    def partial(folder):
        found = whole(folder)
        fresh = {name: value.clone() + 1e-3 for name, value in found.weights.items() if value.is_floating_point()}
        changes = {"weights": {"weights": found.weights | fresh}, "optimizer": {"optimizer": {}}, "step": {"step": 3}}[what]
        return dataclasses.replace(found, **changes)

    monkeypatch.setattr(checkpoint, "read", partial)
    train(parts, broken, config, resume=True)
    monkeypatch.undo()
    assert digest(broken)[0] != digest(run)[0]


def test_resuming_on_other_data_is_refused(store, run, parts, tmp_path, capsys):
    import shutil

    from worldmodel.tools.cli import main

    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "fewer.yaml").write_text("\n".join(f"- {{store: {store}, log: {part.log.id}}}" for part in parts[1:]))
    assert main(["pretrain", "--resume", str(tmp_path / "run"), "--data", str(tmp_path / "fewer.yaml")]) == 2
    assert "began with other data (5 parts then, 4 now)" in capsys.readouterr().err
    rundir.check_same_data(run, parts)
    with pytest.raises(UsageError, match=rf"{parts[2].log.id} is not as it was"):
        rundir.check_same_data(run, [dataclasses.replace(part, weight=2.0) if part is parts[2] else part for part in parts])


def test_weights_of_another_model_are_refused_in_one_line(run, parts, tmp_path):
    import shutil

    from worldmodel.trained import Trained

    other = tmp_path / "run"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("head_latent_width: ", "head_latent_width: 1"))
    for use in (lambda: train(parts, other, rundir.read_config(other), resume=True), lambda: Trained(other)):
        with pytest.raises(WmError, match=r"step 8 does not fit its config\.yaml \(.*\); where another version made it, train anew$"):
            use()


def test_checkpoints_beyond_a_million_steps_are_the_newest(run, tmp_path):
    import shutil

    for step in (999_000, 999_500, 1_000_000, 1_000_500):
        shutil.copytree(run / "checkpoints" / "step_000008", tmp_path / "checkpoints" / f"step_{step:06d}")
    (tmp_path / "checkpoints" / "step_1000500" / "model.safetensors").write_bytes(b"")
    checkpoint._drop_old(tmp_path / "checkpoints")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_1000000", "step_1000500", "step_999500"]
    found, bad = checkpoint.latest_whole(tmp_path)
    assert found.step == 8 and len(bad) == 1 and "step_1000500" in bad[0]


def test_an_objective_that_is_not_asked_at_every_step_can_stand_alone(parts, tmp_path):
    alone = tiny("train.steps=4", *(f"objectives.{name}={int(name == 'future_latent')}" for name in tiny().objectives))
    run = train(parts, tmp_path / "run", alone)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/future_latent" in line] == [1] and all(np.isfinite(line["train/loss"]) for line in lines)


def test_a_probe_that_cannot_be_is_said(store, tmp_path, capsys):
    from worldmodel.tools.cli import main

    command = ["pretrain", "--config", "tiny", "--data", str(store), "-o", str(tmp_path / "run"), "--set", "train.steps=1", "train.warmup=1"]
    assert main([*command, "--probe", str(tmp_path / "nowhere.yaml")]) != 0 and not (tmp_path / "run").exists()  # before the training
    (tmp_path / "one.yaml").write_text(f"- {{store: {store}, log: synthetic/street-000007}}\n")
    capsys.readouterr()
    assert main([*command, "--probe", str(tmp_path / "one.yaml")]) == 0
    assert "nothing was probed" in capsys.readouterr().err


def test_a_checkpoint_is_the_one_that_was_asked_for(run):
    assert checkpoint.load(run, "step_000004").step == 4
    for which in ("nonsense", "step_999999", "step_4", "../config.yaml", "Latest"):
        with pytest.raises(UsageError, match=r"is not best, latest, or one of those kept \(step_000004, step_000008\)"):
            checkpoint.load(run, which)


def test_clips_come_in_endless_epochs_and_ranks_share_them_out(parts):
    config = tiny("train.cache_gb=8")
    clips, _ = clips_of_parts(parts, config)
    weights = np.linspace(0.3, 2.2, len(clips))
    whole = [(epoch, index) for epoch in range(40) for index in Source(clips, weights, config).order(epoch).tolist()]
    source = Source(clips, weights, config)
    positions = np.random.default_rng(0).integers(0, len(whole), 300).tolist()
    assert [source.at(position) for position in positions] == [whole[position] for position in positions]
    assert len(source.orders) <= ORDERS_KEPT
    ranks = [Source(clips, weights, config, rank=rank, world=3) for rank in range(3)]
    assert sorted(clip.id for one in ranks for clip in one.clips) == sorted(clip.id for clip in clips)
    ranks[1].fill()
    assert set(ranks[1].kept) == set(ranks[1].order(0).tolist()) and ranks[1].bytes == sum(kept.nbytes for kept in ranks[1].kept.values())
    few = [Source(clips[:2], weights[:2], config, rank=rank, world=3) for rank in range(3)]
    assert all(len(one.clips) == 2 for one in few)  # too few to share out
    assert len({tuple(one.order(epoch)) for one in few for epoch in range(6)}) > 1


def test_clips_that_do_not_all_fit_in_memory_are_prepared_once_and_seen_many_times(monkeypatch):
    """400 clips and room for 200 of them: each comes 16 times its weight an epoch, while few enough others do that it stays prepared."""
    config = tiny("train.cache_gb=0.0002", "train.steps=5000", "train.clips=4", "train.dense_clips=4", "train.prior_clips=4")
    clip = type("Clip", (), {"nbytes": int(0.0002 * 2**30) // 200})
    made = []
    monkeypatch.setattr(source_module, "prepare", lambda index, config: made.append(index) or clip)
    weights = np.where(np.arange(400) % 40 == 0, 3.0, 1.0)
    source = Source(range(400), weights, config)
    assert source.room == 200
    source.fill()
    assert len(source.kept) == len(made) in (160, 161)  # a window, and the one that was measured, if it is another
    orders = [source.order(epoch) for epoch in range(3)]
    for order in orders:
        assert (np.bincount(order, minlength=400) == 16 * weights).all()
        batches = order[: len(order) // 12 * 12].reshape(-1, 12)
        assert np.mean([len(set(batch)) for batch in batches.tolist()]) > 11
    for index in np.concatenate(orders).tolist():
        source.prepared(index)
        assert source.bytes == len(source.kept) * clip.nbytes < source.memory
    assert len(made) < 1.15 * 3 * 400  # of some 18 visits each
    assert not np.array_equal(orders[0], orders[1])
    again = Source(range(400), weights, config)
    assert again.at(len(orders[0]) + 3) == (1, int(orders[1][3])) and again.at(3) == (0, int(orders[0][3]))


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(parts, tmp_path, run):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = copy / "checkpoints" / "step_000008" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    found, bad = checkpoint.latest_whole(copy)
    assert found.step == 4 and len(bad) == 1 and "step_000008" in bad[0] and "\n" not in bad[0]
    with pytest.raises(WmError, match="step_000008"):
        train(parts, copy, tiny(), resume=True, strict=True)
    train(parts, copy, tiny(), resume=True)
    assert digest(copy) == digest(run)


def test_sigterm_saves_and_exits_130(store, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "worldmodel", "pretrain", "--config", "tiny", "--data", str(store), "-o", str(run),
               "--set", "train.steps=5000", "train.threads=1", "train.validation=0.0"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (run / "checkpoints" / "latest").exists():
        time.sleep(0.2)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 130 and "--resume" in said
    step = checkpoint.load(run, "latest").step
    assert f"saved at step {step}" in said


def test_a_log_without_clips_is_named_however_fast_the_lines_come(parts, tmp_path, capsys):
    from worldmodel.tools.terminal import reporter

    first = dataclasses.replace(parts[0], to_ns=int(parts[0].log.sweep_stamps_ns[parts[0].log.reference_lidar][3]))
    report = reporter("step")
    report(0, 9, "a line just before, which holds back the next")
    train([first, *parts[1:]], tmp_path / "run", tiny("train.steps=1", "train.validation=0.0"), report=report)
    assert (
        f"step: 1 logs give no clip (too short, too few sweeps a second, gaps, or no poses at least every 0.5 s): {parts[0].log.id}\n"
        in capsys.readouterr().err
    )


def test_a_command_that_never_began_leaves_its_folder_to_the_corrected_one(store, tmp_path, capsys):
    from worldmodel.tools.cli import main

    command = ["pretrain", "--config", "tiny", "--data", str(store), "-o", str(tmp_path / "run"), "--set", "train.threads=1", "train.steps=1"]
    for wrong, words in (("model.future=500", "no clip"), ("train.validation=0.99", "nothing is left"), ("objectives.none=1", "not one of")):
        assert main([*command, wrong]) == 2 and words in capsys.readouterr().err
    assert main([*command, "train.autocast=off", "train.channels_last=off"]) == 0 and checkpoint.load(tmp_path / "run", "latest").step == 1
    assert main(command) == 2 and "holds a run already" in capsys.readouterr().err


DAMAGED = {"empty": b"", "binary": b"\xff\xfe\0\x80", "no mapping": b"- 1\n", "a key of a number": b"1: 2\n", "a date": b"name: 2020-13-45\n"}


@pytest.mark.parametrize("how", [*DAMAGED, "cut", "unknown key", "nested key of a number", "a number that cannot be"])
def test_a_damaged_configuration_is_named_by_every_command_that_opens_the_run(untrained, store, tmp_path, capsys, how):
    from worldmodel.tools.cli import main

    run = untrained(tmp_path / "run")
    file = run / "config.yaml"
    whole = file.read_bytes()
    (run / "data.json").write_text(json.dumps({"data": [str(store)]}))
    changes = {"cut": whole[: len(whole) // 2], "unknown key": whole + b"more: 1\n",
               "nested key of a number": whole.replace(b"train:", b"train:\n  1: 2"),
               "a number that cannot be": whole.replace(b"every_s: 0.5", b"every_s: 0")}  # fmt: skip
    file.write_bytes((DAMAGED | changes)[how])
    assert file.read_bytes() != whole
    data = ["--data", str(store)]
    for command in (["evaluate", str(run), *data], ["forecast", str(run), *data], ["export", str(run), "-o", str(tmp_path / "out")],
                    ["finetune", "--from", str(run), *data, "--test", str(store)], ["pretrain", "--resume", str(run)]):  # fmt: skip
        assert main(command) == 1, command
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith(f"wm {command[0]}: "))
        assert str(file) in line and "restore it" in line


@pytest.mark.parametrize("name, words", [("gpu", "not one of cpu, cuda"), ("meta", "not one of cpu, cuda"), ("cuda:99", "GPUs here")])
def test_a_device_that_is_not_there_is_a_question_of_usage(run, store, tmp_path, capsys, name, words):
    from worldmodel.tools.cli import main

    for command in (["pretrain", "-o", str(tmp_path / "run")], ["evaluate", str(run)], ["forecast", str(run)]):
        assert main([*command, "--data", str(store), "--device", name]) == 2
        assert f"--device {name}: " in (said := capsys.readouterr().err) and words in said
    assert not (tmp_path / "run").exists() and validation.device_of("auto").type in ("cpu", "cuda")


# `wm`, but a thread of the process group that is left at the end is an error: it may ask for the interpreter when that is gone, and abort
LEAVES_NO_THREAD = """
import atexit, os, sys
from pathlib import Path
import numpy as np
from sensors.errors import WmError
from worldmodel import pretrain, source
from worldmodel.tools.cli import main

# the clock of the second process is ahead of the first one's, and what each has learned in the end is kept
rank, seconds, average = int(os.environ["RANK"]), [0.0], pretrain._average_gradients

def averaged(model, world):
    seconds[0] += (0.25, 0.4)[rank]
    average(model, world)

class Kept(pretrain.WorldModel):
    def __init__(self, config):
        super().__init__(config)
        atexit.register(lambda: np.savez(f"rank{rank}.npz", **{name: p.detach().numpy() for name, p in self.named_parameters()}))

pretrain._average_gradients, pretrain.WorldModel = averaged, Kept
pretrain.time = type("Clock", (), {"monotonic": staticmethod(lambda: seconds[0])})

# the second process can read one of its clips and no other
readable, prepare = [], source.prepare

def torn(clip, config):
    readable.append(clip.id)
    if rank == 1 and clip.id != readable[0]:
        raise WmError(f"{clip.id}: torn")
    return prepare(clip, config)

source.prepare = torn

def leave():
    left = [name for task in Path("/proc/self/task").iterdir() if "gloo" in (name := (task / "comm").read_text())]
    if left:
        print("left at exit:", left, file=sys.stderr, flush=True)
        os._exit(3)

atexit.register(leave)
sys.exit(main())
"""


def test_two_processes_train_as_one(store, tmp_path):
    run, program = tmp_path / "run", tmp_path / "program.py"
    program.write_text(LEAVES_NO_THREAD)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    changes = ["train.steps=3", "train.seconds=1", "train.threads=1", "train.clips=1", "train.warmup=0"]
    command = [*launch, "pretrain", "--config", "tiny", "--data", str(store), "-o", str(run), "--device", "cpu", "--set", *changes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert checkpoint.load(run, "latest").step == 3
    assert re.search(r"^process 1: (\S+): left out: \1: torn$", done.stderr, re.M) and "step: " in done.stderr and "process 1: 1/3" not in done.stderr
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    one, other = (np.load(tmp_path / f"rank{rank}.npz") for rank in range(2))
    assert len(one.files) > 40 and all(np.array_equal(one[name], other[name]) for name in one.files)  # the rate follows one clock


def test_collapse_is_seen(parts, tmp_path, monkeypatch):
    """Drive the encoder into giving the same vector everywhere, and the alarm stops the training."""
    monkeypatch.setattr(health, "LEAST_ROLLED", 0.0)  # nothing asks anything of the roll-out here
    config = tiny("train.steps=30", "train.validate_every=5", "train.save_every=30", "train.lr=0.03", "train.weight_decay=0.0", "train.warmup=1")
    original = pretrain.objectives

    def with_collapse(weights):
        return original(weights) | {"future_latent": lambda model, batch, output: 100 * output.latents.square().mean()}

    config = dataclasses.replace(config, objectives={"future_latent": 1.0})
    pretrain.objectives = with_collapse
    try:
        with pytest.raises(WmError, match=r"collaps|dead|rank"):
            train(parts, tmp_path / "run", config, strict=True)
    finally:
        pretrain.objectives = original


def test_a_healthy_encoder_raises_no_alarm_and_the_gauges_read_as_they_should():
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(4, 24, 48, 48, generator=generator)
    good = health.measure(gaussian)
    assert health.alarm(good, 20.0) is None and good.rank > 20 and good.dead == 0
    assert 0.7 < health.epps_pulley(torch.randn(4096, 24, generator=generator), generator) < 1.5
    constant = health.epps_pulley(torch.zeros(1000, 8), generator)
    assert constant == pytest.approx(402, rel=0.02)
    flat = torch.ones(4, 24, 48, 48) * torch.rand(24, generator=generator)[:, None, None] + 1e-6 * gaussian
    assert health.alarm(health.measure(flat), 20.0) is not None


def test_objectives_without_weight_are_not_asked():
    assert set(pretrain.objectives({"ray_forecast": 1.0, "occupancy": 0.0})) == {"ray_forecast"}
    with pytest.raises(UsageError, match="nothing to learn"):
        pretrain.objectives({"ray_forecast": 0.0})


def test_a_loss_that_is_not_finite_names_the_clips(parts, tmp_path, monkeypatch):
    original = pretrain.objectives
    monkeypatch.setattr(pretrain, "objectives", lambda w: original(w) | {"masked_rays": lambda m, b, o: torch.tensor(float("nan"))})
    with pytest.raises(WmError, match=r"masked_rays is not finite on clips synthetic/"):
        train(parts, tmp_path / "run", tiny())


def test_the_future_never_enters_the_input(parts):
    """Other truth, other future sweeps: what the model is shown stays the same to the bit."""
    config = tiny()
    clip = clips_of(parts[0].log)[0]
    prepared = prepare(clip, config)
    changed = dataclasses.replace(prepared, future=tuple(f[::-1] * 2 for f in prepared.future))
    changed.rays.columns["range"] = prepared.rays.columns["range"] * 0.5
    first = collate([visit(prepared, config, 0, 0, augment=False)], config)
    second = collate([visit(changed, config, 0, 0, augment=False)], config)
    assert torch.equal(first.clouds.points, second.clouds.points)
    for name in first.rays.__dataclass_fields__:
        assert torch.equal(torch.nan_to_num(getattr(first.rays, name).float()), torch.nan_to_num(getattr(second.rays, name).float())), name
    model = WorldModel(config).eval()
    with torch.no_grad():
        a, b = model(first), model(second)
    assert torch.equal(a.model.log_mass, b.model.log_mass) and torch.equal(a.prior.centre, b.prior.centre)


def test_no_label_is_opened_in_pretraining(parts, tmp_path):
    def refuse():
        raise AssertionError("labels were opened")

    closed = [dataclasses.replace(p, log=dataclasses.replace(p.log, open_labels=refuse)) for p in parts]
    train(closed, tmp_path / "run", tiny("train.steps=2"))


def test_what_is_withheld_is_in_no_input(parts):
    """A hidden region holds no point, and no reading of the evidence lies in it."""
    from sensors.evidence import ALONG_LIMIT_M, ALONG_M, AROUND_RAD
    from worldmodel.batches import RayTable, _withheld, rng_of

    config = tiny()
    prepared = prepare(clips_of(parts[1].log)[0], config)
    hidden = 0
    for seed in range(12):
        rng = rng_of(seed)
        kind = rng_of(seed).choice(["sector", "block", "sweep"], p=[0.55, 0.3, 0.15])
        table = RayTable(dict(prepared.rays.columns) | {"hidden": np.zeros(len(prepared.rays), bool)})
        past, scene, _, (after,) = _withheld(rng, list(prepared.past), prepared.scene, np.ones(len(prepared.past), bool), [table])
        c = after.columns
        if kind == "sweep":
            assert len(past[0]) == 0 and all(np.isnan(c[name][:, 0]).all() for name in ("nearest", "seen", "along"))
            assert np.isnan(c["around"]).all()
            assert (scene.still[:, AGE] > 0).all() and not scene.still[:, PAST].any() and not len(scene.moving)
            continue
        assert np.isnan(c["paced"]).all() and all(np.isnan(c[name][:, -1]).all() for name in ("quadrants", "interpolated", "nearest"))
        ends = (c["origin"] + c["direction"] * c["range"][:, None])[:, :2]
        lost = np.concatenate([b[~np.isin(b[:, :3].view("f4,f4,f4"), a[:, :3].copy().view("f4,f4,f4"))[:, 0]] for a, b in zip(past, prepared.past)])
        hidden += int(c["hidden"].sum())
        # whatever reading is left near a ray that ends inside does not itself lie where points were taken out
        if len(lost):
            from scipy.spatial import cKDTree

            reading = (c["origin"][:, None] + c["direction"][:, None] * np.nan_to_num(c["nearest"])[:, :, None])[..., :2]
            there = ~np.isnan(c["nearest"])
            hole = cKDTree(lost[:, :3])
            assert (hole.query(prepared.scene.still[:, :3])[0] < 1e-4).any() and not (hole.query(scene.still[:, :3])[0] < 1e-4).any()
            assert not len(scene.moving) or not (hole.query(scene.moving[:, :3])[0] < 1e-4).any()
            places = (c["origin"][:, None] + c["direction"][:, None] * ALONG_M[:, None])[..., :2]
            beside = cKDTree(lost[:, :2]).query(places)[0] < 0.95 * ALONG_LIMIT_M  # what is asked there would tell of what was taken out
            assert beside.any() and np.isnan(c["along"]).all(1)[beside].all()
            yaw = np.arctan2(c["direction"][:, 1], c["direction"][:, 0])[:, None] + AROUND_RAD[:, 0]
            along_ground = np.hypot(*c["direction"][:, :2].T)[:, None] * c["around"]
            beside = c["origin"][:, None, :2] + np.stack((np.cos(yaw), np.sin(yaw)), 2) * along_ground[..., None]
            left = ~np.isnan(c["around"])
            assert left.any()
            told = c["nearest"][:, : c["seen"].shape[1], None] + c["seen"]
            cut = np.abs(c["seen"]) >= np.nanmax(np.abs(c["seen"]))  # farther than that nobody says how far
            known = ~np.isnan(told) & ~cut
            assert known.any()
            towards = (c["origin"][:, None, None] + c["direction"][:, None, None] * told[..., None])[known]
            stays = scene.still[scene.still[:, PAST] != 0]
            seen_past = stays[:, :3] * (1 + stays[:, PAST] / np.linalg.norm(stays[:, :3], axis=1))[:, None]
            hole, rest = cKDTree(lost[:, :2]), cKDTree(np.concatenate([p[:, :2] for p in past]))
            for places, near_m in ((beside[left], 0.05), (towards[:, :2], 0.3), (seen_past[:, :2], 0.05)):
                assert not ((hole.query(places)[0] < near_m) & (rest.query(places)[0] > 0.5 + near_m)).any()
            rows = np.flatnonzero(c["hidden"])[:300]
            kept = np.concatenate([p[:, :2] for p in past])
            if len(kept):
                deep = cKDTree(kept).query(ends[rows])[0] > 3.0
                inside = rows[deep]
                gone = ~there[inside] | (np.linalg.norm(reading[inside] - ends[inside][:, None], axis=2) > 1.0)
                assert gone.all()
    assert hidden > 0


def test_evidence_is_mirrored_as_a_mirrored_street_would_have_given_it(parts):
    from sensors.rays import History, history_of, rays_of
    from worldmodel.batches import RayTable, _Turn, _turned_rays, ray_table

    clip = clips_of(parts[2].log)[0]
    past, asked = history_of(clip), rays_of(clip, clip.future[2], 800)
    mirror = np.diag([1.0, -1.0, 1.0, 1.0])
    flipped = lambda a: a * np.array([1, -1, 1], a.dtype)  # noqa: E731
    other = History(
        tuple(map(flipped, past.points)), past.intensity, past.times_s, mirror @ past.present_from_sensor @ mirror, past.elevation_step_rad
    )
    turned = dataclasses.replace(asked, present_from_sensor=mirror @ asked.present_from_sensor @ mirror, directions=flipped(asked.directions))
    table, expected = (ray_table(h, [r], np.eye(4), [3]) for h, r in ((past, asked), (other, turned)))
    found = _turned_rays(RayTable(table.columns | {"range": asked.ranges}), _Turn(0.0, -1.0, 1.0)).columns
    sweeps = len(past.points)
    for name in ("origin", "direction", "bearing", "quadrants", "interpolated", "nearest", "offsets", "angle", "seen", "along", "around", "paced"):
        a, b = (
            c[name][:, :sweeps] if name in ("quadrants", "interpolated", "nearest", "offsets", "angle") else c[name]
            for c in (found, expected.columns)
        )
        same = np.isclose(a.astype(float), b.astype(float), rtol=1e-3, atol=2e-3, equal_nan=True)
        assert same.mean() > 0.98, (name, same.mean())  # at the border of a cell or between two readings rounding decides


def test_a_foreign_encoder_trains_and_keeps_its_names(parts, tmp_path, monkeypatch):
    (tmp_path / "their_encoder.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, config):\n"
        "        super().__init__()\n"
        "        self.config, self.channels, self.cell_m = config, 6, 1.6\n"
        "        self.mix = torch.nn.Conv2d(2, 6, 3, padding=1)\n"
        "    def forward(self, clouds):\n"
        "        low, n = self.config.low, round((self.config.high[0] - self.config.low[0]) / self.cell_m)\n"
        "        maps = []\n"
        "        for p in clouds.points.split(clouds.sizes):\n"
        "            at = ((p[:, :2] - p.new_tensor(low[:2])) / self.cell_m).floor().long()\n"
        "            ok = ((at >= 0) & (at < n)).all(1)\n"
        "            flat = at[ok, 1] * n + at[ok, 0]\n"
        "            grid = torch.zeros(2, n * n).index_add(1, flat, torch.stack((torch.ones(len(flat)), p[ok, 2])))\n"
        "            maps.append(torch.log1p(grid.abs()).view(2, n, n))\n"
        "        return self.mix(torch.stack(maps))\n"
        "def build(config):\n    return Net(config)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tiny("train.steps=3")
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, build="their_encoder:build"))
    run = train(parts, tmp_path / "run", config)
    names = {n for n in checkpoint.load(run, "latest").weights if n.startswith("encoder.")}
    assert names == {"encoder.mix.weight", "encoder.mix.bias"}


def test_dense_clips_are_encoded_with_squares_hidden_and_carry_no_rays(parts):
    config = tiny("train.rotate=false", "train.flip=false", "train.scale=0.0", "train.point_drop=0.0")
    prepared = prepare(clips_of(parts[0].log)[0], config)
    dense = visit(prepared, config, 0, 0, role="dense")
    assert not len(dense.stateful) and not len(dense.prior) and not len(dense.future)
    assert np.array_equal(dense.newest, prepared.past[0])
    kept = {tuple(row) for row in np.concatenate(dense.past)[:, :3]}
    hidden = np.array([tuple(row) not in kept for row in dense.newest[:, :3]])
    assert 0.1 < hidden.mean() < 0.6
    batch = Source(*clips_of_parts(parts, config), config).batch(0)
    asked, sweeps = config.train, len(config.model.latent_sweeps)
    encoded = asked.clips + asked.dense_clips
    assert len(batch.clouds.sizes) == encoded * (1 if config.model.join_sweeps else sweeps) and len(batch.newest.sizes) == encoded
    assert len(batch.times_s) == asked.clips == len(batch.future.sizes) and len(batch.clips) == encoded + asked.prior_clips
    assert set(batch.rays.of[: batch.stateful].tolist()) == set(range(asked.clips))
    assert set(batch.rays.of[batch.stateful :].tolist()) == set(range(len(batch.clips))) - set(range(asked.clips, encoded))


def test_a_part_may_have_its_clips_cut_closer(parts):
    config = tiny()
    apart = [clip.stamp_ns for clip in clips_of_parts(parts[:1], config)[0]]
    close = [clip.stamp_ns for clip in clips_of_parts([dataclasses.replace(parts[0], every_s=0.2)], config)[0]]
    assert len(close) > len(apart) and np.allclose(np.diff(close) / 1e9, 0.2, atol=0.02)


def test_norms_know_their_statistics_when_they_stop_learning_them_early(parts, tmp_path):
    """After two dozen steps the running variance is that of the activations, and not still mostly the one that it began with."""
    found = checkpoint.load(train(parts, tmp_path / "run", tiny("train.steps=24", "train.freeze_bn_at=0.99", "encoder.bn_momentum=0.0001")))
    moved = [value for name, value in found.weights.items() if name.endswith("running_var")]
    assert moved and all((value - 1).abs().mean() > 0.2 for value in moved)


def test_the_rate_rises_and_falls_in_the_time_that_preparing_leaves(parts, tmp_path, monkeypatch):
    now = [0.0]
    fill = source_module.Source.fill

    def slow(self, *args):
        now[0] += 600
        return fill(self, *args)

    def tick():
        now[0] += 1
        return now[0]

    monkeypatch.setattr(source_module.Source, "fill", slow)
    monkeypatch.setattr(pretrain, "time", SimpleNamespace(monotonic=tick))
    said = []
    report = lambda done, total, text: said.append((done, total)) if done else None  # noqa: E731
    run = train(parts, tmp_path / "run", tiny("train.steps=400", "train.seconds=700", "train.warmup=4", "train.validation=0"), report=report)
    steps, rates = (np.asarray(column) for column in rundir.curve(run, "train/lr"))
    assert 10 < len(steps) < 60
    assert [done for done, _ in said] == list(steps) and said[-1][1] == len(steps)  # how many steps fit is told, not how many were allowed
    assert all(abs(total - len(steps)) < 4 for _, total in said[3:])
    assert (np.diff(rates[:4]) > 0).all() and rates[0] < 0.3 * rates.max() and (np.diff(rates[5:]) < 0).all() and rates[-1] < 0.1 * rates.max()
    before = digest(run)
    assert digest(train(parts, run, tiny("train.steps=400", "train.seconds=700", "train.warmup=4", "train.validation=0"), resume=True)) == before


def test_movers_lie_where_the_labels_have_moving_things(parts):
    config = tiny()
    inside = total = 0
    for part in parts:
        labels = part.log.open_labels()
        for clip in clips_of(part.log)[:2]:
            found = prepare(clip, config).movers[:, :3]
            places = transform_points(np.linalg.inv(state_from_ego(clip, config.encoder)), found)
            moving = [box for box in labels.boxes if box.stamp_ns == clip.stamp_ns and np.linalg.norm(box.velocity) > 0.5]
            hit = np.array([points_in(box, places, 0.4) for box in moving]).reshape(len(moving), -1).any(0)
            inside, total = inside + int(hit.sum()), total + len(found)
    assert total > 100 and inside > 0.7 * total


@pytest.mark.parametrize(
    ("change", "word"), [({}, None), ({"width": 160, "height": 80}, "of another size than its calibration"), (None, "unreadable")]
)
def test_colour_comes_from_images_that_fit_their_camera(change, word):
    log = street_log()
    if change is None:
        log = dataclasses.replace(log, read_image=lambda camera, index: Image(camera, int(STAMPS[index]), b"\xff\xd8\xff", 80, 40))
    else:
        log = dataclasses.replace(log, cameras={"front": dataclasses.replace(log.cameras["front"], **change)})
    (clip, *_) = clips_of(log)
    colours = _colours(clip, clip.past[-1], rays_of(clip, clip.past[-1], None))
    seen = ~np.isnan(colours).any(1)
    assert seen.any() == (word is None) and np.allclose(colours[seen], np.array([90, 120, 150]) / 255)
    assert {what for what in log.counts if "colour left out" in what} == ({f"front: images {word}, colour left out"} if word else set())


def test_best_is_pointed_at_anew_where_a_stop_or_damage_came_between(tmp_path):
    model = torch.nn.Linear(2, 2)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 1.0)):
        checkpoint.save(tmp_path, step, model, None, {"best": step < 3, "best_loss": loss})
    pointer = tmp_path / "checkpoints" / "best"
    pointer.write_text("step_000001")
    assert checkpoint.mend_best(tmp_path) == 1.0 and pointer.read_text() == "step_000002"
    (tmp_path / "checkpoints" / "step_000002" / "model.safetensors").write_bytes(b"")
    assert checkpoint.mend_best(tmp_path) == 2.0 and pointer.read_text() == "step_000001"
    (tmp_path / "checkpoints" / "step_000001" / "state.json").unlink()
    assert checkpoint.mend_best(tmp_path) == np.inf and not pointer.exists() and checkpoint.load(tmp_path).step == 3


def test_the_end_of_a_log_is_held_out_whatever_the_order_of_its_parts():
    clips, _ = clips_of_parts([Part(simulate(7, seconds=5.0, lidar="hdl32", every=2), every_s=0.2)], tiny())
    kept, held = source_module.split(clips, 0.2, 0)
    assert len(clips) > 10
    others = clips[len(clips) // 2 :] + clips[: len(clips) // 2]
    kept_too, held_too = source_module.split(others, 0.2, 0)
    assert kept and held
    for one, other in ((kept, kept_too), (held, held_too)):
        assert {clips[i].id for i in one} == {others[i].id for i in other}


def test_clips_that_cannot_be_read_are_named(parts, tmp_path, monkeypatch):
    clips, _ = clips_of_parts(parts, tiny())
    kept, held = source_module.split(clips, tiny().train.validation, tiny().seed)
    bad = {clips[kept[0]].id, clips[held[0]].id}

    def prepared(clip, config):
        if clip.id in bad:
            raise WmError(f"{clip.id}: torn")
        return prepare(clip, config)

    for module in (source_module, validation):
        monkeypatch.setattr(module, "prepare", prepared)
    said = []
    train(parts, tmp_path / "run", tiny(), report=lambda done, total, text: said.append(text))
    assert bad == {clip for clip in bad for line in said if line.startswith(f"{clip}: left out") and line.endswith("torn")}
    bad.update(clips[i].id for i in held)
    with pytest.raises(WmError, match=r"no held-out clip is readable \(.*torn\)"):
        train(parts, tmp_path / "other", tiny())


def test_steps_that_teach_nothing_are_said_and_end_the_training(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "objectives", lambda weights: {"moving": lambda model, batch, output: (0 * output.latents).sum().sqrt()})
    said = []
    with pytest.raises(WmError, match=r"gradient is not finite .* 20th step in a row"):
        train(parts, tmp_path / "run", tiny("train.steps=30", "train.validation=0"), report=lambda done, total, text: said.append(text))
    assert sum("nothing is learned from it" in line for line in said) == 19
