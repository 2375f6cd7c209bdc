"""Detection fine-tuning: targets, losses, scores, and the road from an export to the development kit's figure."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from sensors.adapters.base import open_source
from sensors.adapters.nuscenes import keyframes, tables_of
from sensors.clips import clips_at, clips_of
from sensors.data import Part, open_data
from sensors.errors import UsageError, WmError
from sensors.files import check_folder, commit_folder
from sensors.formats.detections import CLASSES
from sensors.formats.nuscenes_writer import write_logs
from sensors.records import Labels
from sensors.simulator.log import simulate
from sensors.store.writer import write_log
from worldmodel import finetune, results
from worldmodel.devkit import Devkit
from worldmodel.downstream import detection as task
from worldmodel.export.verify import export
from worldmodel.labelled import Grid, in_view, labelled_stamps
from worldmodel.metrics_nuscenes import DISTANCES_M, average_precisions, mean_average_precision
from worldmodel.start import open_start
from worldmodel.tools.cli import main

GRID = Grid((-20.0, -12.0), 0.5, 48, 80)


def example(boxes=(), classes=(), fov_rad=np.pi, ahead_rad=0.0):
    return task.Example("made/log", 0, np.zeros((0, 5), np.float32), np.array(boxes, float).reshape(-1, 9), np.array(classes, int), ahead_rad,
                        fov_rad, np.eye(4))  # fmt: skip


def street(seed=0, count=12):
    """Boxes of several classes, at least 3 m apart."""
    rng = np.random.default_rng(seed)
    spots = rng.permutation([(x, y) for x in np.arange(-17, 18, 4.0) for y in np.arange(-10, 11, 4.0)])[:count] + rng.uniform(-0.5, 0.5, (count, 2))
    sizes = rng.uniform((0.5, 0.5, 1.0), (8.0, 2.5, 3.0), (count, 3))
    boxes = np.column_stack((spots, rng.uniform(-1, 1, count), sizes, rng.uniform(-np.pi, np.pi, count), rng.normal(0, 3, (count, 2))))
    return example(boxes, rng.integers(len(CLASSES), size=count))


def as_outputs(wanted):
    """What a head would say that has learned the targets (of one frame) by heart."""
    heat = torch.from_numpy(wanted["heat"])[None].clamp(1e-6, 1 - 1e-6)
    return {"heat": torch.logit(heat), "boxes": torch.from_numpy(wanted["boxes"])[None].nan_to_num()}


# ---- targets ----


def test_targets_decoded_give_the_boxes_back():
    whole = street()
    (found,) = task.answers(as_outputs(task.targets(whole, GRID)), GRID)
    sure = found[found[:, 1] > 0.99]
    assert len(sure) == len(whole.boxes)
    for box, kind in zip(whole.boxes, whole.classes, strict=True):
        row = sure[np.argmin(np.hypot(*(sure[:, 2:4] - box[:2]).T))]
        assert row[0] == kind
        np.testing.assert_allclose(row[[2, 3, 4, 5, 6, 7, 9, 10]], box[[0, 1, 2, 3, 4, 5, 7, 8]], atol=1e-4)
        assert np.angle(np.exp(1j * (row[8] - box[6]))) == pytest.approx(0, abs=1e-4)
    assert task.score([whole], [found], GRID) == pytest.approx(1)


def test_records_of_an_answer_are_in_the_ego_frame():
    from sensors.geometry import inverse, rotation_z

    whole = dataclasses.replace(street(), ego_from_state=inverse(rotation_z(0.5)))  # the state is the ego frame turned by 0.5
    (found,) = task.answers(as_outputs(task.targets(whole, GRID)), GRID)
    for row, record in zip(found, task.detections(whole, found), strict=True):
        back = rotation_z(0.5)[:2, :2]
        np.testing.assert_allclose(back @ record.box.centre[:2], row[2:4], atol=1e-9)
        np.testing.assert_allclose(back @ record.box.velocity, row[9:11], atol=1e-9)
        assert record.box.yaw_rad == pytest.approx(row[8] - 0.5) and record.box.category == CLASSES[int(row[0])]


def test_what_lies_outside_or_is_unknown_is_left_out():
    boxes = [(25, 0, 0, 4, 2, 1, 0, 1, 1), (0, 0, 0, 4, 2, 1, 0, np.nan, np.nan)]
    wanted = task.targets(example(boxes, [0, 0]), GRID)
    numbers = wanted["boxes"]
    assert (~np.isnan(numbers[0])).sum() == 1 and (~np.isnan(numbers[8])).sum() == 0 and (wanted["heat"] == 1).sum() == 1
    outputs = {"heat": torch.zeros(1, len(CLASSES), 48, 80, requires_grad=True), "boxes": torch.zeros(1, 10, 48, 80, requires_grad=True)}
    task.loss(outputs, {k: torch.from_numpy(v)[None] for k, v in wanted.items()}).backward()
    assert torch.isfinite(outputs["boxes"].grad).all() and not outputs["boxes"].grad[:, 8:].any() and outputs["boxes"].grad[:, :8].any()


def test_empty_frames_are_frames():
    nothing = example()
    wanted = {k: torch.from_numpy(v)[None] for k, v in task.targets(nothing, GRID).items()}
    assert not wanted["heat"].any() and wanted["boxes"].isnan().all()
    outputs = task.Head(4).eval()(torch.zeros(1, 4, 48, 80))
    loss = task.loss(outputs, wanted)
    loss.backward()
    assert torch.isfinite(loss)
    silent = {"heat": torch.full((1, len(CLASSES), 48, 80), -20.0), "boxes": torch.zeros(1, 10, 48, 80)}
    (found,) = task.answers(silent, GRID)
    assert found.shape == (0, 11) and task.detections(nothing, found) == [] and task.score([nothing], [found], GRID) == 0
    assert len(task.turned(nothing, 1.0, True).boxes) == 0


@pytest.mark.parametrize("yaw, mirror", [(0.0, True), (1.1, False), (-2.5, True)])
def test_a_turned_scene_moves_as_the_scene_does(yaw, mirror):
    """A second later everything is where the velocity carries it, in the turned scene too; long sides follow the yaw."""
    before = street()
    before = dataclasses.replace(before, points=np.column_stack((before.boxes[:, :3], np.zeros((12, 2)))).astype(np.float32), ahead_rad=0.2)
    later = dataclasses.replace(before, boxes=before.boxes + np.pad(before.boxes[:, 7:9], ((0, 0), (0, 7))))
    a, b = task.turned(before, yaw, mirror), task.turned(later, yaw, mirror)
    np.testing.assert_allclose(b.boxes[:, :2] - a.boxes[:, :2], a.boxes[:, 7:9], atol=1e-9)
    nose = lambda e: e.boxes[:, :2] + np.stack((np.cos(e.boxes[:, 6]), np.sin(e.boxes[:, 6])), 1)  # noqa: E731
    ahead = dataclasses.replace(before, boxes=np.column_stack((nose(before), before.boxes[:, 2:])))
    np.testing.assert_allclose(nose(a), task.turned(ahead, yaw, mirror).boxes[:, :2], atol=1e-9)
    np.testing.assert_allclose(a.points[:, :2], a.boxes[:, :2], atol=1e-5)
    narrow = dataclasses.replace(before, fov_rad=0.6)
    seen = in_view(*before.boxes[:, :2].T, narrow.ahead_rad, 0.6)
    assert 0 < seen.sum() < 12
    assert (in_view(*a.boxes[:, :2].T, task.turned(narrow, yaw, mirror).ahead_rad, 0.6) == seen).all()


def test_outside_of_the_labelled_view_nothing_counts():
    whole = dataclasses.replace(street(), fov_rad=0.7, ahead_rad=np.pi / 2)
    wanted = task.targets(whole, GRID)
    seen = in_view(*whole.boxes[:, :2].T, np.pi / 2, 0.7)
    assert 0 < (~np.isnan(wanted["boxes"][0])).sum() <= seen.sum() + 1 < 12
    assert not wanted["valid"][0].any() and wanted["valid"][-1, 40]
    logits = torch.zeros(1, len(CLASSES), 48, 80, requires_grad=True)
    task.focal(logits, torch.from_numpy(wanted["heat"])[None], torch.from_numpy(wanted["valid"])[None]).backward()
    assert not logits.grad[0][:, ~torch.from_numpy(wanted["valid"])].any() and logits.grad[0][:, torch.from_numpy(wanted["valid"])].all()
    (found,) = task.answers(as_outputs(task.targets(dataclasses.replace(whole, fov_rad=np.pi), GRID)), GRID)
    assert task.score([whole], [found], GRID) == pytest.approx(1)  # what it says elsewhere is neither right nor wrong


def test_focal_loss_pulls_towards_the_heat():
    heat = torch.tensor([1.0, 0.8, 0.0]).view(1, 1, 1, 3)
    logits = torch.zeros(1, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(1, 1, 3, dtype=torch.bool)
    loss = task.focal(logits, heat.double(), valid)
    loss.backward()
    peak, near, far = logits.grad.flatten().tolist()
    assert peak < 0 < near < far / 100  # cells beside a centre are hardly blamed
    # by hand: p = 1/2
    assert loss.item() == pytest.approx(0.25 * np.log(2) * (1 + 0.2**4 + 1), rel=1e-6)
    assert torch.autograd.gradcheck(lambda x: task.focal(x, heat.double(), valid), torch.randn(1, 1, 1, 3, dtype=torch.float64, requires_grad=True))
    sure = task.focal(torch.tensor([50.0, -50, -50]).view(1, 1, 1, 3), heat, valid)
    assert torch.isfinite(sure) and sure < 1e-6


# ---- the score ----


def made_up_boxes(seed, frames=6):
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(frames):
        n = rng.integers(0, 12)
        true = np.column_stack((rng.integers(0, 4, n), rng.uniform(-55, 55, (n, 2))))
        near = np.repeat(true, 2, 0) + np.pad(rng.normal(0, 1.2, (2 * n, 2)), ((0, 0), (1, 0)))
        wild = np.column_stack((rng.integers(0, 5, 9), rng.uniform(-55, 55, (9, 2))))
        rows = np.concatenate((near, wild))
        truth.append(true)
        found.append(np.column_stack((rows, np.round(rng.random(len(rows)), 1))))  # equal scores too
    return truth, found


def test_average_precision_is_the_devkits():
    algo = pytest.importorskip("nuscenes.eval.detection.algo", reason="the extra `nuscenes` is not installed")
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.common.utils import center_distance
    from nuscenes.eval.detection.data_classes import DetectionBox

    rules = config_factory("detection_cvpr_2019")

    def kit(frames):
        out = EvalBoxes()
        for i, rows in enumerate(frames):
            boxes = [
                DetectionBox(str(i), (x, y, 0), (2, 4, 1.5), (1, 0, 0, 0), (0, 0), detection_name=CLASSES[int(k)], detection_score=float(s),
                             attribute_name="")
                for k, x, y, s in np.column_stack((rows, np.full((len(rows), 4 - rows.shape[1]), -1.0)))
                if np.hypot(x, y) < rules.class_range[CLASSES[int(k)]]
            ]  # fmt: skip
            out.add_boxes(str(i), boxes)
        return out

    partly = 0
    for seed in range(8):
        truth, found = made_up_boxes(seed)
        ours = average_precisions(truth, found)
        for name, values in ours.items():
            for distance, value in zip(DISTANCES_M, values, strict=True):
                data = algo.accumulate(kit(truth), kit(found), name, center_distance, distance)
                assert value == pytest.approx(algo.calc_ap(data, rules.min_recall, rules.min_precision), abs=1e-12)
                partly += 0 < value < 1
    assert partly > 50


def test_a_score_without_truth_is_nothing():
    assert mean_average_precision([np.zeros((0, 3))], [np.zeros((0, 4))]) == 0
    assert average_precisions([np.array([[0, 60.0, 0]])], [np.zeros((0, 4))]) == {}  # beyond the range of its class


# ---- frames ----


def test_clips_at_stamps_have_the_past_that_there_is(parts):
    log = parts[0].log
    stamps = log.sweep_stamps_ns[log.reference_lidar]
    clips = clips_at(log, stamps, past=5, rate_hz=5.0)
    assert [len(c.past) for c in clips[:6]] == [1, 2, 3, 4, 5, 5] and [c.stamp_ns for c in clips] == stamps.tolist()
    (whole,) = [c for c in clips_of(log, past=5, future=0, every_s=100)]
    same = clips[stamps.tolist().index(whole.stamp_ns)]
    assert [f.sweep_index for f in same.past] == [f.sweep_index for f in whole.past]
    assert [len(c.past) for c in clips_at(log, stamps[3:], from_ns=int(stamps[2]))][:2] == [2, 3]
    assert clips_at(log, stamps[:1] + 1) == []


def test_only_labelled_sweeps_are_frames(parts):
    labels = parts[0].log.open_labels()
    stamps = sorted({box.stamp_ns for box in labels.boxes})
    some = Labels(tuple(box for box in labels.boxes if box.stamp_ns in stamps[::3]))
    assert labelled_stamps(parts[0], some, 0.1).tolist() == stamps[::3]
    assert labelled_stamps(dataclasses.replace(parts[0], from_ns=stamps[1], to_ns=stamps[6]), some, 0.1).tolist() == [stamps[3]]
    # sweeps come every 0.2 s: those nearest to 0, 0.5 .. 2 s; after a gap it goes on as it was
    apart = lambda labels: (labelled_stamps(parts[0], labels, 0.5) - stamps[0]) / 1e9  # noqa: E731
    np.testing.assert_allclose(apart(labels), [0, 0.5, 1, 1.5, 2], atol=0.11)
    gone = Labels(tuple(box for box in labels.boxes if not 0.3e9 < box.stamp_ns - stamps[0] < 1.1e9))
    np.testing.assert_allclose(apart(gone), [0, 1.2, 1.5, 2], atol=0.11)


# ---- where it starts from ----


@pytest.fixture(scope="module")
def handed(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "torch"
    assert export(run, "torch", folder, [])["passed"]
    return folder


def test_an_export_starts_where_its_run_does(run, handed):
    ours, theirs = open_start(run), open_start(handed)
    assert theirs.weights.keys() == ours.weights.keys() and all(torch.equal(v, ours.weights[k]) for k, v in theirs.weights.items())
    assert theirs.config.encoder == ours.config.encoder and theirs.config.model.latent_sweeps == ours.config.model.latent_sweeps


def changed(folder, to, about=None, **files):
    """A copy of an export in which files were changed and whose manifest agrees with that."""
    manifest = check_folder(folder)
    whole = {entry["path"]: (folder / entry["path"]).read_bytes() for entry in manifest["files"]}
    commit_folder(to, whole | {name.replace("_", ".", 1): data for name, data in files.items()},
                  {k: v for k, v in manifest.items() if k not in ("files", "digest")} | (about or {}))  # fmt: skip
    return to


def test_an_export_that_is_not_what_it_says_is_refused(run, handed, tmp_path):
    from safetensors.torch import load_file, save

    config = json.loads((handed / "config.json").read_text())
    weights = load_file(handed / "model.safetensors")
    first = next(k for k in weights if k.endswith("0.4.weight"))
    cases = [
        ("fewer", {"model_safetensors": save({k: v for k, v in weights.items() if k != first})}, "are missing"),
        ("transposed", {"model_safetensors": save(weights | {first: weights[first].transpose(0, 1).contiguous()})}, "does not give the map"),
        ("pickle", {"model_safetensors": b"\x80\x04cposix\nsystem\n."}, "no safetensors file"),
        ("import", {"config_json": json.dumps(config | {"build": "os:system"}).encode()}, "your own"),
        ("key", {"config_json": json.dumps({k: v for k, v in config.items() if k != "voxel"}).encode()}, "voxel is missing"),
    ]
    for name, files, message in cases:
        with pytest.raises(WmError, match=message) as told:
            open_start(changed(handed, tmp_path / name, **files))
        assert "\n" not in str(told.value)
    with pytest.raises(UsageError, match="wm export --to torch"):
        open_start(changed(handed, tmp_path / "other", {"target": "elsewhere"}))
    with pytest.raises(UsageError, match="neither a run"):
        open_start(tmp_path)
    bits = tmp_path / "bits"
    changed(handed, bits)
    data = bytearray((bits / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (bits / "model.safetensors").write_bytes(data)
    with pytest.raises(WmError, match=r"model\.safetensors"):
        open_start(bits)


# ---- the whole road ----


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Two streets in nuScenes' tables, and a store that they were ingested into."""
    root = tmp_path_factory.mktemp("tables")
    write_logs(root / "set", [simulate(seed, seconds=1.2, lidar="hdl32", every=2) for seed in (50, 51)])
    for log in open_source(root / "set"):
        write_log(root / "store", log)
    return root


def test_from_an_export_to_the_devkits_figure(handed, store, tables, tmp_path, capsys):
    pytest.importorskip("nuscenes", reason="the extra `nuscenes` is not installed")
    out = tmp_path / "results"
    words = ["finetune", "--task", "detection", "--from", str(handed), "--data", str(store), "--test", str(tables / "store"), "--seeds", "1"]
    words += ["--steps", "4", "--threads", "1", "--arms", "pretrained", "random_frozen", "--results", str(out), "--tables", str(tables / "set")]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [row["arm"] for row in said["rows"]] == ["pretrained", "random_frozen"] and said["task"] == "detection"
    logs = [part.log for part in open_data(tables / "store")]
    samples = sum(len(frames) for frames in keyframes(tables_of(tables / "set", {}), {log.id for log in logs}).values())
    for row in said["devkit"]:
        assert 0 <= row["mAP"] <= 1 and 0 <= row["NDS"] <= 1 and "car" in row["classes"] and len(row["AP"]) == 10
        folder = out / f"{row['arm']}-1-0"
        manifest = check_folder(folder)
        assert manifest["samples"] == manifest["frames"] == samples == 6 and manifest["boxes"] > 0 and manifest["from"] == "torch"
        assert len(json.loads((folder / "nuscenes.json").read_text())["results"]) == samples
        for log in logs:
            labels = sorted((folder / "semantickitti" / log.id.replace("/", "@")).iterdir())
            assert len(labels) == len(sorted((folder / "kitti" / log.id.replace("/", "@")).iterdir())) == 3
            for file in labels:
                assert file.stat().st_size == 4 * len(log.read_sweep("LIDAR_TOP", int(file.stem)).points)
    assert main(words) == 2 and "is not empty" in capsys.readouterr().err


def test_our_score_of_a_detector_is_the_devkits(handed, tables, tmp_path, monkeypatch):
    """A detector that is told the truth, and gets some of it wrong, is scored by both through all that lies between them."""
    pytest.importorskip("nuscenes", reason="the extra `nuscenes` is not installed")
    parts = [Part(log) for log in (p.log for p in open_data(tables / "store"))]
    start = open_start(handed)
    trial = finetune.Trial(start, "pretrained", 0, task, finetune.Plan(threads=1))
    told = finetune.examples(parts, task, start.config, 0.5)
    assert len(told) == 6 and sum(len(e.boxes) for e in told) > 30
    rng = np.random.default_rng(4)
    said = {}
    for e in told:
        kept = rng.random(len(e.boxes)) < 0.8
        rows = np.column_stack((e.classes[kept], rng.random(kept.sum()), e.boxes[kept]))
        rows[:, 2:4] += rng.normal(0, 0.8, (len(rows), 2))
        rows[:, 9:] = np.nan_to_num(rows[:, 9:])
        said[e.log, e.stamp_ns] = np.concatenate((rows, rows + np.pad(rng.normal(0, 9, (len(rows), 2)), ((0, 0), (2, 7)))))
    monkeypatch.setattr(trial, "answers", lambda examples: [said[e.log, e.stamp_ns] for e in examples])
    folder = tables_of(tables / "set", {})
    frames = keyframes(folder, {part.log.id for part in parts})
    results.write(tmp_path / "out", trial, parts, frames, 0.5, {})
    judged = Devkit(folder).score(tmp_path / "out" / "nuscenes.json", {"street-000050", "street-000051"})
    ours = task.score(told, [said[e.log, e.stamp_ns] for e in told], trial.grid)
    assert 0.1 < ours < 0.9
    assert np.mean([judged["AP"][name] for name in judged["classes"]]) == pytest.approx(ours, abs=1e-3)
    one = Devkit(folder).score(tmp_path / "out" / "nuscenes.json", {"street-000051"})
    assert one["mAP"] != judged["mAP"]


def test_the_kit_is_an_extra_and_an_empty_file_scores_nothing(tables, tmp_path, monkeypatch):
    import sys

    (tmp_path / "results.json").write_text('{"results": {"a": []}}')
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "nuscenes.nuscenes", None)
        with pytest.raises(UsageError, match=r"driving-worldmodel\[nuscenes\]"):
            Devkit(tables / "set" / "v1.0-mini")
    pytest.importorskip("nuscenes", reason="the extra `nuscenes` is not installed")
    assert Devkit(tables / "set" / "v1.0-mini").score(tmp_path / "results.json", {"street-000050"})["mAP"] == 0
    (tmp_path / "results.json").write_text('{"meta": {}, "results": {"a": [{"sample_token": "a"}]}}')
    with pytest.raises(WmError, match="refuses it"):
        Devkit(tables / "set" / "v1.0-mini").score(tmp_path / "results.json", {"street-000050"})
    with pytest.raises(WmError, match="does not open it"):
        Devkit(tmp_path / "v1.0-none")


def test_results_want_boxes_and_tables_of_the_test_logs(handed, store, tables, tmp_path, capsys):
    words = ["finetune", "--from", str(handed), "--data", str(store), "--seeds", "1", "--steps", "2", "--threads", "1", "--arms", "pretrained"]
    assert main([*words, "--results", str(tmp_path / "a")]) == 2 and "finds no boxes" in capsys.readouterr().err
    assert main([*words, "--tables", str(tables / "set")]) == 2 and "--results" in capsys.readouterr().err
    assert main([*words, "--task", "detection", "--results", str(tmp_path / "a"), "--tables", str(tables / "set")]) == 2
    assert "no scene of the test logs" in capsys.readouterr().err
    part = tmp_path / "part.yaml"
    part.write_text(f"- {{store: {tables / 'store'}, to_frame: 4}}\n")
    assert main([*words, "--task", "detection", "--test", str(part), "--results", str(tmp_path / "a"), "--tables", str(tables / "set")]) == 2
    assert "scored whole" in capsys.readouterr().err


def test_finished_trials_are_on_disk_before_the_next_one_ends(handed, store, tmp_path, monkeypatch, capsys):
    train = finetune.Trial.train

    def once(trial, *args):
        if trial.frozen:
            raise WmError("stopped")
        return train(trial, *args)

    monkeypatch.setattr(finetune.Trial, "train", once)
    words = ["finetune", "--from", str(handed), "--data", str(store), "--seeds", "1", "--steps", "2", "--threads", "1", "--arms"]
    assert main([*words, "pretrained", "pretrained_frozen", "-o", str(tmp_path / "found.json")]) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["arm"] for row in found["rows"]] == [row["arm"] for row in found["results"]] == ["pretrained"]
    assert len(found["results"][0]["curve"]) >= 1 and "stopped" in capsys.readouterr().err
