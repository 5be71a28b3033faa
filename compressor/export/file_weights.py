"""Weights of few bits as a runtime computes with them fastest: packed, cast or widened."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from compressor.export.graph import Graph, attribute, drop_dead
from compressor.export.quantized_ops import FOUR_BITS, MARKS, WIDEN

# what the integers of 8 bits are in 4
PACKED: Mapping[int, int] = {
    TensorProto.INT8: TensorProto.INT4,
    TensorProto.UINT8: TensorProto.UINT4,
}


def replace_marks(proto: onnx.ModelProto) -> None:
    """Let the marks of weights be Casts from what is stored, in place."""
    _pack_four_bits(proto)
    _cast_halves(proto)
    kept = [entry for entry in proto.opset_import if entry.domain != MARKS]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)


def widen_weights(proto: onnx.ModelProto) -> None:
    """Compute weights once that ONNX Runtime would dequantize in every call, in place.

    Convolutions in float took half as long again: it keeps its fast layout for weights that are
    constant. A matrix of few bits that several products read has no kernel, and took 8 to 25 times
    as long. Cast, Sub and Mul of constants it computes when it loads the file.
    """
    graph = Graph(proto)
    for place, node in reversed(list(enumerate(graph.nodes))):
        weight = _stored(graph, node)
        if weight is not None and _is_widened(graph, node):
            del proto.graph.node[place]
            for step in reversed(_widening(graph, node, weight)):
                proto.graph.node.insert(place, step)


def read_four_bits(proto: onnx.ModelProto) -> None:
    """Let products in float have weights of four bits as they are stored, in place.

    ONNX Runtime has kernels of four bits for these, and for products of integers only of eight:
    their Casts it computes when it loads the file.
    """
    graph = Graph(proto)
    for node in graph.nodes:
        weight = _stored(graph, node)
        if weight is None or weight.data_type not in PACKED.values():
            continue
        if attribute(node, "block_size", 0) or not _reads_integers(graph, node):
            node.input[0] = weight.name
            node.input[2] = _packed(proto, graph.constants[node.input[2]])
    drop_dead(proto)


def _pack_four_bits(proto: onnx.ModelProto) -> None:
    """Store marked integers two in a byte, and let the marks be Casts to eight bits, in place.

    What is equal may be one constant, which others read as bytes: then both are stored.
    """
    graph = Graph(proto)
    for node in graph.nodes:
        if (node.domain, node.op_type) == FOUR_BITS:
            tensor = graph.constants[node.input[0]]
            node.domain, node.op_type = "", "Cast"
            node.attribute.append(helper.make_attribute("to", tensor.data_type))
            node.input[0] = _packed(proto, tensor)


def _packed(proto: onnx.ModelProto, tensor: TensorProto) -> str:
    """Name of the constant with the same integers in four bits."""
    name = f"{tensor.name}.four_bits"
    if all(known.name != name for known in proto.graph.initializer):
        values = numpy_helper.to_array(tensor)
        low, high = values.reshape(-1)[::2] & 15, values.reshape(-1)[1::2] & 15
        packed = low.astype(np.uint8)
        packed[: len(high)] |= high.astype(np.uint8) << 4
        kind = PACKED[tensor.data_type]
        twin = helper.make_tensor(name, kind, values.shape, packed.tobytes(), raw=True)
        proto.graph.initializer.append(twin)
    return name


def _cast_halves(proto: onnx.ModelProto) -> None:
    """Let the marks of weights in floats of 16 bits be Casts, in place.

    The exporter would have computed a Cast of a constant, as ONNX Runtime does when it loads.
    """
    for node in proto.graph.node:
        if (node.domain, node.op_type) == WIDEN:
            node.domain, node.op_type = "", "Cast"
            node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))


def _stored(graph: Graph, node: NodeProto) -> TensorProto | None:
    """The integers of 4 or 8 bits that a DequantizeLinear reads, if they are a constant."""
    if node.op_type != "DequantizeLinear":
        return None
    before = graph.producers.get(node.input[0])
    is_cast = before is not None and before.op_type == "Cast"
    stored = graph.constants.get(before.input[0] if before and is_cast else node.input[0])
    known = {*PACKED, *PACKED.values()}
    return stored if stored is not None and stored.data_type in known else None


def _is_widened(graph: Graph, node: NodeProto) -> bool:
    """Whether it gives its weight to convolutions, or to several products, that are in float."""
    readers = graph.consumers.get(node.output[0], [])
    kinds = {reader.op_type for reader in readers}
    is_slow = kinds == {"Conv"} or (kinds <= {"MatMul", "Gemm"} and len(readers) > 1)
    return is_slow and not _reads_integers(graph, node)


def _reads_integers(graph: Graph, node: NodeProto) -> bool:
    """Whether a reader of it has a factor of integers besides."""
    readers = graph.consumers.get(node.output[0], [])
    sources = [graph.producers.get(reader.input[0]) for reader in readers]
    return any(
        source is not None and source.op_type == node.op_type and source is not node
        for source in sources
    )


def _widening(graph: Graph, node: NodeProto, weight: TensorProto) -> list[NodeProto]:
    """Operations of constants that give what the DequantizeLinear `node` gives."""
    result = node.output[0]
    axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    shape = [-1 if i == axis else 1 for i in range(len(weight.dims))]
    steps = [helper.make_node("Cast", [weight.name], [f"{result}.float"], to=TensorProto.FLOAT)]

    def constant(values: NDArray[np.generic], name: str) -> str:
        tensor = numpy_helper.from_array(values, f"{result}.{name}")
        graph.proto.graph.initializer.append(tensor)
        return str(tensor.name)

    for operator, name in (("Sub", node.input[2]), ("Mul", node.input[1])):
        numbers = numpy_helper.to_array(graph.constants[name]).astype(np.float32)
        if operator == "Sub" and not numbers.any():
            continue
        part = constant(numbers if block else numbers.reshape(shape), name)
        if block:
            rows = constant(np.arange(weight.dims[axis], dtype=np.int32) // block, f"{name}.rows")
            steps.append(helper.make_node("Gather", [part, rows], [f"{part}.all"], axis=axis))
            part = f"{part}.all"
        read, written = steps[-1 - bool(block)].output[0], f"{result}.{operator}"
        steps.append(helper.make_node(operator, [read, part], [written]))
    steps[-1].output[0] = result
    return steps
