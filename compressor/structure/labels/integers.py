"""Which entries an integer argument of an operation counts: they fall with the channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from compressor.structure.labels.flow import Flow
from compressor.structure.labels.operations import FACTORIES, MADE_NEW, operation
from compressor.structure.labels.value import Value, support

VIEWS = frozenset("aten.view aten._unsafe_view aten.reshape aten.expand".split())
PADS = frozenset("aten.pad aten.constant_pad_nd".split())
Position = tuple[int, ...]


@dataclass(frozen=True)
class Counted:
    """What an integer counts.

    Attributes:
        labels: (n,) of the entries.
        sign: -1 for an index from the end, which rises when entries behind it go.
    """

    labels: Tensor
    sign: int = 1


def counted(flow: Flow, node: fx.Node, position: Position) -> Counted | None:
    """What the integer at `position` in the arguments of `node` counts; None if no channels.

    Args:
        flow: of the node's graph.
        node: an operation; of a placeholder, `(d,)` stands for the size of its dimension d.
        position: path of indices in `(*node.args, *node.kwargs.values())`.
    """
    name = operation(node)
    result: Any = flow.values.get(node)
    if node.op == "placeholder":
        return _size(flow, result, position[0])
    if len(position) == 2 and position[0] == _shape_argument(name):
        sizes = _argument(node, position[:1])
        return _size(flow, result, position[1] + len(_shape(result)) - len(sizes))
    if name in PADS and len(position) == 2 and position[0] == 1:
        return _padding(flow, node, result, position[1])
    if name == "aten.split_with_sizes" and len(position) == 2 and position[0] == 1:
        dim = node.args[2] if len(node.args) > 2 else 0
        return _size(flow, result[position[1]], dim)
    if name == "aten.split" and position == (1,) and len({_shape(part) for part in result}) == 1:
        return _size(flow, result[0], node.args[2] if len(node.args) > 2 else 0)
    if name in ("aten.slice", "aten.slice_scatter", "aten.select") and len(position) == 1:
        return _index(flow, node, position[0])
    return None


def sized(flow: Flow, node: fx.Node, position: Position) -> Counted | None:
    """What the size of a dimension, `(dim,)`, of a node's tensor counts; None if no channels."""
    return _size(flow, flow.values.get(node), position[0])


def _shape_argument(name: str) -> int | None:
    if name in VIEWS or name in MADE_NEW:
        return 1
    return 0 if name in FACTORIES else None


def _size(flow: Flow, value: Any, dim: Any) -> Counted | None:
    labels = along(flow, value, int(dim)) if isinstance(value, Value) else None
    return None if labels is None else Counted(labels)


def _padding(flow: Flow, node: fx.Node, value: Value, place: int) -> Counted | None:
    widths: Sequence[int] = node.args[1]  # type: ignore[assignment]
    width = int(widths[place])
    labels = along(flow, value, len(value.shape) - 1 - place // 2)
    if labels is None or width <= 0:
        return None
    return Counted(labels[:width] if place % 2 == 0 else labels[-width:])


def _index(flow: Flow, node: fx.Node, place: int) -> Counted | None:
    offset = 1 if operation(node) == "aten.slice_scatter" else 0  # behind the source
    is_bound = place in ((2,) if operation(node) == "aten.select" else (2 + offset, 3 + offset))
    source = flow.values.get(node.args[0])  # type: ignore[arg-type]
    if not is_bound or not isinstance(source, Value):
        return None
    dim = int(node.args[1 + offset]) if len(node.args) > 1 + offset else 0  # type: ignore[arg-type]
    labels = along(flow, source, dim)
    number = _argument(node, (place,))
    if labels is None or not isinstance(number, int) or abs(number) > len(labels):
        return None
    return Counted(labels[:number]) if number >= 0 else Counted(labels[number:], sign=-1)


def along(flow: Flow, value: Value, dim: int) -> Tensor | None:
    """(n,) labels of a value along one dimension alone."""
    dim %= max(len(value.shape), 1)
    for factor in value.factors:
        if factor.shape[dim] > 1:
            left = flow.squeezed(factor)
            if left is not None and support(left) == (dim,):
                return left.reshape(-1)
    return None


def _argument(node: fx.Node, position: Position) -> Any:
    found: Any = (*node.args, *node.kwargs.values())
    for step in position:
        found = found[step]
    return found


def _shape(value: Any) -> tuple[int, ...]:
    return value.shape if isinstance(value, Value) else ()
