"""`wm export RUN --to pt2`: the encoder as a program of torch.export, with dynamic numbers of points and pillars.

The folder: `encoder.pt2`, `voxelize.py` (numpy alone: from a cloud to its inputs), `config.json`, `manifest.json`, `check_in_target.py`,
`model.safetensors`, the weights it was made of, and `sample.safetensors`, a cloud and our map of it.

`torch.export.load` is not safe on files of others: an archive may hold pickles, names of functions to call, and expressions that are
evaluated. `verify` reads the archive's own tables first and refuses all that no encoder of ours has.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sensors.data import Part
from sensors.errors import WmError, one_line
from sensors.files import BadFile, check_folder, commit_folder, parse_json, read_whole
from worldmodel.config import Encoder
from worldmodel.handover import graph
from worldmodel.handover.folding import Column
from worldmodel.trained import Trained

MODEL = "encoder.pt2"
LIMIT = 1 << 32
TABLE_BYTES = 1 << 26
METADATA = "wm.json"
_MEMBER = re.compile(
    r"[A-Za-z0-9_]+/(archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)|models/model\.json|extra/wm\.json"
    r"|data/(weights/(weight_[0-9]+|model_weights_config\.json)|constants/(tensor_[0-9]+|model_constants_config\.json)|sample_inputs/model\.pt))"
)
_TARGET = re.compile(r"torch\.ops\.aten\.[a-z_0-9]+\.[A-Za-z_0-9]+|_operator\.(eq|ge|gt|le|lt|add|mul|sub)")
_EXPRESSION = re.compile(r"(Symbol\('[su][0-9]{1,6}', positive=True, integer=True\)|(Mul|Add|Integer)\(|\)|, |[0-9]{1,12}){1,40}")
_GUARD = re.compile(r"(L\['[a-z_]+'\]\.size\(\)\[[0-9]\]|[0-9]{1,12}| (<|<=|==|>=|>) ){3}")


def columns(encoder: Encoder, intensity: float | None) -> tuple[Column, ...]:
    """Our own columns; intensity: the full scale of the deployer's, which is folded into the first layer."""
    return graph.columns(encoder, intensity)


def export(trained: Trained, folder: Path, about: dict[str, Any], sample: Tensor, parts: Sequence[Part]) -> dict[str, Any]:
    """Write the export of a trained run's encoder to the new folder; sample (N,F) f32 is a cloud with the encoder's columns."""
    import json

    config = trained.config.encoder
    module, files, metadata = graph.prepared(trained, about, sample)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations inside torch.export
        program = torch.export.export(module, graph.example(config), dynamic_shapes=graph.dynamic_shapes(config))
        for node in program.graph.nodes:
            for key in ("stack_trace", "torch_fn", "source_fn_stack"):  # paths of this machine, which are nobody's business
                node.meta.pop(key, None)
        torch.export.save(program, buffer, extra_files={METADATA: json.dumps(metadata)})
    files[MODEL] = buffer.getvalue()
    return commit_folder(folder, files, {**about, "target": "pt2", "tensors": len(program.state_dict), "torch": torch.__version__})


def snippet(folder: Path) -> str:
    """What a user pastes: numpy and torch alone."""
    return (f"import json, pathlib, sys; sys.path.insert(0, {str(folder)!r})\nimport torch\nfrom voxelize import inputs\n"
            f"config = json.loads(pathlib.Path({str(folder / 'config.json')!r}).read_text())['encoder']\n"
            f"encoder = torch.export.load({str(folder / MODEL)!r}).module()   # only files you trust: loading can run code\n"
            "with torch.no_grad():\n"
            "    bev = encoder(*(torch.from_numpy(value) for value in inputs(cloud, config).values()))   # (N,F) float32 -> (1,C,H,W)")  # fmt: skip


def inspect(data: bytes, what: str) -> dict[str, Any]:
    """The tables of a .pt2 archive that anybody may have made, by member. BadFile for anything but tensors stored plainly, aten operators and
    simple expressions: for pickles, custom objects, other functions, or what does not belong into the archive."""
    again = "export the run again"
    tables: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            rows = archive.infolist()
            if len({row.filename for row in rows}) != len(rows):
                raise BadFile(f"{what}: a member is there twice; {again}")
            for row in rows:
                if not _MEMBER.fullmatch(row.filename):
                    raise BadFile(f"{what}: {one_line(row.filename, 80)} has no place in the program of an encoder; {again}")
                if row.compress_type != zipfile.ZIP_STORED or row.file_size != row.compress_size:
                    raise BadFile(f"{what}: {one_line(row.filename, 80)} is compressed, which torch.export never does; {again}")
                if row.filename.endswith(".json"):
                    if row.file_size > TABLE_BYTES:
                        raise BadFile(f"{what}: a table of {row.file_size} bytes; {again}")
                    tables[row.filename.partition("/")[2]] = parse_json(archive.read(row), f"{what}: {row.filename}")
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, RuntimeError, OverflowError) as error:
        raise BadFile(f"{what}: not an archive of torch.export, or cut off ({one_line(error, 80)}); {again}") from error
    for path, table in tables.items():
        for key, value in _items(table):
            if key in ("use_pickle", "as_custom_obj", "custom_obj_name") and value:
                raise BadFile(f"{what}: {path} holds a pickle or an object of a class, which is code; {again}")
            if key == "target" and not (isinstance(value, str) and _TARGET.fullmatch(value)):
                raise BadFile(f"{what}: calls {one_line(repr(value), 80)}, which is no operator of an encoder; {again}")
            if key == "guards_code" and not (isinstance(value, list) and all(isinstance(row, str) and _GUARD.fullmatch(row) for row in value)):
                raise BadFile(f"{what}: guards that are more than comparisons of sizes, {one_line(repr(value), 80)}, are not evaluated; {again}")
            if key in ("source_fn_stack", "treespec_namedtuple_fields") and value:
                raise BadFile(f"{what}: {path} names code by {key}, which no encoder of ours needs; {again}")
            if key == "expr_str" and not (isinstance(value, str) and _EXPRESSION.fullmatch(value)):
                raise BadFile(f"{what}: the expression {one_line(repr(value), 80)} is not evaluated; {again}")
    return tables


def _items(table: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth; parse_json bounds the depth."""
    stack = [table]
    while stack:
        here = stack.pop()
        if isinstance(here, dict):
            yield from here.items()
            stack += here.values()
        elif isinstance(here, list):
            stack += here


def verify(folder: Path) -> dict[str, Any]:
    """Look the archive through, load it, run the stored cloud and a part of it, compare with the same graph in torch and with the stored map.

    Gives {"loaded", "tensors", "expected", "missing", "unexpected", "mismatched", "difference", "absolute", "largest", "sizes", "reasons"}."""
    manifest = check_folder(folder)
    what = one_line(folder / MODEL)
    data = read_whole(folder / MODEL, LIMIT)
    tables = inspect(data, what)
    stored = graph.Stored(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(io.BytesIO(data))
            module = program.module()
        with torch.no_grad():
            found = stored.differences(lambda given: module(*(torch.from_numpy(value) for value in given.values())))
    except WmError:
        raise
    except Exception as error:  # what torch raises on an archive that it cannot use is of many kinds
        made = one_line(manifest.get("torch"), 40)
        raise WmError(f"{what}: torch {torch.__version__} does not load or run it, made with {made} ({one_line(error, 160)})") from error
    own, theirs = stored.graph.state_dict(), program.state_dict
    metadata = tables.get(f"extra/{METADATA}", {})
    reasons = [f"{MODEL} says of itself {one_line(key)} {one_line(metadata.get(key), 80)}, config.json {one_line(value, 80)}"
               for key, value in stored.metadata.items() if metadata.get(key) != value]  # fmt: skip
    mismatched = sorted(name for name in own.keys() & theirs.keys() if own[name].shape != theirs[name].shape)
    return {
        "loaded": len(own.keys() & theirs.keys()) - len(mismatched), "tensors": len(own), "expected": int(manifest["tensors"]),
        "missing": sorted(own.keys() - theirs.keys()), "unexpected": sorted(theirs.keys() - own.keys()), "mismatched": mismatched,
        **found, "reasons": reasons,
    }  # fmt: skip
