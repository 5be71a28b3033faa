"""What may be pruned together, as values: channel groups and their members."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Side = Literal["out", "in"]


@dataclass(frozen=True)
class Member:
    """One side of one layer that belongs to a channel group.

    Attributes:
        module: name of the layer.
        side: "out" for what the layer gives, and for norms; "in" for what it consumes.
        index: for each channel of the group, the entries of that side which belong to it. A linear
            layer after a flattened 4×4 map has 16 entries a channel.
        size: entries of that side, in the group or not, when the group was found.
    """

    module: str
    side: Side
    index: tuple[tuple[int, ...], ...]
    size: int


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that live in several layers at once and can only be removed from all of them.

    Attributes:
        name: the first layer that gives the channels.
        size: number of channels.
        members: every side of every layer that the channels pass through.
    """

    name: str
    size: int
    members: tuple[Member, ...]

    @property
    def producers(self) -> tuple[Member, ...]:
        """The members whose weights make the channels, and the norms on their way."""
        return tuple(member for member in self.members if member.side == "out")

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The members whose weights read the channels."""
        return tuple(member for member in self.members if member.side == "in")


@dataclass(frozen=True)
class ChannelMap:
    """All channel groups of a model.

    Attributes:
        groups: verified; safe to prune.
        quarantined: name and reason of what looked like a group and failed its check.
    """

    groups: tuple[ChannelGroup, ...]
    quarantined: tuple[tuple[str, str], ...] = ()
