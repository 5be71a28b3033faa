"""A float ONNX file with quantizers put in (Q/DQ), which a runtime fuses into integer kernels.

Activations are uint8 with a zero point, weights int8, symmetric, one scale per output channel, and
biases int32: on x86 the one combination of types that is faster than float.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from compressor.errors import ExportError, suggest
from compressor.export.graph import Graph, drop_unused_constants, sort_nodes
from compressor.export.layers import LayerNode, find_layers
from compressor.export.onnx import save_onnx
from compressor.export.placement import Placement, place
from compressor.quantization.ranges import Ranges, affine_parameters

FloatArray = NDArray[np.float32]
# A float node between DQ and Q has its weight quantized per tensor by ONNX Runtime, unasked
# (WeightBiasQuantization); a node between DQ and it keeps it float.
REQUANTIZED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True)
class QuantizedFile:
    """What was written.

    Attributes:
        path: of the file.
        int8_layers: names of the layers that run on integers.
    """

    path: Path
    int8_layers: tuple[str, ...]


def quantizable_layers(float_path: Path | str) -> list[str]:
    """Names of the layers that can run in int8, in the order of the graph."""
    graph = Graph(onnx.load(float_path))
    return list(dict.fromkeys(layer.name for layer in find_layers(graph)))


def activation_tensors(float_path: Path | str, int8_layers: Collection[str]) -> list[str]:
    """The values whose ranges `quantize_onnx` needs for these layers, in the order of the graph.

    For all layers it is a superset of what it is for some, so one calibration serves every choice.
    """
    graph = Graph(onnx.load(float_path))
    return list(dict.fromkeys(place(graph, _known(graph, int8_layers)).scale_of.values()))


def quantize_onnx(
    float_path: Path | str, path: Path | str, ranges: Ranges, *, int8_layers: Collection[str]
) -> QuantizedFile:
    """Write the float file again with `int8_layers` in int8.

    Args:
        float_path: written by `export_onnx`; it is not changed.
        path: of the new file.
        ranges: at least of `activation_tensors(float_path, int8_layers)`.
        int8_layers: names of torch modules, out of `quantizable_layers(float_path)`.

    Raises:
        ExportError: if a layer is unknown or a range is missing.
    """
    proto = onnx.load(float_path)
    graph = Graph(proto)
    placement = place(graph, _known(graph, int8_layers))
    missing = set(placement.scale_of.values()) - ranges.keys()
    if missing:
        raise ExportError(
            f"The range of {min(missing)!r} is not known. Calibrate all of "
            "`activation_tensors(float_path, int8_layers)`."
        )
    writer = _Writer(graph, placement, ranges)
    for layer in placement.layers:
        writer.quantize_layer(layer)
    for value in placement.scale_of:
        writer.quantize_value(value)
    writer.finish()
    return QuantizedFile(save_onnx(proto, path), tuple(sorted(int8_layers)))


def integer_kernels(path: Path | str) -> Counter[str]:
    """How often each operator, of whatever domain, is in the graph that ONNX Runtime executes."""
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns that the saved graph is for this machine only
        options.optimized_model_filepath = str(optimised)
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        proto = onnx.load(optimised)
    return Counter(node.op_type for node in proto.graph.node)


def weight_scale(
    weight: FloatArray, channel_axis: int, bias: FloatArray | None, source_scale: np.float32
) -> FloatArray:
    """One scale per output channel, such that int8 holds the weight and int32 the bias.

    Args:
        weight: of any rank.
        channel_axis: its dimension of output channels.
        bias: (channels,), in steps of `source_scale * scale`.
        source_scale: scale of the layer's input.
    """
    others = tuple(axis for axis in range(weight.ndim) if axis != channel_axis)
    scale = np.abs(weight).max(axis=others) / 127
    if bias is not None:
        # a channel that is almost all zeros: its steps would be too fine for the bias
        scale = np.maximum(scale, np.abs(bias) / (float(source_scale) * 2**30))
    # of a channel of zeros without a bias any scale is right
    return np.where(scale < np.finfo(np.float32).tiny, 1.0, scale).astype(np.float32)


def quantize_weight(weight: FloatArray, scale: FloatArray, channel_axis: int) -> NDArray[np.int8]:
    """The nearest integers from -127 to 127; ties go to the even one."""
    shape = [-1 if axis == channel_axis else 1 for axis in range(weight.ndim)]
    steps = np.clip(np.rint(weight / scale.reshape(shape)), -127, 127)
    integers: NDArray[np.int8] = steps.astype(np.int8)
    return integers


class _Writer:
    """Puts quantizers into the graph's own protocol buffer."""

    def __init__(self, graph: Graph, placement: Placement, ranges: Ranges) -> None:
        self._graph = graph
        self._placement = placement
        self._ranges = ranges
        self._added: list[NodeProto] = []
        self._constants: dict[bytes, str] = {}
        self._quantized: dict[str, str] = {}

    def quantize_layer(self, layer: LayerNode) -> None:
        """Let the layer read integers, dequantized, for its weight and its bias."""
        node, axis = layer.node, layer.channel_axis
        weight = self._value_of(layer.weight)
        bias = self._value_of(node.input[2]) if len(node.input) > 2 else None
        source_scale, _ = self._parameters(layer.source)
        scale = weight_scale(weight, axis, bias, source_scale)
        integers = quantize_weight(weight, scale, axis)
        node.input[1] = self._dequantized(f"{layer.weight}.int8", integers, scale, axis)
        if bias is not None:
            steps = source_scale * scale
            rounded = np.rint(bias / steps.astype(np.float64)).astype(np.int32)
            node.input[2] = self._dequantized(f"{node.input[2]}.int32", rounded, steps, 0)

    def quantize_value(self, name: str) -> None:
        """Put Q and DQ behind the value, for the nodes that shall read integers."""
        graph, placement = self._graph, self._placement
        is_integer = placement.has_integers(graph, name)
        readers = graph.consumers.get(name, [])
        readers = readers if is_integer else [n for n in readers if placement.is_integer(n)]
        source, result = name, f"{name}.dequantized"
        if is_integer and name in graph.outputs:
            source, result = f"{name}.float", name
            node = graph.producers[name]
            node.output[:] = [source if value == name else value for value in node.output]
        parameters = [
            self._constant(f"{self._placement.scale_of[name]}.{kind}", np.asarray(value))
            for kind, value in zip(("scale", "zero_point"), self._parameters(name), strict=True)
        ]
        writer = graph.producers.get(name)
        if is_integer and writer is not None and writer.op_type == "Pad":
            self._pad_integers(writer, f"{name}.quantized", zero_point=parameters[1])
        else:
            self._add("QuantizeLinear", [source, *parameters], f"{name}.quantized")
        self._add("DequantizeLinear", [f"{name}.quantized", *parameters], result)
        self._quantized[result] = f"{name}.quantized"
        for reader in readers:
            read = self._kept_float(reader, result) if self._is_requantized(reader) else result
            reader.input[:] = [read if value == name else value for value in reader.input]

    def finish(self) -> None:
        """Put the added nodes into their places, without those that nobody reads."""
        proto = self._graph.proto
        nodes = [*proto.graph.node, *self._added]
        read = {name for node in nodes for name in node.input} | self._graph.outputs
        proto.graph.node.extend(node for node in self._added if read.intersection(node.output))
        sort_nodes(proto)
        drop_unused_constants(proto)

    def _pad_integers(self, node: NodeProto, result: str, *, zero_point: str) -> None:
        """Let a Pad run on integers; ONNX Runtime does not fuse it, its float kernel is slower."""
        sizes, axes = node.input[1], list(node.input[3:])
        node.input[:] = [self._quantized[node.input[0]], sizes, zero_point, *axes]
        node.output[:] = [result]

    def _is_requantized(self, node: NodeProto) -> bool:
        if node.op_type not in REQUANTIZED or self._placement.is_integer(node):
            return False
        return any(name in self._graph.consumers for name in node.output)

    def _kept_float(self, node: NodeProto, value: str) -> str:
        result = f"{value}.{node.name}"
        limits = np.finfo(np.float32)
        bounds = [
            self._constant(f"float.{kind}", np.asarray(limit))
            for kind, limit in (("min", limits.min), ("max", limits.max))
        ]
        self._add("Clip", [value, *bounds], result)
        return result

    def _parameters(self, name: str) -> tuple[np.float32, np.uint8]:
        return affine_parameters(self._ranges[self._placement.scale_of[name]])

    def _value_of(self, name: str) -> FloatArray:
        value: FloatArray = numpy_helper.to_array(self._graph.constants[name])
        return value

    def _dequantized(
        self, name: str, integers: NDArray[np.signedinteger], scale: FloatArray, axis: int
    ) -> str:
        zeros = np.zeros(len(scale), dtype=integers.dtype)  # without them no product is fused
        inputs = [
            self._constant(name, integers),
            self._constant(f"{name}.scale", scale),
            self._constant(f"{name}.zero_point", zeros),
        ]
        result = f"{inputs[0]}.dequantized.{len(self._added)}"
        self._add("DequantizeLinear", inputs, result, axis=axis)
        return result

    def _constant(self, name: str, value: NDArray[np.generic]) -> str:
        """The name of the constant; equal ones (a layer that is called often) are written once."""
        tensor = numpy_helper.from_array(value)
        key = tensor.SerializeToString(deterministic=True)
        if key not in self._constants:
            is_taken = name in self._constants.values()
            tensor.name = f"{name}.{len(self._constants)}" if is_taken else name
            self._constants[key] = tensor.name
            self._graph.proto.graph.initializer.append(tensor)
        return self._constants[key]

    def _add(
        self, op_type: str, inputs: list[str], result: str, *, axis: int | None = None
    ) -> None:
        node = helper.make_node(op_type, inputs, [result], name=f"{result}.{op_type}")
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self._added.append(node)


def _known(graph: Graph, int8_layers: Collection[str]) -> Collection[str]:
    known = {layer.name for layer in find_layers(graph)}
    for name in int8_layers:
        if name not in known:
            raise ExportError(f"The file has no layer {name!r} to quantize. {suggest(name, known)}")
    return int8_layers
