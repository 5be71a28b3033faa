"""Residual blocks that can be left out: modules whose output is their input plus a branch.

Found on the exported graph, where the sum is an operation whatever the block's code looks like, and
verified by running the model without each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.structure.surgery import Skip, replace, undone
from compressor.structure.trace import FORWARD_FAILURES, eval_mode, export_graph, watch

SUMS = frozenset({"add", "add_"})
# Leave the shape, and pass on what they get; an activation after the sum is part of the block.
PASSING = frozenset(
    "alias clone contiguous dropout dropout_ elu elu_ feature_dropout gelu gelu_ hardswish "
    "hardswish_ hardtanh hardtanh_ leaky_relu leaky_relu_ mish mish_ relu relu_ relu6 relu6_ "
    "silu silu_".split()
)


@dataclass(frozen=True)
class ResidualBlock:
    """A block that `surgery.Skip` can stand for.

    Attributes:
        name: of the module.
        shape: of its first input and its output.
        modules: names of the modules inside it, itself first.
    """

    name: str
    shape: tuple[int, ...]
    modules: tuple[str, ...]


def residual_blocks(model: nn.Module, inputs: ModelInputs) -> list[ResidualBlock]:
    """The innermost residual blocks of `model`, in its order. The model is not changed.

    Raises:
        ModelError: if the model does not run on `inputs`, or cannot be traced.
    """
    shapes = _kept_shapes(model, inputs)  # in the order in which calls end: inner first
    graph = export_graph(model, inputs)
    constants = {
        *graph.graph_signature.inputs_to_parameters,
        *graph.graph_signature.inputs_to_buffers,
        *graph.graph_signature.inputs_to_lifted_tensor_constants,
    }
    inside = _nodes_by_module(graph.graph.nodes, shapes)
    found = [
        name for name, nodes in inside.items() if _adds_to_its_input(nodes, constants, shapes[name])
    ]
    innermost = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    with eval_mode(model), torch.no_grad():
        outputs = output_tensors(inputs.call(model))
        return [
            ResidualBlock(name, shape, _names_within(model, name))
            for name, shape in shapes.items()
            if name in innermost and _runs_without(model, inputs, name, outputs)
        ]


def _kept_shapes(model: nn.Module, inputs: ModelInputs) -> dict[str, tuple[int, ...]]:
    """Modules with children that are called once and return a tensor like their first argument."""
    calls: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}
    parents = {name for name, module in model.named_modules() if name and any(module.children())}

    def note(name: str, received: ModelInputs, output: Any) -> None:
        calls[name] += 1
        first = received.args[0] if received.args else None
        if isinstance(first, Tensor) and isinstance(output, Tensor):
            if (first.shape, first.dtype) == (output.shape, output.dtype):
                shapes[name] = tuple(output.shape)

    watch(model, inputs, note)
    return {name: shapes[name] for name in shapes if name in parents and calls[name] == 1}


def _nodes_by_module(nodes: Iterable[Node], names: Iterable[str]) -> dict[str, list[Node]]:
    """The operations of each module, those of its children included."""
    inside: dict[str, list[Node]] = {name: [] for name in names}
    for node in nodes:
        for path, _ in node.meta.get("nn_module_stack", {}).values():
            if path in inside:
                inside[path].append(node)
    return inside


def _adds_to_its_input(nodes: list[Node], constants: Iterable[str], shape: tuple[int, ...]) -> bool:
    """Whether the module with these operations returns its input plus something."""
    own = set(nodes)
    ends = [node for node in nodes if any(user not in own for user in node.users)]
    if len(ends) != 1:
        return False
    frontier, seen, summed = [ends[0]], set(), False
    while frontier:
        node = frontier.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in own:
            if node.name not in constants and _shape(node) == shape:
                return summed
            continue
        operation = _operation(node)
        if operation in SUMS:
            summed = True
            frontier.extend(arg for arg in node.args if isinstance(arg, Node))
        elif operation in PASSING:
            frontier.extend(arg for arg in node.args[:1] if isinstance(arg, Node))
    return False


def _operation(node: Node) -> str:
    """`add` for `aten.add.Tensor`."""
    packet = getattr(node.target, "overloadpacket", None)
    return getattr(packet, "__name__", "")


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _names_within(model: nn.Module, name: str) -> tuple[str, ...]:
    names = [inner for inner, _ in model.named_modules(remove_duplicate=False)]
    return tuple(inner for inner in names if inner == name or inner.startswith(f"{name}."))


def _runs_without(model: nn.Module, inputs: ModelInputs, name: str, outputs: list[Tensor]) -> bool:
    """Whether the model, without the module, still gives finite outputs of the same shapes."""
    with undone(model):
        replace(model, name, Skip())
        try:
            others = output_tensors(inputs.call(model))
        except FORWARD_FAILURES:
            return False
    same = [out.shape for out in others] == [out.shape for out in outputs]
    return same and all(bool(out.isfinite().all()) for out in others)
