"""Rules of norms: each channel by itself, channels in groups, or all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from compressor.structure.labels.flow import Flow
from compressor.structure.labels.operations import rule
from compressor.structure.labels.value import Value, blocks, vector


@rule(
    "aten._native_batch_norm_legit_no_training",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_functional",
    "aten.native_batch_norm",
    "aten.batch_norm",
    "aten.cudnn_batch_norm",
    "aten.instance_norm",
)
def batch_norm(flow: Flow, node: fx.Node, value: Value, *args: Any, **kwargs: Any) -> Any:
    """(N, C, …): each channel with its own scale, shift and statistics, (C,) each."""
    result = _scaled(flow, node, value, [a for a in (*args, *kwargs.values()) if _is(a)], 1)
    return _first_of(node, result)


@rule("aten.native_layer_norm", "aten.layer_norm", "aten.rms_norm", "aten._fused_rms_norm")
def layer_norm(
    flow: Flow, node: fx.Node, value: Value, normalized: Sequence[int], *args: Any, **kwargs: Any
) -> Any:
    """Mean and variance over the last dimensions are others without an entry: all stay."""
    dims = len(value.shape)
    own = range(dims - len(normalized), dims)
    why = f"{flow.where(node)} normalises over them"
    for factor in value.factors:
        if any(factor.shape[dim] > 1 for dim in own):
            flow.freeze(factor, why)
    for weight in (*args, *kwargs.values()):
        if _is(weight):
            for factor in weight.factors:
                flow.freeze(factor, why)
    passed = [f for f in value.factors if all(f.shape[dim] == 1 for dim in own)]
    return _first_of(node, Value(value.shape, passed))


@rule("aten.native_group_norm", "aten.group_norm")
def group_norm(flow: Flow, node: fx.Node, value: Value, *args: Any, **kwargs: Any) -> Any:
    """(N, C, …): the channels of one group are normalised together and go together."""
    numbers = [a for a in args if isinstance(a, int) and not isinstance(a, bool)]
    groups = int(numbers[-1]) if "native" in str(node.target) else int(args[0])
    weights = [a for a in (*args, *kwargs.values()) if _is(a)]
    result = _scaled(flow, node, value, weights, 1)
    for factor in result.on(1):
        together = blocks(factor, 1, groups)
        if groups == 1:
            flow.freeze(factor, f"{flow.where(node)} normalises over them")
        else:
            flow.unite(together, together.narrow(2, 0, 1), node)
    return _first_of(node, result)


@rule("aten.prelu", "aten._prelu_kernel")
def prelu(flow: Flow, node: fx.Node, value: Value, weight: Value) -> Value:
    """A slope for each channel of (N, C, …), or one for all."""
    if len(weight.shape) == 1 and len(value.shape) > 1:
        return _scaled(flow, node, value, [weight], 1)
    return flow.merge(node, [value, weight], value.shape)


@rule("aten.local_response_norm", "aten.normalize")
def over_neighbours(flow: Flow, node: fx.Node, value: Value, *_: Any, **__: Any) -> Value:
    """What a channel becomes depends on its neighbours: none can go."""
    flow.freeze_all(node, [value], f"{flow.where(node)} normalises over neighbours")
    return Value(value.shape)


@rule("aten._weight_norm_interface", "aten._weight_norm")
def weight_norm(flow: Flow, node: fx.Node, direction: Value, scale: Value, dim: int = 0) -> Any:
    """`scale * direction / |direction|`, the norm over all dimensions but `dim`.

    Entries that are zero add nothing to the norm, so the other dimensions may lose some.
    """
    size = [n if d == dim else 1 for d, n in enumerate(direction.shape)]
    own = flow.merge(node, [Value(tuple(size), direction.on(dim)), scale], size)
    return _first_of(node, flow.made(direction.shape, [*own.factors, *direction.off(dim)], node))


def _scaled(flow: Flow, node: fx.Node, value: Value, weights: Sequence[Value], dim: int) -> Value:
    """Elementwise with (C,) vectors along `dim`; a channel of several entries is one channel."""
    dims = len(value.shape)
    inner = range(dim + 1, dims)  # such as those of `view(N, C, H, W)`: they share a scale
    whole = [flow.collapse(f, inner, node) if f.shape[dim] > 1 else f for f in value.factors]
    value = Value(value.shape, [f for f in whole if f is not None])
    laid = []
    for weight in weights:
        size = [n if d == dim else 1 for d, n in enumerate(value.shape)]
        factors = [vector(f.reshape(-1), dim, dims) for f in weight.factors]
        laid.append(Value(tuple(size), factors))
    return flow.merge(node, [value, *laid], value.shape)


def _is(argument: Any) -> bool:
    return isinstance(argument, Value)


def _first_of(node: fx.Node, result: Value) -> Any:
    """The result in the form of the node's: alone, or before statistics that nobody reads."""
    examples = node.meta["val"]
    if not isinstance(examples, (tuple, list)):
        return result
    others = [
        Value(tuple(int(n) for n in e.shape)) if e is not None else None for e in examples[1:]
    ]
    return (result, *others)
