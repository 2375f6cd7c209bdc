"""Forecasts, export, verify, fine-tuning and probe of a trained run."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import worldmodel
from sensors.clips import clips_at, clips_of
from sensors.errors import UsageError, WmError
from sensors.rays import history_of, rays_of
from sensors.records import Labels
from sensors.simulator.log import simulate
from tests.worldmodel.conftest import tiny, train
from worldmodel import finetune, probe, rundir
from worldmodel.export.verify import export, verify
from worldmodel.tools.cli import main


@pytest.fixture(scope="module")
def trained(run):
    return worldmodel.load(run)


@pytest.fixture(scope="module")
def handed(run, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "torch"
    return folder, export(run, "torch", folder, parts)


def test_every_arm_answers_every_ray(trained, parts):
    clip = clips_of(parts[0].log)[0]
    history = history_of(clip)
    rays = [rays_of(clip, frame, 200) for frame in (clip.past[-1], clip.future[0], clip.future[-1])]
    answers = trained.mixtures(clip, history, rays)
    assert set(answers) == set(trained.arms)
    for mixtures in answers.values():
        for asked, mixture in zip(rays, mixtures, strict=True):
            assert mixture.p.shape[0] == len(asked.directions) and np.isfinite(mixture.m).all() and (mixture.s > 0).all()
            np.testing.assert_allclose(mixture.p.sum(1), 1, atol=1e-4)


def test_answers_do_not_look_at_the_truth(trained, parts):
    import dataclasses

    clip = clips_of(parts[0].log)[0]
    history = history_of(clip)
    asked = rays_of(clip, clip.future[1], 100)
    told = dataclasses.replace(asked, ranges=asked.ranges * 2, intensity=asked.intensity * 0, index=asked.index * 0)
    first, second = trained.mixtures(clip, history, [asked])["model"][0], trained.mixtures(clip, history, [told])["model"][0]
    assert np.array_equal(first.m, second.m) and np.array_equal(first.p, second.p)


def test_a_forecast_has_everything_a_picture_needs(trained, parts):
    clip = clips_of(parts[0].log)[0]
    forecast = trained.forecast(clip, hide_sector_rad=(0.0, 1.0), count=300)
    assert len(forecast.futures) == 1 + len(clip.future)
    assert all(f.hidden is not None and (np.diff(f.quantiles, axis=1) >= -1e-4).all() for f in forecast.futures)
    assert sum(int(f.hidden.sum()) for f in forecast.futures) > 0
    assert forecast.futures[1].intensity.min() >= 0 and forecast.futures[1].intensity.max() <= 1
    assert "accumulate_nearest" in forecast.futures[0].baselines


def test_colour_is_forecast_where_cameras_were_in_the_training_alone(trained, parts, tmp_path_factory):
    clip = clips_of(parts[0].log)[0]
    assert not parts[0].log.cameras and trained.forecast(clip, count=16).futures[0].colour is None
    seen = [dataclasses.replace(parts[0], log=simulate(7, seconds=2.4, lidar="hdl32", cameras="front", every=2))]
    saw = worldmodel.load(train(seen, tmp_path_factory.mktemp("seen") / "run", tiny("train.steps=2")))
    colour = saw.forecast(clip, count=16).futures[0].colour
    assert colour.shape == (16, 3) and (colour > 0).all() and (colour < 1).all()


def test_without_a_future_only_the_present_can_be_asked_about(trained, parts):
    log = parts[0].log
    clip = clips_at(log, log.sweep_stamps_ns[log.reference_lidar][-1:], past=trained.config.model.past)[0]
    with pytest.raises(UsageError, match="no future frame"):
        trained.forecast(clip, count=16)
    (present,) = trained.forecast(clip, hide_sector_rad=(0.0, 1.0), count=64).futures
    assert present.horizon_s == 0 and np.isfinite(present.ranges).all()


def test_an_export_arrives_whole(handed):
    folder, report = handed
    assert report["passed"] and report["loaded"] == report["tensors"] > 20 and report["difference"] < 1e-5
    assert {"model.safetensors", "config.json", "encoder.py", "manifest.json", "sample.safetensors"} <= {p.name for p in folder.iterdir()}
    assert json.loads((folder / "manifest.json").read_text())["licence"]
    assert main(["verify", str(folder)]) == 0


def edited(folder, tmp_path, change):
    """A copy of an export whose weights were changed and whose manifest agrees with them."""
    from safetensors.numpy import load_file, save

    from sensors.files import check_folder, commit_folder

    weights = load_file(folder / "model.safetensors")
    weights = change(dict(weights))
    manifest = check_folder(folder)
    about = {k: v for k, v in manifest.items() if k not in ("files", "digest")}
    files = {e["path"]: (folder / e["path"]).read_bytes() for e in manifest["files"]}
    files["model.safetensors"] = save({k: np.ascontiguousarray(v) for k, v in weights.items()}, metadata={"format": "pt"})
    commit_folder(tmp_path / "edited", files, about)
    return tmp_path / "edited"


FIRST = "backbone_2d.blocks.0.4.weight"


@pytest.mark.parametrize("name, change, kind", [
    ("renamed", lambda w: {("other" if k == FIRST else k): v for k, v in w.items()}, "missing"),
    ("missing", lambda w: {k: v for k, v in w.items() if k != FIRST}, "missing"),
    ("extra", lambda w: w | {"more": np.zeros(3, np.float32)}, "unexpected"),
    ("narrow", lambda w: w | {FIRST: w[FIRST][:-1]}, "mismatched"),
    ("transposed", lambda w: w | {FIRST: w[FIRST].transpose(1, 0, 2, 3)}, "difference"),
    ("swapped norms", lambda w: w | {"backbone_2d.blocks.0.2.bias": w["backbone_2d.blocks.0.5.bias"] + 0.5}, "difference"),
])  # fmt: skip
def test_what_did_not_arrive_is_named(handed, tmp_path, name, change, kind):
    report = verify(edited(handed[0], tmp_path, change))
    assert not report["passed"], name
    assert report["difference"] > 1e-5 if kind == "difference" else report[kind]
    assert main(["verify", str(tmp_path / "edited")]) == 1


@pytest.mark.parametrize("field", ["target", "tensors", "licence"])
def test_a_manifest_without_what_an_export_says_is_one_line(handed, tmp_path, capsys, field):
    from sensors.files import check_folder, commit_folder

    manifest = check_folder(handed[0])
    about = {k: v for k, v in manifest.items() if k not in ("files", "digest", field)}
    commit_folder(tmp_path / "less", {e["path"]: (handed[0] / e["path"]).read_bytes() for e in manifest["files"]}, about)
    assert main(["verify", str(tmp_path / "less")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert field in line


def test_a_flipped_bit_is_refused(handed, tmp_path):
    import shutil

    shutil.copytree(handed[0], tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(WmError, match=r"model\.safetensors"):
        verify(tmp_path / "copy")


def test_finetuning_compares_all_arms_on_the_same_terms(run, parts):
    plan = finetune.Plan(batch=2, most_steps=4, every=2, patience=2, threads=1)
    said: list[tuple[int, int, str]] = []
    results = finetune.finetune(run, parts[:4], parts[4:], seeds=(0,), fractions=(0.5, 1.0), plan=plan, report=lambda *line: said.append(line))
    assert said[0] == (0, 8, "logs read: 0 of 4") and said[-1][:2] == (8, 8)
    assert any(done == 1 and text.startswith("pretrained 50% seed 0: step 2, IoU") for done, _, text in said)
    assert {(r.arm, r.fraction) for r in results} == {(a, f) for a in finetune.ARMS for f in (0.5, 1.0)}
    assert all(0 <= r.score <= 1 and r.steps <= 4 for r in results)
    half, whole = ({r.logs for r in results if r.fraction == f} for f in (0.5, 1.0))
    assert len(half) == len(whole) == 1 and half.pop() < whole.pop()
    rows = finetune.summary(results)
    assert next(r for r in rows if r["arm"] == "scratch" and r["fraction"] == 1.0)["minus_scratch"] == 0


@pytest.mark.parametrize(
    ("asked", "says"),
    [(["--fractions", "nan"], "--fractions nan"), (["--fractions", "0"], "--fractions 0"), (["--fractions", "7"], "--fractions 7"),
     (["--fractions", "0.5", "0.5"], "each once"), (["--seeds", "0"], "one seed"), (["--arms", "scratch", "scratch"], "each arm once"),
     (["--steps", "-3"], "--steps -3"), (["-o", "."], "is a folder")],
)  # fmt: skip
def test_finetuning_refuses_what_cannot_be_before_it_reads_a_frame(run, store, capsys, asked, says, monkeypatch):
    monkeypatch.setattr(finetune, "examples", lambda *rest: pytest.fail("frames were read"))
    assert main(["finetune", "--from", str(run), "--data", str(store), *asked]) == 2
    assert says in capsys.readouterr().err


def test_the_best_of_scores_below_zero_is_kept_and_what_is_no_number_is_written_as_none(run, parts, monkeypatch):
    from worldmodel.downstream import bev_segmentation
    from worldmodel.start import open_start

    start = open_start(run)
    frames = finetune.examples(parts[:1], bev_segmentation, start.config, 0.5)
    scores, heads = iter((-0.5, -0.2, -0.4, -0.6, -0.7)), []

    def score(self, examples):
        heads.append(self.head.layers[3].bias.item())
        return next(scores)

    monkeypatch.setattr(finetune.Trial, "score", score)
    plan = finetune.Plan(batch=1, rates=(1e-2,), least_steps=0, most_steps=5, every=1, patience=2, threads=1)
    trial = finetune.Trial(start, "pretrained_frozen", 0, bev_segmentation, plan)
    taken, _ = trial.train(frames, frames)
    assert taken == 4 and trial.head.layers[3].bias.item() == heads[1]
    result = finetune.Result("scratch", 1.0, 0, float("nan"), 4, 1.0, 1, 1, ((1, float("nan")),))
    assert json.loads(json.dumps([finetune.as_json([result]), finetune.summary([result])], allow_nan=False))[0][0]["score"] is None


def test_bicycles_are_no_vehicles_in_any_dataset():
    from worldmodel.downstream.bev_segmentation import is_vehicle

    assert not any(map(is_vehicle, ("vehicle.bicycle", "vehicle.motorcycle", "cyclist", "bicycle", "pedestrian")))
    assert all(map(is_vehicle, ("vehicle.car", "vehicle.bus.rigid", "vehicle.construction", "car", "van", "Truck")))


def test_finetuning_without_a_thread_is_a_question_of_usage(run, store, capsys):
    from worldmodel.tools.cli import main

    assert main(["finetune", "--from", str(run), "--data", str(store), "--threads", "0"]) == 2
    assert "--threads 0: give at least 1" in capsys.readouterr().err


def test_the_rate_falls_from_the_best_weights_on_where_validation_stands_still_but_not_at_once(run, parts, monkeypatch):
    import importlib

    from worldmodel.start import open_start

    start = open_start(run)
    task = importlib.import_module("worldmodel.downstream.bev_segmentation")
    frames = finetune.examples(parts[:1], task, start.config, 0.5)
    scores: list[float] = []
    heads = []

    def score(self, examples):
        heads.append(self.head.layers[3].bias.item())
        scores.append(0.5 if len(scores) != 3 else 0.6)  # improves once, at step 4
        return scores[-1]

    monkeypatch.setattr(finetune.Trial, "score", score)
    for least, falls, ends, best in ((0, 3, 6, 0), (7, 7, 9, 3)):
        scores.clear()
        heads.clear()
        plan = finetune.Plan(batch=1, rates=(1e-2, 0.0), least_steps=least, most_steps=10, every=1, patience=2, threads=1)
        trial = finetune.Trial(start, "pretrained_frozen", 0, task, plan)
        taken, curve = trial.train(frames, frames)
        assert taken == len(curve) == ends
        assert len(set(heads[:falls])) == falls  # it learned until then
        assert set(heads[falls:]) == {heads[best], trial.head.layers[3].bias.item()} == {heads[best]}  # with a rate of 0, from the best on


def test_running_statistics_keep_up_in_arms_that_train(run, parts):
    import importlib

    from worldmodel.start import open_start

    start = open_start(run)
    task = importlib.import_module("worldmodel.downstream.bev_segmentation")
    frames = finetune.examples(parts[:1], task, start.config, 0.5)
    plan = finetune.Plan(batch=1, most_steps=1, every=1, threads=1)
    trial = finetune.Trial(start, "pretrained", 0, task, plan)
    trial.train(frames, frames)
    momenta = {m.momentum for m in trial.encoder.modules() if isinstance(m, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)}
    assert momenta == {finetune.MOMENTUM}


def test_weights_that_have_grown_learn_in_proportion(run):
    import importlib

    from worldmodel.start import open_start

    start = open_start(run)
    grown = dataclasses.replace(start, weights={k: 3 * v if v.ndim > 1 else v for k, v in start.weights.items()})
    task = importlib.import_module("worldmodel.downstream.bev_segmentation")
    share = {arm: finetune.Trial(grown, arm, 0, task, finetune.Plan()).share_of_rate for arm in ("pretrained", "scratch")}
    assert set(share["scratch"].values()) == {1.0} and set(share["pretrained"]) == set(share["scratch"])
    once = finetune.Trial(start, "pretrained", 0, task, finetune.Plan()).share_of_rate
    for name, value in share["pretrained"].items():
        assert value == 1.0 if grown.weights[name].ndim == 1 else value > 2.5
        assert value == 1.0 or once[name] == 1.0 or value == pytest.approx(3 * once[name])


def test_smaller_label_shares_are_part_of_larger_ones():
    logs = [f"synthetic/{i}" for i in range(50)]
    assert set(finetune.drawn(logs, 0.02)) < set(finetune.drawn(logs, 0.3)) < set(finetune.drawn(logs, 1.0)) == set(logs)


def test_frozen_arms_do_not_move_the_encoder(run, parts):
    import importlib

    from worldmodel.start import open_start

    start = open_start(run)
    task = importlib.import_module("worldmodel.downstream.bev_segmentation")
    frames = finetune.examples(parts[:2], task, start.config, 0.5)
    trial = finetune.Trial(start, "pretrained_frozen", 0, task, finetune.Plan(batch=2, most_steps=2, every=1, patience=9, threads=1))
    before = {k: v.clone() for k, v in trial.encoder.state_dict().items()}
    trial.train(frames, frames)
    assert all(torch.equal(v, before[k]) for k, v in trial.encoder.state_dict().items())


def test_the_probe_compares_with_an_untrained_network_and_raw_input(run, parts, trained):
    rows = probe.probe(trained, parts, most_clips=5)
    assert {r["features"] for r in rows} == {"latent", "state", "random", "raw"} and {r["task"] for r in rows} == set(probe.TASKS)
    occupied = {r["features"]: r["ap"] for r in rows if r["task"] == "occupied"}
    assert occupied["raw"] > 0.5


def with_boxes(part, keep):
    labels = part.log.open_labels()
    boxes = tuple(box for box in labels.boxes if keep(box.stamp_ns))
    return dataclasses.replace(part, log=dataclasses.replace(part.log, open_labels=lambda: Labels(boxes, labels.categories)))


def test_the_probe_looks_at_instants_that_have_boxes_and_says_where_there_is_nothing_to_find(trained, parts):
    key = {int(part.log.sweep_stamps_ns[part.log.reference_lidar][5]) for part in parts}  # one keyframe a log, on no grid that starts at a full past
    rows = probe.probe(trained, [with_boxes(part, key.__contains__) for part in parts])
    assert {r["clips"] for r in rows} == {len(parts)} and all(r["positives"] > 0 for r in rows if r["task"] == "vehicle")
    rows = probe.probe(trained, [with_boxes(parts[0], lambda stamp: True), *(with_boxes(part, lambda stamp: False) for part in parts[1:])])
    assert rows == [] or all(r["ap"] is None or np.isfinite(r["ap"]) for r in rows)
    json.dumps(rows, allow_nan=False)


def test_a_past_unlike_that_of_training_is_refused(trained, parts):
    for past, rate_hz, words in ((3, 5.0, "3 past sweeps"), (5, 2.5, "5 past sweeps 0.40 s apart")):
        clip = clips_of(parts[0].log, past=past, future=1, rate_hz=rate_hz)[0]
        history = history_of(clip)
        with pytest.raises(UsageError, match=rf"{words}.*learned from 5 that are 0\.20 s apart"):
            trained.mixtures(clip, history, [rays_of(clip, clip.future[0], 50)])


@pytest.mark.parametrize("licences, binds", [
    (["CC0-1.0", "CC-BY-4.0"], "CC-BY-4.0"), (["CC-BY-SA-4.0", "CC BY-NC-SA 3.0", "CC-BY-4.0"], "CC BY-NC-SA 3.0"), ([], "none"),
    (["CC-BY-4.0", "Apache-2.0"], "CC-BY-4.0"), (["ACME internal use only", "CC0-1.0"], "ACME internal use only"),
    (["Open Data LICENCE of Acme", "CC-BY-4.0"], "Open Data LICENCE of Acme"), (["unknown", "CC BY-NC-SA 4.0", "b"], "b; unknown; CC BY-NC-SA 4.0"),
])  # fmt: skip
def test_the_licence_that_binds_hardest(licences, binds):
    assert rundir.strictest(licences) == binds


def test_data_without_labels_are_named(run, parts):
    with pytest.raises(WmError, match="no log of the test data has labels"):
        finetune.finetune(run, parts[:3], [with_no_labels(part) for part in parts[3:]], plan=finetune.Plan(most_steps=1, threads=1))


def with_no_labels(part):
    return dataclasses.replace(part, log=dataclasses.replace(part.log, open_labels=lambda: None))


def test_average_precision_by_hand():
    assert probe.average_precision(np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, False, True, False])) == pytest.approx((1 + 2 / 3) / 2)
