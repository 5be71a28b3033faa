"""Where quantizers sit in a graph, so that a runtime fuses integer kernels and nothing runs twice.

The rules for ONNX Runtime were measured (x86):
- A convolution fuses only if its input and its result, behind its ReLU or clip, are quantized.
  With a float result it runs in float and pays for the conversions: slower than no quantization.
- An addition wants both inputs and its result behind the ReLU quantized.
- What only moves values (views, pads, max pools, …) has the scale of its input.
- A float operation reads the float value where a float operation wrote it: nothing is rounded in
  vain.

The rules for TensorRT are NVIDIA's ("Q/DQ Layer-Placement Recommendations" of its documentation,
and `ResNetV1QDQCase` of its quantization toolkit); it moves quantizers to where it fuses them:
- What a product reads is quantized, and what it writes only where a product reads that.
- An addition is fused with the product before it: its other input is quantized, not the product's
  result. If nothing quantizes the sum, there is nothing to gain.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
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

Runtime = Literal["onnxruntime", "tensorrt"]
aten: Any = torch.ops.aten


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


def place(
    graph: QuantizationGraph, layers: Collection[str], runtime: Runtime = "onnxruntime"
) -> Placement:
    """Decide which values of `graph` are quantized when `layers` run on integers in `runtime`.

    For all layers it is a superset of what it is for some: one calibration serves every choice.

    Raises:
        ModelError: if there is no such layer.
    """
    placement = Placement()
    products = {product.node: product for product in graph.products_of(layers)}
    needed = {product.source for product in products.values()}
    if runtime == "tensorrt":
        _place_inputs(graph, products, placement)
        return placement
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


def _place_inputs(
    graph: QuantizationGraph, products: Mapping[fx.Node, Product], placement: Placement
) -> None:
    """For TensorRT: what products read, and the other input of a sum that is fused with one."""
    placement.products.extend(products.values())
    origins = {product.source: _origin(product.source) for product in products.values()}
    placement.scale_of.update(origins)
    bare = [product.node for product in graph.products if only_user(product.node) is not None]
    for node in graph.nodes:
        if node in products:
            placement.integer_nodes.update((node, *products[node].tail))
        read = activations(node)
        if node.target is not aten.add.Tensor or len(read) != 2:
            continue
        # of two the last: which one it is must not depend on the layers that are chosen
        fused = next((item for item in reversed(bare) if item in read), None)
        behind = only_user(node)
        tail = [behind] if behind is not None and is_clipping(behind) else []
        if fused is None or fused not in products or [node, *tail][-1] not in origins.values():
            continue
        other = read[1 - read.index(fused)]
        placement.scale_of.setdefault(other, _origin(other))
        placement.integer_nodes.update((node, *tail))


def _tensors_read(node: fx.Node) -> list[fx.Node]:
    return [item for item in node.all_input_nodes if is_tensor(item) or item.op == "get_attr"]
