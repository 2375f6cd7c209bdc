"""Tensors out of checkpoints that somebody else made, without running anything that is in them.

A file of `torch.save` is a zip of one pickle, `data.pkl`, and one member per storage. Pickle is a small stack language, and what is dangerous in
it is calling what it names. Here it is interpreted by hand: the values that a state dict is made of are built, tensors become descriptions,
checked against the storages that are there, and any other name ends the reading. Neither `pickle` nor `torch.load` is involved, so no
defect of theirs and no setting opens a way around.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from sensors.errors import one_line
from sensors.files import BadFile, parse_json, read_whole

LIMIT_BYTES = 1 << 33
PICKLE_BYTES = 1 << 26
HEADER_BYTES = 1 << 25
MOST_TENSORS = 100_000
AMPLIFICATION = 4  # tensors of one file may share storages, but not hold more than so many times the file's size
WRAPPERS = ("model_state", "state_dict", "model")  # OpenPCDet; mmengine and Lightning; detectron2 and many scripts
RESAVE = "its owner re-saves it: torch.save({k: v for k, v in model.state_dict().items()}, 'weights.pth')"

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
_SAFETENSORS = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
_REBUILD = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"}
_OTHER_TENSORS = re.compile(r"torch\._utils _rebuild_(?P<kind>sparse|qtensor|meta|nested|wrapper|tensor_v3|parameter_with_state|device)")
_MEMBERS = re.compile(r"[^/]+/(data\.pkl|version|byteorder|data/[0-9]+|\.format_version|\.storage_alignment|\.data/serialization_id)")
_PLAIN = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES",
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """tensors: by name, on the CPU, contiguous, none sharing memory with another. wrapper: the key they lay under, "" for none."""

    tensors: dict[str, Tensor]
    wrapper: str


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth`, `.pt`, `.ckpt` (torch.save, torch >= 1.6) or `.safetensors` file; see `read_checkpoint`."""
    return read_checkpoint(path).tensors


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint made by anybody: a state dict, bare or under one of `WRAPPERS`; other plain values beside it are ignored.

    BadFile: not whole (length, checksums), not of weights alone (which global it names), tensors that their storages do not hold,
    numbers that are not finite, kinds of numbers that no layer has (complex, quantised, sparse)."""
    shown = one_line(path)
    if path.is_dir():
        raise BadFile(f"{shown}: a folder, expected one file of weights; {RESAVE}")
    data = read_whole(path, LIMIT_BYTES)
    if not data:
        raise BadFile(f"{shown}: empty; copy it again")
    if path.suffix == ".safetensors":
        found = Checkpoint(_safetensors(data, shown), "")
    else:
        found = _archive(data, shown)
    for name, value in found.tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise BadFile(f"{shown}: {one_line(name, 100)} holds NaN or infinite numbers; take a checkpoint from before that")
    return found


def _safetensors(data: bytes, shown: str) -> dict[str, Tensor]:
    again = "copy it again, or save it again with safetensors.torch.save_file"
    if len(data) < 8:
        raise BadFile(f"{shown}: {len(data)} bytes are no safetensors file; {again}")
    (length,) = struct.unpack_from("<Q", data)
    if length > min(len(data) - 8, HEADER_BYTES):
        raise BadFile(f"{shown}: a header of {length} bytes in a file of {len(data)}: cut off, or no safetensors file; {again}")
    header = parse_json(data[8 : 8 + length], f"{shown}: header")
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise BadFile(f"{shown}: the header is no table of at most {MOST_TENSORS} tensors; {again}")
    for name, entry in header.items():
        kind = entry.get("dtype") if isinstance(entry, dict) else None
        if name != "__metadata__" and (not isinstance(kind, str) or kind not in _SAFETENSORS):
            raise BadFile(f"{shown}: {one_line(name, 100)} is of type {one_line(repr(kind), 40)}, which no weights are; save it as float32")
    try:
        found = load_safetensors(data)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise BadFile(f"{shown}: {one_line(error, 120)}; {again}") from error
    return {name: value.clone() for name, value in found.items()}


class _Global(NamedTuple):
    """A name that the pickle mentions: known to be harmless, and never looked up."""

    module: str
    name: str


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    elements: int


class _View(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Members(NamedTuple):
    """What the zip directory says: the pickle, and where each storage lies in the file, by its key."""

    pickle: bytes
    storages: dict[str, tuple[int, int]]


def _archive(data: bytes, shown: str) -> Checkpoint:
    members = _members(data, shown)
    top = _Reader(members, shown).run()
    wrapper = ""
    if isinstance(top, dict):
        wrapper = next((key for key in WRAPPERS if isinstance(top.get(key), dict)), "")
    table = top[wrapper] if wrapper else top
    if not isinstance(table, dict):
        raise BadFile(f"{shown}: holds no state dict; {RESAVE}")
    views = {name: value for name, value in table.items() if isinstance(value, _View)}
    if odd := [name for name in views if not isinstance(name, str)]:
        raise BadFile(f"{shown}: a tensor is named {one_line(repr(odd[0]), 40)}, not by text; {RESAVE}")
    if not views:
        keys = ", ".join(one_line(repr(key), 40) for key in list(table)[:5])
        raise BadFile(f"{shown}: no tensor in it (keys: {keys or 'none'}); {RESAVE}")
    total = sum(math.prod(view.size) * view.storage.dtype.itemsize for view in views.values())
    if len(views) > MOST_TENSORS or total > AMPLIFICATION * len(data):
        raise BadFile(f"{shown}: {len(views)} tensors of {total} bytes out of {len(data)}: the same storage over and over; {RESAVE}")
    return Checkpoint({name: _tensor(view, data, members) for name, view in views.items()}, wrapper)


def _members(data: bytes, shown: str) -> _Members:
    """The checked directory of a zip as torch.save writes it: members stored plainly, one after another from the first byte on, none twice,
    none that has no business there, each with its checksum."""
    if data[:4] != b"PK\x03\x04":
        kind = "not a file of torch.save"
        if data[:1] == b"\x80" or data[257:262] == b"ustar":
            kind = "in the format of torch before 1.6, which only code in it can unpack"
        raise BadFile(f"{shown}: {kind}; {RESAVE}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            rows = sorted(archive.infolist(), key=lambda row: row.header_offset)
            if not rows or rows[0].header_offset or data[-22:-18] != b"PK\x05\x06" or archive.comment:
                raise BadFile(f"{shown}: something before or after the archive; {RESAVE}")
            places = _places(rows, data, shown)
            if failed := archive.testzip():
                raise BadFile(f"{shown}: {one_line(failed, 80)} fails its checksum: the file is damaged; copy it again")
    except (zipfile.BadZipFile, NotImplementedError, ValueError, IndexError, OverflowError, EOFError, struct.error, RuntimeError) as error:
        raise BadFile(f"{shown}: cut off or damaged ({one_line(error, 80)}); copy it again") from error
    inside = {name.split("/", 1)[1]: place for name, place in places.items()}
    if "data.pkl" not in inside:
        raise BadFile(f"{shown}: no data.pkl in it; {RESAVE}")
    start, end = inside["data.pkl"]
    if end - start > PICKLE_BYTES:
        raise BadFile(f"{shown}: a data.pkl of {end - start} bytes, more than {PICKLE_BYTES}; {RESAVE}")
    if "byteorder" in inside and data[slice(*inside["byteorder"])] != b"little":
        raise BadFile(f"{shown}: written in another byte order than little; {RESAVE}")
    storages = {name.removeprefix("data/"): place for name, place in inside.items() if name.startswith("data/")}
    return _Members(data[start:end], storages)


def _places(rows: list[zipfile.ZipInfo], data: bytes, shown: str) -> dict[str, tuple[int, int]]:
    places: dict[str, tuple[int, int]] = {}
    at = 0
    for row in rows:
        name = one_line(row.filename, 80)
        if "/code/" in row.filename or row.filename.endswith("/constants.pkl"):
            raise BadFile(f"{shown}: a TorchScript archive, which holds code; {RESAVE}")
        if not _MEMBERS.fullmatch(row.filename) or row.filename.split("/")[0] != rows[0].filename.split("/")[0]:
            raise BadFile(f"{shown}: {name} has no place in a file of weights; {RESAVE}")
        if row.filename in places:
            raise BadFile(f"{shown}: {name} is there twice; {RESAVE}")
        if row.compress_type != zipfile.ZIP_STORED or row.compress_size != row.file_size or row.flag_bits & 1:
            raise BadFile(f"{shown}: {name} is compressed or encrypted, which torch.save never does; {RESAVE}")
        start = row.header_offset + 30 + sum(struct.unpack_from("<HH", data, row.header_offset + 26))
        if row.header_offset < at or start + row.file_size > len(data):
            raise BadFile(f"{shown}: {name} lies on another member or past the end; copy it again")
        at = start + row.file_size
        places[row.filename] = (start, at)
    return places


def _tensor(view: _View, data: bytes, members: _Members) -> Tensor:
    kind = view.storage.dtype
    if not math.prod(view.size):
        return torch.empty(view.size, dtype=kind)
    start, end = members.storages[view.storage.key]
    raw = bytearray(data[start:end])
    flat = torch.frombuffer(raw, dtype=torch.uint8).ne(0) if kind is torch.bool else torch.frombuffer(raw, dtype=kind)
    return flat.as_strided(view.size, view.stride, view.offset).clone(memory_format=torch.contiguous_format)


class _Reader:
    """The stack machine of pickle, for what a state dict is made of."""

    def __init__(self, members: _Members, shown: str) -> None:
        self.members, self.shown = members, shown
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        name, end = "", 0
        try:
            for code, value, position in pickletools.genops(self.members.pickle):
                name, end = code.name, int(position or 0) + 1
                self.step(name, value)
            if name != "STOP" or end != len(self.members.pickle):
                raise ValueError("something after its end")
            (top,) = self.stack
        except (ValueError, IndexError, KeyError, TypeError, struct.error, OverflowError) as error:
            raise BadFile(f"{self.shown}: data.pkl is not as torch.save writes it ({one_line(error, 80)}); {RESAVE}") from error
        return top

    def step(self, name: str, value: Any) -> None:
        stack = self.stack
        if name in _PLAIN:
            stack.append(value)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[value] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[value])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self.pop(int(name[-1]))))
        elif name in ("APPEND", "APPENDS"):
            items = self.pop(1) if name == "APPEND" else self.since_mark()
            self.top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.pop(2) if name == "SETITEM" else self.since_mark()
            self.set_items(self.top(dict), items)
        elif name == "GLOBAL":
            stack.append(self.known(*value.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self.known(*self.pop(2)))
        elif name == "BINPERSID":
            stack.append(self.storage(self.pop(1)[0]))
        elif name == "REDUCE":
            function, arguments = self.pop(2)
            stack.append(self.called(function, arguments))
        elif name == "BUILD":
            self.pop(1)  # attributes of the dict (`_metadata`, the modules' versions), which say nothing of the weights
            self.top(dict)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"instruction {name}")

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise ValueError("takes more off its stack than there is")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def since_mark(self) -> list[Any]:
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"fills a {type(self.stack[-1]).__name__} as if it were a {kind.__name__}")
        return self.stack[-1]

    def set_items(self, table: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):  # hashing a nested tuple may take for ever
                raise ValueError(f"a key of type {type(key).__name__}")
            if key in table:
                raise ValueError(f"the name {one_line(repr(key), 60)} twice")
            table[key] = value

    def known(self, module: Any, name: Any) -> _Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global without name")
        spoken = f"{one_line(module, 60)}.{one_line(name, 60)}"
        harmless = ((module == "collections" and name == "OrderedDict") or (module == "torch" and (name in _STORAGES or name == "Size"))
                    or (module == "torch._utils" and name in _REBUILD))  # fmt: skip
        if harmless:
            return _Global(module, name)
        if other := _OTHER_TENSORS.match(f"{module} {name}"):
            kind = "of numbers like uint16 or float8" if other["kind"].endswith("v3") else f"({other['kind']})"
            raise BadFile(f"{self.shown}: holds a tensor of a kind that is not read {kind}; {RESAVE}")
        if module == "torch" and name.endswith("Storage"):
            raise BadFile(f"{self.shown}: holds a {spoken}, a kind of number that no weights have; save them as float32")
        raise BadFile(f"{self.shown}: not weights only: it names {spoken}, which is not run; {RESAVE}")

    def storage(self, spoken: Any) -> _Storage:
        """From ("storage", torch.FloatStorage, key, device, number of elements); the zip directory has the last word on its size."""
        if not isinstance(spoken, tuple) or len(spoken) != 5 or spoken[0] != "storage":
            raise ValueError("a reference that is no storage")
        kind, key, elements = spoken[1], spoken[2], spoken[4]
        if not isinstance(kind, _Global) or kind.name not in _STORAGES or not isinstance(key, str) or type(elements) is not int or elements < 0:
            raise ValueError("a storage that is not described as one")
        dtype = _STORAGES[kind.name]
        if key not in self.members.storages:
            raise ValueError(f"storage {one_line(key, 20)} is missing")
        start, end = self.members.storages[key]
        if elements * dtype.itemsize != end - start:
            raise ValueError(f"storage {one_line(key, 20)} holds {end - start} bytes, its tensor claims {elements * dtype.itemsize}")
        return _Storage(dtype, key, elements)

    def called(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("a call of what is no function")
        if function.name == "OrderedDict" and arguments in ((), ([],)):
            return {}
        if function.name == "Size" and len(arguments) == 1 and isinstance(arguments[0], tuple):
            return arguments[0]
        if function.name == "_rebuild_parameter" and arguments and isinstance(arguments[0], _View):
            return arguments[0]
        if function.name in ("_rebuild_tensor", "_rebuild_tensor_v2") and len(arguments) >= 4:
            return self.view(*arguments[:4])
        raise ValueError(f"{function.name} of something else")

    def view(self, storage: Any, offset: Any, size: Any, stride: Any) -> _View:
        numbers = [offset, *size, *stride] if isinstance(size, tuple) and isinstance(stride, tuple) else [None]
        if not isinstance(storage, _Storage) or any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers) or len(size) != len(stride):
            raise ValueError("a tensor with a negative or senseless size, stride or offset")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else offset - 1
        if len(size) > 16 or last >= storage.elements:
            raise ValueError(f"a tensor of {one_line(size, 40)} at {offset} in a storage of {storage.elements}")
        return _View(storage, offset, size, stride)
