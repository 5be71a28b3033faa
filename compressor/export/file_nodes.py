"""What is done to the nodes of a quantized file once the exporter has written it, in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from compressor.export.file_weights import replace_marks
from compressor.export.graph import Graph, drop_dead


def finish_nodes(proto: onnx.ModelProto) -> None:
    """All that follows, in its order."""
    replace_marks(proto)
    _pad_inside(proto)
    _skip_round_trips(proto)
    _pad_integers(proto)


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
    drop_dead(proto)


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
    drop_dead(proto)


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
    drop_dead(proto)


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
