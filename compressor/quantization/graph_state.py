"""A graph module as data that pickle takes, and its constants computed once.

Pickle has neither torch's operators nor the fake tensors that tell a graph's shapes; and fx's own
way traces the code anew, after which the names of values are others than in a plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from compressor.errors import ModelError

CONSTANTS = "rounded"
MODULES = "nn_module_stack"
TENSORS = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class GraphState:
    """A graph module without its graph.

    Attributes:
        nodes: in order.
        root: has the modules, parameters and buffers.
        codegen: knows the form of arguments and outputs.
    """

    nodes: tuple[NodeState, ...]
    root: nn.Module
    codegen: Any


@dataclass(frozen=True)
class NodeState:
    """A node; of its metadata the value's shape and type, and the modules that it is of."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    value: Any
    modules: Any


@dataclass(frozen=True)
class _Place:
    """Stands for a node."""

    number: int


@dataclass(frozen=True)
class _Operator:
    """Stands for an operator of torch."""

    name: str
    overload: str


@dataclass(frozen=True)
class _Shape:
    """Stands for a value; a dimension that is no number, the batch, is 1."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


def graph_state(module: fx.GraphModule) -> GraphState:
    """`module` as data that shares its tensors."""
    numbers = {node: number for number, node in enumerate(module.graph.nodes)}

    def plain(item: Any) -> Any:
        return _Place(numbers[item]) if isinstance(item, fx.Node) else item

    nodes = (
        NodeState(
            node.op,
            node.name,
            _plain_target(node.target),
            map_aggregate(node.args, plain),
            map_aggregate(node.kwargs, plain),
            pytree.tree_map(_plain_value, node.meta.get("val")),
            node.meta.get(MODULES),
        )
        for node in numbers
    )
    root = nn.Module()
    for kind in TENSORS:
        getattr(root, kind).update(getattr(module, kind))
    return GraphState(tuple(nodes), root.train(module.training), module.graph._codegen)


def graph_module(state: GraphState) -> fx.GraphModule:
    """The graph module that `graph_state` was made of, or one like it."""
    graph = fx.Graph()
    graph.set_codegen(state.codegen)
    nodes: list[fx.Node] = []

    def known(item: Any) -> Any:
        return nodes[item.number] if isinstance(item, _Place) else item

    for plain in state.nodes:
        target = _target(plain.target)
        args, kwargs = map_aggregate(plain.args, known), map_aggregate(plain.kwargs, known)
        node = graph.create_node(plain.op, target, args, kwargs, name=plain.name)
        node.meta["val"] = pytree.tree_map(_value, plain.value)
        if plain.modules is not None:
            node.meta[MODULES] = plain.modules
        nodes.append(node)
    module = fx.GraphModule(state.root, graph)
    for kind in TENSORS:  # in their order, which an optimizer's state goes by
        getattr(module, kind).clear()
        getattr(module, kind).update(getattr(state.root, kind))
    return module


def check_names(paths: Iterable[str]) -> None:
    """Refuse parameters and buffers whose first module a graph of torch has another thing for.

    Raises:
        ModelError: names the module.
    """
    graph = fx.GraphModule(nn.Module(), fx.Graph())
    for path in paths:
        name = path.partition(".")[0]
        if hasattr(graph, name):
            raise ModelError(
                f"The model's {path!r} is inside {name!r}, and a graph of torch has an attribute "
                "of that name. Give the module another name."
            )


def add_child(parent: nn.Module, name: str, child: nn.Module) -> str:
    """Add `child` under `name`, or with a number behind it where that is taken, in place.

    The children and parameters of a graph have the names that the user gave them.

    Returns:
        The name that it has.

    >>> add_child(nn.Sequential(nn.ReLU()), "0", nn.ReLU())
    '0_1'
    """
    free, number = name, 0
    while hasattr(parent, free):
        number += 1
        free = f"{name}_{number}"
    parent.add_module(free, child)
    return free


def compute_constants(module: fx.GraphModule) -> None:
    """Replace what modules make of parameters and buffers by what it is now, in place."""
    holder = nn.Module()
    path = add_child(module, CONSTANTS, holder)
    for node in list(module.graph.nodes):
        read = node.all_input_nodes
        if node.op != "call_module" or len(read) != 1 or read[0].op != "get_attr":
            continue
        with torch.no_grad():
            value = module.get_submodule(str(node.target))(attrgetter(str(read[0].target))(module))
        holder.register_buffer(node.name, value)
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(f"{path}.{node.name}")
        node.replace_all_uses_with(constant)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()


def _plain_target(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        return _Operator(target._schema.name, target._overloadname)
    return target


def _target(plain: Any) -> Any:
    if not isinstance(plain, _Operator):
        return plain
    space, _, name = plain.name.partition("::")
    return getattr(getattr(getattr(torch.ops, space), name), plain.overload)


def _plain_value(value: Any) -> _Shape | None:
    if not isinstance(value, Tensor):
        return None
    return _Shape(tuple(n if isinstance(n, int) else 1 for n in value.shape), value.dtype)


def _value(plain: _Shape | None) -> Tensor | None:
    return None if plain is None else torch.empty(plain.sizes, dtype=plain.dtype, device="meta")
