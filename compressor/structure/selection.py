"""From scores to cuts: how many channels each group keeps, and which.

Ranking within isomorphic groups: Fang et al. 2024, Isomorphic Pruning (2407.04616).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil, gcd
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, suggest
from compressor.structure.cutting import keep_many
from compressor.structure.groups import ChannelGroup, Member
from compressor.structure.surgery import Edit

Scope: TypeAlias = Literal["layer", "global", "isomorphic"]
Kept: TypeAlias = dict[str, tuple[int, ...]]
"""Channels that stay, ascending, by the name of the group."""

BISECTIONS = 20  # a millionth of the channels
SCORE_FLOOR = 1e-12  # of a group in which nothing matters


def select_kept(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    kept_fraction: float,
    *,
    scope: Scope = "layer",
    round_to: int = 1,
    least_fraction: float = 0.0,
    is_floor: bool = False,
) -> Kept:
    """The channels that stay when the least important ones go.

    At least one step of every group stays; a width that rounding brings to the full one is full.

    Args:
        model: holds the tensors of the groups; for the scope "isomorphic".
        groups: with different names.
        scores: (group.size,) of each group by its name, larger matters more; groups of one ranking
            are compared by them.
        kept_fraction: of the channels of each ranking, above 0 and up to 1.
        scope: "layer": every group is ranked by itself and keeps the same fraction; "global": all
            channels are ranked together, so that the widths follow from the scores; "isomorphic":
            groups that run through layers of the same kinds are ranked together.
        round_to: kept widths are multiples of so many entries.
        least_fraction: of each group, which stays however it ranks, unless `kept_fraction` is less;
            from 0 to below 1.
        is_floor: whether `least_fraction` stays also where `kept_fraction` is less, or where the
            nearest multiple of `round_to` is: for searches over `kept_fraction`.

    Raises:
        ConfigError: for another scope, or a number that is out of range.
    """
    check_scope(scope)
    check_round_to(round_to)
    check_fraction("kept_fraction", kept_fraction)
    check_least_fraction(least_fraction)
    if not is_floor:
        least_fraction = min(least_fraction, kept_fraction)
    kept: Kept = {}
    for ranking in _rankings(model, groups, scope):
        for group, count in zip(ranking, _counts(ranking, scores, kept_fraction), strict=True):
            least = ceil(least_fraction * group.size)
            step = width_step(group, round_to)
            width = rounded_width(max(count, least), group.size, step)
            if is_floor and width < least:
                width = min(width + step, group.size)
            best = scores[group.name].argsort(descending=True, stable=True)[:width]
            kept[group.name] = tuple(sorted(best.tolist()))
    return kept


def widen_kept(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    kept: Mapping[str, tuple[int, ...]],
    fits: Callable[[Kept], bool],
    *,
    scope: Scope = "layer",
    round_to: int = 1,
) -> Kept:
    """`kept`, and as many of the channels that it leaves out as still fit.

    Rounding makes groups of one size change all at once, so that much room can be left. It is
    given to one group after another, a step at a time, in the order in which a rising
    `kept_fraction` would take the steps; of groups that change at once, that whose step has the
    highest mean score is first. A group whose step does not fit stays as it is.

    Args:
        model: as for `select_kept`, which gave `kept`; so are the rest.
        groups: with different names.
        scores: (group.size,) of each group by its name.
        kept: fits.
        fits: whether so many channels may stay; what does not fit stays so when more are added. It
            is asked once for each step taken, and once for each group that ends below its size.
        scope: which groups are ranked together.
        round_to: kept widths are multiples of so many entries.
    """
    places: dict[str, Tensor] = {}
    for ranking in _rankings(model, groups, scope):
        places |= _places(ranking, scores)
    widened = dict(kept)
    open_groups = {g.name: g for g in groups if len(kept[g.name]) < g.size}

    def turn(group: ChannelGroup) -> tuple[float, float]:
        full = width_step(group, round_to)
        step = _next_step(scores[group.name], widened[group.name], full)
        place = places[group.name][step[min(ceil(full / 2), len(step)) - 1]]  # it is rounded up
        own = scores[group.name]
        return float(place), -float(own[step].mean() / own.mean().clamp_min(SCORE_FLOOR))

    while open_groups:
        group = min(open_groups.values(), key=turn)
        step = _next_step(scores[group.name], widened[group.name], width_step(group, round_to))
        wider = {**widened, group.name: tuple(sorted([*widened[group.name], *step]))}
        if fits(wider):
            widened = wider
        if widened is not wider or len(widened[group.name]) == group.size:
            del open_groups[group.name]
    return widened


def cut_to(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]
) -> Edit:
    """Cut `groups` from `model`, all at once and in place.

    A group that `kept` does not name keeps all its channels; of its modules, those with a
    hard-wired width get the form that can lose some, so that the model then holds all tensors of
    the groups.

    Raises:
        SurgeryError: if the model would break; then it is left as it was.
    """
    return keep_many(model, [(g, tuple(kept.get(g.name, range(g.size)))) for g in groups])


def largest_fraction(fits: Callable[[float], bool]) -> float | None:
    """The largest fraction up to 1 that fits, to a millionth; None if nearly 0 does not.

    Args:
        fits: whether a fraction is small enough; what fits stays so when it is made smaller.

    >>> round(largest_fraction(lambda fraction: fraction * fraction <= 0.25), 5)
    0.5
    """
    if fits(1.0):
        return 1.0
    low, high = 2.0**-BISECTIONS, 1.0
    if not fits(low):
        return None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def entries_per_channel(group: ChannelGroup) -> int:
    """Entries that a channel has in the layer that makes it: a head of 64 features has 64."""
    makers = group.producers or group.members
    return max(map(len, makers[0].index))


def width_step(group: ChannelGroup, round_to: int) -> int:
    """The least number of channels whose entries are a multiple of `round_to`."""
    return round_to // gcd(round_to, entries_per_channel(group))


def rounded_width(count: int, size: int, step: int) -> int:
    """The multiple of `step` nearest to `count`, one step at least, `size` at most.

    >>> [rounded_width(count, size=20, step=8) for count in (1, 11, 12, 20)]
    [8, 8, 16, 20]
    """
    nearest = max(int(count / step + 0.5), 1) * step
    return size if nearest > size or count >= size else nearest


def kind_of(model: nn.Module, group: ChannelGroup) -> frozenset[tuple[object, int]]:
    """What two groups have in common that run through layers of the same kinds.

    The classes of the layers, which side of them, and how many entries a channel has there, each
    with how often it occurs.
    """
    found = Counter(
        (type(model.get_submodule(m.module)), m.side, max(map(len, m.index))) for m in group.members
    )
    return frozenset(found.items())


def narrowed(groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]) -> Groups:
    """The groups as they are after all others of their channels were cut in one `keep_many`.

    Args:
        groups: as they were found.
        kept: channels that stayed, ascending, by the name of the group; a group that is not named
            kept all.
    """
    removed: dict[tuple[str, int], set[int]] = {}
    for group in groups:
        for member in group.members:
            gone = group.pruned(list(kept.get(group.name, range(group.size))))
            cut = removed.setdefault((member.tensor, member.dim), set())
            cut.update(entry for channel in gone for entry in member.index[channel])
    return tuple(_narrow(group, kept.get(group.name), removed) for group in groups)


def check_scope(scope: str) -> None:
    """Do nothing if there is such a scope.

    Raises:
        ConfigError: if there is none.
    """
    if scope not in get_args(Scope):
        raise ConfigError(f"There is no scope {scope!r}. {suggest(scope, get_args(Scope))}")


def check_fraction(name: str, value: float | None) -> None:
    """Do nothing if the option `name` is None, or above 0 and up to 1.

    Raises:
        ConfigError: if it is not.
    """
    if value is not None and not 0 < value <= 1:
        raise ConfigError(f"{name}={value} is no fraction. Write 0.7 for 70 %.")


def check_least_fraction(value: float) -> None:
    """Do nothing if so much of every group can stay and something still go.

    Raises:
        ConfigError: unless it is from 0 to below 1.
    """
    if not 0 <= value < 1:
        raise ConfigError(
            f"least_fraction={value} is not from 0 to below 1. Write 0.1 for 10 % of every group."
        )


def check_round_to(round_to: int) -> None:
    """Do nothing if widths can be multiples of it.

    Raises:
        ConfigError: if it is below 1.
    """
    if round_to < 1:
        raise ConfigError(
            f"round_to={round_to} gives no width. Write 1 for any, 16 for its multiples."
        )


Groups: TypeAlias = tuple[ChannelGroup, ...]


def _rankings(
    model: nn.Module, groups: Sequence[ChannelGroup], scope: Scope
) -> list[list[ChannelGroup]]:
    """The groups that are ranked together."""
    if scope == "layer":
        return [[group] for group in groups]
    if scope == "global":
        return [list(groups)]
    alike: dict[frozenset[tuple[object, int]], list[ChannelGroup]] = {}
    for group in groups:
        alike.setdefault(kind_of(model, group), []).append(group)
    return list(alike.values())


def _places(ranking: Sequence[ChannelGroup], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `kept_fraction` from which each channel stays, by group."""
    together = torch.cat([scores[group.name] for group in ranking])
    place = together.argsort(descending=True, stable=True).argsort() + 0.5  # counts are rounded
    place /= len(together)
    parts = torch.split(place, [group.size for group in ranking])
    return {group.name: part for group, part in zip(ranking, parts, strict=True)}


def _counts(
    ranking: Sequence[ChannelGroup], scores: Mapping[str, Tensor], kept_fraction: float
) -> list[int]:
    """How many channels of each group are among the best of all."""
    if not ranking:
        return []
    together = torch.cat([scores[group.name] for group in ranking])
    best = torch.zeros(len(together), dtype=torch.bool)
    order = together.argsort(descending=True, stable=True)
    best[order[: round(kept_fraction * len(together))]] = True
    return [int(part.sum()) for part in torch.split(best, [group.size for group in ranking])]


def _next_step(scores: Tensor, kept: Sequence[int], step: int) -> list[int]:
    """The best of the channels that are left out: as many as the next multiple of `step` wants."""
    stays = set(kept)
    order = scores.argsort(descending=True, stable=True).tolist()
    pruned = [channel for channel in order if channel not in stays]
    return pruned[: step - len(stays) % step]


def _narrow(
    group: ChannelGroup,
    kept: Sequence[int] | None,
    removed: Mapping[tuple[str, int], set[int]],
) -> ChannelGroup:
    stays = range(group.size) if kept is None else kept

    def narrow(member: Member) -> Member:
        gone = removed[member.tensor, member.dim]
        left = [entry for entry in range(member.size) if entry not in gone]
        place = {entry: number for number, entry in enumerate(left)}
        index = tuple(tuple(place[entry] for entry in member.index[c]) for c in stays)
        return replace(member, index=index, size=len(left))

    counts = tuple(replace(c, amounts=tuple(c.amounts[i] for i in stays)) for c in group.counts)
    members = tuple(map(narrow, group.members))
    return replace(group, size=len(stays), members=members, counts=counts)
