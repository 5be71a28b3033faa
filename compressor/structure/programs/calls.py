"""Which nodes of a module's exported graph are whole calls of its children."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from compressor.interfaces.inputs import ModelInputs
from compressor.structure.trace import eval_mode, run


@dataclass(frozen=True)
class Call:
    """One call of a child, seen from outside.

    Attributes:
        form: of (args, kwargs).
        leaves: their leaves; of a tensor, its number in `taken`.
        taken: shapes of the distinct tensors among them.
        result: form of the result.
        given: its leaves; of a tensor, an empty one of that shape.
        passes: whether it gave a tensor back untouched, without a call inside.
        writes: whether it wrote into what it took.
    """

    form: pytree.TreeSpec
    leaves: tuple[Any, ...]
    taken: tuple[torch.Size, ...]
    result: pytree.TreeSpec
    given: tuple[Any, ...]
    passes: bool
    writes: bool


@dataclass(frozen=True)
class TensorNumber:
    """Stands for a tensor in the leaves of a `Call`."""

    number: int


@dataclass(frozen=True)
class Segment:
    """A node by itself, or all nodes of a call.

    Attributes:
        nodes: in the order of the graph.
        call: None for a node of the module's own code.
        name: of the child.
        key: of the call, the same in all graphs of one module.
        arguments: where the tensors `call.taken` come from.
        leaf: which leaf of the result `result` is.
        result: the one node that is used outside, if any.
    """

    nodes: tuple[fx.Node, ...]
    call: Call | None = None
    name: str = ""
    key: str = ""
    arguments: tuple[fx.Node, ...] = ()
    leaf: int = 0
    result: fx.Node | None = None


Calls = Mapping[int, Sequence[Call]]  # by the id of the child, in order


def watch_calls(module: nn.Module, inputs: ModelInputs) -> Calls:
    """Every call of a child of `module` in a run in eval mode.

    Raises:
        ModelError: if the module does not run.
    """
    calls: dict[int, list[Call]] = defaultdict(list)
    open_calls: list[_Open] = []

    def enter(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for outer in open_calls:
            outer.has_inner = True
        opened = _Open.of(args, kwargs)
        open_calls.append(opened)

    def leave(child: nn.Module, _: Any, __: Any, result: Any) -> None:
        calls[id(child)].append(open_calls.pop().close(result))

    handles = []
    for child in list(module.modules())[1:]:
        handles.append(child.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(child.register_forward_hook(leave, with_kwargs=True))
    try:
        with eval_mode(module), torch.no_grad():
            run(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def pass_through_marked(module: nn.Module, calls: Calls) -> Iterator[None]:
    """Inside the `with`, children that give back what they take leave a node in a graph.

    Such as stochastic depth, which does nothing in eval mode, and must be called all the same.
    """
    handles = [
        child.register_forward_hook(lambda _, __, result: torch.dropout(result, 0.0, False))
        for child in module.modules()
        if any(call.passes for call in calls.get(id(child), ()))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stubbed(module: nn.Module, names: Collection[str], calls: Calls) -> Iterator[None]:
    """Inside the `with`, these children only leave a node in a graph, which is traced sooner."""
    patched = []
    for name in names:
        child = module.get_submodule(name)
        own = calls.get(id(child), ())
        if _is_apart(module, child) and not any(call.passes or call.writes for call in own):
            if "forward" not in vars(child):
                vars(child)["forward"] = _stub(own)
                patched.append(child)
    try:
        yield
    finally:
        for child in patched:
            del vars(child)["forward"]


def segments(
    module: nn.Module,
    nodes: Sequence[fx.Node],
    parameters: Mapping[fx.Node, str],
    calls: Calls,
    chosen: frozenset[str] | None = None,
) -> list[Segment]:
    """`nodes` split into calls of children, as far outside as possible, and single nodes.

    A call is kept whole if its arguments and its result can be told from the graph: as many tensors
    in it as it took, of the same shapes, and one node of it used outside. Of other calls, the nodes
    are the module's own, and calls within them are tried.

    Args:
        module: the traced one.
        nodes: of its graph, but for placeholders and the output.
        parameters: names of the placeholders that are no inputs.
        calls: of `watch_calls`.
        chosen: keys of the calls to keep whole, as found for another graph of the module.
    """
    finder = _Finder(module, parameters, calls, chosen)
    for node in nodes:
        finder.number_calls(node)
    return list(finder.split(list(nodes), depth=1))


def owner_of(node: fx.Node) -> str:
    """The name of the module whose code made the node."""
    stack = _stack(node)
    return stack[-1][1] if stack else ""


@dataclass
class _Open:
    """A call that has begun."""

    form: pytree.TreeSpec
    leaves: list[Any]
    tensors: list[Tensor]
    versions: list[int]
    has_inner: bool = False

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Open:
        leaves, form = pytree.tree_flatten((args, kwargs))
        tensors: dict[int, Tensor] = {id(x): x for x in leaves if isinstance(x, Tensor)}
        numbers = {key: TensorNumber(number) for number, key in enumerate(tensors)}
        numbered = [numbers[id(x)] if isinstance(x, Tensor) else x for x in leaves]
        found = list(tensors.values())
        return cls(form, numbered, found, [tensor._version for tensor in found])

    def close(self, result: Any) -> Call:
        given, form = pytree.tree_flatten(result)
        writes = [tensor._version for tensor in self.tensors] != self.versions
        passes = not self.has_inner and any(result is tensor for tensor in self.tensors)
        return Call(
            self.form,
            tuple(self.leaves),
            tuple(tensor.shape for tensor in self.tensors),
            form,
            tuple(_empty(leaf) if isinstance(leaf, Tensor) else leaf for leaf in given),
            passes and not writes,
            writes,
        )


@dataclass
class _Finder:
    module: nn.Module
    parameters: Mapping[fx.Node, str]
    calls: Calls
    chosen: frozenset[str] | None
    places: dict[str, tuple[str, int]] = field(default_factory=dict)  # key -> name, which call
    counts: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def number_calls(self, node: fx.Node) -> None:
        for key, name in _stack(node)[1:]:
            if key not in self.places:
                child = id(self.module.get_submodule(name))
                self.places[key] = (name, self.counts[child])
                self.counts[child] += 1

    def split(self, nodes: list[fx.Node], depth: int) -> Iterator[Segment]:
        runs = [(key, list(run)) for key, run in groupby(nodes, lambda node: _key(node, depth))]
        keys = [key for key, _ in runs]
        for key, own in runs:
            if not key:
                yield from (Segment((node,)) for node in own)
                continue
            segment = self.whole_call(key, own) if keys.count(key) == 1 else None
            if segment is None:
                yield from self.split(own, depth + 1)
            else:
                yield segment

    def whole_call(self, key: str, nodes: list[fx.Node]) -> Segment | None:
        name, number = self.places[key]
        seen = self.calls.get(id(self.module.get_submodule(name)), ())
        is_chosen = self.chosen is None or key in self.chosen
        if not is_chosen or len(seen) != self.counts[id(self.module.get_submodule(name))]:
            return None
        call, inside = seen[number], set(nodes)
        arguments = self.arguments(call, name, nodes, inside)
        results = [node for node in nodes if any(user not in inside for user in node.users)]
        if arguments is None or len(results) > 1:
            return None
        if not results:
            return Segment(tuple(nodes), call, name, key, arguments)
        fitting = [i for i, leaf in enumerate(call.given) if isinstance(leaf, Tensor)]
        if len(fitting) > 1:
            fitting = [i for i in fitting if call.given[i].shape == _shape(results[0])]
        if len(fitting) != 1:
            return None
        return Segment(tuple(nodes), call, name, key, arguments, fitting[0], results[0])

    def arguments(
        self, call: Call, name: str, nodes: list[fx.Node], inside: set[fx.Node]
    ) -> tuple[fx.Node, ...] | None:
        """For each tensor that the call took, its node; None if that cannot be told."""
        read = [node for user in nodes for node in user.all_input_nodes if node not in inside]
        read = [node for node in dict.fromkeys(read) if node.op != "get_attr"]
        flowing = [node for node in read if node not in self.parameters]
        if len(flowing) < len(call.taken):  # a parameter was handed over
            flowing += [
                node
                for node in read
                if node in self.parameters and not self.parameters[node].startswith(f"{name}.")
            ]
        if len(flowing) != len(call.taken):
            return None
        if len(flowing) == 1:
            return tuple(flowing)
        found = [[node for node in flowing if _shape(node) == shape] for shape in call.taken]
        if any(len(fitting) != 1 for fitting in found):
            return None
        return tuple(fitting[0] for fitting in found)


def _is_apart(module: nn.Module, child: nn.Module) -> bool:
    """Whether no other part of `module` has a module of `child`."""
    inside = {id(part) for part in child.modules()}
    places = [f"{name}." for name, part in _all_modules(module) if part is child]
    return not any(
        id(part) in inside and not f"{name}.".startswith(tuple(places))
        for name, part in _all_modules(module)
    )


def _all_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(module.named_modules(remove_duplicate=False))


def _stub(calls: Sequence[Call]) -> Callable[..., Any]:
    """A `forward` that gives new tensors of the shapes of the results, made from the arguments."""
    number = iter(calls)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = next(number)
        leaves = pytree.tree_leaves((args, kwargs))
        taken = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
        first, *others = taken.values() or [torch.empty(())]
        for other in others:  # so that the node depends on all of them
            first = first.sum() + other.sum()
        given = [
            first.new_empty(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, Tensor) else leaf
            for leaf in call.given
        ]
        return pytree.tree_unflatten(given, call.result)

    return forward


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    """(key, module name) of the calls that a node is in, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(key, name) for key, (name, _) in stack.items()]


def _key(node: fx.Node, depth: int) -> str:
    stack = _stack(node)
    return stack[depth][0] if len(stack) > depth else ""


def _shape(node: fx.Node) -> torch.Size | None:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else None
