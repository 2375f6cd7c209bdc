"""Checkpoints from others, hostile ones among them: read whole as tensors, or refused in one line; nothing in them ever runs."""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors
from torch import nn

from sensors.errors import WmError
from worldmodel.handover.checkpoints import read_checkpoint, read_tensors


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def saved(value, **kwargs):
    out = io.BytesIO()
    torch.save(value, out, **kwargs)
    return out.getvalue()


GOOD = saved(network().state_dict())


def refused(tmp_path, data, name="weights.pth"):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(WmError) as error:
        read_tensors(path)
    line = str(error.value).replace(str(tmp_path), "")  # whose name holds words of the test's
    assert name in line and "\n" not in line and "weights_only" not in line and len(line) < 260
    return line


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[k], v) and found[k].dtype == v.dtype and found[k].is_contiguous() for k, v in expected.items())


class Payload:
    """Makes the marker file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


# what is read


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("wrapper", ["", "model_state", "state_dict", "model"])
def test_state_dicts_of_every_shape_are_read(tmp_path, protocol, wrapper):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    around = {
        "model_state": {"epoch": 3, "it": 7, "optimizer_state": optimizer.state_dict(), "version": "pcdet+0.6", "accumulated_iter": None},
        "state_dict": {"meta": {"classes": ("car", "van"), "lr": [0.1], "cfg": "model = dict()\n"}, "optimizer": optimizer.state_dict()},
        "model": {"iteration": 7, "optimizer": optimizer.state_dict(), "scheduler": {"last_epoch": 7}},
    }
    value = {**around[wrapper], wrapper: model.state_dict()} if wrapper else model.state_dict()
    (tmp_path / "w.pth").write_bytes(saved(value, pickle_protocol=protocol))
    found = read_checkpoint(tmp_path / "w.pth")
    assert found.wrapper == wrapper and same(found.tensors, model.state_dict())


def test_views_kinds_and_parameters_are_read(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    shared = torch.arange(10)
    value = {
        "turned": whole.T,
        "part": whole[1:3, ::2],
        "a": shared,
        "b": shared,
        "flag": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(5, dtype=torch.int64),
        "half": torch.ones(3, dtype=torch.float16),
        "brain": torch.ones(3, dtype=torch.bfloat16),
        "trained": nn.Parameter(torch.ones(2)),
        "big": 1 << 80,
        "shape": torch.zeros(2, 3).shape,
    }
    (tmp_path / "w.ckpt").write_bytes(saved(value))
    found = read_tensors(tmp_path / "w.ckpt")
    assert same(found, {k: v.detach().contiguous() for k, v in value.items() if isinstance(v, torch.Tensor)})
    found["a"][0] = 99
    assert found["b"][0] == 0


def test_safetensors_are_read_also_when_not_aligned(tmp_path):
    value = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.arange(4.0), "c": torch.zeros(0, 2), "d": torch.tensor(7)}
    (tmp_path / "w.safetensors").write_bytes(save_safetensors(value, metadata={"format": "pt"}))
    assert same(read_tensors(tmp_path / "w.safetensors"), value)


# payloads


@pytest.mark.parametrize("place", ["top", "value", "key", "wrapper", "beside", "reduce state"])
def test_a_payload_is_named_and_never_runs(tmp_path, place):
    marker = tmp_path / "marker"
    bad, weights = Payload(marker), network().state_dict()
    if place == "reduce state":
        weights = OrderedDict(weights)
        weights.extra = bad
    value = {
        "top": bad,
        "value": {**weights, "x": bad},
        "key": {"x": torch.ones(1), (bad,): 1},
        "wrapper": {"state_dict": bad},
        "beside": {"model_state": weights, "optimizer_state": [bad]},
        "reduce state": weights,
    }[place]
    line = refused(tmp_path, saved(value))
    assert "mkdir" in line and "not weights only" in line and "model.state_dict().items()" in line
    assert not marker.exists()
    pickle.loads(pickle.dumps(bad))
    assert marker.exists()  # the payload works where it is run


@pytest.mark.parametrize(
    "module, name",
    [
        ("builtins", "getattr"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("numpy.core.multiarray", "scalar"),
        ("mmengine.logging.history_buffer", "HistoryBuffer"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch.jit", "load"),
        ("torch", "FloatStorage.from_file"),
        ("os\x1b[2J", "system"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_foreign_globals_are_named(tmp_path, module, name, protocol):
    call = f"c{module}\n{name}\n".encode() if protocol == 2 else b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name)) + b"\x93"
    code = bytes([0x80, protocol]) + call + b"(X\x01\x00\x00\x00.tR."
    line = refused(tmp_path, with_pickle(code))
    assert name.split("\x1b")[0] in line and line.isprintable()


def test_a_model_saved_as_object_says_how_to_save_it(tmp_path):
    line = refused(tmp_path, saved(network()))
    assert "torch.nn.modules.container.Sequential" in line and "torch.save({k: v for k, v in model.state_dict().items()}" in line


def test_numpy_scalars_are_named(tmp_path):
    assert "numpy" in refused(tmp_path, saved({"state_dict": network().state_dict(), "epoch": np.float64(1)}))


# archives


def members(data=GOOD):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {row.filename: archive.read(row) for row in archive.infolist()}


def archive(files, compression=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as target:
        for name, data in files.items() if isinstance(files, dict) else files:
            target.writestr(name, data)
    return out.getvalue()


def with_pickle(code, **storages):
    return archive({"archive/data.pkl": code, "archive/version": b"3\n", **{f"archive/data/{k}": v for k, v in storages.items()}})


def test_archives_written_anew_are_read(tmp_path):
    (tmp_path / "w.pth").write_bytes(archive(members()))
    assert same(read_tensors(tmp_path / "w.pth"), network().state_dict())


def test_a_second_pickle_is_refused(tmp_path):
    marker = tmp_path / "marker"
    code = pickle.dumps(Payload(marker))
    for name in (
        "archive/other.pkl",
        "archive/.metadata",
        "archive/data/payload.pkl",
        "data.pkl",
        "other/data.pkl",
        "archive/../data.pkl",
        "/data.pkl",
    ):
        refused(tmp_path, archive({**members(), name: code}))
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice_is_refused(tmp_path):
    for name in members():
        assert "twice" in refused(tmp_path, archive([*members().items(), (name, members()[name])]))


def test_polyglots_are_refused(tmp_path):
    for before in (b"\xff\xd8\xff\xe0" + bytes(200) + b"\xff\xd9", b"#!/bin/sh\n", b"MZ", b"\x00"):
        refused(tmp_path, before + GOOD)
    refused(tmp_path, GOOD + b"more")
    refused(tmp_path, GOOD + GOOD)
    with_comment = bytearray(GOOD)
    with_comment[-2:] = struct.pack("<H", 4)
    refused(tmp_path, bytes(with_comment) + b"more")


def test_torchscript_is_refused(tmp_path):
    data = archive({**members(), "archive/code/__torch__.py": b"raise SystemExit\n", "archive/constants.pkl": b"\x80\x02)."})
    assert "TorchScript" in refused(tmp_path, data)


def test_formats_before_the_zip_are_refused(tmp_path):
    marker = tmp_path / "marker"
    assert "before 1.6" in refused(tmp_path, saved(network().state_dict(), _use_new_zipfile_serialization=False))
    assert "before 1.6" in refused(tmp_path, pickle.dumps(Payload(marker), protocol=2))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("pickle")
        code = pickle.dumps(Payload(marker))
        info.size = len(code)
        tar.addfile(info, io.BytesIO(code))
    assert "before 1.6" in refused(tmp_path, out.getvalue())
    assert not marker.exists()


def test_folders_and_links_are_refused(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    (tmp_path / "w.pth").write_bytes(GOOD)
    (tmp_path / "link.pth").symlink_to(tmp_path / "w.pth")
    for path in (tmp_path / "dcp", tmp_path / "link.pth", tmp_path / "none.pth", "/dev/zero"):
        with pytest.raises(WmError):
            read_tensors(type(tmp_path)(path))
    assert not marker.exists()


@pytest.mark.parametrize("size", [0, 1, 4, 30, len(GOOD) // 2, len(GOOD) - 23, len(GOOD) - 1])
def test_truncated_files_are_refused(tmp_path, size):
    line = refused(tmp_path, GOOD[:size])
    assert "copy it again" in line or "re-saves" in line


def test_compressed_members_are_refused(tmp_path):
    bomb = {**members(), "archive/data/0": bytes(1 << 26)}
    data = archive(bomb, zipfile.ZIP_DEFLATED)
    assert len(data) < 1 << 18
    assert "compressed" in refused(tmp_path, data)


def test_members_on_top_of_each_other_are_refused(tmp_path):
    data = bytearray(archive({"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(64), "a/data/1": bytes(64)}))
    second = data.rindex(b"PK\x01\x02")
    first = data.rindex(b"PK\x01\x02", 0, second)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    refused(tmp_path, bytes(data))


def test_every_flipped_bit_is_found_or_does_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    expected, silent = network().state_dict(), 0
    path = tmp_path / "w.pth"
    for at, bit in zip(rng.integers(0, len(GOOD), 500), rng.integers(0, 8, 500)):
        data = bytearray(GOOD)
        data[at] ^= 1 << bit
        path.write_bytes(data)
        try:
            silent += not same(read_tensors(path), expected)
        except WmError as error:
            assert "\n" not in str(error)
    assert silent == 0


# tensors


def tensor_pickle(storage="torch\nFloatStorage", elements=4, offset=0, size=(4,), stride=(1,), key="0", name="w"):
    """A state dict of one tensor as torch.save would put it, with whatever numbers are asked for."""

    def number(value):
        return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def many(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    spoken = b"(" + text("storage") + f"c{storage}\n".encode() + text(key) + text("cpu") + number(elements) + b"tQ"
    return (
        b"\x80\x02}"
        + text(name)
        + b"ctorch._utils\n_rebuild_tensor_v2\n("
        + spoken
        + number(offset)
        + many(size)
        + many(stride)
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )


def hostile(tmp_path, stored=bytes(16), **kwargs):
    return refused(tmp_path, with_pickle(tensor_pickle(**kwargs), **{"0": stored}))


def test_a_name_twice_and_bytes_after_the_end_are_refused(tmp_path):
    stored, once = {"0": bytes(16)}, tensor_pickle()
    twice = once[:-1] + once[3:-1] + b"."  # without the protocol and the empty dict that it begins with
    assert "'w' twice" in refused(tmp_path, with_pickle(twice, **stored))
    assert "after its end" in refused(tmp_path, with_pickle(once + b"x", **stored))


def test_the_tensor_by_hand_is_good_when_nothing_is_wrong(tmp_path):
    (tmp_path / "w.pth").write_bytes(with_pickle(tensor_pickle(), **{"0": np.arange(4, dtype="<f4").tobytes()}))
    assert same(read_tensors(tmp_path / "w.pth"), {"w": torch.arange(4.0)})


@pytest.mark.parametrize(
    "wrong",
    [
        {"elements": 8, "size": (8,)},
        {"elements": 1 << 40, "size": (1 << 40,)},
        {"stored": b"", "elements": 4},
        {"stored": bytes(15)},
        {"size": (5,)},
        {"size": (1 << 40,), "stride": (0,)},
        {"size": (1 << 62,)},
        {"size": (1 << 40, 1 << 40)},
        {"size": (-4,)},
        {"stride": (-1,)},
        {"stride": (2,)},
        {"stride": (1 << 62,)},
        {"offset": 1},
        {"offset": -1},
        {"offset": 1 << 62},
        {"size": (2, 2), "stride": (1,)},
        {"size": (0,), "offset": 9},
        {"key": "1"},
        {"key": "../0"},
        {"size": (1,) * 64, "stride": (1,) * 64},
        {"elements": -4},
        {"storage": "torch\nComplexFloatStorage"},
        {"storage": "torch\nQInt8Storage"},
        {"storage": "torch.cuda\nFloatStorage"},
        {"storage": "torch\nUntypedStorage"},
        {"storage": "torch\nDoubleStorage"},
        {"storage": "torch\nSize"},
    ],
    ids=str,
)
def test_tensors_that_their_storage_does_not_hold_are_refused(tmp_path, wrong):
    hostile(tmp_path, **wrong)


@pytest.mark.parametrize(
    "kind, make",
    [
        ("sparse", lambda: torch.eye(3).to_sparse()),
        ("qtensor", lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)),
        ("meta", lambda: torch.empty(3, device="meta")),
        ("Complex", lambda: torch.ones(2, dtype=torch.complex64)),
        ("sparse", lambda: torch.eye(3).to_sparse_csr()),
        ("UInt16", lambda: torch.ones(2, dtype=torch.uint16)),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds_are_refused(tmp_path, kind, make):
    assert kind.lower() in refused(tmp_path, saved({"w": make()})).lower()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value, name):
    weights = network().state_dict()
    weights["0.bias"][1] = value
    assert "0.bias" in refused(tmp_path, saved(weights) if name == "w.pth" else save_safetensors(dict(weights)), name)


def test_names_that_are_no_text_and_files_without_tensors_are_refused(tmp_path):
    assert "not by text" in refused(tmp_path, saved({0: torch.ones(1)}))
    assert "epoch" in refused(tmp_path, saved({"epoch": 3}))
    assert "no state dict" in refused(tmp_path, saved([torch.ones(1)]))
    refused(tmp_path, saved({"state_dict": {}}))


def test_one_storage_named_over_and_over_does_not_grow(tmp_path):
    big = torch.zeros(1 << 18)
    assert "over and over" in refused(tmp_path, saved({str(i): big for i in range(64)}))


@pytest.mark.parametrize(
    "code",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02}",
        b"\x80\x02}..",
        b"\x80\x02}.garbage",
        b"\x80\x02]X\x01\x00\x00\x00aK\x01s.",
        b"\x80\x02}X\x01\x00\x00\x00as.",
        b"\x80\x02}(X\x01\x00\x00\x00au.",
        b"\x80\x02t.",
        b"\x80\x02h\x07.",
        b"\x80\x02r\xff\xff\xff\xff.",
        b"\x80\x02}r\xff\xff\xff\xff.",
        b"\x80\x02R.",
        b"\x80\x02X\xff\xff\xff\x7fa.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
        b"\x80\x02}(K\x01K\x02K\x01K\x03u.",
        b"(lp0\n.",
        b"I" + b"9" * 9999 + b"\n.",
        b"\x80\x02}}K\x01s.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02)\x81.",
        b"\x80\x02}K\x01b.",
        b"\x80\x02K\x01K\x01b.",
        b"\x80\x02ccollections\nOrderedDict\n]]aa\x85R.",
        b"\xff",
        b"cos\nsystem\n(S'id'\ntR.",
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02}0.",
        b"\x80\x02\x82\x01.",
    ],
    ids=lambda c: repr(c[:24]),
)
def test_pickles_that_torch_never_writes_are_refused(tmp_path, code):
    refused(tmp_path, with_pickle(code))


def test_deep_and_wide_pickles_end_soon(tmp_path):
    refused(tmp_path, with_pickle(b"\x80\x02)" + b"\x85" * 200_000 + b"."))
    doubled = b"\x80\x02)" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    refused(tmp_path, with_pickle(doubled + b"."))
    assert "key" in refused(tmp_path, with_pickle(b"\x80\x02}" + doubled[2:] + b"Ns."))


def test_mutated_pickles_never_end_in_anything_else(tmp_path):
    rng = np.random.default_rng(1)
    files = members()
    inner = next(name for name in files if name.endswith("data.pkl"))
    code, path = files[inner], tmp_path / "w.pth"
    for _ in range(150):
        data = bytearray(code)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(0, 256)
        path.write_bytes(archive({**files, inner: bytes(data)}))
        try:
            assert all(isinstance(v, torch.Tensor) for v in read_tensors(path).values())
        except WmError as error:
            assert "\n" not in str(error)


# safetensors


def safetensors(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(first=0, last=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        safetensors(b"", length=0),
        safetensors(b"{}", length=(1 << 64) - 1),
        safetensors(b"{}", length=101_000_000),
        safetensors(b"\xff\xfe{}"),
        safetensors(b"{"),
        safetensors(b"[]"),
        safetensors(b"nonsense"),
        safetensors({"a": 3}),
        safetensors({"a": {}}),
        safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        safetensors({"a": entry(), "b": entry(8, 12)}, bytes(12)),
        safetensors({"a": entry(0, 8, (2,)), "b": entry(4, 8)}, bytes(8)),
        safetensors({"a": entry(4, 0)}, bytes(4)),
        safetensors({"a": entry(shape=(1 << 62, 1 << 62))}, bytes(4)),
        safetensors({"a": entry(shape=(-1,))}, bytes(4)),
        safetensors({"a": entry(dtype="F128")}, bytes(4)),
        safetensors({"a": entry(dtype="C64", last=8)}, bytes(8)),
        safetensors({"a": entry(dtype=3)}, bytes(4)),
        safetensors({"a": entry()}, bytes(5)),
        safetensors({"a": entry()}, bytes(3)),
        safetensors({"a": entry(), "__metadata__": {"epoch": 3}}, bytes(4)),
        safetensors({"a": entry(shape=(2,))}, bytes(4)),
        safetensors({str(i): entry(0, 0, (0,)) for i in range(100_001)}),
        GOOD,
        safetensors({"a": entry(0.0, 4)}, bytes(4)),
        safetensors({"a": entry("0", 4)}, bytes(4)),
        safetensors(b"[" * 100_000),
    ],
    ids=lambda d: repr(d[:60]),
)
def test_broken_safetensors_are_refused(tmp_path, data):
    refused(tmp_path, data, "w.safetensors")


def test_safetensors_cut_anywhere_are_refused(tmp_path):
    whole = save_safetensors(dict(network().state_dict()))
    for size in (1, 7, 8, 20, len(whole) // 2, len(whole) - 1):
        refused(tmp_path, whole[:size], "w.safetensors")


def test_a_pickle_called_safetensors_is_refused(tmp_path):
    marker = tmp_path / "marker"
    refused(tmp_path, pickle.dumps(Payload(marker)), "w.safetensors")
    assert not marker.exists()
