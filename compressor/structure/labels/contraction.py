"""Rules of what sums over channels: linear layers, convolutions, products, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from compressor.structure.labels.flow import TAPS, Flow
from compressor.structure.labels.operations import operation, rule
from compressor.structure.labels.value import Value, aligned, support, vector


@rule("aten.linear")
def linear(
    flow: Flow, node: fx.Node, value: Value, weight: Value, bias: Value | None = None
) -> Value:
    """(…, in) with weight (out, in) -> (…, out)."""
    shape = flow.shape(node)
    last = len(value.shape) - 1
    read, passed = _take(flow, node, value, last)
    flow.contract(node, read, _vectors(flow, node, weight, 1))
    outputs = _vectors(flow, node, weight, 0)
    return _with_outputs(flow, node, shape, passed, outputs, len(shape) - 1, bias)


@rule("aten.addmm")
def addmm(flow: Flow, node: fx.Node, bias: Value, value: Value, weight: Value, **_: Any) -> Value:
    """`bias + value @ weight`."""
    product = _matmul(flow, node, value, weight, flow.shape(node))
    return flow.merge(node, [product, bias], product.shape)


@rule("aten.matmul", "aten.bmm", "aten.mm", "aten.mv", "aten.dot")
def matmul(flow: Flow, node: fx.Node, first: Value, second: Value) -> Value:
    """(…, m, k) with (…, k, n) -> (…, m, n)."""
    return _matmul(flow, node, first, second, flow.shape(node))


@rule("aten.baddbmm")
def baddbmm(flow: Flow, node: fx.Node, bias: Value, first: Value, second: Value, **_: Any) -> Value:
    """`bias + first @ second`."""
    product = _matmul(flow, node, first, second, flow.shape(node))
    return flow.merge(node, [product, bias], product.shape)


@rule("aten.einsum")
def einsum(flow: Flow, node: fx.Node, equation: str, values: Sequence[Value], **_: Any) -> Value:
    """A product with named dimensions; two operands at most, others freeze."""
    shape = flow.shape(node)
    left, right = [*equation.replace(" ", "").split("->"), ""][:2]
    terms = left.split(",")
    if "." in equation or not right or len(terms) > 2 or any(len(set(t)) < len(t) for t in terms):
        flow.freeze_all(node, values, f"{flow.where(node)} with {equation!r} has no rule")
        return Value(shape)
    letters = "".join(dict.fromkeys(left.replace(",", "")))
    summed = [letter for letter in letters if letter not in right]
    # Every operand is laid out over all letters: then it is an elementwise product and a sum.
    laid = [_laid_out(value, term, letters) for value, term in zip(values, terms, strict=True)]
    sizes = [max(value.shape[k] for value in laid) for k in range(len(letters))]
    shared = [k for k, letter in enumerate(letters) if all(letter in t for t in terms)]
    batch = [k for k in shared if letters[k] in right]
    if len(laid) == 2:
        laid = [_heads_first(flow, node, value, batch) for value in laid]
    for value in laid[1:]:
        for k, letter in enumerate(letters):
            if letter in summed:
                for factor in value.on(k):
                    flow.mark_read(factor)
    product = flow.merge(node, laid, sizes)
    factors = []
    for factor in product.factors:
        over = [k for k in support(factor) if letters[k] in summed]
        kept = [k for k in support(factor) if letters[k] not in summed]
        if over and kept:
            left_over = flow.collapse(factor, over, node)
            factor = factor if left_over is None else left_over
        elif over:
            continue
        order = [letters.index(letter) for letter in right]
        factors.append(factor.permute(*order, *[k for k in range(len(letters)) if k not in order]))
    return flow.made(shape, [f.reshape(f.shape[: len(shape)]) for f in factors], node)


@rule(
    "aten.conv1d",
    "aten.conv2d",
    "aten.conv3d",
    "aten.convolution",
    "aten.conv_transpose1d",
    "aten.conv_transpose2d",
    "aten.conv_transpose3d",
)
def convolution(
    flow: Flow, node: fx.Node, value: Value, weight: Value, bias: Value | None = None, *args: Any
) -> Value:
    """(N, in, …) with weight (out, in / groups, …), transposed (in, out / groups, …)."""
    name = operation(node)
    groups, is_transposed = _groups(name, args)
    unbatched = len(value.shape) == len(weight.shape) - 1
    channel = 0 if unbatched else 1
    read, passed = _take(flow, node, value, channel)
    for factor in passed:
        if any(factor.shape[dim] > 1 for dim in range(channel + 1, factor.dim())):
            flow.freeze(factor, f"{flow.where(node)} mixes neighbours")
    passed = [f for f in passed if all(n == 1 for n in f.shape[channel + 1 :])]
    for dim in range(2, len(weight.shape)):
        for factor in weight.on(dim):
            flow.freeze(factor, TAPS)
    whole, part = _vectors(flow, node, weight, 0), _vectors(flow, node, weight, 1)
    if groups == 1:
        outputs, inputs = (part, whole) if is_transposed else (whole, part)
        flow.contract(node, read, inputs)
    else:
        outputs = _grouped(flow, node, read, weight, bias, groups, is_transposed)
    return _with_outputs(flow, node, flow.shape(node), passed, outputs, channel, bias)


@rule("torchvision.deform_conv2d")
def deformable(
    flow: Flow,
    node: fx.Node,
    value: Value,
    weight: Value,
    offset: Value,
    mask: Value,
    bias: Value,
    *settings: Any,
) -> Value:
    """A convolution whose taps are moved by `offset`: (N, in, H, W) -> (N, out, H', W')."""
    del settings
    flow.freeze_all(node, [offset, mask], f"{flow.where(node)} reads them by their numbers")
    read = plain(flow, node, value, 1)
    for dim in range(2, len(weight.shape)):
        for factor in weight.on(dim):
            flow.freeze(factor, TAPS)
    flow.contract(node, read, _vectors(flow, node, weight, 1))
    outputs = _vectors(flow, node, weight, 0)
    return _with_outputs(flow, node, flow.shape(node), [], outputs, 1, bias)


@rule(
    "aten.scaled_dot_product_attention",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
)
def attention(
    flow: Flow,
    node: fx.Node,
    query: Value,
    key: Value,
    value: Value,
    mask: Any = None,
    *_: Any,
    **options: Any,
) -> Any:
    """(…, heads, L, size) each: heads are removed whole; sizes of queries and keys are fixed."""
    mask = options.get("attn_mask", mask)
    operands = [_heads(flow, node, v) for v in (query, key, value)]
    for operand in operands:
        for factor in operand.on(len(operand.shape) - 2):
            flow.freeze(factor, f"{flow.where(node)} attends to them")
    for operand in operands[:2]:
        for factor in operand.on(len(operand.shape) - 1):
            flow.freeze(factor, f"{flow.where(node)} scales by their number")
    examples = node.meta["val"]
    shape = tuple(
        int(n) for n in (examples[0] if isinstance(examples, (tuple, list)) else examples).shape
    )
    dims = len(shape)
    batch = [_batch_only(v, dims) for v in operands]
    if options.get("enable_gqa") and dims > 3:
        repeats = shape[-3] // operands[1].shape[-3]
        batch[1:] = [_repeated(v, repeats) for v in batch[1:]]
    if isinstance(mask, Value):
        batch.append(_batch_only(_heads(flow, node, mask), dims))
    heads = flow.merge(node, batch, (*shape[:-2], 1, 1))
    last = [aligned(f, dims) for f in operands[2].on(len(operands[2].shape) - 1)]
    result = flow.made(shape, [*heads.factors, *last], node)
    if not isinstance(examples, (tuple, list)):
        return result
    return (result, *(Value(()) if isinstance(e, torch.Tensor) else e for e in examples[1:]))


def _heads(flow: Flow, node: fx.Node, value: Value) -> Value:
    """Labels over (heads, size) become labels of heads."""
    dims = len(value.shape)
    return _heads_first(flow, node, value, range(dims - 2))


def _heads_first(flow: Flow, node: fx.Node, value: Value, batch: Sequence[int]) -> Value:
    factors = []
    for factor in value.factors:
        inner = [dim for dim in support(factor) if dim not in batch]
        is_mixed = len(inner) < len(support(factor))
        left = flow.collapse(factor, inner, node) if is_mixed and inner else factor
        if left is not None:
            factors.append(left)
    return flow.made(value.shape, factors, node)


def _batch_only(value: Value, dims: int) -> Value:
    """The labels over all dimensions but the last two, which get size 1."""
    factors = [f for f in value.factors if f.shape[-1] == 1 and f.shape[-2] == 1]
    shape = (1,) * (dims - len(value.shape)) + (*value.shape[:-2], 1, 1)
    return Value(shape, [aligned(f, dims) for f in factors])


def _repeated(value: Value, repeats: int) -> Value:
    shape = list(value.shape)
    shape[-3] *= repeats
    factors = [f.repeat_interleave(repeats, -3) if f.shape[-3] > 1 else f for f in value.factors]
    return Value(tuple(shape), factors)


def _matmul(flow: Flow, node: fx.Node, first: Value, second: Value, shape: Sequence[int]) -> Value:
    """Laid out over (…, m, k, n): labels of k are summed over, those of the others pass."""
    if len(first.shape) == 1:
        first = Value((1, *first.shape), [f.unsqueeze(0) for f in first.factors])
        shape = (*shape[:-1], 1, *shape[-1:]) if len(second.shape) > 1 else (1, *shape)
    is_vector = len(second.shape) == 1
    if is_vector:
        second = Value((*second.shape, 1), [f.unsqueeze(1) for f in second.factors])
        shape = (*shape, 1)
    dims = len(shape)
    batch = range(dims - 2)
    operands = []
    for value in (first, second):
        wide = Value(
            (1,) * (dims - len(value.shape)) + tuple(value.shape),
            [aligned(f, dims) for f in value.factors],
        )
        has_batch = any(n > 1 for n in wide.shape[:-2])
        operands.append(_heads_first(flow, node, wide, batch) if has_batch else wide)
    read = plain(flow, node, operands[0], dims - 1)
    flow.contract(node, read, plain(flow, node, operands[1], dims - 2))
    rows = [f for f in operands[0].factors if f.shape[-1] == 1]
    columns = [f for f in operands[1].factors if f.shape[-2] == 1]
    heads = flow.merge(
        node,
        [
            Value((*o.shape[:-2], 1, 1), [f for f in o.factors if f.shape[-2:] == (1, 1)])
            for o in operands
        ],
        (*shape[:-2], 1, 1),
    )
    passed = [f for f in (*rows, *columns) if f.shape[-2:] != (1, 1)]
    result = flow.made(shape, [*heads.factors, *passed], node)
    return Value(flow.shape(node), [_fitted(f, flow.shape(node)) for f in result.factors])


def _fitted(factor: Tensor, shape: Sequence[int]) -> Tensor:
    """Without the dimensions of size 1 that were put in for a vector."""
    if factor.dim() == len(shape):
        return factor
    return (
        factor.reshape([n for n in factor.shape if n > 1] or [1])
        if len(shape) == 1
        else (factor.squeeze(-1) if factor.shape[-1] == 1 else factor.squeeze(-2))
    )


def plain(flow: Flow, node: fx.Node, value: Value, dim: int) -> list[Tensor]:
    """(n,) labels along `dim`, those over several dimensions united along the others."""
    vectors = []
    for factor in value.on(dim):
        others = [d for d in support(factor) if d != dim]
        left = flow.collapse(factor, others, node)
        if left is not None:
            vectors.append(left.reshape(-1))
    return vectors


def _take(flow: Flow, node: fx.Node, value: Value, dim: int) -> tuple[list[Tensor], list[Tensor]]:
    """The labels that are summed over along `dim`, and the factors that pass."""
    return plain(flow, node, value, dim), value.off(dim)


def _vectors(flow: Flow, node: fx.Node, weight: Value, dim: int) -> list[Tensor]:
    return plain(flow, node, weight, dim)


def _with_outputs(
    flow: Flow,
    node: fx.Node,
    shape: Sequence[int],
    passed: Sequence[Tensor],
    outputs: Sequence[Tensor],
    dim: int,
    bias: Value | None,
) -> Value:
    """The result of a layer: what passed it, and the labels of its outputs along `dim`."""
    made = [vector(labels, dim, len(shape)) for labels in outputs]
    value = flow.made(shape, [*passed, *made], node)
    if bias is None:
        return value
    along = [vector(f.reshape(-1), dim, len(shape)) for f in bias.factors]
    size = [n if d == dim else 1 for d, n in enumerate(shape)]
    return flow.merge(node, [value, Value(tuple(size), along)], shape)


def _grouped(
    flow: Flow,
    node: fx.Node,
    read: list[Tensor],
    weight: Value,
    bias: Value | None,
    groups: int,
    is_transposed: bool,
) -> list[Tensor]:
    """Inputs and outputs of one group of a grouped convolution go together, whole."""
    whole = _vectors(flow, node, weight, 0)
    for labels in _vectors(flow, node, weight, 1):
        flow.freeze(labels, f"all groups of {flow.where(node)} share them")
    sides = [labels.reshape(groups, -1) for labels in (*read, *whole)]
    for side in sides:
        flow.unite(side, side[:, :1], node)
    if read and whole:
        flow.unite(sides[0][:, :1], sides[-1][:, :1], node)
    else:
        for side in sides:
            flow.freeze(side, f"{flow.where(node)} reads entries that cannot be removed")
    if not is_transposed:
        return whole
    for labels in whole:
        flow.mark_read(labels)
    if not whole:
        return []
    per_group = weight.shape[1]
    return [sides[-1][:, :1].expand(groups, per_group).reshape(-1)]


def _groups(name: str, args: Sequence[Any]) -> tuple[int, bool]:
    """Groups, and whether the convolution is transposed, from the arguments behind the bias."""
    if name == "aten.convolution":  # stride, padding, dilation, transposed, output_padding, groups
        return int(args[5]), bool(args[3])
    if "transpose" in name:  # stride, padding, output_padding, groups, dilation
        return (int(args[3]) if len(args) > 3 else 1), True
    return (int(args[3]) if len(args) > 3 else 1), False


def _laid_out(value: Value, term: str, letters: str) -> Value:
    """An operand of an einsum with a dimension for every letter."""
    order = sorted(range(len(term)), key=lambda k: letters.index(term[k]))

    def lay(tensor_shape: Sequence[int]) -> list[int]:
        return [tensor_shape[term.index(letter)] if letter in term else 1 for letter in letters]

    factors = [f.permute(order).reshape(lay(f.shape)) for f in value.factors]
    return Value(tuple(lay(value.shape)), factors)
