"""Where quantizers sit in a graph, so that a runtime fuses integer kernels and nothing runs twice.

The rules were measured on ONNX Runtime (x86):
- A convolution fuses only if its input and its result, behind its ReLU or clip, are quantized.
  With a float result it runs in float and pays for the conversions: slower than no quantization.
- An addition wants both inputs and its result behind the ReLU quantized.
- What only moves values (views, pads, max pools, …) has the scale of its input.
- A float operation reads the float value where a float operation wrote it: nothing is rounded in
  vain.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, field

from torch import fx

from compressor.quantization.graph import (
    Product,
    QuantizationGraph,
    activations,
    is_clipping,
    is_computing,
    is_moving,
    is_tensor,
    only_user,
)


@dataclass
class Placement:
    """The decision for one graph and one set of layers that run on integers.

    Attributes:
        scale_of: quantized value -> the value whose range gives its scale: itself, or the one that
            was moved to it.
        products: that run on integers.
        integer_nodes: all whose results are integers in the runtime.
    """

    scale_of: dict[fx.Node, fx.Node] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    integer_nodes: set[fx.Node] = field(default_factory=set)

    def has_integers(self, value: fx.Node) -> bool:
        """Whether `value` is quantized and was computed on integers."""
        return value in self.scale_of and value in self.integer_nodes

    def readers(self, value: fx.Node) -> list[fx.Node]:
        """Who reads a quantized value as what its integers say; the others read it in float."""
        readers = list(value.users)
        if self.has_integers(value):
            return readers
        return [reader for reader in readers if reader in self.integer_nodes]

    @property
    def origins(self) -> list[fx.Node]:
        """The values with a range of their own, in the order in which they are placed."""
        return list(dict.fromkeys(self.scale_of.values()))


def place(graph: QuantizationGraph, layers: Collection[str]) -> Placement:
    """Decide which values of `graph` are quantized when `layers` run on integers.

    For all layers it is a superset of what it is for some: one calibration serves every choice.

    Raises:
        ModelError: if there is no such layer.
    """
    placement = Placement()
    products = {product.node: product for product in graph.products_of(layers)}
    needed = {product.source for product in products.values()}
    for node in graph.nodes:
        if node in products:
            _place_product(products[node], needed, placement)
        elif node.op == "call_function" and node not in placement.integer_nodes:
            _place_between(node, placement)
        if node in needed:
            placement.scale_of.setdefault(node, _origin(node))
    return placement


def _origin(value: fx.Node) -> fx.Node:
    """The value that was moved to become `value`; itself if it was computed."""
    while value.op == "call_function" and is_moving(value) and activations(value):
        value = activations(value)[0]
    return value


def _place_product(product: Product, needed: Collection[fx.Node], placement: Placement) -> None:
    placement.products.append(product)
    placement.integer_nodes.add(product.node)
    if not (product.is_convolution or product.is_matrix) and product.bias is not None:
        return  # its bias is added in float: the runtime has no such product with a bias
    placement.integer_nodes.update(product.tail)
    if product.is_convolution or product.result in needed:
        placement.scale_of[product.result] = product.result


def _place_between(node: fx.Node, placement: Placement) -> None:
    """An operation between layers joins them if all that it reads is quantized."""
    sources = activations(node)
    if not is_tensor(node) or not any(placement.has_integers(value) for value in sources):
        return
    if any(value not in placement.scale_of for value in sources):
        return
    if is_moving(node):
        placement.integer_nodes.add(node)
        if node.target is operator.getitem:
            placement.integer_nodes.update(node.all_input_nodes)
        placement.scale_of[node] = _origin(node)
    elif is_computing(node) and len(sources) == len(_tensors_read(node)):
        result = node
        placement.integer_nodes.add(node)
        behind = only_user(node)
        if behind is not None and is_clipping(behind):
            placement.integer_nodes.add(behind)
            result = behind
        placement.scale_of[result] = result


def _tensors_read(node: fx.Node) -> list[fx.Node]:
    return [item for item in node.all_input_nodes if is_tensor(item) or item.op == "get_attr"]
