"""Integers of the user's own modules that count channels: guessed by value, proven by the check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

from torch import nn

from compressor.structure.groups import ChannelGroup, Count, Member
from compressor.structure.layers import COUNTED

Amounts: TypeAlias = dict[int, tuple[int, ...]]


def with_counts(model: nn.Module, groups: Sequence[ChannelGroup]) -> Iterator[list[ChannelGroup]]:
    """Guesses, ever wider, at the integers of the user's modules that count channels.

    An attribute that equals the number of channels (heads) or of entries counts them, perhaps: the
    check decides.
    """
    for counts_entries, reaches_up in ((False, False), (True, False), (True, True)):
        yield [
            guess
            for group in groups
            if (guess := _counted(model, group, counts_entries, reaches_up)).counts
        ]


def _counted(
    model: nn.Module, group: ChannelGroup, counts_entries: bool, reaches_up: bool
) -> ChannelGroup:
    is_compound = any(len(entries) > 1 for member in group.members for entries in member.index)
    ones: Amounts = {}
    if is_compound or not counts_entries:
        ones = {group.size: (1,) * group.size}
    around = {**(_entries(group.members) if counts_entries else {}), **ones}
    counts = []
    for name in _holders(model, group, reaches_up):
        own = [member for member in group.members if member.module == name]
        # A layer counts what it makes of the channels, what is around it may count anything.
        made = _entries([member for member in own if member.side == "out"])
        amounts = {**made, **ones} if own else around
        counts += [
            Count(name, key, amounts[value])
            for key, value in vars(model.get_submodule(name)).items()
            if isinstance(value, int) and not isinstance(value, bool) and value in amounts
        ]
    return replace(group, counts=tuple(counts))


def _entries(members: Sequence[Member]) -> Amounts:
    """Number of entries of a dimension that is all the group's -> how many each channel has."""
    amounts: Amounts = {}
    for member in members:
        own = tuple(len(entries) for entries in member.index)
        if sum(own) == member.size:
            amounts[member.size] = own
    return amounts


def _holders(model: nn.Module, group: ChannelGroup, reaches_up: bool) -> list[str]:
    """The layers of a group that are not torch's, their parents, or all modules above them."""
    names: dict[str, None] = {}
    for module in group.modules:
        if not isinstance(model.get_submodule(module), COUNTED):
            names[module] = None
        parts = module.split(".")[:-1]
        names[".".join(parts)] = None
        if reaches_up:
            names |= {".".join(parts[:k]): None for k in range(len(parts))}
    return list(names)
