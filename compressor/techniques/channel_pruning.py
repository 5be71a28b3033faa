"""Channel pruning: remove a group's least important channels from every layer they run through.

Groups come from `structure.channels`, which verified each one; here they get their widths. What
pays is what the target's kernels gain: their time goes in steps of the width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from math import ceil

from torch import Tensor, nn

from compressor.errors import SurgeryError
from compressor.result import Choice
from compressor.structure.channels import find_groups
from compressor.structure.groups import ChannelGroup
from compressor.structure.labels.flow import OUTPUTS
from compressor.structure.observing import observe
from compressor.structure.scores import check_criterion, group_importance
from compressor.structure.selection import (
    cut_to,
    entries_per_channel,
    rounded_width,
    width_step,
)
from compressor.structure.trace import copy_model
from compressor.techniques.base import TECHNIQUES, Lost, Stage, Technique, TechniqueContext
from compressor.training.card import Card

KEPT_FRACTIONS = (0.75, 0.5, 0.25)  # of each group, about
KERNEL_STEP = 4  # entries; no kernel that was measured has finer steps that pay
MOST_WIDTHS = 16  # of a group whose cost is asked for
PLATEAU = 0.03  # times that differ by less are equal: the error of a measurement


@TECHNIQUES.register
class ChannelPruning(Technique):
    """Thinner layers, fewer heads. Saves on every runtime, as far as its kernels step there."""

    name = "channel_pruning"
    stage = Stage.WIDTH
    card = Card(
        summary="Removes whole channels, attention heads and MLP features from all their layers.",
        source="Fang et al. (2023), DepGraph: Towards any structural pruning, for the groups; "
        "Molchanov et al. (2019), Importance estimation for neural network pruning",
        functional=None,
        use_when="The target must compute less, and there is data to fine-tune on.",
        avoid_when="Layers are as narrow as the kernels' steps already: nothing gets faster there.",
        cost="One trace and one check of the model to find the groups; for the criteria that need "
        "them, gradients on a small subset.",
    )

    def __init__(self) -> None:
        """The groups are found once, at the first call of `choices` or `apply`."""
        self._groups: dict[str, ChannelGroup] | None = None

    def choices(self, model: nn.Module, context: TechniqueContext) -> Iterator[Choice]:
        """For every group, keep about 3/4, 1/2 or 1/4 of its channels, at widths that pay."""
        groups = self._find(model, context, report=True)
        if not groups:
            return
        scores = _scores(model, groups.values(), context.importance, context)
        names = {name for name, _ in model.named_modules(remove_duplicate=False)}
        for group in groups.values():
            for width in widths_of(group, context):
                yield Choice(
                    technique=self.name,
                    site=group.name,
                    setting={"kept": _best(scores[group.name], width)},
                    label=f"{width} of {group.size} channels",
                    modules=tuple(sorted({_known(module, names) for module in group.modules})),
                )

    def apply(self, model: nn.Module, choices: Sequence[Choice], context: TechniqueContext) -> None:
        """Slice every layer of the chosen groups, in place."""
        chosen = self._groups_of(model, choices, context)
        cut_to(model, chosen, {choice.site: choice.setting["kept"] for choice in choices})

    def reranked(
        self,
        model: nn.Module,
        choices: Sequence[Choice],
        importance: str,
        context: TechniqueContext,
    ) -> list[Choice]:
        """`choices` with as many channels kept as they keep, by another criterion.

        Args:
            model: the reference. Not changed.
            choices: of this technique.
            importance: name of the criterion; see `structure.scores`.
            context: of the job; its own criterion is passed over.

        Raises:
            ConfigError: if there is no such criterion.
            SurgeryError: if a choice does not fit the model.
        """
        check_criterion(importance)
        self._groups_of(model, choices, context)
        if not choices:
            return []
        groups = self._find(model, context, report=False)
        scores = _scores(model, groups.values(), importance, context)
        return [
            replace(
                choice,
                setting={
                    **choice.setting,
                    "kept": _best(scores[choice.site], len(choice.setting["kept"])),
                },
            )
            for choice in choices
        ]

    def _groups_of(
        self, model: nn.Module, choices: Sequence[Choice], context: TechniqueContext
    ) -> list[ChannelGroup]:
        """The group that each choice cuts."""
        groups = self._find(model, context, report=False)
        for choice in choices:
            if choice.site not in groups:
                raise SurgeryError(
                    f"The plan prunes the channel group {choice.site!r}, which this model does not "
                    "have. Apply a plan to a copy of the reference that it was made for."
                )
        return [groups[choice.site] for choice in choices]

    def _find(
        self, model: nn.Module, context: TechniqueContext, *, report: bool
    ) -> dict[str, ChannelGroup]:
        if self._groups is None:
            found = find_groups(model, context.inputs)
            self._groups = {group.name: group for group in found.groups}
            if report:
                context.lost.extend(Lost(self.name, name, why) for name, why in found.quarantined)
                context.lost.extend(
                    Lost(self.name, ", ".join(layers), why)
                    for why, layers in found.frozen
                    if why != OUTPUTS
                )
        return self._groups


def widths_of(group: ChannelGroup, context: TechniqueContext) -> list[int]:
    """Numbers of channels that are worth keeping, widest first; none of them is all.

    With `context.group_cost`, each is the widest of its plateau of cost, and costs less than the
    next wider one. Without, they lie on the grid of `width_multiple`, and hold `min_width` entries.
    """
    if context.group_cost is not None:
        costs = {width: context.group_cost(group, width) for width in _grid(group)}
        return plateau_widths(costs, group.size)
    step = width_step(group, context.width_multiple)
    least = ceil(context.min_width / entries_per_channel(group))
    return candidate_widths(group.size, step, least)


def candidate_widths(size: int, step: int, least: int) -> list[int]:
    """Multiples of `step` near the wanted fractions of `size`, widest first.

    >>> candidate_widths(64, step=16, least=16)
    [48, 32, 16]
    >>> candidate_widths(12, step=1, least=1)
    [9, 6, 3]
    >>> candidate_widths(16, step=4, least=16)
    []
    """
    rounded = {rounded_width(round(size * part), size, step) for part in KEPT_FRACTIONS}
    return sorted((width for width in rounded if least <= width < size), reverse=True)


def plateau_widths(costs: dict[int, float], size: int) -> list[int]:
    """Widths that pay, widest first: about the wanted fractions, and the widest at their cost.

    Args:
        costs: of each width that may be kept, `size` among them.
        size: the full width.

    >>> costs = {16: 1.0, 32: 2.0, 40: 3.9, 48: 4.0, 64: 4.0}
    >>> plateau_widths(costs, size=64)
    [32, 16]
    """
    candidates = set()
    for part in KEPT_FRACTIONS:
        wanted = min(costs, key=lambda width: (abs(width - part * size), -width))
        limit = costs[wanted] * (1 + PLATEAU)
        candidates.add(max(width for width in costs if costs[width] <= limit))
    paying, cheapest = [], costs[size]
    for width in sorted(candidates - {size}, reverse=True):
        if costs[width] < cheapest * (1 - PLATEAU):
            paying.append(width)
            cheapest = costs[width]
    return paying


def _scores(
    model: nn.Module,
    groups: Collection[ChannelGroup],
    importance: str,
    context: TechniqueContext,
) -> Mapping[str, Tensor]:
    """(group.size,) importance of the channels of each group, by its name."""
    scored = copy_model(model)
    cut_to(scored, list(groups), {})
    observed = observe(scored, importance, context.inputs, context.accumulate_gradients)
    return {group.name: group_importance(scored, group, importance, observed) for group in groups}


def _best(scores: Tensor, width: int) -> list[int]:
    """The channels of the highest scores, ascending; of equal ones the first."""
    order = scores.argsort(descending=True, stable=True)
    return sorted(order[:width].tolist())


def _grid(group: ChannelGroup) -> list[int]:
    """Widths that are asked for: multiples of the kernels' step, at most `MOST_WIDTHS`, and all."""
    step = width_step(group, KERNEL_STEP)
    step *= ceil(group.size / MOST_WIDTHS / step)
    return [*range(step, group.size, step), group.size]


def _known(module: str, names: set[str]) -> str:
    """The module, or what holds it if only a prepared model has it."""
    while module not in names:
        module = module.rpartition(".")[0]
    return module
