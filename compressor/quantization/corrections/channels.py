"""Where the channels of a product or a normalisation go: what a scale for each can move through.

A channel keeps its scale on its way through ReLUs, pools and what moves whole channels; nothing may
mix them, and nothing else may look.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from compressor.quantization.graph import Product, QuantizationGraph, is_moving, rank
from compressor.quantization.operations import PADDING

aten: Any = torch.ops.aten
GROUPS = 6  # the place of the number of groups among a convolution's arguments
HOMOGENEOUS = frozenset({aten.relu.default, aten.leaky_relu.default, aten.prelu.default})
SAME = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.dropout.default,
    }
)
# with the dimensions that they pool, the last ones
POOLS = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
}
SWAPPING = frozenset({aten.permute.default, aten.transpose.int})
PICKING = frozenset({aten.select.int, aten.slice.Tensor})
RESHAPING = frozenset(
    {
        aten.flatten.using_ints,
        aten.reshape.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.view.default,
    }
)


@dataclass(frozen=True)
class Pair:
    """Two products between which the channels can be scaled."""

    first: Product
    second: Product


def find_pairs(graph: QuantizationGraph) -> list[Pair]:
    """All pairs of products where nothing but the second reads the channels of the first."""
    pairs = []
    for first in graph.products:
        readers = readers_of_channels(graph, first.node, channel_axis(first))
        if readers is None or len(readers) != 1 or not is_its_own(graph, first):
            continue
        (second,) = readers
        if is_its_own(graph, second) and first.weight != second.weight:
            pairs.append(Pair(first, second))
    return pairs


def readers_of_channels(
    graph: QuantizationGraph, value: fx.Node, axis: int
) -> list[Product] | None:
    """The products that read the channels of `value`; None if something else does as well.

    Args:
        graph: that `value` is in.
        value: whose channels they are.
        axis: dimension of the channels, not negative.
    """
    products = {product.node: product for product in graph.products}
    found: list[Product] = []
    for user in value.users:
        if user in products:
            product = products[user]
            if product.source is not value or axis != _read_axis(product):
                return None
            found.append(product)
            continue
        after = _axis_after(user, value, axis)
        behind = None if after is None else readers_of_channels(graph, user, after)
        if behind is None:
            return None
        found += behind
    return found or None


def channel_axis(product: Product) -> int:
    """The dimension of a product's output channels."""
    return 1 if product.is_convolution else rank(product.node) - 1


def groups_of(product: Product) -> int:
    """Of a convolution; 1 of a linear layer."""
    args = product.node.args
    return cast(int, args[GROUPS]) if product.is_convolution and len(args) > GROUPS else 1


def is_its_own(graph: QuantizationGraph, product: Product) -> bool:
    """Whether nothing else has its weight or its bias."""
    paths = [path for path in (product.weight, product.bias) if path is not None]
    return all(count_readers(graph, path) == 1 for path in paths)


def count_readers(graph: QuantizationGraph, path: str) -> int:
    """How many operations read a parameter, under whatever name."""
    tensor = graph.tensor(path)
    nodes = (node for node in graph.nodes if node.op == "get_attr")
    return sum(len(node.users) for node in nodes if graph.tensor(str(node.target)) is tensor)


def _read_axis(product: Product) -> int:
    return 1 if product.is_convolution else rank(product.source) - 1


def _axis_after(node: fx.Node, value: fx.Node, axis: int) -> int | None:
    """Where the channels of `value` are in what `node` makes of it; None if they are not there."""
    if node.op != "call_function" or node.args[0] is not value or not _is_one(node):
        return None
    if node.target in HOMOGENEOUS | SAME or _is_relu(node):
        return axis
    if node.target in POOLS:
        return axis if axis < rank(value) - POOLS[node.target] else None
    if node.target in SWAPPING:
        return _axis_swapped(node, axis)
    if node.target in PADDING:
        padded = len(cast(list[int], node.args[1])) // 2
        return axis if is_moving(node) and axis < rank(node) - padded else None
    if node.target in PICKING:
        dimension = cast(int, node.args[1] if len(node.args) > 1 else 0) % rank(value)
        if dimension == axis:
            return None
        return axis - (node.target is aten.select.int and dimension < axis)
    if node.target in RESHAPING:
        return _axis_reshaped(_shape(value), _shape(node), axis)
    return None


def _axis_swapped(node: fx.Node, axis: int) -> int:
    size = rank(node)
    if node.target is aten.permute.default:
        return [i % size for i in cast(list[int], node.args[1])].index(axis)
    first, second = (cast(int, i) % size for i in node.args[1:3])
    return {first: second, second: first}.get(axis, axis)


def _axis_reshaped(before: list[Any], after: list[Any], axis: int) -> int | None:
    """Of (N, C, 1, 1) as (N, C), or of (…, C) as another (…, C)."""
    if axis == 1 and before[2:] == [1] * len(before[2:]) and after == before[:2]:
        return 1
    if axis == len(before) - 1 and isinstance(after[-1], int) and after[-1] == before[-1]:
        return len(after) - 1
    return None


def _shape(node: fx.Node) -> list[Any]:
    return list(node.meta["val"].shape)


def _is_one(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_relu(node: fx.Node) -> bool:
    """A clamp from 0 without an upper end."""
    bounds = [*node.args[1:], *node.kwargs.values()]
    if node.target is aten.clamp_min.default:
        return bounds == [0]
    return node.target is aten.clamp.default and bounds in ([0], [0, None])
