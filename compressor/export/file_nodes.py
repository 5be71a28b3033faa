"""What is done to the nodes of a quantized file once the exporter has written it, in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from compressor.export.graph import Graph
from compressor.export.quantized_ops import WIDEN

FOUR_BITS = {"int4": TensorProto.INT4, "uint4": TensorProto.UINT4}
EIGHT_BITS = {TensorProto.INT8, TensorProto.UINT8}


def finish_nodes(proto: onnx.ModelProto) -> None:
    """All that follows, in its order."""
    _pack_four_bits(proto)
    _cast_halves(proto)
    _pad_inside(proto)
    _skip_round_trips(proto)
    _pad_integers(proto)


def _pack_four_bits(proto: onnx.ModelProto) -> None:
    """Store integers of 4 bits two in a byte, in place."""
    for tensor in proto.graph.initializer:
        kind = FOUR_BITS.get(tensor.name.rpartition("_")[2])
        if kind is None or tensor.data_type == kind:
            continue
        values = numpy_helper.to_array(tensor)
        low, high = values.reshape(-1)[::2] & 15, values.reshape(-1)[1::2] & 15
        packed = low.astype(np.uint8)
        packed[: len(high)] |= high.astype(np.uint8) << 4
        tensor.CopyFrom(
            helper.make_tensor(tensor.name, kind, values.shape, packed.tobytes(), raw=True)
        )


def _cast_halves(proto: onnx.ModelProto) -> None:
    """Let the marks of weights in floats of 16 bits be Casts, in place.

    The exporter would have computed a Cast of a constant, as ONNX Runtime does when it loads.
    """
    for node in proto.graph.node:
        if (node.domain, node.op_type) == WIDEN:
            node.domain, node.op_type = "", "Cast"
            node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    kept = [entry for entry in proto.opset_import if entry.domain != WIDEN[0]]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)


def widen_weights(proto: onnx.ModelProto) -> None:
    """Let convolutions in float have 8-bit weights that are computed once, in place.

    ONNX Runtime runs a DequantizeLinear of a constant in every call, and keeps its fast layout for
    weights that are constant: a third of the speed was lost. Cast and Mul of constants it computes
    when it loads the file.
    """
    graph = Graph(proto)
    for place, node in reversed(list(enumerate(graph.nodes))):
        readers = graph.consumers.get(node.output[0], [])
        if node.op_type != "DequantizeLinear" or not _is_widened(graph, node, readers):
            continue
        weight, scale, zero_point = (graph.constants[name] for name in node.input)
        shape = [-1, *[1] * (len(weight.dims) - 1)]
        for part in (scale, zero_point):
            values = numpy_helper.to_array(part).astype(np.float32).reshape(shape)
            constant = numpy_helper.from_array(values, f"{node.output[0]}.{part.name}")
            proto.graph.initializer.append(constant)
        result = node.output[0]
        steps = [
            helper.make_node("Cast", [weight.name], [f"{result}.float"], to=TensorProto.FLOAT),
            helper.make_node(
                "Sub", [f"{result}.float", f"{result}.{zero_point.name}"], [f"{result}.shifted"]
            ),
            helper.make_node("Mul", [f"{result}.shifted", f"{result}.{scale.name}"], [result]),
        ]
        del proto.graph.node[place]
        for step in reversed(steps):
            proto.graph.node.insert(place, step)


def _is_widened(graph: Graph, node: NodeProto, readers: Sequence[NodeProto]) -> bool:
    """Whether it gives convolutions alone their weight of 8 bits, and they read no integers."""
    weight, scale = (graph.constants.get(name) for name in node.input[:2])
    if weight is None or weight.data_type not in EIGHT_BITS or not readers:
        return False
    sources = [graph.producers.get(reader.input[0]) for reader in readers]
    return (
        scale is not None
        and len(scale.dims) <= 1
        and all(reader.op_type == "Conv" for reader in readers)
        and all(source is None or source.op_type != node.op_type for source in sources)
    )


def _skip_round_trips(proto: onnx.ModelProto) -> None:
    """Leave out DQ and Q of one scale behind each other: the integers are what they were."""
    graph = Graph(proto)
    same: dict[str, str] = {}
    for node in graph.nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
        before = graph.producers.get(node.input[0]) if node.input else None
        if _is_pair(before, node):
            assert before is not None
            same[node.output[0]] = before.input[0]
    _drop_dead(proto)


def _pad_inside(proto: onnx.ModelProto) -> None:
    """Let convolutions do the padding that they alone read.

    ONNX Runtime does so in float files only: a Pad of integers is a pass over memory more.
    """
    graph = Graph(proto)
    for node in graph.nodes:
        after = graph.only_consumer(node.output[0])
        sizes = _spatial_pads(graph, node)
        if sizes is None or after is None or after.op_type != "QuantizeLinear":
            continue
        dequantized = graph.consumers.get(after.output[0], [])
        floats = [name for reader in dequantized for name in reader.output]
        convolutions = [reader for name in floats for reader in graph.consumers.get(name, [])]
        is_alone = graph.outputs.isdisjoint([*after.output, *floats])
        if is_alone and all(_may_pad(reader, floats) for reader in convolutions):
            after.input[0] = node.input[0]  # zero is the zero point, so it may come later
            for convolution in convolutions:
                _add_pads(convolution, sizes)
    _drop_dead(proto)


def _spatial_pads(graph: Graph, node: NodeProto) -> NDArray[np.int64] | None:
    """Zeros that a Pad puts before and behind the dimensions after the channels, (2, dims)."""
    mode = next((item.s for item in node.attribute if item.name == "mode"), b"constant")
    if node.op_type != "Pad" or mode != b"constant" or not _is_zero_pad(graph, node):
        return None
    given = [graph.constants.get(name) for name in (node.input[1], *node.input[3:]) if name]
    sizes, *axes = (None if item is None else numpy_helper.to_array(item) for item in given)
    if sizes is None or axes or (sizes < 0).any():
        return None
    pads: NDArray[np.int64] = sizes.reshape(2, -1)
    return None if pads[:, :2].any() else pads[:, 2:]


def _may_pad(node: NodeProto, floats: Sequence[str]) -> bool:
    """Whether it is a convolution of one of `floats` whose padding is a number for each side."""
    is_automatic = any(
        item.name == "auto_pad" and item.s not in {b"", b"NOTSET"} for item in node.attribute
    )
    return node.op_type == "Conv" and node.input[0] in floats and not is_automatic


def _add_pads(convolution: NodeProto, sizes: NDArray[np.int64]) -> None:
    given = next((item for item in convolution.attribute if item.name == "pads"), None)
    total = sizes.reshape(-1)
    if given is not None:
        total = total + np.array(given.ints)
        convolution.attribute.remove(given)
    convolution.attribute.append(helper.make_attribute("pads", total.tolist()))


def _pad_integers(proto: onnx.ModelProto) -> None:
    """Let a Pad between DQ and Q of one scale run on integers, in place.

    ONNX Runtime does not fuse it, and its float kernel is slower.
    """
    graph = Graph(proto)
    for node in graph.nodes:
        before, after = graph.producers.get(node.input[0]), graph.only_consumer(node.output[0])
        if node.op_type != "Pad" or not _is_pair(before, after) or not _is_zero_pad(graph, node):
            continue
        assert before is not None
        assert after is not None
        sizes, axes = node.input[1], list(node.input[3:])
        node.input[:] = [before.input[0], sizes, before.input[2], *axes]
        node.output[:] = after.output
        proto.graph.node.remove(after)
    _drop_dead(proto)


def _is_zero_pad(graph: Graph, node: NodeProto) -> bool:
    filled = node.input[2] if len(node.input) > 2 else ""
    if not filled:
        return True
    return filled in graph.constants and not numpy_helper.to_array(graph.constants[filled]).any()


def _is_pair(before: NodeProto | None, after: NodeProto | None) -> bool:
    """Whether they are DQ and Q of one scale."""
    if before is None or after is None:
        return False
    kinds = (before.op_type, after.op_type)
    return kinds == ("DequantizeLinear", "QuantizeLinear") and before.input[1:] == after.input[1:]


def _drop_dead(proto: onnx.ModelProto) -> None:
    """Remove nodes that nobody reads, in place."""
    read = {value.name for value in proto.graph.output}
    for node in reversed(list(proto.graph.node)):
        if read.isdisjoint(node.output):
            proto.graph.node.remove(node)
        else:
            read.update(node.input)
