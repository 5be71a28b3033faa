from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compressor.export.graph import Graph, drop_unused_constants, sort_nodes


def diamond() -> onnx.ModelProto:
    """a -> (b, c) -> d, written backwards, with a constant that nobody reads."""
    nodes = [
        helper.make_node("Add", ["left", "right"], ["output"], name="d"),
        helper.make_node("Neg", ["top"], ["right"], name="c"),
        helper.make_node("Mul", ["top", "two"], ["left"], name="b"),
        helper.make_node("Abs", ["input"], ["top"], name="a"),
    ]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("input", "output")]
    constants = [
        numpy_helper.from_array(np.ones(1, np.float32), name) for name in ("two", "unread")
    ]
    return helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:], constants))


def test_sorted_nodes_follow_what_they_read_and_else_keep_their_order() -> None:
    proto = diamond()
    sort_nodes(proto)
    assert [node.name for node in proto.graph.node] == ["a", "c", "b", "d"]
    onnx.checker.check_model(proto)


def test_the_edges_of_a_value() -> None:
    graph = Graph(diamond())
    assert graph.producers["top"].name == "a"
    assert {node.name for node in graph.consumers["top"]} == {"b", "c"}
    assert graph.only_consumer("top") is None
    only = graph.only_consumer("left")
    assert only is not None
    assert only.name == "d"
    assert graph.only_consumer("output") is None, "the caller reads it"
    assert graph.activations(graph.producers["left"]) == ["top"]


def test_constants_that_nobody_reads_are_dropped() -> None:
    proto = diamond()
    drop_unused_constants(proto)
    assert [tensor.name for tensor in proto.graph.initializer] == ["two"]
