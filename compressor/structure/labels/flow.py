"""Labels flow through an exported graph: each operation says which entries share a fate.

A parameter or buffer gets a label for every entry of each of its dimensions. An elementwise
operation unites the labels at one place, a contraction (linear, convolution, attention) unites
those that are summed over and passes on those of the weight's outputs, and whatever only moves data
is run on the labels themselves. What then shares a label can only be removed together.

An operation without a rule freezes what reaches it, and the reason names it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec
from torch.utils import _pytree as pytree

from compressor.structure.labels.operations import (
    FACTORIES,
    MADE_NEW,
    RULES,
    is_pointwise,
    operation,
)
from compressor.structure.labels.sets import FIXED, LabelSets
from compressor.structure.labels.value import Value, aligned, support, vector

OUTPUTS = "they are the model's outputs"
UNPARAMETRIZE = "remove it with torch.nn.utils.parametrize.remove_parametrizations before pruning"
TAPS = "they are taps of a kernel"
ROWS = "they are rows of an embedding, picked by number"
MOST_CONSTANT_ENTRIES = 1 << 22  # of a constant that is computed to know its value


class Flow:
    """One pass of labels through a graph.

    Attributes:
        sets: which labels share a fate, and which are frozen.
        tensors: of each parameter and float buffer, by the name that the graph has for it, the
            labels of each dimension: (n,) each; None for dimensions of size 1.
        read: labels of weights' dimensions that are summed over.
        values: of every node.
        used: names of the tensors that some operation takes.
    """

    def __init__(
        self,
        graphs: Mapping[str, Sequence[ExportedProgram]],
        rewritten: Collection[fx.Node] = (),
    ) -> None:
        """Label the graphs.

        Args:
            graphs: name of a module of the model -> its graphs, functional, decomposed by an empty
                table; {"": [graph]} for the whole model.
            rewritten: nodes whose integer arguments will be written anew for what is kept.
        """
        self.sets = LabelSets()
        self.tensors: dict[str, tuple[Tensor | None, ...]] = {}
        self.read: set[int] = set()
        self.values: dict[fx.Node, Any] = {}
        self.used: set[str] = set()
        self._rewritten = frozenset(rewritten)
        self._splits: list[Tensor] = []
        self._part_of: dict[fx.Node, str] = {}
        for part, program in ((part, graph) for part, own in graphs.items() for graph in own):
            outputs = self._run(program.graph_module, self._inputs(part, program), part)
            specs = program.graph_signature.output_specs
            self._freeze_outputs(
                [out for out, spec in zip(outputs, specs, strict=True) if _is_users(spec)], part
            )
        self._settle()

    # what rules ask --------------------------------------------------------------------------

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of the node's only tensor."""
        return tuple(int(size) for size in node.meta["val"].shape)

    def is_rewritten(self, node: fx.Node) -> bool:
        """Whether integer arguments of the node follow what is kept."""
        return node in self._rewritten

    def where(self, node: fx.Node) -> str:
        """The operation and its module, for a reason; of a parametrization also the way out."""
        path, name = self.path(node)[-1], operation(node)
        if ".parametrizations." in path and "_weight_norm" not in name:  # which has a rule
            return f"{name} in {path!r} ({UNPARAMETRIZE})"
        return f"{name} in {path!r}" if path else name

    def path(self, node: fx.Node) -> list[str]:
        """Names of the modules that an operation is in, the innermost last."""
        part = self._part_of.get(node, "")
        stack = [name for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
        inner = [re.sub(r"@\d+", "", name) for name in stack or [""]]  # without the call's number
        return [".".join(filter(None, (part, name))) for name in inner]

    # what rules do ---------------------------------------------------------------------------

    def unite(self, first: Tensor, second: Tensor, node: fx.Node) -> None:
        """Make the labels at one place share a fate."""
        reason = f"they meet entries that cannot be removed, at {self.where(node)}"
        self.sets.unite(first, second, reason)

    def freeze(self, factor: Tensor, why: str) -> None:
        """Nothing with these labels can be removed."""
        self.sets.freeze(factor, why)

    def freeze_all(self, node: fx.Node, values: Sequence[Any], why: str) -> None:
        """Freeze whatever reaches a node."""
        for value in pytree.tree_leaves(list(values)):
            if isinstance(value, Value):
                for factor in value.factors:
                    self.freeze(factor, why)

    def collapse(self, factor: Tensor, dims: Collection[int], node: fx.Node) -> Tensor | None:
        """Unite the labels along `dims`: entries there can only be removed all at once.

        Returns:
            The factor with size 1 in `dims`; None, and frozen, if no dimension is left.
        """
        dims = [dim for dim in dims if factor.shape[dim] > 1]
        if not dims:
            return factor
        left = [dim for dim in support(factor) if dim not in dims]
        if not left:
            self.freeze(factor, f"{self.where(node)} needs all of them")
            return None
        first = factor
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        self.unite(factor, first, node)
        return first

    def collapse_value(self, value: Value, dims: Collection[int], node: fx.Node) -> Value:
        """`collapse` every factor."""
        factors = [self.collapse(factor, dims, node) for factor in value.factors]
        return Value(value.shape, [f for f in factors if f is not None])

    def squeezed(self, factor: Tensor) -> Tensor | None:
        """With size 1 in every dimension along which the labels' sets do not differ.

        Returns:
            None, if nothing is left but `FIXED`, or a single set.
        """
        roots = self.sets.find(factor)
        for dim in support(factor):
            if bool((roots == roots.narrow(dim, 0, 1)).all()):
                roots, factor = roots.narrow(dim, 0, 1), factor.narrow(dim, 0, 1)
        return factor if support(factor) else None

    def made(self, shape: Sequence[int], factors: Sequence[Tensor], node: fx.Node) -> Value:
        """A value with these factors, two of equal support made one."""
        kept: dict[tuple[int, ...], Tensor] = {}
        for raw in factors:
            factor = self.squeezed(raw)
            if factor is None:
                continue
            key = support(factor)
            if key not in kept:
                kept[key] = factor
                continue
            kept[key] = self._joined(kept[key], factor, node)
        return Value(tuple(shape), list(kept.values()))

    def move(
        self,
        value: Value,
        shape: Sequence[int],
        function: Callable[[Tensor], Tensor],
        node: fx.Node,
    ) -> Value:
        """What only moves entries, run on labels of the full shape."""
        moved = [function(f.expand(value.shape).contiguous()) for f in value.factors]
        return self.made(shape, moved, node)

    def merge(self, node: fx.Node, values: Sequence[Value], shape: Sequence[int]) -> Value:
        """Elementwise: labels at one place share a fate; the shapes are broadcast."""
        dims = len(shape)
        extents = [_extents(value, dims) for value in values]
        operands = [
            [left for f in value.factors if (left := self.squeezed(aligned(f, dims))) is not None]
            for value in values
        ]
        for i, factors in enumerate(operands):
            operands[i] = [
                left for f in factors if (left := self._apart(f, extents, i, node)) is not None
            ]
        for i, factors in enumerate(operands):
            for factor in factors:
                for j, others in enumerate(operands):
                    if i != j and any(extents[j][dim] > 1 for dim in support(factor)):
                        self._match(factor, others, node)
        return self.made(shape, [f for factors in operands for f in factors], node)

    def contract(self, node: fx.Node, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Unite the labels of a dimension that is summed over: (n,) vectors of both sides."""
        for labels in second:
            self.mark_read(labels)
        if first and second:
            for labels in first[1:]:
                self.unite(first[0], labels, node)
            for labels in second:
                self.unite(first[0], labels, node)
        else:
            for labels in (*first, *second):
                self.freeze(labels, f"{self.where(node)} sums over entries that cannot be removed")

    def mark_read(self, labels: Tensor) -> None:
        """These labels of a weight stand for what it reads."""
        self.read.update(labels.flatten().tolist())

    def split(self, factor: Tensor) -> None:
        """A vector became an array: what is kept of it must be an array again."""
        if len(support(factor)) > 1:
            self._splits.append(factor)

    # the pass --------------------------------------------------------------------------------

    def _freeze_outputs(self, outputs: Any, part: str) -> None:
        why = f"they are outputs of {part!r}, which is analysed alone" if part else OUTPUTS
        for value in pytree.tree_leaves(outputs):
            if isinstance(value, Value):
                for factor in value.factors:
                    self.freeze(factor, why)

    def _inputs(self, part: str, program: ExportedProgram) -> list[Value]:
        values = []
        nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
        for node, spec in zip(nodes, program.graph_signature.input_specs, strict=True):
            example = node.meta.get("val")
            if not isinstance(example, Tensor):
                values.append(example)
                continue
            shape = tuple(int(size) for size in example.shape)
            value = Value(shape)
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                if example.dtype.is_floating_point:
                    name = f"{part}.{spec.target}" if part else str(spec.target)
                    value = self._tensor(name, shape)
                    if node.users:
                        self.used.add(name)
                else:
                    tensors = {**program.state_dict, **program.constants}
                    value.constant = tensors[str(spec.target)].detach().cpu()
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                value.constant = program.constants[str(spec.target)].detach().cpu()
            values.append(value)
        return values

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Value:
        if name not in self.tensors:
            self.tensors[name] = tuple(
                self.sets.fresh(size) if size > 1 else None for size in shape
            )
        vectors = enumerate(self.tensors[name])
        factors = [vector(labels, dim, len(shape)) for dim, labels in vectors if labels is not None]
        return Value(shape, factors)

    def _run(self, module: fx.GraphModule, inputs: Sequence[Any], part: str) -> Any:
        """Label one graph; a graph may hold others, as behind `torch.no_grad` in `forward`."""
        env: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in module.graph.nodes:
            self._part_of[node] = part
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "get_attr":
                env[node] = _attribute(module, str(node.target))
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: env[n])
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
                env[node] = self._apply(node, args, kwargs)
            self.values[node] = env[node]
        return None

    def _apply(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if node.target is operator.getitem:
            return args[0][args[1]]
        name = operation(node)
        if name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            graphs = [a for a in args if isinstance(a, fx.GraphModule)]
            after = args[list(args).index(graphs[0]) + 1 :]
            return self._run(graphs[0], after, self._part_of[node])
        if name in MADE_NEW:  # of a tensor they take dtype and device, not its entries
            args = (Value((), constant=torch.empty(())), *args[1:])
        leaves = pytree.tree_leaves([args, kwargs])
        values = [leaf for leaf in leaves if isinstance(leaf, Value)]
        if name in FACTORIES and self.is_rewritten(node):
            return self._free(node)
        constant = self._constant(node, args, kwargs, values)
        if constant is not None and not any(value.factors for value in values):
            return constant
        chosen = RULES.get(name)
        if chosen is None and is_pointwise(node):
            chosen = pointwise
        if chosen is None:
            if any(value.factors for value in values):
                why = f"the operation {self.where(node)} has no rule"
                self.freeze_all(node, values, why)
            return _unlabelled(node)
        result = chosen(self, node, *args, **kwargs)
        return result if result is not None else _unlabelled(node)

    def _free(self, node: fx.Node) -> Value:
        """Made of a shape that will be written anew: any entry of it may go."""
        shape = self.shape(node)
        sizes = [(dim, size) for dim, size in enumerate(shape) if size > 1]
        factors = [vector(self.sets.fresh(size), dim, len(shape)) for dim, size in sizes]
        return Value(shape, factors, follows=True)

    def _constant(
        self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], values: Sequence[Value]
    ) -> Any:
        """The value of an operation on constants alone, if it is one and not large."""
        example = node.meta.get("val")
        if not isinstance(example, Tensor) or any(value.constant is None for value in values):
            return None
        shape = tuple(int(size) for size in example.shape)
        if example.numel() > MOST_CONSTANT_ENTRIES or not callable(node.target):
            return None
        given = pytree.tree_map(lambda x: x.constant if isinstance(x, Value) else x, (args, kwargs))
        options = {k: v for k, v in given[1].items() if k not in ("device", "pin_memory")}
        try:
            result = node.target(*given[0], **options)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return None
        is_made = operation(node) in FACTORIES or (
            bool(values) and all(value.follows for value in values)
        )
        return Value(shape, constant=result, follows=is_made)

    def _settle(self) -> None:
        """What was split into an array keeps whole hyperplanes of it: along its last axis."""
        arrays = self._splits
        while arrays:
            left = [factor for factor in map(self.squeezed, arrays) if factor is not None]
            arrays = [f for f in left if len(support(f)) > 1 and not self._is_settled(f)]
            for factor in arrays:
                first = factor
                for dim in support(factor)[:-1]:
                    first = first.narrow(dim, 0, 1)
                self.sets.unite(factor, first, "they are split evenly")

    def _is_settled(self, factor: Tensor) -> bool:
        """Whether nothing of an array can go, so that it need not be one of hyperplanes."""
        return bool(self.sets.is_frozen(factor).all())

    def _apart(
        self, factor: Tensor, extents: Sequence[Sequence[int]], own: int, node: fx.Node
    ) -> Tensor | None:
        """`factor` without the dimensions in which another operand has only part of its support.

        Those operands tell entries along these dimensions apart, and not along the others, so what
        is removed must be whole along them.
        """
        for j, extent in enumerate(extents):
            held = [dim for dim in support(factor) if extent[dim] > 1]
            if j == own or not held or len(held) == len(support(factor)):
                continue
            left = self.collapse(factor, held, node)
            if left is None:
                return None
            factor = left
        return factor

    def _match(self, factor: Tensor, others: Sequence[Tensor], node: fx.Node) -> None:
        """Unite `factor` with the factor of another operand that runs along the same dimensions."""
        mine = set(support(factor))
        equal = [other for other in others if set(support(other)) == mine]
        nested = [
            other for other in others if set(support(other)) < mine or mine < set(support(other))
        ]
        for other in equal or nested:
            self.unite(factor, other, node)
        if not equal and not nested:
            self.freeze(factor, f"they meet entries that cannot be removed, at {self.where(node)}")

    def _joined(self, first: Tensor, second: Tensor, node: fx.Node) -> Tensor:
        """One factor for two along the same dimensions: an entry would be gone with either label.

        Where both say the same, or both cannot go, nothing is lost; elsewhere only the coarser of
        the two may differ.
        """
        coarse, fine = sorted((first, second), key=self._count)
        differ = self.sets.find(coarse) != self.sets.find(fine)
        differ &= ~(self.sets.is_frozen(coarse) & self.sets.is_frozen(fine))
        if bool(differ.any()):
            self.freeze(fine[differ], f"{self.where(node)} merges two kinds of channels")
        return torch.where(coarse == FIXED, fine, coarse)

    def _count(self, factor: Tensor) -> int:
        return len(torch.unique(self.sets.find(factor)))


def pointwise(flow: Flow, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Elementwise over all tensors that are given."""
    leaves = pytree.tree_leaves([args, kwargs])
    values = [leaf for leaf in leaves if isinstance(leaf, Value)]
    return flow.merge(node, values, flow.shape(node))


def _is_users(spec: OutputSpec) -> bool:
    """Whether the model returns it; the others are new values of its buffers."""
    return spec.kind is OutputKind.USER_OUTPUT


def _unlabelled(node: fx.Node) -> Any:
    def strip(example: Any) -> Any:
        return (
            Value(tuple(int(s) for s in example.shape)) if isinstance(example, Tensor) else example
        )

    return pytree.tree_map(strip, node.meta.get("val"))


def _attribute(module: fx.GraphModule, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    if isinstance(found, Tensor):
        return Value(tuple(found.shape), constant=found.detach().cpu())
    return found


def _extents(value: Value, dims: int) -> list[int]:
    if value.follows:
        return [1] * dims
    return [1] * (dims - len(value.shape)) + list(value.shape)
