"""The sweep codec: 2.1 mm, everything else exact, and bytes that are no sweep are an error."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensors.records import PointLabels, Sweep
from sensors.store import codec


def order_slowly(count, walk, ring):
    if walk == 0:
        return sorted(range(count), key=lambda i: (ring[i], i))
    return sorted(range(count), key=lambda i: (i % walk, i))


def steps_slowly(points, step_m, escaped):
    """Coordinates as whole steps, point by point; escaped ones are zero."""
    return [[0 if i in escaped else round(float(value) / step_m) for value in point] for i, point in enumerate(points)]


def differences_slowly(values):
    out, before = [], 0
    for value in values:
        difference = (value - before + 2**31) % 2**32 - 2**31
        out.append(2 * difference if difference >= 0 else -2 * difference - 1)
        before = value
    return out


@st.composite
def sweeps(draw):
    count = draw(st.integers(0, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(("near", "grid", "huge", "tiny", "same", "edges")))
    points = {
        "near": lambda: rng.normal(0, 30, (count, 3)),
        "grid": lambda: rng.integers(-80000, 80000, (count, 3)) / 1000,
        "huge": lambda: rng.normal(0, 1, (count, 3)) * 10 ** rng.uniform(0, 37, (count, 1)),
        "tiny": lambda: rng.normal(0, 1e-40, (count, 3)),
        "same": lambda: np.full((count, 3), 5.0),
        "edges": lambda: rng.choice([-0.0, 0.0, 0.002, -0.002, 1600, 1600.001, -1600.5, 3.4e38, -3.4e38, 1e-45], (count, 3)),
    }[kind]().astype(np.float32)
    scale = draw(st.sampled_from((255, 100, 1000, 65535, None)))
    intensity = rng.random(count) if scale is None else rng.integers(0, scale + 1, count) / scale
    ring = rng.integers(0, draw(st.sampled_from((1, 32, 65536))), count) if draw(st.booleans()) else None
    time = rng.integers(-(2**31), 2**31, count) if draw(st.booleans()) else None
    return Sweep("lidar", 7, points, intensity.astype(np.float32), ring, time, draw(st.booleans()))


def bits(array):
    return array.view(np.uint32)


@settings(deadline=None, max_examples=200)
@given(sweeps(), st.booleans())
def test_what_comes_back_is_what_was_recorded(sweep, lossless):
    found = codec.decode(codec.encode(sweep, lossless=lossless))
    error = np.abs(found.points.astype(np.float64) - sweep.points.astype(np.float64))
    assert found.points.shape == sweep.points.shape and not (error > (0 if lossless else codec.MAX_ERROR_M)).any()
    if lossless:
        assert (bits(found.points) == bits(sweep.points)).all() and (bits(found.intensity) == bits(sweep.intensity)).all()
    assert np.abs(found.intensity - sweep.intensity).max(initial=0) <= 8e-6
    assert (found.ring is None) == (sweep.ring is None) and (found.ring is None or (found.ring == sweep.ring).all())
    assert (found.time_ns is None) == (sweep.time_ns is None) and (found.time_ns is None or (found.time_ns == sweep.time_ns).all())
    assert found.deskewed == sweep.deskewed
    Sweep("lidar", 7, found.points, found.intensity, found.ring, found.time_ns)


@settings(deadline=None, max_examples=100)
@given(sweeps(), st.sampled_from((0, 1, 16, 40)))
def test_the_columns_are_those_of_the_slow_twin(sweep, walk):
    if walk == 0 and sweep.ring is None:
        walk = 1
    count = len(sweep.points)
    escaped = {i for i, point in enumerate(sweep.points.tolist()) if max(map(abs, point)) > codec.FAR_M}
    order = codec._order(count, walk, sweep.ring)
    slow_order = order_slowly(count, walk, sweep.ring)
    assert (list(range(count)) if order is None else order.tolist()) == slow_order
    near = sweep.points.astype(np.float64)
    near[sorted(escaped)] = 0
    steps = np.rint(near / codec.STEP_M).astype(np.int32)
    slow = steps_slowly(sweep.points, codec.STEP_M, escaped)
    assert steps.tolist() == slow
    for axis in range(3):
        walked = codec._taken(steps[:, axis], order)
        assert codec._differences(walked).tolist() == differences_slowly([slow[i][axis] for i in slow_order])
        assert (codec._summed(codec._differences(walked)) == walked).all()


@pytest.mark.parametrize("denominator", [100, 255])
def test_intensities_of_kitti_and_nuscenes_are_exact(denominator):
    intensity = (np.arange(denominator + 1, dtype=np.float32) / np.float32(denominator)).astype(np.float32)
    sweep = Sweep("lidar", 7, np.zeros((len(intensity), 3)), intensity)
    record = codec.encode(sweep)
    assert codec.HEADER.unpack_from(record)[-1] == denominator
    assert (bits(codec.decode(record).intensity) == bits(intensity)).all()


def test_millimetre_logs_are_kept_to_the_bit_at_a_fraction_of_their_size():
    rng = np.random.default_rng(0)
    points = (np.cumsum(rng.integers(-30, 31, (20000, 3)), 0) / 1000).astype(np.float32)
    points[17, 1] = -0.0
    record = codec.encode(Sweep("lidar", 7, points, np.zeros(len(points))), lossless=True)
    assert (bits(codec.decode(record).points) == bits(points)).all() and len(record) < points.nbytes / 3


def test_a_sensor_that_writes_columns_of_beams_is_walked_along_its_beams():
    azimuth, elevation = np.meshgrid(np.linspace(0, 6.28, 600), np.linspace(-0.5, 0.2, 32), indexing="ij")
    points = 20 * np.stack((np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)), -1)
    ring = np.tile(np.arange(32), 600)
    columns = Sweep("lidar", 7, points.reshape(-1, 3), np.zeros(19200))
    assert codec.HEADER.unpack_from(codec.encode(columns))[3] == 32
    dropped = np.random.default_rng(0).random(19200) < 0.8
    rings = Sweep("lidar", 7, points.reshape(-1, 3)[dropped], np.zeros(dropped.sum()), ring[dropped])
    assert codec.HEADER.unpack_from(codec.encode(rings))[3] == 0


def test_points_that_are_not_finite_are_refused():
    sweep = Sweep("lidar", 7, np.zeros((2, 3)), np.zeros(2))
    points = np.array([[0, 0, 0], [0, np.nan, 0]], np.float32)
    object.__setattr__(sweep, "points", points)
    with pytest.raises(codec.CodecError, match="finite"):
        codec.encode(sweep)


def whole_record():
    rng = np.random.default_rng(1)
    points = rng.normal(0, 10, (40, 3))
    points[3] = 5000
    return codec.encode(Sweep("lidar", 7, points, rng.integers(0, 256, 40) / 255, rng.integers(0, 4, 40), rng.integers(0, 10**8, 40)))


def test_a_cut_record_is_an_error_at_every_length():
    record = whole_record()
    for length in [*range(len(record)), len(record) + 1]:
        with pytest.raises(codec.CodecError):
            codec.decode((record + b"\0")[:length])


@pytest.mark.parametrize("field, value", [
    (0, b"xxxx"), (1, 2), (2, 255), (2, 0), (3, 0), (4, 2**26 + 1), (4, 41), (4, 0), (5, 41), (5, 0), (6, float("nan")), (6, -1.0), (6, 1e300),
    (7, 65535), (7, 0),
])  # fmt: skip
def test_a_header_that_lies_is_an_error_before_anything_is_allocated(field, value):
    record = whole_record()
    header = list(codec.HEADER.unpack_from(record))
    if (field, value) == (3, 0):
        header[2] &= ~codec.RING
    header[field] = value
    with pytest.raises(codec.CodecError):
        codec.decode(codec.HEADER.pack(*header) + record[codec.HEADER.size :])


def test_columns_that_declare_more_than_they_may_are_an_error():
    bomb = codec._compress(np.zeros(1 << 22, np.uint32))
    sweep = Sweep("lidar", 7, np.zeros((5, 3)), np.zeros(5))
    header = codec.encode(sweep)[: codec.HEADER.size]
    columns = [bomb] * 4
    with pytest.raises(codec.CodecError, match="declares"):
        codec.decode(header + struct.pack("<4I", *map(len, columns)) + b"".join(columns))


@settings(deadline=None)
@given(st.data())
def test_any_changed_byte_is_an_error_or_a_sweep_but_never_a_crash(data):
    record = bytearray(whole_record())
    for _ in range(data.draw(st.integers(1, 4))):
        record[data.draw(st.integers(0, len(record) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = codec.decode(bytes(record))
    except codec.CodecError:
        return
    assert found.points.shape[1] == 3


def test_point_labels_come_back():
    labels = PointLabels(5, np.array([0, 255, 3]), np.array([-(2**31), 0, 2**31 - 1]), np.array([True, False, True]))
    record = codec.encode_labels(labels)
    found = codec.decode_labels(record, 5)
    assert (
        found.category.tolist() == [0, 255, 3]
        and found.instance.tolist() == labels.instance.tolist()
        and found.moving.tolist() == [True, False, True]
    )
    assert len(codec.decode_labels(codec.encode_labels(PointLabels(5, [], [], [])), 5).category) == 0
    for length in range(len(record)):
        with pytest.raises(codec.CodecError):
            codec.decode_labels(record[:length], 5)


def test_arrays_come_back_and_only_as_what_was_asked_for():
    arrays = [np.array([[1.5, np.inf, -0.0]], np.float32), np.zeros((0, 3), np.uint8), np.arange(6, dtype=np.int32).reshape(1, 2, 3)]
    record, kinds = codec.encode_arrays(arrays), ["f4:2", "u1:2", "i4:3"]
    for got, meant in zip(codec.decode_arrays(record, kinds), arrays, strict=True):
        assert got.dtype == meant.dtype and got.shape == meant.shape and got.tobytes() == meant.tobytes()
    for length in range(len(record)):
        with pytest.raises(codec.CodecError):
            codec.decode_arrays(record[:length], kinds)
    for other in (["f4:2"], ["f4:1", "u1:2", "i4:3"], ["u1:2", "u1:2", "i4:3"]):
        with pytest.raises(codec.CodecError, match="not "):
            codec.decode_arrays(record, other)


@settings(deadline=None)
@given(st.data())
def test_any_changed_byte_of_arrays_is_an_error_or_arrays_but_never_a_crash(data):
    record = bytearray(codec.encode_arrays([np.ones((4, 5), np.float32), np.ones((4, 5), np.uint8)]))
    for _ in range(data.draw(st.integers(1, 4))):
        record[data.draw(st.integers(0, len(record) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = codec.decode_arrays(bytes(record), ["f4:2", "u1:2"])
    except codec.CodecError:
        return
    assert [array.ndim for array in found] == [2, 2]
