"""Importance of the channels of a group: one score a channel, over all its tensors.

A channel lives in several tensors. Its score is the mean, over those that the criterion can score,
of the tensor's own score divided by its mean over the channels: no tensor drowns the others, and
groups can be compared. Both what makes a channel and what reads it count, as in DepGraph (Fang et
al. 2023, 2301.12900); biases do not.

BN scale: Liu et al. 2017 (1708.06519). Activations: Hu et al. 2016 (1607.03250), with magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.errors import ConfigError, suggest
from compressor.structure.groups import ChannelGroup, Member
from compressor.structure.importance import (
    fpgm_importance,
    hessian_importance,
    l1_importance,
    l2_importance,
    lamp_importance,
    taylor_importance,
)

MEAN_FLOOR = 1e-12  # a dead tensor has mean score 0


@dataclass(frozen=True)
class Observed:
    """What was seen of a model while it ran; see `structure.observing`.

    Attributes:
        gradients: of the loss, by parameter name.
        squared_gradients: mean over batches of their squares, by parameter name.
        activations: mean absolute output of each channel of a layer, by the layer's name.
    """

    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    squared_gradients: Mapping[str, Tensor] = field(default_factory=dict)
    activations: Mapping[str, Tensor] = field(default_factory=dict)


NOTHING = Observed()


@dataclass(frozen=True)
class Part:
    """One member of a group, opened.

    Attributes:
        member: which.
        owner: the module that holds the tensor.
        tensor: parameter or buffer.
    """

    member: Member
    owner: nn.Module
    tensor: Tensor

    @property
    def is_weight(self) -> bool:
        """A parameter that is not a bias."""
        key = self.member.tensor.rpartition(".")[2]
        return isinstance(self.tensor, nn.Parameter) and not key.endswith("bias")

    def rows(self, tensor: Tensor | None = None) -> Tensor:
        """The entries of each channel, (channels, entries), of the tensor or of one of its shape.

        A channel with fewer entries than another is filled up with zeros.
        """
        source = self.tensor if tensor is None else tensor
        entries = source.detach().float().movedim(self.member.dim, 0)
        entries = entries.reshape(len(entries), -1)
        return _gather(entries, self.member.index)


Criterion: TypeAlias = Callable[[Part, Observed], Tensor | None]


def group_importance(
    model: nn.Module, group: ChannelGroup, criterion: str, observed: Observed = NOTHING
) -> Tensor:
    """Score of every channel of `group`: (group.size,) float32 on the CPU, larger matters more.

    The mean over the channels is 1, but for "lamp", whose largest is 1. A group without a tensor
    that the criterion can score (no batch norm, no gradient) is scored by L2.

    Args:
        model: holds the tensors of the group.
        group: whose channels are scored.
        criterion: one of `CRITERIA`.
        observed: gradients for "taylor", their squares for "hessian", activations for "activation".

    Raises:
        ConfigError: if `criterion` is unknown.
    """
    check_criterion(criterion)
    parts = open_group(model, group)
    scores = _mean_score(parts, CRITERIA[criterion], observed)
    if scores is None:
        scores = _mean_score(parts, _l2, observed)
    if scores is None:
        return torch.ones(group.size)
    return lamp_importance(scores) if criterion == "lamp" else scores


def check_criterion(criterion: str) -> None:
    """Do nothing if there is such a criterion.

    Raises:
        ConfigError: if there is none.
    """
    if criterion not in CRITERIA:
        raise ConfigError(f"importance={criterion!r} is unknown. {suggest(criterion, CRITERIA)}")


def open_group(model: nn.Module, group: ChannelGroup) -> list[Part]:
    """Every member of `group` with its tensor."""
    parts = []
    for member in group.members:
        owner = model.get_submodule(member.module)
        parts.append(Part(member, owner, getattr(owner, member.tensor.rpartition(".")[2])))
    return parts


def _mean_score(parts: list[Part], criterion: Criterion, observed: Observed) -> Tensor | None:
    scores = [score for part in parts if (score := criterion(part, observed)) is not None]
    if not scores:
        return None
    relative = [score.cpu() / score.cpu().mean().clamp_min(MEAN_FLOOR) for score in scores]
    return torch.stack(relative).mean(0)


def _gather(entries: Tensor, index: tuple[tuple[int, ...], ...]) -> Tensor:
    """(all entries, …) -> (channels, …): the rows of each channel, beside each other."""
    longest = max(map(len, index))
    absent = len(entries)
    padded = [[*own, *[absent] * (longest - len(own))] for own in index]
    entries = torch.cat([entries, entries.new_zeros(1, *entries.shape[1:])])
    return entries[torch.tensor(padded, device=entries.device)].flatten(1)


def _l1(part: Part, _: Observed) -> Tensor | None:
    return l1_importance(part.rows()) if part.is_weight else None


def _l2(part: Part, _: Observed) -> Tensor | None:
    return l2_importance(part.rows()) if part.is_weight else None


def _l2_squared(part: Part, _: Observed) -> Tensor | None:
    return l2_importance(part.rows()).square() if part.is_weight else None


def _fpgm(part: Part, _: Observed) -> Tensor | None:
    # The scales of a norm are no vectors: one that is near the others' mean is not redundant.
    is_filter = part.is_weight and part.tensor.dim() > 1
    return fpgm_importance(part.rows()) if is_filter else None


def _bn_scale(part: Part, _: Observed) -> Tensor | None:
    is_scale = isinstance(part.owner, _BatchNorm) and part.is_weight
    return l1_importance(part.rows()) if is_scale else None


def _taylor(part: Part, observed: Observed) -> Tensor | None:
    gradient = observed.gradients.get(part.member.tensor)
    if gradient is None or not part.is_weight:
        return None
    return taylor_importance(part.rows(), part.rows(gradient))


def _hessian(part: Part, observed: Observed) -> Tensor | None:
    squares = observed.squared_gradients.get(part.member.tensor)
    if squares is None or not part.is_weight:
        return None
    return hessian_importance(part.rows(), part.rows(squares))


def _activation(part: Part, observed: Observed) -> Tensor | None:
    magnitudes = observed.activations.get(part.member.module)
    is_made_here = part.member.side == "out" and part.is_weight
    if magnitudes is None or not is_made_here or len(magnitudes) != part.member.size:
        return None
    return _gather(magnitudes[:, None].float(), part.member.index).sum(1)


CRITERIA: dict[str, Criterion] = {
    "l1": _l1,
    "l2": _l2,
    "bn_scale": _bn_scale,
    "lamp": _l2_squared,
    "fpgm": _fpgm,
    "taylor": _taylor,
    "hessian": _hessian,
    "activation": _activation,
}
