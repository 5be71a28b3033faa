"""What ONNX Runtime makes of a file: whether it takes it, and which operations it runs in float."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto

from compressor.errors import ExportError, first_line
from compressor.export.graph import attribute
from compressor.export.onnxruntime_model import ORT_ERRORS

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
INTEGER_KERNEL = re.compile(r"QLinear|QGemm|MatMulNBits|Quantize|Dequantize|\w*Integer")
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
    executed, written = executed_graph(path).graph, onnx.load(path).graph
    names = {name: node.name for node in written.node for name in (node.name, *node.output)}
    floats = {value.name for value in executed.input if _is_float(value.type.tensor_type.elem_type)}
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for node in executed.node:
        computes_floats = not floats.isdisjoint(node.input)
        if _writes_floats(node, is_given_floats=computes_floats):
            floats.update(node.output)
        is_other = INTEGER_KERNEL.match(node.op_type) or node.op_type in MOVING
        if computes_floats and not is_other:
            found[node.op_type][_scope(node, names)] = None
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


def _scope(node: NodeProto, written: Mapping[str, str]) -> str:
    """Of the node of the file that it was: the runtime appends to names ("conv2d_1_nchwc")."""
    for name in (node.name, *node.output):
        known = [key for key in written if name == key or name.startswith((f"{key}_", f"{key}/"))]
        if known:
            return written[max(known, key=len)].rpartition("/")[0]
    return ""


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
