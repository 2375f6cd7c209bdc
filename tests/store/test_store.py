"""A stored log is the log that was written, and anything that happened to it since is found."""

import hashlib
import json
import pickle
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest

from sensors import files
from sensors.adapters import kitti_raw
from sensors.adapters.base import open_source
from sensors.errors import UsageError, WmError
from sensors.records import Box, Camera, Image, Labels, Lidar, Log, PointLabels, RecordError, Sweep, Trajectory, no_labels
from sensors.store import codec
from sensors.store import format as layout
from sensors.store.reader import open_store
from sensors.store.writer import Reference, write_log

JPEG = b"\xff\xd8\xff\xc0\x00\x11\x08\x00\x03\x00\x04 made up"  # a header of 4x3 pixels


class Recording:
    """Two LiDARs, one camera, three turns; the second turn of `top` and the first image cannot be read."""

    def read_sweep(self, lidar, index):
        if (lidar, index) == ("top", 1):
            raise RecordError("0001.bin: 7 bytes, no multiple of 16")
        rng = np.random.default_rng(index)
        count = 50 + index
        ring = rng.integers(0, 4, count) if lidar == "top" else None
        return Sweep(lidar, self.stamps[index], rng.normal(0, 20, (count, 3)), rng.integers(0, 256, count) / 255, ring, np.arange(count) - 25)

    def read_image(self, camera, index):
        if index == 0:
            raise OSError(5, "Input/output error")
        return Image(camera, self.stamps[index] + 3, JPEG + bytes([index]), 4, 3, 900 if index == 1 else None)

    def open_labels(self):
        boxes = [Box(self.stamps[0], "1", "car", [5, 0, 1], [4, 2, 1.5], 0.5, [1, 2], 7), Box(self.stamps[2], "2", "bus", [9, 1, 1], [8, 2, 3], -3)]
        return Labels(tuple(boxes), ("car", "bus"), 0.7, self.point_labels, self.truth, self.missing)

    def truth(self, camera, index):
        return (np.full((3, 4), np.inf if index == 1 else 7.5), np.arange(12).reshape(3, 4) + index) if camera == "front" else None

    def missing(self, lidar, index):
        return np.eye(3)[: index - 1 if index else 1] if lidar == "top" else None

    def point_labels(self, lidar, index):
        count = 50 + index
        return None if lidar != "top" else PointLabels(self.stamps[index], np.arange(count) % 3, np.arange(count) - 9, np.arange(count) % 2 == 0)

    stamps = (1_000_000_000, 1_100_000_000, 1_200_000_007)

    def log(self, name="made-up/log"):
        pose = np.tile(np.eye(4), (3, 1, 1))
        pose[:, 0, 3] = (1e5, 1e5 + 0.123456789, 1e5 + 1)
        return Log(
            id=name,
            dataset="made-up",
            licence="CC0",
            ego_frame="rear axle",
            lidars={"top": Lidar("top", np.eye(4), 10.0, 4, [-0.1, 0, 0.1, 0.2]), "../side": Lidar("../side", pose[1], 10.0)},
            cameras={"front": Camera("front", np.eye(4), [[3, 0, 1.5], [0, 3, 1], [0, 0, 1]], 4, 3, "brown_conrady", [0.1, 0.2], 10.0)},
            poses=Trajectory(self.stamps, pose, "gnss"),
            sweep_stamps_ns={"top": self.stamps, "../side": self.stamps},
            image_stamps_ns={"front": [stamp + 3 for stamp in self.stamps]},
            read_sweep=self.read_sweep,
            read_image=self.read_image,
            open_labels=self.open_labels,
            measured_speed=(np.array(self.stamps), np.array([1.0, 2.0, 3.5])),
            intensity_scale=255.0,
            ego_box=(-1, -1, -0.5, 3, 1, 2),
            counts=Counter({"top: NaN, dropped": 4}),
            notes=("made up",),
        )


@pytest.fixture
def log():
    return Recording().log()


@pytest.fixture
def kitti(tmp_path):
    (tmp_path / "raw").mkdir()
    return kitti_raw.write_sample(tmp_path / "raw")


def same_bytes(a, b):
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_what_a_log_has_that_is_of_no_use_is_counted(tmp_path):
    recording = Recording()

    def read_sweep(lidar, index):
        sweep = Recording.read_sweep(recording, lidar, 0)
        return Sweep(lidar, recording.stamps[index], sweep.points[: 5 * index], sweep.intensity[: 5 * index])

    def read_image(camera, index):
        return Image(camera, recording.stamps[index] + 3, JPEG, 4, 3)

    wide = Camera("front", np.eye(4), [[3, 0, 3.5], [0, 3, 1], [0, 0, 1]], 8, 3)
    log = replace(recording.log(), read_sweep=read_sweep, read_image=read_image, cameras={"front": wide}, open_labels=no_labels)
    counts = write_log(tmp_path / "s", log)["counts"]
    assert counts["top: sweeps without a point"] == counts["../side: sweeps without a point"] == 1
    assert counts["front: images of another size than its calibration, 8x3"] == 3


def test_everything_that_a_log_says_comes_back(tmp_path, log):
    write_log(tmp_path / "s", log)
    store = open_store(tmp_path / "s")
    assert store.ids == ("made-up/log",) and store.verify() == [] and store.strangers() == []
    found = pickle.loads(pickle.dumps(store.open_log("made-up/log")))
    for name in ("id", "dataset", "licence", "ego_frame", "stamps", "intensity_scale", "ego_box", "notes"):
        assert getattr(found, name) == getattr(log, name)
    assert found.counts == log.counts + Counter({"top: unreadable, quarantined": 1, "front: unreadable, quarantined": 1})
    assert found.poses.source == "gnss" and same_bytes(found.poses.stamps_ns, log.poses.stamps_ns)
    assert np.abs(found.poses.world_from_ego - log.poses.world_from_ego).max() < 1e-9
    assert found.measured_speed[1].tolist() == [1.0, 2.0, 3.5]
    assert found.lidars["top"].beams == 4 and found.lidars["../side"].elevations_rad is None
    assert found.cameras["front"].model == "brown_conrady" and found.cameras["front"].distortion.tolist() == [0.1, 0.2]
    stamps = Recording.stamps
    assert found.sweep_stamps_ns["top"].tolist() == [stamps[0], stamps[2]] and found.sweep_stamps_ns["../side"].tolist() == list(stamps)
    for lidar, places in (("top", {0: 0, 1: 2}), ("../side", {0: 0, 1: 1, 2: 2})):
        for place, source in places.items():
            got, meant = found.read_sweep(lidar, place), log.read_sweep(lidar, source)
            assert np.abs(got.points - meant.points).max() <= codec.MAX_ERROR_M and got.stamp_ns == meant.stamp_ns
            assert same_bytes(got.intensity, meant.intensity) and same_bytes(got.time_ns, meant.time_ns)
            assert (got.ring is None) == (lidar != "top") and (got.ring is None or same_bytes(got.ring, meant.ring))
    images = [found.read_image("front", i) for i in range(2)]
    assert [image.encoded[-1] for image in images] == [1, 2] and [image.exposure_ns for image in images] == [900, None]


def test_labels_lie_apart_and_come_back_in_the_order_of_the_points(tmp_path, log):
    manifest = write_log(tmp_path / "s", log)
    assert {name for name in (entry["path"] for entry in manifest["files"]) if name.startswith("labels/")} == {
        "labels/boxes.parquet",
        "labels/points-top.pack",
        "labels/points-top.parquet",
        "labels/missing-top.pack",
        "labels/missing-top.parquet",
        "labels/truth-front.pack",
        "labels/truth-front.parquet",
    }
    store = open_store(tmp_path / "s")
    labels = pickle.loads(pickle.dumps(store.open_log("made-up/log").open_labels()))
    meant = log.open_labels()
    for got, box in zip(labels.boxes, meant.boxes, strict=True):
        assert (got.stamp_ns, got.track, got.category, got.yaw_rad, got.points_inside) == (
            box.stamp_ns, box.track, box.category, box.yaw_rad, box.points_inside)  # fmt: skip
        assert got.centre.tolist() == box.centre.tolist() and got.size.tolist() == box.size.tolist()
        assert (got.velocity is None) == (box.velocity is None)
    assert labels.categories == ("car", "bus") and labels.complete_fov_rad == 0.7
    assert labels.read_point_labels("top", 1).instance.tolist() == meant.read_point_labels("top", 2).instance.tolist()
    assert labels.read_missing_rays("top", 0).tolist() == [[1, 0, 0]] and labels.read_missing_rays("top", 1).shape == (1, 3)
    assert labels.read_missing_rays("../side", 0) is None and labels.read_camera_truth("front", 9) is None
    depth, category = labels.read_camera_truth("front", 0)
    assert depth.dtype == np.float32 and np.isinf(depth).all() and category.tolist() == (np.arange(12).reshape(3, 4) + 1).tolist()
    assert labels.read_point_labels("../side", 0) is None and labels.read_point_labels("top", 2) is None
    shutil.rmtree(store.data_folder("made-up/log") / "labels")
    with pytest.raises(files.BadFile, match="labels"):
        open_store(tmp_path / "s").open_log("made-up/log")


def test_what_a_log_does_not_have_is_said(tmp_path, log):
    write_log(tmp_path / "s", log)
    stored = open_store(tmp_path / "s").open_log(log.id)
    lidar, camera = stored.reference_lidar, next(iter(stored.cameras))
    for ask in (lambda: stored.read_sweep(lidar, -1), lambda: stored.read_sweep(lidar, 99), lambda: stored.read_sweep("no\nsuch", 0),
                lambda: stored.read_sweep(camera, 0), lambda: stored.read_image(camera, -1), lambda: stored.read_image(lidar, 0)):  # fmt: skip
        with pytest.raises(RecordError, match="no item"):
            ask()


def test_a_log_written_without_labels_has_none(tmp_path, log):
    manifest = write_log(tmp_path / "s", log, labels=False)
    assert manifest["labels"] is None and open_store(tmp_path / "s").open_log("made-up/log").open_labels() is None


def test_what_is_unreadable_is_listed_with_its_reason_and_the_rest_kept(tmp_path, log):
    manifest = write_log(tmp_path / "s", log)
    assert [(row["sensor"], row["stamp_ns"]) for row in manifest["quarantined"]] == [("top", Recording.stamps[1]), ("front", Recording.stamps[0] + 3)]
    assert "multiple of 16" in manifest["quarantined"][0]["reason"] and "Input/output" in manifest["quarantined"][1]["reason"]


def test_the_frame_table_names_neighbours_with_their_skew_and_leaves_gaps_open(tmp_path, log):
    write_log(tmp_path / "s", log)
    table = pyarrow.parquet.read_table(open_store(tmp_path / "s").data_folder("made-up/log") / "frames.parquet").to_pydict()
    assert table["stamp_ns"] == list(Recording.stamps)  # the side LiDAR is the reference: it has more sweeps
    assert table["top: index"] == [0, None, 1] and table["top: skew_ns"] == [0, None, 0]
    assert table["front: index"] == [None, 0, 1] and table["front: skew_ns"] == [None, 3, 3]
    assert table["m03"] == [1e5, 1e5 + 0.123456789, 1e5 + 1]


def test_lossless_is_to_the_bit(tmp_path, log):
    write_log(tmp_path / "s", log, lossless=True)
    found = open_store(tmp_path / "s").open_log("made-up/log")
    assert same_bytes(found.read_sweep("top", 1).points, log.read_sweep("top", 2).points)


def test_the_sample_of_kitti_survives_with_its_picture_bytes(tmp_path, kitti):
    log = next(open_source(kitti))
    write_log(tmp_path / "s", log, lossless=True)
    found = open_store(tmp_path / "s").open_log(log.id)
    for i in range(4):
        assert same_bytes(found.read_sweep("velodyne", i).points, log.read_sweep("velodyne", i).points)
    for i in range(3):
        assert found.read_image("image_02", i).encoded == log.read_image("image_02", i).encoded


def test_a_store_of_references_reads_the_originals_and_notices_their_change(tmp_path, kitti):
    log = next(open_source(kitti))
    manifest = write_log(tmp_path / "s", log, reference=Reference(kitti, "kitti_raw"))
    assert not any(entry["path"].endswith(".pack") for entry in manifest["files"])
    found = open_store(tmp_path / "s").open_log(log.id)
    found = pickle.loads(pickle.dumps(found))
    assert same_bytes(found.read_sweep("velodyne", 2).points, log.read_sweep("velodyne", 2).points)
    assert found.read_image("image_02", 1).encoded == log.read_image("image_02", 1).encoded
    original = kitti / "velodyne_points/data/0000000002.bin"
    original.write_bytes(original.read_bytes()[16:])
    with pytest.raises(files.BadFile, match=r"row 2: the original in .* changed"):
        found.read_sweep("velodyne", 2)
    shutil.rmtree(kitti)
    with pytest.raises(files.BadFile, match="not there"):
        open_store(tmp_path / "s").open_log(log.id).read_sweep("velodyne", 0)


def test_nothing_is_replaced_without_being_asked_and_open_readers_keep_theirs(tmp_path, log, kitti):
    write_log(tmp_path / "s", log)
    before = open_store(tmp_path / "s")
    old = before.open_log(log.id)
    with pytest.raises(files.Exists, match="--overwrite"):
        write_log(tmp_path / "s", log)
    write_log(tmp_path / "s", log, overwrite=True, lossless=True)
    after = open_store(tmp_path / "s")
    assert before.manifest(log.id)["generation"] == 1 and after.manifest(log.id)["generation"] == 2
    assert np.abs(old.read_sweep("top", 1).points - after.open_log(log.id).read_sweep("top", 1).points).max() > 0
    assert after.verify() == [] and after.strangers() == []


def test_a_log_without_one_readable_item_is_refused_and_leaves_nothing(tmp_path, log):
    def unreadable(sensor, index):
        raise RecordError("gone")

    log = replace(log, read_sweep=unreadable, read_image=unreadable)
    with pytest.raises(RecordError, match=r"not one readable sweep or image \(gone\)"):
        write_log(tmp_path / "s", log)
    store = open_store(tmp_path / "s")
    assert store.ids == () and list((tmp_path / "s/logs/made-up@log").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../..", "a/b c", "a/\u202eb", "A/b", "a/B", "a/-rf", "a/<script>", "a/" + "x" * 290, "a/caf\u00e9", "a/cafe\u0301", "a/con"]
)
def test_ids_from_outside_stay_in_their_folder(tmp_path, name):
    try:
        log = Recording().log(name)
    except RecordError:
        return
    write_log(tmp_path / "s", log)
    assert open_store(tmp_path / "s").ids == (name,) and [path.name for path in tmp_path.iterdir()] == ["s"]
    assert len(list((tmp_path / "s/logs").iterdir())) == 1


def test_a_folder_that_is_something_else_is_not_made_a_store(tmp_path, log):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(UsageError, match="neither empty nor a store"):
        write_log(tmp_path, log)
    with pytest.raises(UsageError, match="not a store"):
        open_store(tmp_path)
    with pytest.raises(UsageError, match="not in"):
        write_log(tmp_path / "s", log)
        open_store(tmp_path / "s").open_log("made-up/other")


@pytest.fixture
def small(tmp_path):
    """A store of one log without camera, small enough to try every byte."""
    log = Recording().log()
    log = replace(log, cameras={}, image_stamps_ns={}, lidars={"top": log.lidars["top"]}, sweep_stamps_ns={"top": Recording.stamps})
    write_log(tmp_path / "s", log)
    return tmp_path / "s"


def read_all(root):
    """Everything that a reader can get out of a store, as bytes."""
    store = open_store(root)
    out = []
    for log_id in store.ids:
        log = store.open_log(log_id)
        out += [log.id, log.licence, str(log.poses.world_from_ego.tolist()), str(log.measured_speed[1].tolist()), str(log.lidars)]
        for name, stamps in log.sweep_stamps_ns.items():
            for i in range(len(stamps)):
                sweep = log.read_sweep(name, i)
                out += [sweep.points.tobytes(), sweep.intensity.tobytes(), sweep.time_ns.tobytes()]
        labels = log.open_labels()
        out += [str(labels.boxes), labels.read_point_labels("top", 0).instance.tobytes()]
    return out


def damageable(root):
    return [path for path in sorted(root.rglob("*")) if path.is_file() and ".locks" not in path.parts]


@pytest.mark.slow
def test_every_flipped_byte_is_found_deep_and_never_read_as_other_data(small):
    meant = read_all(small)
    for path in damageable(small):
        whole = path.read_bytes()
        every = max(1, len(whole) // 40)
        for i in range(0, len(whole), every):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
            try:
                assert read_all(small) == meant, (path, i)
            except WmError as error:
                assert "\n" not in str(error)
            if path.name != layout.STORE_FILE:
                assert open_store(small, strict=False).verify(), (path, i)
        path.write_bytes(whole)
    assert read_all(small) == meant


def test_every_cut_or_longer_or_missing_file_is_named(small):
    for path in damageable(small):
        whole = path.read_bytes()
        for cut in (b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole + b"\n", None):
            path.unlink()
            if cut is not None:
                path.write_bytes(cut)
            name = path.name
            if name.startswith("generation") and cut is None:
                assert open_store(small).ids == ()
            elif name == layout.STORE_FILE and cut in (whole[:-1], whole + b"\n"):
                assert len(open_store(small).ids) == 1  # the mark of a store means the same without its last newline
            else:
                with pytest.raises(WmError, match=f"{name}|not a store"):
                    read_all(small)
            path.write_bytes(whole)
    (small / "logs/made-up@log/notes.txt").write_text("x")
    (small / "logs/made-up@log/tmp-1").mkdir()
    assert open_store(small).verify() == [] and open_store(small).strangers() == ["logs/made-up@log/notes.txt", "logs/made-up@log/tmp-1"]


def change(small, **changes):
    """Rewrite the manifest as somebody who knows how to seal one could."""
    path = files.generation_path(small / "logs/made-up@log", 1)
    manifest = json.loads(path.read_text())
    for key, value in changes.items():
        if value is KeyError:
            del manifest[key]
        else:
            manifest[key] = value
    del manifest["digest"]
    path.write_bytes(files.seal(manifest))


ENTRY = {"path": "a", "bytes": 0, "sha256": "0" * 64}


@pytest.mark.parametrize("changes", [
    {"version": 999}, {"version": -1}, {"version": "1"}, {"version": True}, {"format": "tar"}, {"generation": 2}, {"stamps": "guessed"},
    {"id": KeyError}, {"id": 3}, {"id": "x"}, {"id": "made-up/other"}, {"licence": None}, {"ego_box": [1, 2]}, {"ego_box": [1, 2, 3, "x", 5, 6]},
    {"lidars": []}, {"lidars": {"top": {}}}, {"counts": {"a": -1}}, {"folder": "../other"}, {"folder": "/etc"}, {"folder": "000001-absent"},
    {"folder": "a/b"}, {"files": {}}, {"files": [ENTRY] * 2}, {"files": [ENTRY | {"path": "../x"}]}, {"files": [ENTRY | {"path": "/etc/passwd"}]},
    {"files": [ENTRY | {"bytes": -1}]}, {"files": [ENTRY | {"bytes": 1.5}]}, {"files": [ENTRY | {"sha256": "0" * 40}]},
    {"files": [ENTRY | {"mode": 7}]}, {"files": []}, {"poses": "../../x"}, {"quarantined": [{"sensor": 1}]}, {"labels": "x"},
    {"labels": {"boxes": "x"}}, {"frames": "nowhere.parquet"}, {"pose_source": "guess"}, {"notes": "text"},
])  # fmt: skip
def test_a_manifest_that_lies_is_refused_in_one_line(small, changes):
    change(small, **changes)
    with pytest.raises(files.BadFile) as caught:
        store = open_store(small)
        store.open_log(store.ids[0])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_unknown_fields_of_a_manifest_do_no_harm(small):
    meant = read_all(small)
    change(small, colour="green")
    assert read_all(small) == meant


def test_an_index_that_points_elsewhere_is_refused(small):
    folder = open_store(small).data_folder("made-up/log")
    table = pyarrow.parquet.read_table(folder / "lidar-top.parquet").to_pydict()
    lies = [{"offset": [0, 1]}, {"length": [10**15, 10**15]}, {"length": [-5, 5]}, {"offset": [2**62, 2**62]}, {"stamp_ns": [5, 5]}, {"points": None}]
    for lie in lies:
        columns = {key: value for key, value in (table | lie).items() if value is not None}
        types = {key: kind for key, kind in layout.SWEEP_COLUMNS.items() if key in columns}
        data = layout.table_bytes(columns, types)
        (folder / "lidar-top.parquet").write_bytes(data)
        manifest = open_store(small).manifest("made-up/log")
        rows = [row for row in manifest["files"] if row["path"] != "lidar-top.parquet"]
        change(small, files=[*rows, {"path": "lidar-top.parquet", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}])
        with pytest.raises(files.BadFile, match="top"):
            open_store(small).open_log("made-up/log")


def test_a_newest_generation_that_is_broken_is_told_and_the_one_before_is_named(small, log):
    write_log(small, log, overwrite=True)
    path = files.generation_path(small / "logs/made-up@log", 2)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(files.BadFile, match="generation 1 is there too"):
        open_store(small)
    store = open_store(small, strict=False)
    assert store.ids == () and len(store.problems) == 1
    path.unlink()
    assert open_store(small).manifest("made-up/log")["generation"] == 1


def test_a_file_cut_under_an_open_reader_is_an_error_and_not_a_crash(small):
    store = open_store(small)
    log = store.open_log("made-up/log")
    pack = store.data_folder("made-up/log") / "lidar-top.pack"
    pack.write_bytes(pack.read_bytes()[:100])
    with pytest.raises(files.BadFile, match=r"lidar-top\.pack"):
        log.read_sweep("top", 1)


def test_a_data_folder_that_is_a_link_is_not_followed(small, tmp_path):
    folder = open_store(small).data_folder("made-up/log")
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(files.BadFile):
        open_store(small)
