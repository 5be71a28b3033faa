"""Channel pruning: remove a group's least important channels from every layer they run through.

Groups come from `structure.channels`, which verified each one; here they get their widths.
Source: Fang et al. 2023, DepGraph (2301.12900), for the groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from compressor.errors import SurgeryError
from compressor.result import Choice
from compressor.structure.channels import find_groups
from compressor.structure.groups import ChannelGroup
from compressor.structure.surgery import keep_many
from compressor.structure.trace import copy_model
from compressor.techniques.base import TECHNIQUES, Lost, Stage, Technique, TechniqueContext
from compressor.techniques.importance import group_importance

KEPT_FRACTIONS = (0.75, 0.5, 0.25)  # of each group, rounded to the target's grid


@TECHNIQUES.register
class ChannelPruning(Technique):
    """Thinner layers. Saves on every runtime, as far as its kernels step at the kept width."""

    name = "channel_pruning"
    stage = Stage.WIDTH

    def __init__(self) -> None:
        """The groups are found once, at the first call of `choices` or `apply`."""
        self._groups: dict[str, ChannelGroup] | None = None

    def choices(self, model: nn.Module, context: TechniqueContext) -> Iterator[Choice]:
        """For every group, keep 3/4, 1/2 or 1/4 of its channels, rounded to the target's grid."""
        groups = self._find(model, context, report=True)
        scored = _with_gradients(model, context) if groups else model
        for group in groups.values():
            order = group_importance(scored, group, context.importance).argsort(descending=True)
            for width in candidate_widths(group.size, context.width_multiple, context.min_width):
                kept = sorted(order[:width].tolist())
                yield Choice(
                    technique=self.name,
                    site=group.name,
                    setting={"kept": kept},
                    label=f"{width} of {group.size} channels",
                    modules=tuple(sorted({member.module for member in group.members})),
                )

    def apply(self, model: nn.Module, choices: Sequence[Choice], context: TechniqueContext) -> None:
        """Slice every layer of the chosen groups, in place."""
        groups = self._find(model, context, report=False)
        for choice in choices:
            if choice.site not in groups:
                raise SurgeryError(
                    f"The plan prunes the channel group {choice.site!r}, which this model does not "
                    "have. Apply a plan to a copy of the reference that it was made for."
                )
        keep_many(model, [(groups[choice.site], choice.setting["kept"]) for choice in choices])

    def _find(
        self, model: nn.Module, context: TechniqueContext, *, report: bool
    ) -> dict[str, ChannelGroup]:
        if self._groups is None:
            found = find_groups(model, context.inputs)
            self._groups = {group.name: group for group in found.groups}
            if report:
                context.lost.extend(Lost(self.name, name, why) for name, why in found.quarantined)
        return self._groups


def candidate_widths(size: int, multiple: int, minimum: int) -> list[int]:
    """Widths worth trying for a group of `size` channels, widest first.

    >>> candidate_widths(64, multiple=16, minimum=16)
    [48, 32, 16]
    >>> candidate_widths(16, multiple=4, minimum=16)
    []
    """
    rounded = {max(round(size * part / multiple), 1) * multiple for part in KEPT_FRACTIONS}
    return sorted((width for width in rounded if minimum <= width < size), reverse=True)


def _with_gradients(model: nn.Module, context: TechniqueContext) -> nn.Module:
    """A copy of `model` that holds the loss's gradients, if the criterion needs them."""
    if context.importance != "taylor" or context.accumulate_gradients is None:
        return model
    copy = copy_model(model).requires_grad_(True)
    with torch.enable_grad():
        context.accumulate_gradients(copy)
    return copy
