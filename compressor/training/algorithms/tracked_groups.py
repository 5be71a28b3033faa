"""Channel groups of a model that is trained, and cut: which of their channels are still there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from compressor.errors import ConfigError, SurgeryError
from compressor.logs import get_logger
from compressor.structure.groups import ChannelGroup, Member
from compressor.structure.selection import cut_to, narrowed
from compressor.training.tasks.base import TaskModel

if TYPE_CHECKING:
    from compressor.structure.surgery import Edit
    from compressor.training.state import State

logger = get_logger(__name__)

NETWORK = "model."  # of a task, in names


class TrackedGroups:
    """Groups by the numbers of their channels when they were found, whoever cuts them since.

    Args:
        groups: of `find_groups`, of the model or of the network that a task is about.

    Raises:
        ConfigError: if there is none.

    Attributes:
        found: the groups as they were found, by the names of the trained model.
        kept: channels that are left, ascending, by the name of the group.
    """

    def __init__(self, groups: Sequence[ChannelGroup]) -> None:
        if not groups:
            raise ConfigError(
                "There are no channel groups to work on. Give find_groups(model, inputs).groups."
            )
        self._given = tuple(groups)
        self._lost: set[str] = set()
        self.found = self._given
        self.kept: dict[str, tuple[int, ...]] = {}

    def bind(self, state: State) -> None:
        """Find the groups' tensors in the model, in place: modules get a form that can be cut.

        Raises:
            ConfigError: if the model does not have them.
        """
        self.kept = {}
        choices = [self._given]
        if isinstance(state.model, TaskModel):
            choices.append(tuple(_renamed(group, NETWORK) for group in self._given))
        errors: list[SurgeryError] = []
        for groups in choices:
            try:
                state.edit(partial(cut_to, groups=groups, kept={}))
            except SurgeryError as error:
                errors.append(error)
                continue
            self.found, self._lost = groups, set()
            self.kept = {group.name: tuple(range(group.size)) for group in groups}
            return
        raise ConfigError(
            f"The channel groups are not those of this model: {errors[0]} "
            "Find them in the model that is trained, before anything is cut from it."
        ) from errors[0]

    def tracked(self) -> tuple[ChannelGroup, ...]:
        """The groups that can still be cut, as they were found."""
        return tuple(group for group in self.found if group.name not in self._lost)

    def current(self) -> tuple[ChannelGroup, ...]:
        """The same groups, as they are now."""
        now = narrowed(self.found, self.kept)
        return tuple(group for group in now if group.name not in self._lost)

    def follow(self, edit: Edit, model: nn.Module) -> None:
        """Learn from `edit`, which was made to `model`, which channels are gone.

        A group that was not cut as a whole, or whose tensors were replaced, is tracked no more.
        """
        if not self.kept:  # not bound yet
            return
        parameters = {name for name, _ in model.named_parameters()}
        for group in self.current():
            left = _left_of(group, edit, parameters)
            if left is None:
                self._lose(group)
            else:
                self.kept[group.name] = tuple(self.kept[group.name][channel] for channel in left)
        tensors = tensors_of(model)
        for group in self.current():
            if any(_size(tensors, member) != member.size for member in group.members):
                self._lose(group)

    def state_dict(self) -> dict[str, Any]:
        """What is left, as plain values."""
        return {
            "kept": {name: list(kept) for name, kept in self.kept.items()},
            "lost": sorted(self._lost),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.kept = {name: tuple(kept) for name, kept in saved["kept"].items()}
        self._lost = set(saved["lost"])

    def _lose(self, group: ChannelGroup) -> None:
        logger.warning(
            "The channel group %r is left alone from here on: its layers were changed otherwise.",
            group.name,
        )
        self._lost.add(group.name)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the first of their names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _size(tensors: Mapping[str, Tensor], member: Member) -> int:
    tensor = tensors.get(member.tensor)
    return 0 if tensor is None else tensor.shape[member.dim]


def _left_of(
    group: ChannelGroup, edit: Edit, parameters: Collection[str]
) -> tuple[int, ...] | None:
    """The channels that an edit left; None if it left a part of one, or put other tensors there."""
    is_there: dict[int, bool] = {}
    for member in group.members:
        if member.tensor not in parameters:  # of buffers an edit says nothing
            continue
        if member.tensor in edit.removed or member.tensor in edit.added:
            return None
        stays = list(range(member.size))
        for dim, kept in edit.sliced.get(member.tensor, ()):
            stays = [stays[entry] for entry in kept] if dim == member.dim else stays
        there = set(stays)
        for channel, own in enumerate(member.index):
            stay = {entry in there for entry in own}
            if len(stay) > 1 or (own and is_there.setdefault(channel, *stay) not in stay):
                return None
    return tuple(channel for channel in range(group.size) if is_there.get(channel, True))


def _renamed(group: ChannelGroup, prefix: str) -> ChannelGroup:
    """The same group of a model that holds this one under a name."""
    return replace(
        group,
        members=tuple(replace(m, tensor=f"{prefix}{m.tensor}") for m in group.members),
        counts=tuple(replace(c, module=_under(prefix, c.module)) for c in group.counts),
        prepared=tuple(replace(p, module=_under(prefix, p.module)) for p in group.prepared),
    )


def _under(prefix: str, name: str) -> str:
    return f"{prefix}{name}".rstrip(".")
