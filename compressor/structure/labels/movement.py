"""Rules of what only moves entries: views, permutations, joins, slices, padding, indexing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from compressor.structure.labels.flow import ROWS, Flow
from compressor.structure.labels.operations import rule
from compressor.structure.labels.sets import FIXED
from compressor.structure.labels.value import Value, aligned, blocks, support


@rule(
    "aten.view",
    "aten._unsafe_view",
    "aten.reshape",
    "aten._reshape_alias",
    "aten.unflatten",
    "aten.flatten",
)
def view(flow: Flow, node: fx.Node, value: Value, *_: Any, **__: Any) -> Value:
    """The same entries in order; only the dimensions that are merged or split are touched."""
    shape = flow.shape(node)
    made = []
    for factor in value.factors:
        viewed = _viewed(factor, value.shape, shape)
        made.append(viewed)
        if len(support(viewed)) > len(support(factor)):
            flow.split(viewed)
    return flow.made(shape, made, node)


@rule("aten.permute", "aten.transpose", "aten.t", "aten.numpy_T", "aten.movedim", "aten.swapaxes")
def permute(flow: Flow, node: fx.Node, value: Value, *args: Any, **kwargs: Any) -> Value:
    """Dimensions change places, in the labels as in the tensor."""
    made = [_call(node, factor, *args, **kwargs) for factor in value.factors]
    return Value(flow.shape(node), made)


@rule(
    "aten.alias",
    "aten.detach",
    "aten.contiguous",
    "aten.clone",
    "aten.lift_fresh_copy",
    "aten._to_copy",
    "aten.to",
    "aten.dropout",
    "aten.feature_dropout",
    "aten.alpha_dropout",
    "aten.native_dropout",
    "aten.type_as",
    "aten._assert_tensor_metadata",
)
def same(flow: Flow, node: fx.Node, value: Any, *_: Any, **__: Any) -> Any:
    """The same entries at the same places."""
    if node.meta.get("val") is None:
        return value
    passed = Value(value.shape, list(value.factors), follows=value.follows)
    return (passed, passed) if isinstance(node.meta["val"], (tuple, list)) else passed


@rule(
    "aten.zeros_like",
    "aten.ones_like",
    "aten.full_like",
    "aten.empty_like",
    "aten.rand_like",
    "aten.randn_like",
    "aten.bernoulli",
)
def like(flow: Flow, node: fx.Node, value: Value, *_: Any, **__: Any) -> Value:
    """Made to the shape of another, entry for entry."""
    return Value(value.shape, list(value.factors))


@rule("aten.expand")
def expand(flow: Flow, node: fx.Node, value: Value, *_: Any, **__: Any) -> Value:
    """Repeated along dimensions of size 1, which have no labels."""
    shape = flow.shape(node)
    return Value(shape, [aligned(f, len(shape)) for f in value.factors], follows=value.follows)


@rule("aten.unsqueeze")
def unsqueeze(flow: Flow, node: fx.Node, value: Value, dim: int) -> Value:
    """One dimension more."""
    return Value(flow.shape(node), [factor.unsqueeze(dim) for factor in value.factors])


@rule("aten.squeeze")
def squeeze(flow: Flow, node: fx.Node, value: Value, *_: Any) -> Value:
    """Fewer dimensions; all that go have size 1 in the tensor, not only in the labels."""
    shape = flow.shape(node)
    return flow.made(shape, [_viewed(f, value.shape, shape) for f in value.factors], node)


@rule("aten.cat", "aten.concat")
def cat(flow: Flow, node: fx.Node, values: Sequence[Value], dim: int = 0) -> Value:
    """Labels one after the other along `dim`; along other dimensions the parts share them."""
    shape = flow.shape(node)
    values = [value for value in values if value.shape != (0,)]
    dim %= len(shape)
    values = [_whole_along(flow, node, value, dim, values) for value in values]
    made = []
    for key in dict.fromkeys(support(f) for value in values for f in value.on(dim)):
        parts = []
        for value in values:
            size = [n if d in key else 1 for d, n in enumerate(value.shape)]
            own = [f for f in value.on(dim) if support(f) == key]
            parts.append(own[0] if own else torch.full(size, FIXED))
        made.append(torch.cat(parts, dim))
    # Along the others it is as if the parts were added up: equal places share a fate.
    slices = [
        Value(_with(value.shape, dim, 1), value.off(dim), follows=value.follows) for value in values
    ]
    across = flow.merge(node, slices, _with(shape, dim, 1))
    return flow.made(shape, [*made, *across.factors], node)


def _whole_along(
    flow: Flow, node: fx.Node, value: Value, dim: int, others: Sequence[Value]
) -> Value:
    """Where another part has no labels over (heads, `dim`), those of heads alone are kept."""
    factors = []
    for factor in value.factors:
        key = support(factor)
        is_shared = all(any(support(f) == key for f in other.factors) for other in others)
        mixed = factor.shape[dim] > 1 and len(key) > 1 and not is_shared
        left = flow.collapse(factor, [dim], node) if mixed else factor
        factors += [] if left is None else [left]
    return Value(value.shape, factors, follows=value.follows)


@rule("aten.stack")
def stack(flow: Flow, node: fx.Node, values: Sequence[Value], dim: int = 0) -> Value:
    """As elementwise: equal places of the parts share a fate."""
    shape = flow.shape(node)
    dim %= len(shape)
    part = _with(shape, dim, 1)
    parts = [Value(part, [f.unsqueeze(dim) for f in v.factors], follows=v.follows) for v in values]
    return Value(shape, flow.merge(node, parts, part).factors)


@rule("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.tensor_split")
def split(
    flow: Flow, node: fx.Node, value: Value, size: Any = None, dim: int = 0
) -> tuple[Value, ...]:
    """Parts along `dim`. Equal parts stay equal: the same places of all of them go together."""
    shapes = [tuple(int(n) for n in part.shape) for part in node.meta["val"]]
    if node.target is torch.ops.aten.unbind.int:
        dim = 0 if size is None else int(size)
    dim %= len(value.shape)
    is_unbind = len(shapes[0]) < len(value.shape)
    lengths = [1 if is_unbind else shape[dim] for shape in shapes]
    is_even = len(set(lengths)) == 1 and len(lengths) > 1 and not is_unbind
    follows_sizes = flow.is_rewritten(node) and "with_sizes" in str(node.target)
    if is_even and not follows_sizes:
        for factor in value.on(dim):
            even = blocks(factor, dim, len(lengths))
            flow.split(even)
            flow.unite(even, even.narrow(dim, 0, 1), node)
    parts: list[list[Tensor]] = [[] for _ in shapes]
    for factor in value.factors:
        pieces = (
            torch.split(factor, lengths, dim) if factor.shape[dim] > 1 else [factor] * len(shapes)
        )
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece.squeeze(dim) if is_unbind else piece)
    return tuple(flow.made(s, part, node) for s, part in zip(shapes, parts, strict=True))


@rule("aten.glu")
def glu(flow: Flow, node: fx.Node, value: Value, dim: int = -1) -> Value:
    """The first half times the sigmoid of the second: both lose the same places."""
    shape = flow.shape(node)
    dim %= len(shape)
    for factor in value.on(dim):
        halves = blocks(factor, dim, 2)
        flow.split(halves)
        flow.unite(halves, halves.narrow(dim, 0, 1), node)
    made = [f.narrow(dim, 0, shape[dim]) if f.shape[dim] > 1 else f for f in value.factors]
    return flow.made(shape, made, node)


@rule("aten.slice")
def slice_(flow: Flow, node: fx.Node, value: Value, dim: int = 0, *args: Any) -> Value:
    """A run of the entries along `dim`."""
    made = [_call(node, f, dim, *args) if f.shape[dim] > 1 else f for f in value.factors]
    return flow.made(flow.shape(node), made, node)


@rule("aten.select", "aten.select_copy")
def select(flow: Flow, node: fx.Node, value: Value, dim: int, index: Any) -> Value:
    """One entry along `dim`, which can therefore not be removed from in front of it."""
    if isinstance(index, Value):
        return _freeze_along(flow, node, value, dim)
    made = []
    for factor in value.factors:
        if factor.shape[dim] > 1:
            if len(support(factor)) == 1:
                flow.freeze(factor, f"{flow.where(node)} takes one of them by its number")
            made.append(_call(node, factor, dim, index))
        else:
            made.append(factor.squeeze(dim))
    return flow.made(flow.shape(node), made, node)


@rule("aten.constant_pad_nd", "aten.pad")
def pad(
    flow: Flow, node: fx.Node, value: Value, widths: Sequence[int], *_: Any, **__: Any
) -> Value:
    """New entries at the ends: fixed, or free where the program's integers follow."""
    factors = list(value.factors)
    shape = list(value.shape)
    dims = len(shape)
    for k in range(0, len(widths), 2):
        before, after = int(widths[k]), int(widths[k + 1])
        dim = dims - 1 - k // 2
        shape[dim] += before + after
        if not before and not after:
            continue
        padded = []
        for factor in factors:
            if factor.shape[dim] == 1:
                padded.append(factor)
                continue
            rest = list(factor.shape)
            ends = []
            for count in (before, after):
                rest[dim] = count
                is_free = flow.is_rewritten(node) and min(before, after) >= 0 and count
                is_vector = len(support(factor)) == 1
                ends.append(
                    flow.sets.fresh(count).reshape(rest)
                    if is_free and is_vector
                    else torch.full([max(n, 0) for n in rest], FIXED)
                )
            low, high = max(-before, 0), factor.shape[dim] - max(-after, 0)
            middle = factor.narrow(dim, low, high - low)
            padded.append(torch.cat([ends[0], middle, ends[1]], dim))
        factors = padded
    return flow.made(shape, factors, node)


@rule("aten.slice_scatter")
def slice_scatter(
    flow: Flow, node: fx.Node, base: Value, source: Value, dim: int = 0, *args: Any, **kwargs: Any
) -> Value:
    """`x[:, a:b] = y`: as a join of what is left of the base with the source."""
    shape = flow.shape(node)
    dim %= len(shape)
    places = torch.arange(shape[dim])
    taken = torch.ops.aten.slice.Tensor(places, 0, *args)
    result = []
    for key in {support(f) for f in (*base.on(dim), *source.on(dim))}:
        old = [f for f in base.factors if support(f) == key]
        new = [f for f in source.factors if support(f) == key]
        full = [n if d in key else 1 for d, n in enumerate(shape)]
        merged = old[0].clone() if old else torch.full(full, FIXED)
        if old:  # a place that is written over is a place all the same
            written = new[0] if new else torch.tensor(FIXED)
            flow.unite(merged.index_select(dim, taken), written, node)
        if new:
            merged.index_copy_(dim, taken, new[0].expand_as(merged.index_select(dim, taken)))
        result.append(merged)
    slices = [Value(_with(v.shape, dim, 1), v.off(dim), follows=v.follows) for v in (base, source)]
    across = flow.merge(node, slices, _with(shape, dim, 1))
    return flow.made(shape, [*result, *across.factors], node)


@rule("aten.copy", "aten.copy_")
def copy(flow: Flow, node: fx.Node, base: Value, source: Value, *_: Any) -> Value:
    """The source, broadcast to the base's shape."""
    base = Value(base.shape, list(base.factors), follows=not base.factors)
    return flow.merge(node, [base, source], flow.shape(node))


@rule("aten.embedding")
def embedding(flow: Flow, node: fx.Node, weight: Value, index: Value, *_: Any, **__: Any) -> Value:
    """Rows of a table: the rows are fixed, the columns are the new last dimension."""
    shape = flow.shape(node)
    for rows in weight.on(0):
        flow.freeze(rows, ROWS)
    last = [aligned(f.reshape(-1), len(shape)) for f in weight.on(1)]
    return Value(shape, [*last, *_of_index(index, len(shape))])


@rule("aten.index", "aten._unsafe_index")
def index(flow: Flow, node: fx.Node, value: Value, indices: Sequence[Any]) -> Value:
    """`x[i, j]` with known numbers moves entries; with others, what they pick is fixed."""
    shape = flow.shape(node)
    known = [None if i is None else (i.constant if isinstance(i, Value) else i) for i in indices]
    picked = [dim for dim, i in enumerate(indices) if i is not None]
    is_known = all(known[dim] is not None for dim in picked)
    touched = [f for f in value.factors if any(f.shape[dim] > 1 for dim in picked)]
    if is_known and all(k is None or k.dtype != torch.bool for k in known):
        moved = Value(value.shape, touched)
        made = flow.move(moved, shape, lambda t: torch.ops.aten.index.Tensor(t, known), node)
        factors = made.factors
    else:
        for factor in touched:
            flow.freeze(factor, f"{flow.where(node)} picks them by numbers that depend on the data")
        factors = []
    rest = [f for f in value.factors if all(f.shape[dim] == 1 for dim in picked)]
    return flow.made(shape, [*factors, *_passed(rest, value.shape, shape, indices)], node)


@rule("aten.index_select", "aten.gather", "aten.roll", "aten.flip", "aten.repeat_interleave")
def along_one(flow: Flow, node: fx.Node, value: Value, *args: Any, **kwargs: Any) -> Value:
    """Entries moved along some dimensions by known numbers."""
    if any(isinstance(a, Value) and a.constant is None for a in args):
        dim = next(int(a) for a in (*args, kwargs.get("dim", 0)) if isinstance(a, int))
        return _freeze_along(flow, node, value, dim)
    known = [a.constant if isinstance(a, Value) else a for a in args]
    return flow.move(value, flow.shape(node), lambda t: _call(node, t, *known, **kwargs), node)


@rule(
    "aten.repeat",
    "aten.pixel_unshuffle",
    "aten.channel_shuffle",
    "aten.as_strided",
    "aten.diagonal",
    "aten.tril",
    "aten.triu",
    "aten.unfold",
    "aten.im2col",
)
def moved(flow: Flow, node: fx.Node, value: Value, *args: Any, **kwargs: Any) -> Value:
    """Any other operation that only moves entries: run on the labels themselves."""
    made = flow.move(value, flow.shape(node), lambda t: _moved(node, t, *args, **kwargs), node)
    for factor in made.factors:
        flow.split(factor)
    return made


@rule("aten.pixel_shuffle")
def pixel_shuffle(flow: Flow, node: fx.Node, value: Value, factor: int) -> Value:
    """The channels that make one map go together: without some it would have holes."""
    shape = flow.shape(node)
    made = flow.move(value, shape, lambda t: _moved(node, t, factor), node)
    return flow.collapse_value(made, [len(shape) - 2, len(shape) - 1], node)


def _moved(node: fx.Node, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The operation on labels; some kernels know floating point only."""
    try:
        return _call(node, labels, *args, **kwargs)
    except (RuntimeError, NotImplementedError):
        return _call(node, labels.double(), *args, **kwargs).round().long()


def _call(node: fx.Node, *args: Any, **kwargs: Any) -> Tensor:
    assert callable(node.target)
    result: Tensor = node.target(*args, **kwargs)
    return result


def _viewed(factor: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Labels of a tensor of shape `before`, viewed as `after`; what has no labels stays so."""
    sizes: list[int] = []
    part_sizes: list[int] = []
    for old, new in _matched(before, after):
        old_sizes = [factor.shape[dim] for dim in old]
        has_labels = any(size > 1 for size in old_sizes)
        part_sizes += [before[dim] if has_labels else 1 for dim in old]
        sizes += [after[dim] if has_labels else 1 for dim in new]
    return factor.expand(part_sizes).reshape(sizes)


def _matched(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions of both shapes that hold as many entries."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old: list[int] = []
        new: list[int] = []
        have = want = 1
        while True:
            if have <= want and i < len(before):
                old.append(i)
                have *= before[i]
                i += 1
            elif j < len(after):
                new.append(j)
                want *= after[j]
                j += 1
            else:
                break
            if have == want and old and new:
                break
        runs.append((old, new))
    return runs


def _freeze_along(flow: Flow, node: fx.Node, value: Value, dim: int) -> Value:
    for factor in value.on(dim):
        flow.freeze(factor, f"{flow.where(node)} picks them by numbers that depend on the data")
    shape = flow.shape(node)
    rest = value.off(dim)
    if len(shape) != len(value.shape):
        rest = [f.squeeze(dim) for f in rest] if len(shape) == len(value.shape) - 1 else []
    return Value(shape, rest)


def _passed(
    factors: Sequence[Tensor], before: Sequence[int], after: Sequence[int], indices: Sequence[Any]
) -> list[Tensor]:
    """Factors along dimensions that an index leaves alone, where the new dimensions put them."""
    padded = [*indices, *[None] * (len(before) - len(indices))]
    picked = [dim for dim, i in enumerate(padded) if i is not None]
    if not picked:
        return list(factors)
    width = len(after) - (len(before) - len(picked))  # dimensions that the indices make
    is_run = all(b == a + 1 for a, b in pairwise(picked))
    first = picked[0] if is_run else 0
    passed = []
    for factor in factors:
        left = [factor.shape[dim] for dim in range(len(before)) if dim not in picked]
        at = sum(dim not in picked for dim in range(first))
        passed.append(factor.reshape(*left[:at], *[1] * width, *left[at:]))
    return passed


def _of_index(index: Value, dims: int) -> list[Tensor]:
    return [factor.reshape(*factor.shape, *[1] * (dims - factor.dim())) for factor in index.factors]


def _with(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])
