"""One exported graph of a module in the form of a program, for one batch size and one mode."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from compressor.errors import CheckpointError, ModelError, first_line
from compressor.interfaces.inputs import ModelInputs
from compressor.structure.programs.calls import (
    Calls,
    Segment,
    TensorNumber,
    owner_of,
    pass_through_marked,
    segments,
    stubbed,
)
from compressor.structure.programs.program import form_of, operation
from compressor.structure.programs.programmed import base_class
from compressor.structure.trace import FORWARD_FAILURES

Step = tuple[Any, ...]  # of a program, without the numbers of the dead


@dataclass(frozen=True)
class Encoded:
    """What a program is made of, for one graph.

    Attributes:
        exported: the graph, as `torch.export` leaves it: in-place operations stay.
        form: of (args, kwargs).
        leaves: of the inputs, with the sizes of the tensors.
        steps: of the program.
        owners: of each step, whose mode its flags follow.
        outputs: form and leaves.
        constants: tensors that the steps read and that are neither parameters nor buffers, by the
            names of buffers for them, and the names that `torch.export` has for them.
        step_of: the number of the step of each node, by the node's name.
        inputs: the number of the leaf that each placeholder of an input is, by its name.
        collapsed: the keys of the calls that are steps.
        opaque: names of the children whose every call is a step.
    """

    exported: ExportedProgram
    form: str
    leaves: tuple[Any, ...]
    steps: tuple[Step, ...]
    owners: tuple[str, ...]
    outputs: tuple[str, tuple[Any, ...]]
    constants: Mapping[str, tuple[str, Tensor]]
    step_of: Mapping[str, int]
    inputs: Mapping[str, int]
    collapsed: frozenset[str]
    opaque: frozenset[str]


def refuse(reason: str, module: nn.Module) -> ModelError:
    """The error for a module that cannot be a program."""
    return ModelError(
        f"The forward of a {base_class(module).__name__} cannot be written as a program, because "
        f"{reason}. Widths that its code fixes cannot be pruned."
    )


def export(
    module: nn.Module, inputs: ModelInputs, calls: Calls, opaque: Collection[str] = ()
) -> ExportedProgram:
    """The graph of `module` in its mode; every call of a child leaves a node.

    Args:
        module: not changed.
        inputs: of one call.
        calls: of `watch_calls`.
        opaque: children whose insides need not be in the graph.

    Raises:
        ModelError: if it cannot be exported.
    """
    # with gradients, so that a block under `torch.no_grad()` shows as one
    with (
        pass_through_marked(module, calls),
        stubbed(module, opaque, calls),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        # of recurrent layers, whose weights are listed twice
        warnings.filterwarnings("ignore", ".*were assigned during export", UserWarning)
        try:
            return torch.export.export(module, inputs.args, dict(inputs.kwargs), strict=False)
        except FORWARD_FAILURES as error:
            mode = "training" if module.training else "eval"
            reason = f"torch.export cannot trace it in {mode} mode: {first_line(error)[:-1]}"
            raise refuse(reason, module) from error


def encode(
    module: nn.Module,
    exported: ExportedProgram,
    inputs: ModelInputs,
    calls: Calls,
    collapsed: frozenset[str] | None = None,
) -> Encoded:
    """`exported` as steps.

    Args:
        module: the exported one.
        exported: of `export`.
        inputs: that it was exported with.
        calls: of `watch_calls`, for inputs of these shapes.
        collapsed: keys of the calls to keep, as found for another graph of the module.

    Raises:
        ModelError: if there is something in it that a program does not hold.
    """
    return _Encoder(module, exported, inputs).encode(calls, collapsed)


class _Encoder:
    def __init__(self, module: nn.Module, exported: ExportedProgram, inputs: ModelInputs) -> None:
        self.module = module
        self.exported = exported
        self.arguments = (inputs.args, dict(inputs.kwargs))
        self.references: dict[fx.Node, tuple[Any, ...]] = {}
        self.parameters: dict[fx.Node, str] = {}
        self.constants: dict[str, tuple[str, Tensor]] = {}
        self.targets: dict[str, str] = {}
        self.inputs: dict[str, int] = {}
        self.steps: list[Step] = []
        self.owners: list[str] = []
        self.step_of: dict[str, int] = {}
        self.is_pure = False

    def encode(self, calls: Calls, collapsed: frozenset[str] | None) -> Encoded:
        leaves, spec = pytree.tree_flatten(self.arguments)
        if spec != self.exported.call_spec.in_spec:
            raise refuse("torch.export orders its arguments in another way", self.module)
        self.read_placeholders()
        nodes = [
            node
            for node in self.exported.graph.nodes
            if node.op not in ("placeholder", "output") and not _is_assertion(node)
        ]
        found = segments(self.module, nodes, self.parameters, calls, collapsed)
        own = [segment.nodes[0] for segment in found if segment.call is None]
        writing = any(call.writes for several in calls.values() for call in several)
        self.is_pure = not writing and not any(map(self.writes, own))
        for segment in found:
            if segment.call is not None:
                self.add_call(segment)
            elif segment.nodes[0].op == "call_function":
                self.add_operation(segment.nodes[0])
        return Encoded(
            self.exported,
            self.form(spec),
            tuple(self.input_leaf(leaf) for leaf in leaves),
            tuple(self.steps),
            tuple(self.owners),
            self.outputs(),
            self.constants,
            self.step_of,
            self.inputs,
            frozenset(segment.key for segment in found if segment.call is not None),
            self.opaque(found, calls),
        )

    def opaque(self, found: Sequence[Segment], calls: Calls) -> frozenset[str]:
        whole: dict[int, list[str]] = {}
        for segment in found:
            if segment.call is not None:
                child = self.module.get_submodule(segment.name)
                whole.setdefault(id(child), []).append(segment.name)
        return frozenset(
            names[0] for child, names in whole.items() if len(names) == len(calls[child])
        )

    def writes(self, node: fx.Node) -> bool:
        """Whether it writes into something that is no parameter or buffer."""
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            return False
        return node.args[0] not in self.parameters

    def read_placeholders(self) -> None:
        placeholders = [node for node in self.exported.graph.nodes if node.op == "placeholder"]
        specs = self.exported.graph_signature.input_specs
        for node, spec in zip(placeholders, specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                self.references[node] = ("input", len(self.inputs))
                self.inputs[node.name] = len(self.inputs)
                continue
            assert spec.target is not None
            name = spec.target
            if spec.kind is InputKind.CONSTANT_TENSOR:
                name = f"program_{spec.target.replace('.', '_')}"
                self.targets[name] = spec.target
            elif spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
                continue  # refused where it is read
            self.parameters[node] = name
            self.references[node] = ("tensor", name)

    def input_leaf(self, leaf: Any) -> tuple[Any, ...]:
        if isinstance(leaf, Tensor):
            return ("tensor", *leaf.shape)
        if leaf is None or isinstance(leaf, (bool, int, float, str)):
            return ("constant", leaf)
        raise refuse(f"one of its arguments is a {type(leaf).__name__}", self.module)

    def outputs(self) -> tuple[str, tuple[Any, ...]]:
        spec = self.exported.call_spec.out_spec
        assert spec is not None
        (output,) = (node for node in self.exported.graph.nodes if node.op == "output")
        return self.form(spec), tuple(self.value(leaf) for leaf in output.args[0])

    def form(self, spec: pytree.TreeSpec) -> str:
        try:
            return form_of(spec)
        except (NotImplementedError, TypeError, ValueError) as error:
            reason = f"a file cannot hold the form {spec} of its arguments or results"
            raise refuse(reason, self.module) from error

    def add(self, step: Step, owner: str, nodes: Sequence[fx.Node], result: fx.Node | None) -> None:
        for node in nodes:
            self.step_of[node.name] = len(self.steps)
        if result is not None:
            self.references[result] = ("value", len(self.steps))
        self.steps.append(step)
        self.owners.append(owner)

    def add_call(self, segment: Segment) -> None:
        assert segment.call is not None
        leaves = [
            self.value(segment.arguments[leaf.number] if isinstance(leaf, TensorNumber) else leaf)
            for leaf in segment.call.leaves
        ]
        form = self.form(segment.call.form)
        step = ("call", segment.name, form, tuple(leaves), segment.leaf)
        self.add(step, segment.name, segment.nodes, segment.result)

    def add_operation(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            (_, number), index = self.value(node.args[0]), node.args[1]
            self.add(("item", number, index), "", [node], node)
            return
        name = str(node.target)
        if self.is_pure and name == "aten.contiguous.default":
            assert isinstance(node.args[0], fx.Node)
            self.references[node] = self.reference(node.args[0])
            return
        name = _BY_VALUE.get(name, name)
        if self.is_pure:
            name = _ANY_LAYOUT.get(name, name)
        try:
            operation(name)
        except CheckpointError as error:
            raise refuse(f"it runs {name!r}", self.module) from error
        args = tuple(self.value(arg) for arg in node.args)
        values = tuple(self.value(arg) for arg in node.kwargs.values())
        step = ("op", name, args, tuple(node.kwargs), values)
        self.add(step, owner_of(node), [node], node)

    def value(self, value: Any) -> Any:
        """As a program has it."""
        if isinstance(value, fx.Node):
            return self.reference(value)
        if isinstance(value, (list, tuple)):
            return ("list", *(self.value(item) for item in value))
        if isinstance(value, float) and not isfinite(value):
            return ("float", str(value))
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, str):
            return ("text", value)
        if isinstance(value, torch.dtype):
            return ("dtype", "inputs" if value is torch.float64 else str(value)[6:])
        if isinstance(value, torch.device):
            return ("device",)
        for kind, tag in ((torch.memory_format, "memory_format"), (torch.layout, "layout")):
            if isinstance(value, kind):
                return (tag, str(value)[6:])
        raise refuse(f"a {type(value).__name__} is an argument in it", self.module)

    def reference(self, node: fx.Node) -> tuple[Any, ...]:
        if node not in self.references:
            raise refuse(f"it uses {node.name!r}, of a block that is not traced", self.module)
        kind, name = self.references[node]
        if kind == "tensor" and name in self.targets:
            target = self.targets[name]
            self.constants[name] = (target, self.exported.constants[target])
        return (kind, name)


# Outside of a trace, these would make tensors that no longer know where they come from.
_BY_VALUE = {
    "aten.lift_fresh_copy.default": "aten.clone.default",
    "aten.detach_.default": "aten.detach.default",
}


# Layouts depend on the device, the data type and the mode: where nothing writes in place, they are
# left to `reshape`, which makes `contiguous` needless.
_ANY_LAYOUT = {
    "aten.view.default": "aten.reshape.default",
    "aten._unsafe_view.default": "aten.reshape.default",
}


def _is_assertion(node: fx.Node) -> bool:
    return str(node.target).startswith("aten._assert")
