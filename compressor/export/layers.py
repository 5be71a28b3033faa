"""Which nodes of an exported file compute a layer of the torch model."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import NodeProto, TensorProto

from compressor.export.graph import Graph, attribute

MODULE_KEY = "compressor.module"


@dataclass(frozen=True)
class LayerNode:
    """A convolution or matrix product with the nodes that a runtime fuses into it.

    Attributes:
        name: of the torch module, by `named_modules`.
        node: Conv, Gemm or MatMul.
        tail: the bias Add of a MatMul, then a ReLU or a Clip.
        source: name of the activation that it reads.
        result: name of what the last of `tail`, or else `node`, writes.
        channel_axis: dimension of the weight that runs over the output channels.
    """

    name: str
    node: NodeProto
    tail: tuple[NodeProto, ...]
    source: str
    result: str
    channel_axis: int

    @property
    def weight(self) -> str:
        """Name of the weight."""
        return str(self.node.input[1])


def find_layers(graph: Graph) -> list[LayerNode]:
    """All convolutions and matrix products by a constant weight, in the order of the graph."""
    return [
        _layer(graph, node)
        for node in graph.nodes
        if _is_product(graph, node) and node.input[0] not in graph.constants
    ]


def _is_product(graph: Graph, node: NodeProto) -> bool:
    """Whether the node multiplies by a constant float weight, in a way with an integer kernel."""
    if node.op_type not in {"Conv", "Gemm", "MatMul"}:
        return False
    constants = [graph.constants.get(name) for name in node.input[1:] if name]
    if any(tensor is None or tensor.data_type != TensorProto.FLOAT for tensor in constants):
        return False
    ranks = [len(tensor.dims) for tensor in constants if tensor is not None]
    is_plain = not any(entry.name in {"alpha", "beta"} and entry.f != 1 for entry in node.attribute)
    return (
        is_plain
        and attribute(node, "transA", 0) == 0
        and (node.op_type == "Conv" or ranks[0] == 2)
        and ranks[1:] in ([], [1])
    )


def _layer(graph: Graph, node: NodeProto) -> LayerNode:
    tail = _tail(graph, node)
    is_transposed = node.op_type == "Gemm" and attribute(node, "transB", 0) == 1
    return LayerNode(
        _module(node),
        node,
        tail,
        source=node.input[0],
        result=(tail[-1] if tail else node).output[0],
        channel_axis=0 if node.op_type == "Conv" or is_transposed else 1,
    )


def _tail(graph: Graph, node: NodeProto) -> tuple[NodeProto, ...]:
    tail: list[NodeProto] = []
    behind = graph.only_consumer(node.output[0])
    if node.op_type == "MatMul" and behind is not None and behind.op_type == "Add":
        if len(graph.activations(behind)) == 1:
            tail.append(behind)
            behind = graph.only_consumer(behind.output[0])
    if behind is not None and is_clipping(graph, behind):
        tail.append(behind)
    return tuple(tail)


def is_clipping(graph: Graph, node: NodeProto) -> bool:
    """Whether the node is a ReLU or a Clip from 0: what integers that begin at 0 do anyway."""
    if node.op_type != "Clip":
        return node.op_type == "Relu"
    low = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    return low is not None and float(onnx.numpy_helper.to_array(low)) == 0.0


def _module(node: NodeProto) -> str:
    """The weight's name says whose it is, but a tied weight has one name, a transposed one none.

    A module that is not called itself (`out_proj` of an attention) is noted as the one around it.
    """
    owner = str(node.input[1]).rpartition(".")[0]
    notes = {str(entry.key): str(entry.value) for entry in node.metadata_props}
    noted = notes.get(MODULE_KEY, "")
    return owner if not noted or owner.startswith(f"{noted}.") else noted
