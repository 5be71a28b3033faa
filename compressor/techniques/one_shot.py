"""Channel pruning in one call: find the groups, rank their channels, cut a copy of the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from compressor.errors import ConfigError, ModelError, suggest
from compressor.interfaces.inputs import ModelInputs, device_of
from compressor.interfaces.instances import check_module
from compressor.profiling.counts import count
from compressor.structure.channels import find_groups
from compressor.structure.groups import ChannelGroup, ChannelMap
from compressor.structure.observing import NEEDS_GRADIENTS, Backward, observe
from compressor.structure.origin import remember_origin
from compressor.structure.scores import CRITERIA, Observed, group_importance
from compressor.structure.selection import (
    Kept,
    Scope,
    check_fraction,
    check_least_fraction,
    check_round_to,
    check_scope,
    cut_to,
    largest_fraction,
    select_kept,
    widen_kept,
    width_step,
)
from compressor.structure.trace import copy_model, copy_skeleton
from compressor.units import gain_text, times

CLOSE = 0.99  # of the work that may be left: no more channels are tried


@dataclass(frozen=True)
class Pruned:
    """A pruned model and what was cut.

    Attributes:
        model: a copy, in the mode and on the device of the original. Fine-tune it; batch norms want
            new statistics first (`compressor.functional.reestimate_batchnorm`). `compressor.save`
            needs no reference for it.
        kept: channels that stayed, ascending, by the name of the group.
        channels: the groups, and what could not be pruned and why.
        macs_fraction: of the original's multiply-accumulates; 1 if it has none.
        params_fraction: of the original's parameters.
    """

    model: nn.Module
    kept: Mapping[str, tuple[int, ...]]
    channels: ChannelMap
    macs_fraction: float
    params_fraction: float

    def __repr__(self) -> str:
        """What was cut, in one line."""
        groups = self.channels.groups
        pruned = sum(
            len(self.kept.get(group.name, range(group.size))) < group.size for group in groups
        )
        frozen = sum(len(layers) for _, layers in self.channels.frozen)
        quarantined = len(self.channels.quarantined)
        parts = [
            gain_text("macs", 1 / self.macs_fraction),
            gain_text("params", 1 / self.params_fraction),
            f"{pruned} of {len(groups)} channel groups pruned",
            *([f"{times(frozen, 'layer')} frozen"] if frozen else []),
            *([f"{times(quarantined, 'group')} quarantined"] if quarantined else []),
        ]
        return f"Pruned({', '.join(parts)})"


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
    ignored: Collection[str | nn.Module] = (),
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
        least_fraction: of each group, which stays however it ranks, from 0 to below 1; a smaller
            `kept_fraction` goes before it, `macs_fraction` does not.
        ignored: modules of the model, or their names, that keep their channels, and so do the
            groups that run through them.
        backward: for "taylor" and "hessian": adds the gradients of your loss to the parameters of
            the model that it is given, one `.backward()` for each of some batches.

    Raises:
        ConfigError: unless one of the two fractions is given; for values without a meaning, for
            widths that leave nothing to cut, and for a `backward` that adds no gradients.
        ModelError: if the model has no channels that can be removed, or does not run on `inputs`;
            for TorchScript, and lazy modules that have not run yet.

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
    check_least_fraction(least_fraction)
    _check_model(model)
    names = _ignored_names(model, ignored)
    with torch.inference_mode(False):  # in it, neither operations nor gradients can be seen
        inputs = ModelInputs.of(inputs).to(device_of(model))
        channels = find_groups(model, inputs)
        groups = [group for group in channels.groups if not _is_ignored(group, names)]
        if not groups:
            raise ModelError(_why_nothing(channels))
        scored = copy_model(model)
        cut_to(scored, groups, {})
        observed = observe(scored, importance, inputs, backward)
        _check_gradients(groups, importance, observed)
        scores = {g.name: group_importance(scored, g, importance, observed) for g in groups}
        before = count(model, inputs)
        search = _Search(
            model, inputs, scored, groups, scores, before.macs, scope, round_to, least_fraction
        )
        if macs_fraction is not None:
            kept = search.choose_within(macs_fraction)
        else:
            assert kept_fraction is not None
            kept = search.choose(kept_fraction)
            _check_cut(groups, kept, kept_fraction, round_to)
        pruned = copy_model(model)
        cut_to(pruned, [group for group in groups if len(kept[group.name]) < group.size], kept)
        after = count(pruned, inputs)
    remember_origin(pruned, model)
    return Pruned(
        pruned,
        kept,
        channels,
        macs_fraction=after.macs / before.macs if before.macs else 1.0,
        params_fraction=after.params / before.params,
    )


@dataclass(frozen=True)
class _Search:
    """What the channels that stay are chosen from, and by what."""

    model: nn.Module
    inputs: ModelInputs
    scored: nn.Module
    groups: Sequence[ChannelGroup]
    scores: Mapping[str, Tensor]
    macs: int
    scope: Scope
    round_to: int
    least_fraction: float

    def choose(self, fraction: float, *, is_floor: bool = False) -> Kept:
        return select_kept(
            self.scored,
            self.groups,
            self.scores,
            fraction,
            scope=self.scope,
            round_to=self.round_to,
            least_fraction=self.least_fraction,
            is_floor=is_floor,
        )

    def choose_within(self, limit: float) -> Kept:
        """As many channels as leave no more than `limit` of the work."""
        if not self.macs:
            raise ModelError(
                f"No multiply-accumulates are counted in the model, so macs_fraction={limit} has "
                "no meaning. Give kept_fraction."
            )
        choose = partial(self.choose, is_floor=True)
        fraction = largest_fraction(lambda fraction: self._macs_left(choose(fraction)) <= limit)
        if fraction is None:
            raise ConfigError(
                f"macs_fraction={limit} cannot be reached: with the least that stays of every "
                f"group, by least_fraction={self.least_fraction} and round_to={self.round_to}, "
                f"{self._macs_left(choose(1e-9)):.3f} are left. Allow more, or make these smaller."
            )
        kept = choose(fraction)
        if self._macs_left(kept) >= CLOSE * limit:
            return kept

        def fits(wider: Kept) -> bool:
            return self._macs_left(wider) <= limit

        return widen_kept(
            self.scored,
            self.groups,
            self.scores,
            kept,
            fits,
            scope=self.scope,
            round_to=self.round_to,
        )

    def _macs_left(self, kept: Kept) -> float:
        trial = copy_skeleton(self.model)
        cut_to(trial, self.groups, kept)
        return count(trial, self.inputs).macs / self.macs


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
    if importance not in CRITERIA:
        near = suggest(str(importance).lower(), CRITERIA)
        raise ConfigError(f"importance={importance!r} is unknown. {near}")
    if importance in NEEDS_GRADIENTS and backward is None:
        raise ConfigError(
            f"importance={importance!r} needs the gradients of your loss. Give `backward`, a "
            "function of the model that calls `loss.backward()` for each of some batches."
        )


def _check_model(model: nn.Module) -> None:
    """Refuse what cannot be cut, before any work."""
    check_module("model", model)
    for name, module in model.named_modules():
        where = f"Its module {name!r}" if name else "The model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{where} is TorchScript, whose layers cannot be cut. Give the module itself, from "
                "before torch.jit.script or torch.jit.trace."
            )
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(tensor is not None and is_lazy(tensor) for tensor in tensors):
            raise ModelError(
                f"{where} is a {type(module).__name__} without sizes yet. Run the model once first."
            )


def _ignored_names(model: nn.Module, ignored: Collection[str | nn.Module]) -> frozenset[str]:
    """All names of the modules that `ignored` lists, and of those inside them."""
    if isinstance(ignored, (str, nn.Module)):
        given = repr(ignored) if isinstance(ignored, str) else f"a {type(ignored).__name__}"
        raise ConfigError(f"`ignored` is {given}, not a list. Write it in brackets: [...].")
    modules = dict(model.named_modules(remove_duplicate=False))
    known = {id(module) for module in modules.values()}
    inside: set[int] = set()
    for item in ignored:
        if isinstance(item, str) and item not in modules:
            near = suggest(item, filter(None, modules))
            raise ConfigError(f"The model has no module {item!r} to ignore. {near}")
        module = modules[item] if isinstance(item, str) else item
        if id(module) not in known:
            raise ConfigError(
                f"`ignored` has a {type(module).__name__} that is no module of the model. Give "
                "modules of the model that is pruned, not of a copy, or their names."
            )
        inside |= {id(part) for part in module.modules()}
    return frozenset(name for name, module in modules.items() if id(module) in inside)


def _is_ignored(group: ChannelGroup, names: Collection[str]) -> bool:
    return any(
        module == name or module.startswith(f"{name}.")
        for module in group.modules
        for name in names
    )


def _why_nothing(channels: ChannelMap) -> str:
    reasons = [f"{name}: {why}" for name, why in channels.quarantined]
    reasons += [f"{', '.join(layers[:3])}: {why}" for why, layers in channels.frozen]
    joined = "; ".join(reason.rstrip(".") for reason in reasons[:3])
    return (
        "The model has no channels that can be removed. "
        f"{joined or 'Name fewer modules in `ignored`'}."
    )


def _check_gradients(groups: Sequence[ChannelGroup], importance: str, observed: Observed) -> None:
    """Refuse a `backward` after which nothing could be ranked."""
    seen = {**observed.gradients, **observed.squared_gradients}
    tensors = {member.tensor for group in groups for member in group.members}
    if importance in NEEDS_GRADIENTS and tensors.isdisjoint(seen):
        raise ConfigError(
            f"After `backward`, no parameter that could be pruned has a gradient, and "
            f"importance={importance!r} needs them. Compute the loss with the model that "
            "`backward` is given, a copy of yours, and call `loss.backward()`."
        )


def _check_cut(
    groups: Sequence[ChannelGroup], kept: Kept, kept_fraction: float, round_to: int
) -> None:
    """Refuse to give back the whole model to who asked for less."""
    if kept_fraction == 1 or any(len(kept[group.name]) < group.size for group in groups):
        return
    widest = max(groups, key=lambda group: group.size)
    raise ConfigError(
        f"kept_fraction={kept_fraction} cuts nothing: the widest group, {widest.name!r}, has "
        f"{widest.size} channels, kept in multiples of {width_step(widest, round_to)} "
        f"(round_to={round_to}). Keep less, or round to less."
    )
