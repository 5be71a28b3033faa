"""LSTMs in a graph: what they are made of, and their layers as modules one after another."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from compressor.quantization.operations import LSTM

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Recurrence:
    """One LSTM, all its layers and directions.

    Attributes:
        layer: name of the module that owns the weights.
        node: the operation.
        weights: paths of the matrices (4 * hidden, in) and (4 * hidden, hidden) of each layer and
            direction.
    """

    layer: str
    node: fx.Node
    weights: tuple[str, ...]


def read_recurrence(node: fx.Node) -> Recurrence | None:
    """The LSTM that a node is; None for other operations, projections and computed weights."""
    if node.target is not LSTM:
        return None
    factors = cast(Sequence[fx.Node], node.args[2])
    has_biases, layers, is_bidirectional = node.args[3], node.args[4], node.args[7]
    parts = cast(int, layers) * (2 if is_bidirectional else 1)
    if len(factors) != parts * (4 if has_biases else 2):
        return None  # of a projection there is one more
    if any(item.op != "get_attr" for item in factors):
        return None
    paths = tuple(str(factors[i].target) for i in matrix_positions(node))
    return Recurrence(paths[0].rpartition(".")[0], node, paths)


def matrix_positions(node: fx.Node) -> list[int]:
    """Where in its list of weights an LSTM has matrices, and no biases."""
    factors, has_biases = cast(Sequence[fx.Node], node.args[2]), node.args[3]
    return [i for i in range(len(factors)) if not has_biases or i % 4 < 2]


def unroll(graph: fx.Graph, node: fx.Node, layer: str) -> None:
    """Put calls of a module for the layers of an LSTM, in place.

    Args:
        graph: of the node.
        node: as of a `Recurrence`.
        layer: path of a module that is called like a `DynamicLSTM`.
    """
    x, (hidden, cell), factors, _, layers, _, _, is_bidirectional, is_batch_first = cast(
        tuple[Any, ...], node.args
    )
    directions, each = 1 + is_bidirectional, len(factors) // layers
    call: Callable[..., fx.Node] = graph.call_function
    ends: list[tuple[fx.Node, fx.Node]] = []
    with graph.inserting_before(node):
        x = call(aten.transpose.int, (x, 0, 1)) if is_batch_first else x
        for i in range(layers):
            begin, end = i * directions, (i + 1) * directions
            before = [call(aten.slice.Tensor, (item, 0, begin, end)) for item in (hidden, cell)]
            result = graph.call_module(layer, (x, *before, *factors[i * each : (i + 1) * each]))
            x, *after = (call(operator.getitem, (result, part)) for part in range(3))
            ends.append((after[0], after[1]))
        x = call(aten.transpose.int, (x, 0, 1)) if is_batch_first else x
        last = [call(aten.cat.default, (list(parts), 0)) for parts in zip(*ends, strict=True)]
    for part in list(node.users):
        result = (x, *last)[cast(int, part.args[1])]
        result.meta = dict(part.meta)
        part.replace_all_uses_with(result)
        graph.erase_node(part)
    graph.erase_node(node)
