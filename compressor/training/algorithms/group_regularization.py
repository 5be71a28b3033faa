"""Whole channels that shrink while training, the unimportant ones most (Fang et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.structure.groups import ChannelGroup, Member
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.tracked_groups import TrackedGroups
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State

if TYPE_CHECKING:
    from compressor.structure.surgery import Edit


def channel_shrinkage(squares: Tensor, alpha: float = 4.0) -> Tensor:
    """How strongly each channel of a group is pulled to 0: 1 the largest, 2**alpha the smallest.

    2**(alpha * (max - own) / (max - min)), equation 4 of DepGraph.

    Args:
        squares: (channels,), the sum of the squares of all weights of each.
        alpha: 0 pulls all alike.

    Returns:
        (channels,); all 1 if the channels are equal.

    >>> channel_shrinkage(torch.tensor([1.0, 3.0, 5.0]), alpha=4)
    tensor([16.,  4.,  1.])
    """
    largest, smallest = squares.max(), squares.min()
    # 1e-12: equal channels, up to rounding, have no order
    spread = (largest - smallest).clamp_min(1e-12 * largest.clamp_min(1e-30))
    return torch.exp2(alpha * (largest - squares) / spread)


class GroupRegularization(Algorithm):
    """Pulls the weights of every channel to 0, in all layers that it runs through at once.

    Adds `strength` times `channel_shrinkage` times the weight to the gradient, which is the
    gradient of half the sum of the channels' squares, each times its shrinkage. What is small
    becomes smaller, so that it can be cut with little harm, by `GradualPruning` or after training.

    Args:
        groups: of `find_groups`, of the model or of the network that a task is about.
        strength: above 0; that of the most important channels, about that of a weight decay.
        alpha: 0 or more; the least important are pulled 2**alpha times as much.

    Raises:
        ConfigError: for values out of range.
    """

    events = frozenset({Event.SETUP, Event.BEFORE_STEP})
    before = ("GradientClipping",)  # what is clipped is what is stepped
    after = ("SAM",)  # whose gradients are those of the loss alone
    card = Card(
        summary="Shrinks whole channels, the least important most, so that they can be cut.",
        source="Fang et al. (2023), DepGraph: Towards any structural pruning, section 3.3",
        functional="channel_shrinkage",
        settings="`strength`: times learning rate and steps, it is how far weights shrink.",
        use_when="Before or while channels are pruned, if there are epochs to spend.",
        avoid_when="The schedule is short: weights shrink by the learning rate times strength.",
        cost="Two passes over the weights of the groups a step.",
    )

    def __init__(
        self, groups: Sequence[ChannelGroup], strength: float = 5e-4, alpha: float = 4.0
    ) -> None:
        if not strength > 0:
            raise ConfigError(f"strength={strength} shrinks nothing. Write a number above 0.")
        if not alpha >= 0:
            raise ConfigError(f"alpha={alpha} would shrink what matters most. Write 0 or more.")
        self.groups = TrackedGroups(groups)
        self.strength = strength
        self.alpha = alpha
        self._bound: list[list[_Weight]] | None = None

    def on(self, event: Event, state: State) -> None:
        """Add to the gradients."""
        if event is Event.SETUP:
            self._bound = None
            self.groups.bind(state)
            return
        if self._bound is None:
            self._bound = [_weights(state.model, group) for group in self.groups.current()]
        with torch.no_grad():
            for weights in self._bound:
                self._shrink(weights)

    def rebind(self, edit: Edit, state: State) -> None:
        """Follow the channels."""
        self.groups.follow(edit, state.model)
        self._bound = None

    def state_dict(self) -> dict[str, Any]:
        """Which channels are left."""
        return self.groups.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it."""
        self.groups.load_state_dict(saved)
        self._bound = None

    def close(self) -> None:
        """Let go of the model."""
        self._bound = None

    def _shrink(self, weights: Sequence[_Weight]) -> None:
        if not weights:
            return
        squares = torch.stack([weight.squares() for weight in weights]).sum(0)
        pull = self.strength * channel_shrinkage(squares, self.alpha)
        for weight in weights:
            weight.pull(pull)


class _Weight:
    """One member of a group, with the channel of each entry."""

    def __init__(self, parameter: nn.Parameter, member: Member) -> None:
        self.parameter = parameter
        self.dim = member.dim
        self.channels = len(member.index)
        owners = [self.channels] * member.size  # one more: of entries that belong to none
        for channel, entries in enumerate(member.index):
            for entry in entries:
                owners[entry] = channel
        self.owners = torch.tensor(owners, device=parameter.device)

    def squares(self) -> Tensor:
        """Sum of the squares of each channel: (channels,), float32."""
        entries = self.parameter.float().movedim(self.dim, 0)
        by_entry = entries.reshape(len(entries), -1).square().sum(1)
        total = by_entry.new_zeros(self.channels + 1)
        return total.index_add(0, self.owners, by_entry)[:-1]

    def pull(self, strengths: Tensor) -> None:
        """Add each channel's strength times the weight to the gradient, in place."""
        if self.parameter.grad is not None:
            by_entry = torch.cat([strengths, strengths.new_zeros(1)])[self.owners]
            shape = [1] * self.parameter.dim()
            shape[self.dim] = -1
            self.parameter.grad += by_entry.view(shape).to(self.parameter.dtype) * self.parameter


def _weights(model: nn.Module, group: ChannelGroup) -> list[_Weight]:
    """The parameters of `group`, biases aside."""
    named = dict(model.named_parameters())
    return [
        _Weight(named[member.tensor], member)
        for member in group.members
        if member.tensor in named and not member.tensor.endswith("bias")
    ]
