"""Where quantizers sit in a graph, so that a runtime fuses integer kernels and nothing runs twice.

The rules were measured on ONNX Runtime (x86):
- A convolution fuses only if its input and its result, behind its ReLU or Clip, are quantized.
  With a float result it runs in float and pays for the conversions: slower than no quantization.
- An addition wants both inputs and its result behind the ReLU quantized.
- What only moves values (reshape, pad, max pool, …) has the scale of its input.
- A float node reads the float value where a float node wrote it: nothing is rounded in vain.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from onnx import NodeProto, numpy_helper

from compressor.export.graph import Graph
from compressor.export.layers import LayerNode, find_layers, is_clipping

MOVING = frozenset(
    {
        "Flatten",
        "Identity",
        "MaxPool",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
COMPUTING = frozenset(
    {"Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid"}
)


@dataclass
class Placement:
    """The decision for one graph and one set of int8 layers.

    Attributes:
        scale_of: quantized value -> the value whose range gives its scale: itself, or the one that
            was moved to it.
        layers: the layers that run on integers.
        integer_nodes: ids of all nodes whose results are integers in the runtime.
    """

    scale_of: dict[str, str] = field(default_factory=dict)
    layers: list[LayerNode] = field(default_factory=list)
    integer_nodes: set[int] = field(default_factory=set)

    def is_integer(self, node: NodeProto | None) -> bool:
        """Whether the node runs on integers; the writer of a graph's input (None) does not."""
        return node is not None and id(node) in self.integer_nodes

    def has_integers(self, graph: Graph, value: str) -> bool:
        """Whether `value` is quantized and was written by an integer node."""
        return value in self.scale_of and self.is_integer(graph.producers.get(value))


def place(graph: Graph, int8_layers: Collection[str]) -> Placement:
    """Decide which values of `graph` are quantized when `int8_layers` run on integers."""
    placement = Placement()
    layers = {id(layer.node): layer for layer in find_layers(graph) if layer.name in int8_layers}
    needed = {layer.source for layer in layers.values()}
    placement.scale_of = {name: name for name in needed if name not in graph.producers}
    for node in graph.nodes:
        if id(node) in layers:
            _place_layer(layers[id(node)], needed, placement)
        elif not placement.is_integer(node):
            _place_between(graph, node, placement)
        for name in needed.intersection(node.output):
            placement.scale_of.setdefault(name, _origin(graph, name))
    return placement


def _origin(graph: Graph, value: str) -> str:
    """The value that was moved to become `value`; itself if it was computed."""
    writer = graph.producers.get(value)
    while writer is not None and _is_moving(graph, writer):
        value = graph.activations(writer)[0]
        writer = graph.producers.get(value)
    return value


def _is_moving(graph: Graph, node: NodeProto) -> bool:
    is_moving = node.op_type in MOVING or _is_zero_pad(graph, node)
    return is_moving and bool(graph.activations(node))


def _place_layer(layer: LayerNode, needed: Collection[str], placement: Placement) -> None:
    placement.layers.append(layer)
    placement.integer_nodes.add(id(layer.node))
    if layer.node.op_type == "MatMul" and layer.tail:
        return  # its bias is added in float: the runtime has no integer product with a bias
    placement.integer_nodes |= {id(node) for node in layer.tail}
    if layer.node.op_type == "Conv" or layer.result in needed:
        placement.scale_of[layer.result] = layer.result


def _place_between(graph: Graph, node: NodeProto, placement: Placement) -> None:
    """A node between layers joins them if all that it reads is quantized."""
    sources = graph.activations(node)
    if not any(placement.has_integers(graph, name) for name in sources):
        return
    if any(name not in placement.scale_of for name in sources):
        return
    if _is_moving(graph, node):
        placement.integer_nodes.add(id(node))
        placement.scale_of |= {name: _origin(graph, name) for name in node.output}
    elif node.op_type in COMPUTING and sources == list(node.input):
        result = node.output[0]
        placement.integer_nodes.add(id(node))
        behind = graph.only_consumer(result)
        if behind is not None and is_clipping(graph, behind):
            placement.integer_nodes.add(id(behind))
            result = behind.output[0]
        placement.scale_of[result] = result


def _is_zero_pad(graph: Graph, node: NodeProto) -> bool:
    if node.op_type != "Pad":
        return False
    filled = graph.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    return filled is None or not numpy_helper.to_array(filled).any()
