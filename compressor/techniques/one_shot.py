"""Channel pruning in one call: find the groups, rank their channels, cut a copy of the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from compressor.errors import ConfigError, ModelError
from compressor.interfaces.inputs import ModelInputs, device_of
from compressor.profiling.counts import count
from compressor.structure.channels import find_groups
from compressor.structure.groups import ChannelGroup, ChannelMap
from compressor.structure.observing import NEEDS_GRADIENTS, Backward, observe
from compressor.structure.scores import check_criterion, group_importance
from compressor.structure.selection import (
    Kept,
    Scope,
    check_fraction,
    check_round_to,
    check_scope,
    cut_to,
    largest_fraction,
    select_kept,
    widen_kept,
)
from compressor.structure.trace import copy_model, copy_skeleton

CLOSE = 0.99  # of the work that may be left: no more channels are tried


@dataclass(frozen=True)
class Pruned:
    """A pruned model and what was cut.

    Attributes:
        model: a copy, in the mode and on the device of the original. Fine-tune it; batch norms want
            new statistics first (`compressor.functional.reestimate_batchnorm`).
        kept: channels that stayed, ascending, by the name of the group.
        channels: the groups, and what could not be pruned and why.
        macs_fraction: of the original's multiply-accumulates.
        params_fraction: of the original's parameters.
    """

    model: nn.Module
    kept: Mapping[str, tuple[int, ...]]
    channels: ChannelMap
    macs_fraction: float
    params_fraction: float


def prune(
    model: nn.Module,
    inputs: Any,
    *,
    kept_fraction: float | None = None,
    macs_fraction: float | None = None,
    importance: str = "l2",
    scope: Scope = "layer",
    round_to: int = 1,
    least_fraction: float = 0.1,
    ignored: Collection[str] = (),
    backward: Backward | None = None,
) -> Pruned:
    """A copy of `model` without its least important channels. The model is not changed.

    What is removed follows from the graph of the model and is verified; see `find_groups`.

    Args:
        model: trained.
        inputs: of one call, with two samples at least: a tensor, a tuple of arguments, a dict of
            keywords, or `ModelInputs`.
        kept_fraction: of the channels, above 0 and up to 1; see `select_kept`.
        macs_fraction: of the multiply-accumulates that may be left, in place of `kept_fraction`:
            as many channels stay as it allows.
        importance: what ranks the channels; one of `structure.scores.CRITERIA`.
        scope: which channels are ranked together: those of a "layer", "global" or "isomorphic".
        round_to: widths are multiples of it; 16 suits ONNX Runtime on x86 in float32, 4 in int8.
        least_fraction: of each group, which stays however it ranks.
        ignored: names of modules that keep their channels, and the groups that run through them.
        backward: for "taylor" and "hessian": adds the gradients of your loss to the parameters of
            the model that it is given, one `.backward()` for each of some batches.

    Raises:
        ConfigError: unless one of the two fractions is given, and for values without a meaning.
        ModelError: if the model has no channels that can be removed, or does not run on `inputs`.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> prune(net, torch.randn(2, 4), kept_fraction=0.5).model
    Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
      (1): ReLU()
      (2): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    _check(kept_fraction, macs_fraction, importance, backward)
    check_scope(scope)
    check_round_to(round_to)
    inputs = ModelInputs.of(inputs).to(device_of(model))
    channels = find_groups(model, inputs)
    groups = [group for group in channels.groups if not _is_ignored(group, ignored)]
    if not groups:
        reasons = [f"{name}: {why}" for name, why in channels.quarantined]
        reasons += [f"{', '.join(layers[:3])}: {why}" for why, layers in channels.frozen]
        raise ModelError(
            "The model has no channels that can be removed. "
            f"{'; '.join(reasons[:3]) or 'Name fewer modules in `ignored`'}."
        )
    scored = copy_model(model)
    cut_to(scored, groups, {})
    observed = observe(scored, importance, inputs, backward)
    scores = {g.name: group_importance(scored, g, importance, observed) for g in groups}
    before = count(model, inputs)

    def choose(fraction: float) -> Kept:
        return select_kept(
            scored,
            groups,
            scores,
            fraction,
            scope=scope,
            round_to=round_to,
            least_fraction=least_fraction,
        )

    def macs_left(kept: Kept) -> float:
        trial = copy_skeleton(model)
        cut_to(trial, groups, kept)
        return count(trial, inputs).macs / before.macs

    def choose_within(limit: float) -> Kept:
        fraction = largest_fraction(lambda fraction: macs_left(choose(fraction)) <= limit)
        if fraction is None:
            raise ConfigError(
                f"macs_fraction={limit} cannot be reached: with one step of channels in every "
                f"group, {macs_left(choose(1e-9)):.3f} are left. Allow more, or a smaller round_to."
            )
        kept = choose(fraction)
        if macs_left(kept) >= CLOSE * limit:
            return kept

        def fits(wider: Kept) -> bool:
            return macs_left(wider) <= limit

        return widen_kept(scored, groups, scores, kept, fits, scope=scope, round_to=round_to)

    if macs_fraction is not None:
        kept = choose_within(macs_fraction)
    else:
        assert kept_fraction is not None
        kept = choose(kept_fraction)
    pruned = copy_model(model)
    cut_to(pruned, [group for group in groups if len(kept[group.name]) < group.size], kept)
    after = count(pruned, inputs)
    return Pruned(
        pruned,
        kept,
        channels,
        macs_fraction=after.macs / before.macs,
        params_fraction=after.params / before.params,
    )


def _check(
    kept_fraction: float | None,
    macs_fraction: float | None,
    importance: str,
    backward: Backward | None,
) -> None:
    if (kept_fraction is None) == (macs_fraction is None):
        raise ConfigError(
            f"kept_fraction={kept_fraction} and macs_fraction={macs_fraction} do not say how far "
            "to prune. Give one of the two, such as macs_fraction=0.5."
        )
    check_fraction("kept_fraction", kept_fraction)
    check_fraction("macs_fraction", macs_fraction)
    check_criterion(importance)
    if importance in NEEDS_GRADIENTS and backward is None:
        raise ConfigError(
            f"importance={importance!r} needs the gradients of your loss. Give `backward`, a "
            "function of the model that calls `loss.backward()` for each of some batches."
        )


def _is_ignored(group: ChannelGroup, ignored: Collection[str]) -> bool:
    return any(
        module == name or module.startswith(f"{name}.")
        for module in group.modules
        for name in ignored
    )
