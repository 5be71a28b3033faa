"""Where the graph of a model adds a module's output, or a part inside it, to its input."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from compressor.interfaces.inputs import ModelInputs

SUMS = frozenset({"add", "add_"})
# Pass on what they get, in the same shape at last; what stands after a sum is part of the block.
PASSING = frozenset(
    "alias clone contiguous dropout dropout_ elu elu_ feature_dropout gelu gelu_ hardswish "
    "hardswish_ hardtanh hardtanh_ leaky_relu leaky_relu_ mish mish_ relu relu_ relu6 relu6_ "
    "silu silu_ to _to_copy view reshape _unsafe_view flatten unflatten "
    "layer_norm rms_norm batch_norm group_norm".split()
)
SCALING = frozenset({"mul", "mul_", "div", "div_"})  # a branch, by a layer scale
MOVING = frozenset({"permute", "transpose", "roll", "slice"})  # a branch of zeros stays zeros
# Give other channels than they get, which may be pruned apart from those.
MIXING = frozenset(
    "addmm baddbmm bmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
    "convolution embedding linear matmul mm".split()
)
CHECKS = "_assert"  # operations of the exporter that nothing follows from

Pair = tuple[Node, Node]
"""What comes in, and what it has become."""


class ResidualGraph:
    """The operations of a model, by the modules that they belong to.

    Args:
        program: of the model, with an inference graph of ATen operations.
        shapes: of the outputs of the modules in question, by their names.
    """

    def __init__(self, program: ExportedProgram, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.constants = {
            *program.graph_signature.inputs_to_parameters,
            *program.graph_signature.inputs_to_buffers,
            *program.graph_signature.inputs_to_lifted_tensor_constants,
        }
        self.inside = _nodes_by_module(program.graph.nodes, shapes)

    def residual_of(self, name: str) -> Pair | None:
        """Input and output of the module, if it returns its input plus something."""
        nodes, shape = self.inside[name], self.shapes[name]
        own = set(nodes)
        end = _only_end(nodes, own)
        if end is None:
            return None
        frontier, seen, summed = [end], set(), False
        while frontier:
            node = frontier.pop()
            if node in seen:
                continue
            seen.add(node)
            if node not in own:
                if node.name not in self.constants and _shape(node) == shape:
                    return (node, end) if summed else None
                continue
            operation = _operation(node)
            if operation in SUMS:
                summed = True
                frontier.extend(arg for arg in node.args if isinstance(arg, Node))
            elif operation in PASSING:
                frontier.extend(arg for arg in node.args[:1] if isinstance(arg, Node))
        return None

    def branch_of(self, name: str) -> Pair | None:
        """The stream before and after the sum, if the module is a whole branch beside it.

        A part of a branch, behind a layer that is not inside it, is none: it is as wide as the
        stream by chance, and no longer when one of the two is pruned.
        """
        pair = self.end_of_branch(name)
        if pair is None:
            return None
        beside = _ancestors(self._inputs(name), MIXING)
        return pair if _passed_from(pair[0]) & beside else None

    def end_of_branch(self, name: str) -> Pair | None:
        """The stream before and after the sum, if the output is added to what the input is of."""
        nodes = self.inside[name]
        own = set(nodes)
        node = _only_end(nodes, own)
        if node is None:
            return None
        while True:
            users = _users(node)
            if len(users) != 1 or _shape(users[0]) == ():
                return None
            user = users[0]
            if _operation(user) in SUMS:
                break
            is_scale = _operation(user) in SCALING and all(
                arg is node or not isinstance(arg, Node) or arg.name in self.constants
                for arg in user.args
            )
            is_passed = _operation(user) in PASSING | MOVING and user.args[0] is node
            if not is_scale and not is_passed:
                return None
            node = user
        others = [arg for arg in user.args if isinstance(arg, Node) and arg is not node]
        if len(others) != 1 or _shape(others[0]) != _shape(user):
            return None
        stream = others[0]
        comes_from_it = bool(_passed_from(stream) & _ancestors(self._inputs(name)))
        return (stream, user) if comes_from_it and stream not in own else None

    def _inputs(self, name: str) -> Iterator[Node]:
        """What the module computes with that it did not compute."""
        own = set(self.inside[name])
        return (arg for node in self.inside[name] for arg in node.all_input_nodes if arg not in own)


def _nodes_by_module(nodes: Iterable[Node], names: Iterable[str]) -> dict[str, list[Node]]:
    """The operations of each module, those of its children included."""
    inside: dict[str, list[Node]] = {name: [] for name in names}
    for node in nodes:
        if _operation(node).startswith(CHECKS):
            continue
        for path, _ in node.meta.get("nn_module_stack", {}).values():
            if path in inside:
                inside[path].append(node)
    return inside


def _only_end(nodes: list[Node], own: set[Node]) -> Node | None:
    """The one operation whose value is used outside."""
    ends = [node for node in nodes if any(user not in own for user in _users(node))]
    return ends[0] if len(ends) == 1 else None


def _users(node: Node) -> list[Node]:
    return [user for user in node.users if not _operation(user).startswith(CHECKS)]


def _ancestors(nodes: Iterable[Node], end_at: Collection[str] = ()) -> set[Node]:
    """The nodes, and all that they are computed from; not beyond operations of `end_at`."""
    found: set[Node] = set()
    frontier = list(nodes)
    while frontier:
        node = frontier.pop()
        if node not in found:
            found.add(node)
            if _operation(node) not in end_at:
                frontier.extend(node.all_input_nodes)
    return found


def _passed_from(node: Node) -> set[Node]:
    """The node, and what it is but another form of."""
    found = {node}
    while _operation(node) in PASSING and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
        found.add(node)
    return found


def _operation(node: Node) -> str:
    """`add` for `aten.add.Tensor`."""
    packet = getattr(node.target, "overloadpacket", None)
    return getattr(packet, "__name__", "")


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def node_values(
    program: ExportedProgram, inputs: ModelInputs, pairs: Iterable[Pair]
) -> dict[str, Tensor]:
    """What the nodes are in a run of the graph, by name."""
    capture = _Capture(program, {node.name for pair in pairs for node in pair})
    # Not by keywords: the graph takes all arguments flat.
    leaves = pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))
    with torch.no_grad():
        capture.run(*leaves, enable_io_processing=False)
    return capture.values


class _Capture(Interpreter):
    """Runs a graph and keeps the values of some of its nodes."""

    def __init__(self, program: ExportedProgram, names: Collection[str]) -> None:
        super().__init__(program.module(check_guards=False))
        self.names = names
        self.values: dict[str, Tensor] = {}
        # The module may call its inputs otherwise than the program does.
        arguments = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        self.known_as = dict(zip(arguments, program.graph_signature.user_inputs, strict=True))

    def run_node(self, n: Node) -> Any:
        """The node's value, of which a copy is kept: an operation in place may follow."""
        value = super().run_node(n)
        name = self.known_as.get(n.name, n.name)
        if name in self.names:
            self.values[name] = value.detach().clone()
        return value
