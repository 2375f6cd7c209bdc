"""`wm export RUN --to onnx`: the encoder as one ONNX file, with dynamic numbers of points and pillars, checked against onnxruntime.

The folder: `encoder.onnx` (opset 18, no external data, what it expects in its metadata), `voxelize.py` (numpy alone: from a cloud to its
inputs), `config.json`, `manifest.json`, `check_in_target.py`, and what the proof needs: `model.safetensors`, the weights it was made of, and
`sample.safetensors`, a cloud and our map of it.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sensors.data import Part
from sensors.errors import UsageError, WmError, one_line
from sensors.files import BadFile, check_folder, commit_folder, read_whole
from worldmodel.config import Encoder
from worldmodel.handover import graph
from worldmodel.handover.folding import Column
from worldmodel.trained import Trained

MODEL = "encoder.onnx"
OPSET = 18
LIMIT = (1 << 31) - 1
MOST_NODES = 100_000
MOST_ELEMENTS = 1 << 30
# what the graph of a pillar encoder is made of; above all nothing that holds a graph of its own, loops, or asks for randomness
OPERATORS = {
    "Add", "BatchNormalization", "Cast", "Concat", "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Div", "Expand", "Flatten", "Gather",
    "GatherND", "Gemm", "Identity", "Less", "MatMul", "Max", "Min", "Mul", "ReduceMax", "ReduceSum", "Relu", "Reshape", "ScatterElements",
    "ScatterND", "Shape", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze",
}  # fmt: skip
SIZED_BY = {"Expand": 1, "Reshape": 1, "ConstantOfShape": 0}


def columns(encoder: Encoder, intensity: float | None) -> tuple[Column, ...]:
    """Our own columns; intensity: the full scale of the deployer's, which is folded into the first layer."""
    return graph.columns(encoder, intensity)


def _library(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"--to onnx needs {name}: pip install driving-worldmodel[onnx]") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torchvision the exporter says so on stderr, though nothing here uses it; and it warns of axes that share a name on purpose."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def export(trained: Trained, folder: Path, about: dict[str, Any], sample: Tensor, parts: Sequence[Part]) -> dict[str, Any]:
    """Write the export of a trained run's encoder to the new folder; sample (N,F) f32 is a cloud with the encoder's columns."""
    onnx = _library("onnx")
    _library("onnxscript")
    _library("onnxruntime")
    config = trained.config.encoder
    module, files, metadata = graph.prepared(trained, about, sample)
    with _quiet():
        program = torch.onnx.export(
            module, graph.example(config), input_names=graph.input_names(config), output_names=["map"], opset_version=OPSET,
            dynamic_shapes=graph.dynamic_shapes(config), dynamo=True, external_data=False, verbose=False)  # fmt: skip
    assert program is not None
    model = program.model_proto
    _by_rows(model)
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del part.metadata_props[:]  # the exporter's notes: paths and lines of this machine
    onnx.helper.set_model_props(model, metadata | {"licence": str(about.get("licence"))})
    files[MODEL] = model.SerializeToString()
    initializers = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    return commit_folder(folder, files, {**about, "target": "onnx", "tensors": len(initializers), "opset": OPSET, "initializers": initializers})


def _by_rows(model: Any) -> None:
    """Points go to their pillars row by row (ScatterND) instead of element by element, which is how the exporter says it: onnxruntime takes half
    the time for the whole encoder, and gives the same bits."""
    maker = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        index = maker.get(node.input[1]) if node.op_type == "ScatterElements" else None
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        if index is None or axis != 0 or index.op_type != "Expand" or maker[index.input[0]].op_type != "Unsqueeze":
            continue
        node.op_type = "ScatterND"
        node.input[1] = index.input[0]
        for attribute in [a for a in node.attribute if a.name == "axis"]:
            node.attribute.remove(attribute)
    used = {name for node in model.graph.node for name in node.input} | {row.name for row in model.graph.output}
    for node in [n for n in model.graph.node if not used & set(n.output)]:
        model.graph.node.remove(node)
    used = {name for node in model.graph.node for name in node.input}
    for tensor in [t for t in model.graph.initializer if t.name not in used]:
        model.graph.initializer.remove(tensor)


def snippet(folder: Path) -> str:
    """What a deployer pastes: numpy and onnxruntime alone."""
    return (f"import json, pathlib, sys; sys.path.insert(0, {str(folder)!r})\nimport onnxruntime\nfrom voxelize import inputs\n"
            f"config = json.loads(pathlib.Path({str(folder / 'config.json')!r}).read_text())['encoder']\n"
            f"session = onnxruntime.InferenceSession({str(folder / MODEL)!r})\n"
            "(bev,) = session.run(None, inputs(cloud, config))   # (N,F) float32 -> (1,C,H,W)")  # fmt: skip


def inspected(data: bytes, what: str) -> Any:
    """The ModelProto of an ONNX file that anybody may have made, looked through before anything acts on it: BadFile for data kept in other files,
    tensors that claim other sizes than they have, operators or functions beyond OPERATORS, graphs inside nodes, cycles."""
    onnx = _library("onnx")
    message = _library("google.protobuf.message")
    again = "export the run again"
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except (message.DecodeError, ValueError, RecursionError) as error:
        raise BadFile(f"{what}: not an ONNX file, or cut off ({one_line(error, 80)}); {again}") from error
    if model.functions or model.training_info or any(row.domain not in ("", "ai.onnx") for row in model.opset_import):
        raise BadFile(f"{what}: holds functions or operators of its own (custom domains); {again}")
    if model.graph.sparse_initializer or model.graph.quantization_annotation or len(model.graph.node) > MOST_NODES:
        raise BadFile(f"{what}: sparse or quantized, or more than {MOST_NODES} nodes: no encoder of ours; {again}")
    shapes: dict[str, list[int]] = {}
    for tensor in model.graph.initializer:
        _check_tensor(onnx, tensor, what)
        if tensor.name in shapes:
            raise BadFile(f"{what}: {one_line(tensor.name, 80)} is there twice; {again}")
        whole = tensor.data_type == onnx.TensorProto.INT64 and math.prod(tensor.dims) <= 16
        shapes[tensor.name] = onnx.numpy_helper.to_array(tensor).ravel().tolist() if whole else []
    for node in model.graph.node:
        name = one_line(node.op_type, 40)
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            raise BadFile(f"{what}: uses the operator {one_line(node.domain, 40)}::{name}, which no encoder of ours has; {again}")
        for attribute in node.attribute:
            if (
                attribute.HasField("g")
                or attribute.graphs
                or attribute.HasField("sparse_tensor")
                or attribute.sparse_tensors
                or attribute.ref_attr_name
            ):
                raise BadFile(f"{what}: a graph inside of {name}; {again}")
            for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
                _check_tensor(onnx, tensor, what)
        at = SIZED_BY.get(node.op_type)
        if at is not None and at < len(node.input) and math.prod(abs(n) or 1 for n in shapes.get(node.input[at], [])) > MOST_ELEMENTS:
            raise BadFile(f"{what}: {name} would make a tensor of more than {MOST_ELEMENTS} elements; {again}")
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise BadFile(f"{what}: onnx.checker says {one_line(error, 160)}; {again}") from error
    return model


def _check_tensor(onnx: ModuleType, tensor: Any, what: str) -> None:
    name = one_line(tensor.name, 80)
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        where = next((one_line(repr(entry.value), 80) for entry in tensor.external_data if entry.key == "location"), "another file")
        raise BadFile(f"{what}: {name} lies outside of the file, in {where}, which is not opened; export the run again")
    sizes = {onnx.TensorProto.FLOAT: (4, "float_data"), onnx.TensorProto.INT64: (8, "int64_data"), onnx.TensorProto.INT32: (4, "int32_data"),
             onnx.TensorProto.BOOL: (1, "int32_data")}  # fmt: skip
    if tensor.data_type not in sizes or tensor.HasField("segment") or any(n < 0 for n in tensor.dims) or len(tensor.dims) > 16:
        raise BadFile(f"{what}: {name} is of a type or shape that no weights have; export the run again")
    size, field = sizes[tensor.data_type]
    held = len(tensor.raw_data) // size if tensor.HasField("raw_data") else len(getattr(tensor, field))
    if math.prod(tensor.dims) != held or (tensor.HasField("raw_data") and len(tensor.raw_data) != held * size):
        raise BadFile(f"{what}: {name} claims {math.prod(tensor.dims)} elements and holds {held}; export the run again")


def verify(folder: Path) -> dict[str, Any]:
    """Look the file through, run the stored cloud and a part of it in onnxruntime, and compare with torch and with the stored map.

    Gives {"loaded", "tensors", "expected", "missing", "unexpected", "mismatched", "difference", "absolute", "largest", "sizes", "latency_ms",
    "reasons"}; latency_ms: medians of onnxruntime and torch on the stored cloud, pillars found already, one thread each."""
    manifest = check_folder(folder)
    wanted = manifest.get("initializers")
    if not isinstance(wanted, dict):
        raise WmError(f"{one_line(folder)}: the manifest lists no initializers; export the run again")
    what = one_line(folder / MODEL)
    data = read_whole(folder / MODEL, LIMIT)
    model = inspected(data, what)
    stored = graph.Stored(folder)
    runtime = _library("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4

    def run(given: dict[str, Any]) -> Tensor:
        return torch.from_numpy(session.run(None, given)[0])

    try:
        session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        found = stored.differences(run)
        given = stored.inputs()
        tensors = tuple(torch.from_numpy(value) for value in given.values())
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                latency = {"onnxruntime": graph.median_ms(lambda: session.run(None, given)), "torch": graph.median_ms(lambda: stored.graph(*tensors))}
        finally:
            torch.set_num_threads(threads)
    except (RuntimeError, ValueError, TypeError) as error:  # onnxruntime's own errors are RuntimeErrors
        raise WmError(f"{what}: onnxruntime refuses it ({one_line(error, 200)}); export the run again") from error
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime"):
            raise WmError(f"{what}: onnxruntime refuses it ({one_line(error, 200)}); export the run again") from error
        raise
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    metadata = {row.key: row.value for row in model.metadata_props}
    reasons = [f"{MODEL} says of itself {one_line(key)} {one_line(metadata.get(key), 80)}, config.json {one_line(value, 80)}"
               for key, value in stored.metadata.items() if metadata.get(key) != value]  # fmt: skip
    return {
        "loaded": sum(wanted.get(name) == dims for name, dims in shapes.items()), "tensors": len(shapes), "expected": int(manifest["tensors"]),
        "missing": sorted(wanted.keys() - shapes.keys()), "unexpected": sorted(shapes.keys() - wanted.keys()),
        "mismatched": sorted(name for name in shapes.keys() & wanted.keys() if shapes[name] != wanted[name]),
        **found, "latency_ms": latency, "reasons": reasons,
    }  # fmt: skip
