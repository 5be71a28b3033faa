"""Rules of what works along dimensions: sums, means, softmax, pooling, interpolation, sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from compressor.structure.labels.flow import Flow
from compressor.structure.labels.operations import operation, rule
from compressor.structure.labels.value import Value, support

ADDING = frozenset({"aten.sum", "aten.norm", "aten.linalg_vector_norm"})  # a zero adds nothing


@rule(
    "aten.sum",
    "aten.mean",
    "aten.amax",
    "aten.amin",
    "aten.max",
    "aten.min",
    "aten.argmax",
    "aten.argmin",
    "aten.var",
    "aten.std",
    "aten.var_mean",
    "aten.std_mean",
    "aten.prod",
    "aten.any",
    "aten.all",
    "aten.logsumexp",
    "aten.norm",
    "aten.linalg_vector_norm",
    "aten.median",
    "aten.nanmedian",
)
def reduce(flow: Flow, node: fx.Node, value: Value, *args: Any, **kwargs: Any) -> Any:
    """Over some dimensions. Zeros do not change a sum; a mean or a maximum keeps all its entries.

    `max` of two tensors is elementwise.
    """
    tensors = [a for a in args if isinstance(a, Value)]
    if tensors:
        return flow.merge(node, [value, *tensors], flow.shape(node))
    given = _argument(operation(node), args, kwargs)
    dims = _dims(given, len(value.shape))
    is_sum = operation(node) in ADDING
    passed = []
    for factor in value.factors:
        over = [dim for dim in dims if factor.shape[dim] > 1]
        if not over:
            passed.append(factor)
        elif len(over) < len(support(factor)):
            left = flow.collapse(factor, over, node)
            passed += [] if left is None else [left]
        elif not is_sum:
            flow.freeze(factor, f"{flow.where(node)} counts them")
    examples = node.meta["val"]
    results = []
    for example in examples if isinstance(examples, (tuple, list)) else [examples]:
        shape = tuple(int(n) for n in example.shape)
        if len(shape) == len(value.shape):
            factors = passed
        else:
            left_dims = [d for d in range(len(value.shape)) if d not in dims]
            factors = [f.reshape([f.shape[d] for d in left_dims]) for f in passed]
        results.append(flow.made(shape, factors, node))
    return tuple(results) if isinstance(examples, (tuple, list)) else results[0]


@rule(
    "aten.softmax",
    "aten._softmax",
    "aten._safe_softmax",
    "aten.log_softmax",
    "aten._log_softmax",
    "aten.cumsum",
    "aten.cumprod",
    "aten.logcumsumexp",
    "aten.sort",
    "aten.topk",
    "aten.argsort",
)
def along(flow: Flow, node: fx.Node, value: Value, *args: Any, **kwargs: Any) -> Any:
    """Entries along a dimension depend on each other there: they stay."""
    numbers = [a for a in args if isinstance(a, int) and not isinstance(a, bool)]
    if operation(node) == "aten.topk":
        dim = numbers[1] if len(numbers) > 1 else -1
    else:
        dim = kwargs.get("dim", numbers[0] if numbers else -1)
    factors = []
    for factor in value.factors:
        left = flow.collapse(factor, [dim % len(value.shape)], node)
        factors += [] if left is None else [left]
    return _each(flow, node, Value(value.shape, factors))


@rule(
    "aten.avg_pool1d",
    "aten.avg_pool2d",
    "aten.avg_pool3d",
    "aten.max_pool1d",
    "aten.max_pool2d",
    "aten.max_pool3d",
    "aten.max_pool2d_with_indices",
    "aten.max_pool3d_with_indices",
    "aten.max_pool1d_with_indices",
    "aten.adaptive_avg_pool1d",
    "aten.adaptive_avg_pool2d",
    "aten.adaptive_avg_pool3d",
    "aten._adaptive_avg_pool2d",
    "aten._adaptive_avg_pool3d",
    "aten.adaptive_max_pool1d",
    "aten.adaptive_max_pool2d",
    "aten.lp_pool2d",
    "aten.upsample_nearest1d",
    "aten.upsample_nearest2d",
    "aten.upsample_nearest3d",
    "aten._upsample_nearest_exact2d",
    "aten.upsample_linear1d",
    "aten.upsample_bilinear2d",
    "aten._upsample_bilinear2d_aa",
    "aten._upsample_bicubic2d_aa",
    "aten.upsample_bicubic2d",
    "aten.upsample_trilinear3d",
    "aten.grid_sampler",
    "aten.grid_sampler_2d",
    "aten.reflection_pad1d",
    "aten.reflection_pad2d",
    "aten.replication_pad1d",
    "aten.replication_pad2d",
    "torchvision.roi_align",
    "torchvision.roi_pool",
)
def local(flow: Flow, node: fx.Node, value: Value, *args: Any, **kwargs: Any) -> Any:
    """(N, C, …): each channel by itself; its neighbourhood has no labels."""
    others = [a for a in (*args, *kwargs.values()) if isinstance(a, Value)]
    flow.freeze_all(node, others, f"{flow.where(node)} reads places from them")
    examples = node.meta["val"]
    first = examples[0] if isinstance(examples, (tuple, list)) else examples
    channel = len(first.shape) - _spatial(node, len(first.shape)) - 1
    factors = []
    for factor in value.factors:
        inner = [dim for dim in support(factor) if dim != channel]
        left = flow.collapse(factor, inner, node)
        factors += [] if left is None else [left]
    return _each(flow, node, Value(value.shape, factors))


def _spatial(node: fx.Node, dims: int) -> int:
    name = operation(node)
    for count in (1, 2, 3):
        if f"{count}d" in name:
            return count
    return dims - 2


def _each(flow: Flow, node: fx.Node, value: Value) -> Any:
    examples = node.meta["val"]
    if not isinstance(examples, (tuple, list)):
        return Value(flow.shape(node), list(value.factors))
    return tuple(Value(tuple(int(n) for n in e.shape), list(value.factors)) for e in examples)


def _argument(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The dimensions that are reduced."""
    if name in ("aten.norm", "aten.linalg_vector_norm"):  # behind the order of the norm
        return kwargs.get("dim", args[1] if len(args) > 1 else None)
    return kwargs.get("dim", args[0] if args else None)


def _dims(given: Any, count: int) -> list[int]:
    if given is None or isinstance(given, bool) or (isinstance(given, (list, tuple)) and not given):
        return list(range(count))
    if isinstance(given, int):
        return [given % count] if count else []
    return [int(dim) % count for dim in given]
