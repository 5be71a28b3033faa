"""Modules whose code fixes widths: which of them need a program, and what in it counts channels."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from compressor.errors import ModelError, SurgeryError
from compressor.interfaces.inputs import ModelInputs
from compressor.structure.groups import ChannelGroup
from compressor.structure.labels.collect import Follower
from compressor.structure.labels.flow import Flow
from compressor.structure.labels.integers import PADS, Position, counted, sized
from compressor.structure.labels.operations import FACTORIES, operation
from compressor.structure.labels.value import Value
from compressor.structure.programs.program import STEPS
from compressor.structure.programs.programmed import ATTRIBUTE
from compressor.structure.programs.trace import Traced, trace_program
from compressor.structure.trace import watch

# Operations whose integers Python code may have fixed.
FIXING = (
    FACTORIES
    | PADS
    | frozenset(
        "aten.view aten._unsafe_view aten.reshape aten.expand aten.split aten.split_with_sizes "
        "aten.slice aten.slice_scatter aten.select".split()
    )
)
Calls = Mapping[str, Sequence[ModelInputs]]


def padding_modules(flow: Flow) -> list[str]:
    """The modules whose code pads channels by fixed numbers."""
    names = []
    for node in flow.values:
        if node.op == "call_function" and operation(node) in PADS:
            source, widths = _arguments_of(node)
            value = flow.values[source]
            padded = [len(value.shape) - 1 - k // 2 for k, width in enumerate(widths) if width]
            if any(value.on(dim) for dim in padded):
                names.append(flow.path(node)[-1])
    return list(dict.fromkeys(names))


def fixing_modules(flow: Flow, groups: Iterable[ChannelGroup]) -> list[str]:
    """The modules whose code may fix the number of channels of these groups."""
    labels = {
        int(flow.sets.find(vector)[entry])
        for group in groups
        for member in group.members
        if (vector := flow.tensors[member.tensor][member.dim]) is not None
        for channel in member.index
        for entry in channel[:1]
    }
    names = []
    for node in flow.values:
        if node.op != "call_function" or operation(node) not in FIXING:
            continue
        values = [
            value
            for value in pytree.tree_leaves(
                [flow.values[node], [flow.values[n] for n in node.all_input_nodes]]
            )
            if isinstance(value, Value)
        ]
        roots = {
            int(root) for v in values for f in v.factors for root in flow.sets.find(f).flatten()
        }
        if roots & labels:
            names.append(flow.path(node)[-1])
    return list(dict.fromkeys(names))


def trace_modules(
    model: nn.Module, names: Collection[str], inputs: ModelInputs
) -> tuple[dict[str, Traced], dict[str, str]]:
    """A program for each module that can have one, and why the others have none.

    Args:
        model: in which they are.
        names: of the modules.
        inputs: for one call.
    """
    if not names:
        return {}, {}
    small, large = (_calls(model, names, inputs.with_batch(size)) for size in (2, 3))
    traced: dict[str, Traced] = {}
    refused: dict[str, str] = {}
    for name in names:
        module = model.get_submodule(name)
        try:
            if name not in small or name not in large:
                raise ModelError(f"{name!r} is not called as a module.")
            traced[name] = trace_program(module, small[name], large[name])
        except (ModelError, SurgeryError) as error:
            refused[name] = str(error)
    return traced, refused


def aligned_nodes(flow: Flow, name: str, traced: Traced) -> dict[fx.Node, fx.Node]:
    """Each node of a module's own graph -> the node of the whole model's graph that it is.

    Empty if the module does not do the same as a part of the model: then nothing can be said.
    """
    mine = [node for node in traced.graph.graph.nodes if node.op == "call_function"]
    whole = [n for n in flow.values if n.op == "call_function" and name in flow.path(n)]
    whole = whole[: len(mine)]  # of a module that is called twice, the first call
    if [str(node.target) for node in mine] != [str(node.target) for node in whole]:
        return {}
    pairs: dict[fx.Node, fx.Node] = dict(zip(mine, whole, strict=True))
    for inner, outer in list(pairs.items()):
        for a, b in zip(_arguments(inner), _arguments(outer), strict=True):
            if isinstance(a, fx.Node) and isinstance(b, fx.Node):
                pairs.setdefault(a, b)
    return pairs


def find_followers(
    flow: Flow, name: str, traced: Traced, nodes: Mapping[fx.Node, fx.Node]
) -> list[Follower]:
    """The integers of a module's program that count channels."""
    followers = []
    for (node, position), slot in traced.slots.items():
        if node not in nodes:
            continue
        find = sized if node.op == "placeholder" else counted  # any node may make an input
        found = find(flow, nodes[node], position)
        if found is not None:
            amount = found.sign / slot.scale
            followers.append(Follower(name, ATTRIBUTE, slot.path, found.labels, amount))
    return followers


def freeze_fixed(flow: Flow, name: str, traced: Traced, nodes: Mapping[fx.Node, fx.Node]) -> None:
    """Freeze the channels that an integer counts which the program has no place for.

    Of a write into a slice, the graph has an operation that the code does not have.
    """
    why = f"the program of {name!r} would not follow them"
    for inner, outer in nodes.items():
        step = traced.step_of.get(inner)
        if step is None or traced.program[STEPS][step][0] != "op":
            continue
        for position in _integers(inner):
            if (inner, position) in traced.slots or (inner, position) in traced.following:
                continue
            found = counted(flow, outer, position)
            if found is not None and len(found.labels):
                flow.freeze(found.labels, why)


def _integers(node: fx.Node) -> Iterator[Position]:
    for place, argument in enumerate((*node.args, *node.kwargs.values())):
        if isinstance(argument, int) and not isinstance(argument, bool):
            yield (place,)
        elif isinstance(argument, (list, tuple)):
            yield from ((place, k) for k, item in enumerate(argument) if isinstance(item, int))


def _arguments_of(node: fx.Node) -> tuple[Any, Any]:
    source, widths, *_ = node.args
    return source, widths


def _arguments(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves([list(node.args), dict(node.kwargs)])


def _calls(model: nn.Module, names: Collection[str], inputs: ModelInputs) -> dict[str, ModelInputs]:
    """What each of the modules is given in its first call."""
    calls: dict[str, ModelInputs] = {}

    def note(name: str, received: ModelInputs, _: Any) -> None:
        if name in names:
            calls.setdefault(name, received)

    watch(model, inputs, note)
    return calls
