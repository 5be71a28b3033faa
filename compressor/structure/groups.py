"""What may be pruned together, as values: channel groups, their tensors and their integers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Side = Literal["out", "in"]


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter or buffer that a channel group runs through.

    Attributes:
        tensor: its name; of a tied one, the first of its names.
        dim: of the tensor, from 0.
        side: "out" where the channels are made or scaled, "in" where they are read.
        index: for each channel of the group, the entries of that dimension which belong to it. A
            linear layer behind a flattened 4×4 map has 16 entries a channel.
        size: entries of that dimension, in the group or not, when the group was found.
    """

    tensor: str
    dim: int
    side: Side
    index: tuple[tuple[int, ...], ...]
    size: int

    @property
    def module(self) -> str:
        """Name of the module that holds the tensor."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True)
class Count:
    """An integer that counts channels, besides those that torch's own layers hold.

    Attributes:
        module: whose attribute it is.
        attribute: such as "num_heads".
        amounts: by how much it falls when a channel goes, for each channel of the group.
        path: where it is, if the attribute is a tuple that may hold tuples.
    """

    module: str
    attribute: str
    amounts: tuple[int, ...]
    path: tuple[int, ...] = ()


@dataclass(frozen=True)
class Preparation:
    """What a module needs before channels can be cut from it.

    Attributes:
        module: its name.
        program: for its `forward`, see `structure.programs`. Empty: the module is an attention of
            hard-wired width, and one of ours takes its place, see `structure.attention`.
    """

    module: str
    program: tuple[Any, ...] = ()


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that live in several tensors at once and can only be removed from all of them.

    A channel is what cannot be divided: an output of a convolution, a whole head of an attention, a
    whole group of a grouped convolution.

    Attributes:
        name: the first layer that makes the channels; "layer[3]" for the part from entry 3 on.
        size: number of channels.
        members: every dimension of every tensor that the channels run through.
        counts: integers that change with them.
        prepared: what is done to modules before anything is cut.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    counts: tuple[Count, ...] = ()
    prepared: tuple[Preparation, ...] = ()

    @property
    def producers(self) -> tuple[Member, ...]:
        """The members that make or scale the channels."""
        return tuple(member for member in self.members if member.side == "out")

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The members that read the channels."""
        return tuple(member for member in self.members if member.side == "in")

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that hold the members, each once, in the order of the members."""
        return tuple(dict.fromkeys(member.module for member in self.members))

    def pruned(self, kept: Iterable[int]) -> tuple[int, ...]:
        """The channels that are not among `kept`."""
        stays = set(kept)
        return tuple(channel for channel in range(self.size) if channel not in stays)


@dataclass(frozen=True)
class ChannelMap:
    """All channel groups of a model.

    Attributes:
        groups: verified; safe to prune.
        quarantined: name and reason of what looked like a group and failed its check.
        frozen: reason -> layers whose channels cannot be removed because of it, such as an
            operation without a rule.
    """

    groups: tuple[ChannelGroup, ...]
    quarantined: tuple[tuple[str, str], ...] = ()
    frozen: tuple[tuple[str, tuple[str, ...]], ...] = ()
