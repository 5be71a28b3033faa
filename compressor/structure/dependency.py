"""Candidate channel groups from torch-pruning's dependency graph (Fang et al. 2023, 2301.12900).

torch-pruning only finds them: it never changes a model here, and nothing that it says is believed
before `channels.verify_group` has checked it. Read with torch-pruning 1.6.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch_pruning as tp
from torch import nn
from torch.nn.modules.conv import _ConvNd

from compressor.errors import SurgeryError
from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.structure.groups import ChannelGroup, Member, Side
from compressor.structure.layers import layer_axis, layer_members

SideKey = tuple[str, Side]


@dataclass(frozen=True)
class Candidate:
    """A group that torch-pruning found.

    Attributes:
        group: None if it cannot be written as one.
        reason: why not, in a sentence.
    """

    name: str
    group: ChannelGroup | None
    reason: str = ""


def candidate_groups(model: nn.Module, inputs: ModelInputs) -> list[Candidate]:
    """All groups of output channels of the convolutions and linear layers of `model`.

    Args:
        model: in eval mode; all its parameters must require gradients, since the graph is read off
            autograd.
        inputs: for one forward pass.
    """
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    refused, drafts = [], []
    for found in _all_groups(model, inputs):
        try:
            drafts.append(_draft(found, names))
        except SurgeryError as error:
            refused.append(Candidate(names[found[0].dep.target.module], None, str(error)))
    merged = _merge_blocks(drafts, {name: module for module, name in names.items()})
    return refused + [Candidate(group.name, group) for group in merged]


@dataclass
class _Draft:
    """A group while it is put together: for each side of a layer, entry -> channel of the group."""

    size: int
    entries: dict[SideKey, dict[int, int]]


def _all_groups(model: nn.Module, inputs: ModelInputs) -> Iterator[Any]:
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # about unknown ops, which the check will catch
        graph = tp.DependencyGraph().build_dependency(
            model,
            # Its own call tries `model(*inputs)` under a bare `except`, then `model(inputs)`.
            example_inputs=inputs,
            forward_fn=lambda module, given: given.call(module),
            output_transform=lambda outputs: [t for t in output_tensors(outputs) if t.grad_fn],
            # Fresh containers: its default arguments are mutable and remember other models.
            unwrapped_parameters=[],
            customized_pruners={},
            ignored_layers=[],
            ignored_params=[],
            verbose=False,
        )
        yield from graph.get_all_groups(ignored_layers=[])


def _draft(found: Any, names: dict[nn.Module, str]) -> _Draft:
    """One group of torch-pruning in our terms.

    Raises:
        SurgeryError: if it runs through something that cannot be sliced.
    """
    draft = _Draft(len(found[0].root_idxs), defaultdict(dict))
    for item in found:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            raise SurgeryError(
                f"The channels meet a bare parameter of shape {tuple(module.shape)}. "
                "Put it into a layer of its own to have them pruned."
            )
        if module not in names or not _has_channels(module):
            continue  # an operation, or a module that works on each entry alone
        for side in _sides(module, item.dep.handler):
            key = (names[module], side)
            layer_axis(module, side)  # raises if it cannot be sliced
            draft.entries[key].update(zip(item.idxs, item.root_idxs, strict=True))
    return draft


def _has_channels(module: nn.Module) -> bool:
    """Whether a module that torch-pruning lists has something to slice."""
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    return any(True for _ in module.parameters(recurse=False)) or isinstance(
        module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.MultiheadAttention)
    )


def _sides(module: nn.Module, handler: Any) -> tuple[Side, ...]:
    """Which sides of `module` a pruning function of torch-pruning stands for."""
    if isinstance(module, _ConvNd) and module.groups == module.out_channels > 1:
        return ("out", "in")  # depthwise: one function for both
    if isinstance(module, (_ConvNd, nn.Linear)):
        return ("in",) if handler.__name__ == "prune_in_channels" else ("out",)
    return ("out",)


def _merge_blocks(drafts: list[_Draft], modules: dict[str, nn.Module]) -> list[ChannelGroup]:
    """Groups so coarse that a layer which works in blocks of channels loses whole blocks.

    A grouped convolution reads and writes block by block: what is before and behind it goes
    together, a whole block at a time. A group norm likewise.
    """
    joined: _Sets[tuple[int, int]] = _Sets()  # (draft, channel)
    together: _Sets[int] = _Sets()  # drafts that share such a layer
    block_at: dict[tuple[str, int], tuple[int, int]] = {}
    for number, draft in enumerate(drafts):
        for (name, side), entries in draft.entries.items():
            axis = layer_axis(modules[name], side)
            if axis.blocks == 1:
                continue
            for entry, channel in entries.items():
                there = block_at.setdefault((name, axis.block_of(entry)), (number, channel))
                joined.join(there, (number, channel))
                together.join(there[0], number)
    groups: dict[int, dict[tuple[int, int], list[tuple[int, int]]]] = {}
    for number, draft in enumerate(drafts):
        classes = groups.setdefault(together.find(number), defaultdict(list))
        for channel in range(draft.size):
            classes[joined.find((number, channel))].append((number, channel))
    return _named(
        [_sides_of(list(classes.values()), drafts) for classes in groups.values()], modules
    )


def _sides_of(
    classes: list[list[tuple[int, int]]], drafts: list[_Draft]
) -> dict[SideKey, list[list[int]]]:
    """The entries of each side of each layer, for a group of channels of (draft, channel)."""
    position = {item: number for number, items in enumerate(classes) for item in items}
    index: dict[SideKey, list[list[int]]] = {}
    for number in sorted({number for number, _ in position}):
        for key, entries in drafts[number].entries.items():
            owned = index.setdefault(key, [[] for _ in classes])
            for entry, channel in entries.items():
                owned[position[number, channel]].append(entry)
    return {key: [sorted(set(own)) for own in owned] for key, owned in index.items()}


def _named(
    found: list[dict[SideKey, list[list[int]]]], modules: dict[str, nn.Module]
) -> list[ChannelGroup]:
    """Groups named after the first layer that makes their channels, in the order of the model."""
    order = {name: number for number, name in enumerate(modules)}
    groups: list[ChannelGroup] = []
    taken: set[str] = set()
    for sides in found:
        ordered = sorted(sides, key=lambda key: (order[key[0]], key[1] == "in"))
        members: tuple[Member, ...] = sum(
            (layer_members(n, modules[n], side, sides[n, side]) for n, side in ordered), ()
        )
        makers = [m for m in members if m.side == "out" and _is_root(modules[m.module])]
        name = makers[0].module
        if name in taken:  # a layer whose output is split feeds several groups
            name = f"{name}[{makers[0].index[0][0]}]"
        taken.add(name)
        groups.append(ChannelGroup(name, len(members[0].index), members))
    return sorted(groups, key=lambda group: order.get(group.name, len(order)))


def _is_root(module: nn.Module) -> bool:
    return isinstance(module, (_ConvNd, nn.Linear))


T = TypeVar("T")


class _Sets(Generic[T]):
    """Disjoint sets; each is named by its smallest item."""

    def __init__(self) -> None:
        self._parent: dict[T, T] = {}

    def find(self, item: T) -> T:
        while (above := self._parent.setdefault(item, item)) != item:
            self._parent[item] = item = self._parent[above]
        return item

    def join(self, a: T, b: T) -> None:
        low, high = sorted((self.find(a), self.find(b)))  # type: ignore[type-var]
        self._parent[high] = low
