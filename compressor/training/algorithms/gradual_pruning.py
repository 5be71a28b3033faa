"""Channels that are cut, more and more of them, while training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.counts import count
from compressor.structure.groups import ChannelGroup
from compressor.structure.observing import NEEDS_GRADIENTS
from compressor.structure.scores import Observed, check_criterion, group_importance
from compressor.structure.selection import (
    Kept,
    Scope,
    check_fraction,
    check_round_to,
    check_scope,
    cut_to,
    largest_fraction,
    select_kept,
)
from compressor.structure.surgery import undone
from compressor.training import binding
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.gradual_sparsity import cubic_sparsity
from compressor.training.algorithms.tracked_groups import TrackedGroups
from compressor.training.algorithms.windows import refuse_window
from compressor.training.card import Card
from compressor.training.clock import Duration, DurationLike
from compressor.training.events import Event
from compressor.training.ramp import progress
from compressor.training.state import State
from compressor.training.tasks.base import TaskModel

if TYPE_CHECKING:
    from compressor.structure.surgery import Edit


class GradualPruning(Algorithm):
    """Cuts the least important channels, a few at a time, along a cubic schedule.

    A cut shrinks the layers themselves; optimizer, averages and masks follow. Channels are ranked
    anew at each cut by the weights as they have become; criteria that need gradients take those of
    the batches since the cut before. Channels that another has cut count as gone. It has no
    `window`: `start` and `end` say when it cuts.

    Args:
        groups: of `find_groups`, of the model or of the network that a task is about.
        kept_fraction: of the channels, that is left at the end; see `select_kept`.
        start: of the cutting.
        end: of the cutting; leave time after it to recover.
        macs_fraction: of the multiply-accumulates, that may be left at the end, in place of
            `kept_fraction`.
        updates: cuts on the way.
        importance: what ranks the channels; all of `structure.scores.CRITERIA` but "activation".
        scope: which channels are ranked together: those of a "layer", "global" or "isomorphic".
        round_to: widths are multiples of it, in entries.
        least_fraction: of each group, which stays however it ranks.
        inputs: of one call of the network, to count its operations; with `macs_fraction`.

    Raises:
        ConfigError: unless one of the two fractions is given, and for values without a meaning.
    """

    events = frozenset({Event.SETUP, Event.AFTER_STEP, Event.BATCH_END, Event.EPOCH_END})
    card = Card(
        summary="Prunes whole channels, the least important first, while training goes on.",
        source="Molchanov et al. (2017), Pruning convolutional neural networks for resource "
        "efficient inference; groups: Fang et al. (2023), DepGraph; schedule: Zhu and Gupta (2017)",
        functional=None,
        settings="`kept_fraction` or `macs_fraction`, what is left; `end`, from which on "
        "the rest is trained.",
        use_when="Much is to be cut: the weights adapt between cuts, and ranks are made anew.",
        avoid_when="A few channels go: cutting once and fine-tuning is simpler and as good.",
        cost="`updates` rankings; later batches are faster. With `macs_fraction` about twenty "
        "calls of the network a cut, with gradients a copy of them.",
    )

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        kept_fraction: float | None = None,
        start: DurationLike = "0dur",
        end: DurationLike = "0.5dur",
        *,
        macs_fraction: float | None = None,
        updates: int = 10,
        importance: str = "l2",
        scope: Scope = "layer",
        round_to: int = 1,
        least_fraction: float = 0.1,
        inputs: ModelInputs | None = None,
    ) -> None:
        if (kept_fraction is None) == (macs_fraction is None):
            raise ConfigError(
                f"kept_fraction={kept_fraction} and macs_fraction={macs_fraction} do not say how "
                "far to prune. Give one of the two, such as kept_fraction=0.5."
            )
        if macs_fraction is not None and inputs is None:
            raise ConfigError("macs_fraction needs `inputs` of one call, to count operations on.")
        check_fraction("kept_fraction", kept_fraction)
        check_fraction("macs_fraction", macs_fraction)
        check_criterion(importance)
        check_scope(scope)
        check_round_to(round_to)
        if importance == "activation":
            raise ConfigError(
                "importance='activation' is not watched during training. Choose 'taylor'."
            )
        if updates < 1:
            raise ConfigError(f"updates={updates} cuts nothing. Write 1 or more.")
        self.groups = TrackedGroups(groups)
        self.kept_fraction = kept_fraction
        self.macs_fraction = macs_fraction
        self.start, self.end = Duration.parse(start), Duration.parse(end)
        self.updates = updates
        self.importance = importance
        self.scope: Scope = scope
        self.round_to = round_to
        self.least_fraction = least_fraction
        self.inputs = inputs
        self._level = 0  # of `updates`
        self._all_macs = 0
        self._sums: dict[str, Tensor] = {}  # of gradients, or of their squares
        self._steps = 0  # that are in the sums

    def on(self, event: Event, state: State) -> None:
        """Sum up gradients, or cut."""
        if event is Event.SETUP:
            refuse_window(self, "`start` and `end`", "its cuts would come late")
            self._level, self._sums, self._steps = 0, {}, 0  # those of another trainer
            self.groups.bind(state)
            if self.inputs is not None:
                self._all_macs = self._count(state.model)
        elif event is Event.AFTER_STEP:
            if self.importance in NEEDS_GRADIENTS and self._level < self.updates:
                if not state.step_skipped:
                    self._add_gradients(state.model)
        else:
            passed = progress(state.clock, state.max_duration, self.start, self.end)
            level = int(passed * self.updates + 1e-9)  # 0.3 * 10 is 3, although 0.3 is less
            if level > self._level:
                self._level = level
                self._cut(state, cubic_sparsity(level / self.updates, 1.0))

    def rebind(self, edit: Edit, state: State) -> None:
        """Note which channels are gone, and cut the sums of gradients like their parameters."""
        self.groups.follow(edit, state.model)
        changed = edit.removed | edit.added
        self._sums = {
            name: binding.cut(total, edit.sliced.get(name, ()))
            for name, total in self._sums.items()
            if name not in changed
        }

    def state_dict(self) -> dict[str, Any]:
        """What is left, how far it is, and the sums of gradients."""
        return {
            "groups": self.groups.state_dict(),
            "level": self._level,
            "sums": self._sums,
            "steps": self._steps,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self.groups.load_state_dict(saved["groups"])
        self._level, self._steps = saved["level"], saved["steps"]
        self._sums = dict(saved["sums"])

    def _add_gradients(self, model: nn.Module) -> None:
        tensors = {m.tensor for group in self.groups.tracked() for m in group.members}
        for name, parameter in model.named_parameters():
            if name in tensors and parameter.grad is not None:
                gradient = parameter.grad.detach()
                addend = gradient.square() if self.importance == "hessian" else gradient
                total = self._sums.get(name)
                self._sums[name] = addend.clone() if total is None else total.to(addend) + addend
        self._steps += 1

    def _cut(self, state: State, passed: float) -> None:
        """Cut to where the schedule is, `passed` of the way."""
        groups, current = self.groups.tracked(), self.groups.current()
        if not groups:
            return
        scores = self._scores(state.model)
        state.context.broadcast(list(scores.values()))  # sums on a GPU are not equal to the bit
        fraction = self._fraction(state.model, scores, passed)
        if fraction is None:
            return
        kept = self._select(state.model, scores, fraction)
        state.edit(lambda model: cut_to(model, current, kept))
        self._sums, self._steps = {}, 0

    def _fraction(
        self, model: nn.Module, scores: Mapping[str, Tensor], passed: float
    ) -> float | None:
        """Of the channels, that stays now; None if no cut is deep enough."""
        if self.kept_fraction is not None:
            return 1 - passed * (1 - self.kept_fraction)
        assert self.macs_fraction is not None
        limit = (1 - passed * (1 - self.macs_fraction)) * self._all_macs

        def fits(fraction: float) -> bool:
            with undone(model):
                cut_to(model, self.groups.current(), self._select(model, scores, fraction))
                return self._count(model) <= limit

        return largest_fraction(fits)

    def _scores(self, model: nn.Module) -> dict[str, Tensor]:
        """Of all channels that there ever were; what is gone comes last."""
        sums = self._sums
        means = {name: total / max(self._steps, 1) for name, total in sums.items()}
        observed = Observed(gradients=means, squared_gradients=means)
        scores = {}
        for found, now in zip(self.groups.tracked(), self.groups.current(), strict=True):
            own = torch.full((found.size,), -inf)
            left = list(self.groups.kept[found.name])
            own[left] = group_importance(model, now, self.importance, observed)
            scores[found.name] = own
        return scores

    def _select(self, model: nn.Module, scores: Mapping[str, Tensor], fraction: float) -> Kept:
        """What stays of the channels that are left, by their present numbers."""
        chosen = select_kept(
            model,
            self.groups.tracked(),
            scores,
            fraction,
            scope=self.scope,
            round_to=self.round_to,
            least_fraction=self.least_fraction,
        )
        kept = {}
        for name, channels in chosen.items():
            stays = set(channels)
            left = enumerate(self.groups.kept[name])
            kept[name] = tuple(number for number, channel in left if channel in stays)
        return kept

    def _count(self, model: nn.Module) -> int:
        """Multiply-accumulates of one call of the network."""
        assert self.inputs is not None
        network = model
        if isinstance(model, TaskModel) and isinstance(getattr(model, "model", None), nn.Module):
            network = model.get_submodule("model")
        return count(network, self.inputs).macs
