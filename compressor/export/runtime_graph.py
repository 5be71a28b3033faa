"""What ONNX Runtime makes of a file: whether it takes it, and which operations it runs in float."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from onnx import GraphProto, NodeProto, TensorProto

from compressor.errors import ExportError, first_line
from compressor.export.graph import attribute
from compressor.export.onnxruntime_model import ORT_ERRORS

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
INTEGER_KERNEL = re.compile(
    r"QLinear|QGemm|MatMulNBits|Quantize|Dequantize|DynamicQuantize|\w*Integer"
)
TO_FLOATS = re.compile(r"Dequantize|MatMulNBits|DynamicQuantize(MatMul|LSTM)|\w*IntegerToFloat")
NO_FLOATS = frozenset(
    {"ArgMax", "ArgMin", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "NonZero"}
    | {"IsInf", "IsNaN", "Shape", "Size"}
)
MOVING = frozenset(
    {"Cast", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "Expand", "Flatten"}
    | {"Gather", "GatherElements", "GatherND", "Identity", "Pad", "ReorderInput", "ReorderOutput"}
    | {"Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
QGEMM_SCALE = 7  # the place of the scale of its result, which is float without one


def check_loads(content: bytes) -> None:
    """Let ONNX Runtime read a file, of this content, before it is written.

    Raises:
        ExportError: if it refuses; with its reason.
    """
    _load(content, ort.SessionOptions())


def executed_graph(path: Path | str) -> onnx.ModelProto:
    """The file as ONNX Runtime executes it on this machine's CPU: fused, and in its own layouts.

    Raises:
        ExportError: if it refuses the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(optimised)
        _load(str(path), options)
        return onnx.load(optimised)


def float_operations(path: Path | str) -> dict[str, tuple[str, ...]]:
    """What ONNX Runtime computes in float in a quantized file, beside its integer kernels.

    It has no integer kernel for them, or what they read is not quantized; layers that were left in
    float are among them. What converts or only moves values is not.

    Returns:
        For each type of operation in ONNX, names of the modules that they are of, once each; "" is
        the model itself, or several modules that the runtime made one operation of.

    Raises:
        ExportError: if ONNX Runtime refuses the file.
    """
    executed, written = executed_graph(path).graph, onnx.load(path, load_external_data=False).graph
    floats = {value.name for value in executed.input if _is_float(value.type.tensor_type.elem_type)}
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for node, origin in _with_origins(executed, written):
        computes_floats = not floats.isdisjoint(node.input)
        if _writes_floats(node, is_given_floats=computes_floats):
            floats.update(node.output)
        is_other = INTEGER_KERNEL.match(node.op_type) or node.op_type in MOVING
        if computes_floats and not is_other:
            name = "" if origin is None else origin.name
            found[node.op_type][name.rpartition("/")[0]] = None
    return {kind: tuple(names) for kind, names in found.items()}


def _writes_floats(node: NodeProto, *, is_given_floats: bool) -> bool:
    if node.op_type == "QGemm":
        return len(node.input) <= QGEMM_SCALE or not node.input[QGEMM_SCALE]
    if node.op_type == "Cast":
        return _is_float(attribute(node, "to", TensorProto.FLOAT))
    if TO_FLOATS.match(node.op_type):
        return True
    is_kernel = INTEGER_KERNEL.match(node.op_type) or node.op_type in NO_FLOATS
    return is_given_floats and not is_kernel


def _with_origins(
    executed: GraphProto, written: GraphProto
) -> Iterator[tuple[NodeProto, NodeProto | None]]:
    """Each executed node with the node of the file that it was, or is a part of."""
    known = {name: node for node in written.node for name in (node.name, *node.output) if name}
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in written.node:
        for name in node.input:
            readers[name].append(node)
    kept = {node.op_type for node in executed.node}
    origins: dict[str, NodeProto] = {}  # of executed values
    for node in executed.node:
        origin = _namesake(node, known)
        if origin is None:
            origin = _whole(node, origins, readers, kept)
        if origin is not None:
            origins.update({name: known.get(name, origin) for name in node.output})
        yield node, origin


def _namesake(node: NodeProto, known: Mapping[str, NodeProto]) -> NodeProto | None:
    """The one of its name: the runtime appends to names ("conv2d_1_nchwc")."""
    for name in (node.name, *node.output):
        found = [key for key in known if name == key or name.startswith((f"{key}_", f"{key}/"))]
        if found:
            return known[max(found, key=len)]
    return None


def _whole(
    node: NodeProto,
    origins: Mapping[str, NodeProto],
    readers: Mapping[str, list[NodeProto]],
    kept: Collection[str],
) -> NodeProto | None:
    """The operation without a kernel that a nameless node is a part of.

    ONNX defines it by others, as HardSwish, and the runtime writes these: it reads what that does.
    """
    for name in node.input:
        source = origins.get(name)
        if source is not None and _is_written_out(source, kept):
            return source
        for value in [name] if source is None else source.output:
            for reader in readers.get(value, ()):
                if _is_written_out(reader, kept):
                    return reader
    return None


def _is_written_out(node: NodeProto, kept: Collection[str]) -> bool:
    if node.domain or node.op_type in kept or not onnx.defs.has(node.op_type):
        return False
    schema: Any = onnx.defs.get_schema(node.op_type)
    return bool(schema.has_function)


def _is_float(kind: int) -> bool:
    return kind in FLOATS


def _load(file: str | bytes, options: ort.SessionOptions) -> None:
    options.log_severity_level = 3  # it warns of its own optimiser
    try:
        ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise ExportError(
            f"ONNX Runtime {ort.__version__} refuses the quantized file: {first_line(error)} Leave "
            "the layers around what it names in float (`ignored`), or install another version."
        ) from error
