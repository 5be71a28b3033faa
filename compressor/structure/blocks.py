"""Blocks that can be left out: residual ones, and the branches inside that are added to a stream.

Found on the exported graph, where the sum is an operation whatever the block's code looks like, and
verified by running the model without each.

How little a block does: block influence, Men et al. 2024, ShortGPT (2403.03853).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.structure.residuals import Pair, ResidualGraph, node_values
from compressor.structure.surgery import replace, undone
from compressor.structure.trace import FORWARD_FAILURES, eval_mode, export_graph, watch

CLOSE = 1e-5  # of sums of a tensor, computed by other kernels in float32


class StandIn(nn.Module):
    """Stands for a removed block: gives its first argument back, or zeros like it.

    Args:
        is_zero: gives zeros, for a branch that is added to something.
        argument: name of the first argument, where the block is called with keywords only.
        outputs: 0: gives the tensor; else a tuple of so many, None after the first.
    """

    def __init__(self, *, is_zero: bool = False, argument: str = "", outputs: int = 0) -> None:
        super().__init__()
        self.is_zero = is_zero
        self.argument = argument
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument, or zeros, in the form of the block's output."""
        x = args[0] if args else kwargs[self.argument]
        x = torch.zeros_like(x) if self.is_zero else x
        return (x, *[None] * (self.outputs - 1)) if self.outputs else x


@dataclass(frozen=True)
class ResidualBlock:
    """A block that a `StandIn` can stand for.

    Attributes:
        name: of the module.
        shape: of its first input and its output.
        modules: names of the modules inside it, itself first.
        is_zero: a branch that is added to a stream; else a block that holds the sum.
        argument: as `StandIn` has it.
        outputs: as `StandIn` has it.
        influence: 1 - cosine between what goes in and what comes out, the mean over samples and
            positions; of a branch, between the stream before and after the sum. 0 does nothing.
    """

    name: str
    shape: tuple[int, ...]
    modules: tuple[str, ...]
    is_zero: bool = False
    argument: str = ""
    outputs: int = 0
    influence: float = 1.0

    def stand_in(self) -> StandIn:
        """What takes its place."""
        return StandIn(is_zero=self.is_zero, argument=self.argument, outputs=self.outputs)


def residual_blocks(model: nn.Module, inputs: ModelInputs) -> list[ResidualBlock]:
    """Blocks and branches of `model` that can be left out one by one, in its order.

    Of nested blocks the innermost are listed, and those around them that hold more layers; branches
    where a block has several, as attention and MLP of a transformer. The model is not changed.

    Raises:
        ModelError: if the model does not run on `inputs`, or cannot be traced.
    """
    calls = _kept_shapes(model, inputs)  # in the order in which calls end: inner first
    program = export_graph(model, inputs)
    graph = ResidualGraph(program, {name: call.shape for name, call in calls.items()})
    sums = {name: pair for name in calls if (pair := graph.residual_of(name)) is not None}
    branches = {name: pair for name in calls if (pair := graph.branch_of(name)) is not None}
    values = node_values(program, inputs, [*sums.values(), *branches.values()])
    sums = {n: p for n, p in sums.items() if calls[n].is_first(values[p[0].name])}
    blocks = _offered_blocks(model, sums)
    branches = _offered_branches(model, blocks, branches)
    pairs = {**branches, **{name: sums[name] for name in blocks}}
    found = []
    with eval_mode(model), torch.no_grad():
        outputs = output_tensors(inputs.call(model))
        for name, call in calls.items():
            if name in pairs:
                before, after = (values[node.name] for node in pairs[name])
                block = ResidualBlock(
                    name,
                    call.shape,
                    _names_within(model, name),
                    is_zero=name not in blocks,
                    argument=call.argument,
                    outputs=call.outputs,
                    influence=block_influence(before, after),
                )
                if _runs_without(model, inputs, block, outputs):
                    found.append(block)
    return found


@dataclass(frozen=True)
class _Call:
    """How a module is called that gives a tensor like its first argument.

    `sums` tell the first argument from others; None if there is no other tensor.
    """

    shape: tuple[int, ...]
    argument: str
    outputs: int
    sums: tuple[float, float] | None

    def is_first(self, value: Tensor) -> bool:
        """Whether `value` of the graph is the first argument, up to rounding."""
        if self.sums is None:
            return True
        (a, b), (c, d) = self.sums, _sums(value)
        return abs(a - c) + abs(b - d) <= CLOSE * (b + d)


def _kept_shapes(model: nn.Module, inputs: ModelInputs) -> dict[str, _Call]:
    """Modules with children that are called once and return a tensor like their first argument."""
    counts: Counter[str] = Counter()
    calls: dict[str, _Call] = {}
    parents = {name for name, module in model.named_modules() if name and any(module.children())}

    def note(name: str, received: ModelInputs, output: Any) -> None:
        counts[name] += 1
        argument, first = _first_argument(received)
        is_tuple = type(output) is tuple and output and all(o is None for o in output[1:])
        result = output[0] if is_tuple else output
        if isinstance(first, Tensor) and isinstance(result, Tensor):
            if (first.shape, first.dtype) == (result.shape, result.dtype):
                sums = _sums(first) if len(received.tensors()) > 1 else None
                outputs = len(output) if is_tuple else 0
                calls[name] = _Call(tuple(first.shape), argument, outputs, sums)

    watch(model, inputs, note)
    return {name: calls[name] for name in calls if name in parents and counts[name] == 1}


def _first_argument(received: ModelInputs) -> tuple[str, Any]:
    if received.args:
        return "", received.args[0]
    return next(iter(received.kwargs.items()), ("", None))


def _sums(tensor: Tensor) -> tuple[float, float]:
    return float(tensor.double().sum()), float(tensor.double().abs().sum())


def _offered_blocks(model: nn.Module, found: Collection[str]) -> list[str]:
    """Without those that only hold other blocks: a stage of several, a wrapper around one."""
    offered: list[str] = []
    for name in found:  # inner first
        inner = [other for other in offered if other.startswith(f"{name}.")]
        outermost = [o for o in inner if not any(o.startswith(f"{p}.") for p in inner)]
        layers = _layers_within(model, name)
        if len(outermost) < 2 and all(layers != _layers_within(model, o) for o in outermost):
            offered.append(name)
    return offered


def _offered_branches(
    model: nn.Module, blocks: Collection[str], found: Mapping[str, Pair]
) -> dict[str, Pair]:
    """The outermost of each sum; not the only one of a block, which does as much as the block."""
    outermost = {
        name: pair
        for name, pair in found.items()
        if not any(name.startswith(f"{o}.") and found[o][1] is pair[1] for o in found)
    }
    held = [_layers_within(model, block) for block in blocks]
    offered = {}
    for name, pair in outermost.items():
        around = max((b for b in blocks if name.startswith(f"{b}.")), key=len, default=None)
        beside = [o for o in outermost if around is None or o.startswith(f"{around}.")]
        is_only_one = around is not None and len(beside) == 1
        if not is_only_one and _layers_within(model, name) not in held:
            offered[name] = pair
    return offered


def _names_within(model: nn.Module, name: str) -> tuple[str, ...]:
    names = [inner for inner, _ in model.named_modules(remove_duplicate=False)]
    return tuple(inner for inner in names if inner == name or inner.startswith(f"{name}."))


def _layers_within(model: nn.Module, name: str) -> set[int]:
    """The modules inside that hold parameters themselves."""
    inside = model.get_submodule(name).modules()
    return {id(module) for module in inside if any(True for _ in module.parameters(recurse=False))}


def _runs_without(
    model: nn.Module, inputs: ModelInputs, block: ResidualBlock, outputs: list[Tensor]
) -> bool:
    """Whether the model, without the block, still gives finite outputs of the same shapes."""
    with undone(model):
        replace(model, block.name, block.stand_in())
        try:
            others = output_tensors(inputs.call(model))
        except FORWARD_FAILURES:
            return False
    same = [out.shape for out in others] == [out.shape for out in outputs]
    return same and all(bool(out.isfinite().all()) for out in others)


def block_influence(before: Tensor, after: Tensor) -> float:
    """1 - cosine, the mean over samples and positions; 0 where nothing changes, up to 2.

    Args:
        before: (N, C, H, W), or (…, C).
        after: of the same shape.

    >>> block_influence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
    1.0
    """
    dim = 1 if before.dim() == 4 else -1
    cosine = nn.functional.cosine_similarity(before.double(), after.double(), dim=dim)
    return float(1 - cosine.mean())
