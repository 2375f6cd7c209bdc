"""What every adapter promises, checked on the sample that it writes itself. Found by discovery: a new adapter is under test as it appears."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from sensors.adapters.base import adapters, guess, open_source
from sensors.errors import UsageError, WmError
from sensors.records import Box, Image, Log, Sweep

ADAPTERS = adapters()


@pytest.fixture(scope="module", params=sorted(ADAPTERS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def source(name, tmp_path_factory):
    return ADAPTERS[name].write_sample(tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def log(name, source):
    logs = list(open_source(source))
    assert len(logs) >= 1 and all(isinstance(log, Log) for log in logs), logs
    return logs[0]


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_sample_is_recognised_and_by_this_adapter_alone(name, source, tmp_path):
    assert guess(source) == name
    assert ADAPTERS[name].recognise(tmp_path) == 0
    assert ADAPTERS[name].recognise(tmp_path / "absent") == 0
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    assert ADAPTERS[name].recognise(tmp_path / "file") == 0


def test_a_log_says_what_it_is(name, log):
    assert log.id.startswith(f"{name}/") and log.dataset == name and log.licence and log.ego_frame
    assert log.files and all(file.is_file() for file in log.files)


def test_payloads_are_read_by_index_with_the_stamp_of_the_listing(log):
    for lidar, stamps in log.sweep_stamps_ns.items():
        assert len(stamps)
        for index in (0, len(stamps) - 1):
            sweep = log.read_sweep(lidar, index)
            assert isinstance(sweep, Sweep) and sweep.lidar == lidar and sweep.stamp_ns == stamps[index] and len(sweep.points)
    for camera, stamps in log.image_stamps_ns.items():
        assert len(stamps)
        image = log.read_image(camera, len(stamps) - 1)
        assert isinstance(image, Image) and image.camera == camera and image.stamp_ns == stamps[-1]
        assert (image.width, image.height) == (log.cameras[camera].width, log.cameras[camera].height)


def test_a_missing_thing_is_counted(log):
    """Each sample lacks one image."""
    assert any("file absent" in what for what in log.counts), log.counts


def test_reading_twice_gives_the_same_and_counts_once(source):
    log = next(iter(open_source(source)))
    lidar = log.reference_lidar
    first = log.read_sweep(lidar, 0)
    counts = dict(log.counts)
    again = log.read_sweep(lidar, 0)
    assert np.array_equal(first.points, again.points) and np.array_equal(first.intensity, again.intensity)
    assert dict(log.counts) == counts


def test_poses_cover_the_sweeps(log):
    if log.poses is None:
        return
    stamps = log.sweep_stamps_ns[log.reference_lidar]
    assert log.poses.stamps_ns[0] <= stamps[0] + 10**8 and log.poses.stamps_ns[-1] >= stamps[-1] - 10**8


def test_labels_are_opened_on_request(log):
    labels = log.open_labels()
    if labels is not None:
        assert all(isinstance(box, Box) for box in labels.boxes) and {box.category for box in labels.boxes} <= set(labels.categories)


def test_a_log_travels_to_worker_processes(log):
    copy = pickle.loads(pickle.dumps(log))
    lidar = log.reference_lidar
    assert np.array_equal(copy.read_sweep(lidar, 0).points, log.read_sweep(lidar, 0).points)


def test_the_source_is_left_alone(name, tmp_path):
    source = ADAPTERS[name].write_sample(tmp_path)
    before = tree(tmp_path)
    for log in open_source(source):
        assert isinstance(log, Log)
        log.read_sweep(log.reference_lidar, 0)
        log.open_labels()
    assert tree(tmp_path) == before


def test_an_unreadable_payload_raises_one_line_and_the_log_goes_on(name, tmp_path):
    source = ADAPTERS[name].write_sample(tmp_path)
    log = next(iter(open_source(source)))
    lidar = log.reference_lidar
    payloads = sorted((f for f in log.files if f.suffix == ".bin"), key=str)
    assert payloads, "the sample has no .bin payload to damage"
    payloads[0].write_bytes(payloads[0].read_bytes()[:7])
    outcomes = []
    for index in range(len(log.sweep_stamps_ns[lidar])):
        try:
            outcomes.append(log.read_sweep(lidar, index))
        except WmError as error:
            assert "\n" not in str(error)
            outcomes.append(error)
    assert sum(isinstance(o, WmError) for o in outcomes) == 1
    assert sum(isinstance(o, Sweep) for o in outcomes) == len(outcomes) - 1


def test_an_unknown_option_is_refused(name, source):
    with pytest.raises(UsageError, match="no_such_option"):
        list(ADAPTERS[name].open_logs(source, {"no_such_option": "1"}))


def test_what_nobody_recognises_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no adapter"):
        guess(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        guess(tmp_path / "absent")


def test_two_datasets_in_one_folder_are_named(tmp_path):
    if len(ADAPTERS) < 2:
        pytest.skip("one adapter only")
    scores = []
    for module in ADAPTERS.values():
        part = tmp_path / module.__name__
        part.mkdir()
        shutil.copytree(module.write_sample(part), tmp_path / "all", dirs_exist_ok=True)
        scores.append(module.recognise(tmp_path / "all"))
    if sorted(scores)[-1] == sorted(scores)[-2] > 0:
        with pytest.raises(UsageError, match="give --dataset"):
            guess(tmp_path / "all")
