"""How many channels each group keeps under each scope, and what is left of the groups."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import nn

from compressor.errors import ConfigError
from compressor.structure.groups import ChannelGroup, Count, Member
from compressor.structure.selection import (
    Kept,
    Scope,
    cut_to,
    kind_of,
    largest_fraction,
    narrowed,
    rounded_width,
    select_kept,
    widen_kept,
    width_step,
)


def linear_group(name: str, size: int, reader: str = "") -> ChannelGroup:
    index = tuple((i,) for i in range(size))
    members = [Member(f"{name}.weight", 0, "out", index, size)]
    members += [Member(f"{reader}.weight", 1, "in", index, size)] if reader else []
    return ChannelGroup(name, size, tuple(members))


MODEL = nn.ModuleDict({"a": nn.Linear(2, 4), "b": nn.Linear(2, 4), "c": nn.Conv1d(2, 4, 1)})
GROUPS = [linear_group(name, 4) for name in "abc"]
SCORES = {
    "a": torch.tensor([9.0, 8.0, 7.0, 6.0]),
    "b": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "c": torch.tensor([0.1, 0.2, 0.4, 0.3]),
}


def test_each_layer_keeps_its_own_best_half() -> None:
    kept = select_kept(MODEL, GROUPS, SCORES, 0.5)
    assert kept == {"a": (0, 1), "b": (2, 3), "c": (2, 3)}


def test_one_ranking_gives_the_widths_and_leaves_every_layer_one() -> None:
    kept = select_kept(MODEL, GROUPS, SCORES, 0.5, scope="global")
    assert kept == {"a": (0, 1, 2, 3), "b": (2, 3), "c": (2,)}  # six of twelve, and one


def test_layers_of_one_kind_are_ranked_together() -> None:
    kept = select_kept(MODEL, GROUPS, SCORES, 0.5, scope="isomorphic")
    assert kept == {"a": (0, 1, 2, 3), "b": (3,), "c": (2, 3)}


def test_a_group_keeps_its_least_fraction_however_it_ranks() -> None:
    kept = select_kept(MODEL, GROUPS, SCORES, 0.5, scope="global", least_fraction=0.5)
    assert {name: len(channels) for name, channels in kept.items()} == {"a": 4, "b": 2, "c": 2}


def test_a_floor_holds_below_the_fraction_and_against_rounding() -> None:
    group = linear_group("a", 20)
    scores = {"a": torch.arange(20.0)}

    def width(kept_fraction: float, least: float, *, is_floor: bool, round_to: int = 1) -> int:
        kept = select_kept(
            MODEL,
            [group],
            scores,
            kept_fraction,
            round_to=round_to,
            least_fraction=least,
            is_floor=is_floor,
        )
        return len(kept["a"])

    assert width(0.1, 0.5, is_floor=False) == 2  # what was asked for goes before the default
    assert width(0.1, 0.5, is_floor=True) == 10
    assert width(0.7, 0.5, is_floor=True) == 14
    assert width(0.1, 0.5, is_floor=True, round_to=8) == 16  # the nearest, 8, is less than 10
    assert width(0.1, 0.85, is_floor=True, round_to=8) == 20  # 24 are not there


@pytest.mark.parametrize("least", [-0.1, 1.0, 1.5, float("nan")])
def test_a_least_fraction_out_of_range_is_refused(least: float) -> None:
    with pytest.raises(ConfigError, match=f"least_fraction={least}"):
        select_kept(MODEL, GROUPS, SCORES, 0.5, least_fraction=least)


def test_what_fits_is_given_back_best_first_and_no_more() -> None:
    none: dict[str, tuple[int, ...]] = {"a": (0,), "b": (3,), "c": (2,)}
    asked: list[int] = []

    def fits(kept: Mapping[str, Sequence[int]]) -> bool:
        asked.append(sum(map(len, kept.values())))
        return asked[-1] <= 6

    kept = widen_kept(MODEL, GROUPS, SCORES, none, fits, scope="global")
    assert kept == {"a": (0, 1, 2, 3), "b": (3,), "c": (2,)}  # all of a matter more than any other
    assert asked == [4, 5, 6, 7, 7]  # a is full; one more of b, then one of c, would be too much


def test_of_groups_that_change_at_once_the_relatively_better_step_is_first() -> None:
    none: dict[str, tuple[int, ...]] = {"a": (0,), "b": (3,), "c": (2,)}
    kept = widen_kept(
        MODEL, GROUPS, SCORES, none, lambda kept: sum(map(len, kept.values())) <= 5, scope="layer"
    )
    # of the means 7.5, 2.5 and 0.25: 8 is 1.07, 3 is 1.2, and 0.3 is 1.2 too, after b
    assert kept == {"a": (0,), "b": (2, 3), "c": (2, 3)}


@pytest.mark.parametrize("scope", ["layer", "global", "isomorphic"])
@pytest.mark.parametrize("round_to", [1, 2, 3, 8])
def test_widening_passes_through_every_wider_selection(scope: Scope, round_to: int) -> None:
    groups = [linear_group("a", 20), linear_group("b", 32), linear_group("c", 16)]
    random = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.size, generator=random) for group in groups}

    def select(kept_fraction: float) -> Kept:
        return select_kept(MODEL, groups, scores, kept_fraction, scope=scope, round_to=round_to)

    seen: list[Mapping[str, Sequence[int]]] = []

    def fits(kept: Mapping[str, Sequence[int]]) -> bool:
        seen.append(kept)
        return True

    first = select(0.5)
    last = widen_kept(MODEL, groups, scores, first, fits, scope=scope, round_to=round_to)
    assert last == select(1.0)
    for fraction in range(501, 1000):
        assert select(fraction / 1000) in [first, *seen]


@pytest.mark.parametrize("allowed", range(3, 13))
def test_steps_fill_up_what_is_allowed(allowed: int) -> None:
    none: dict[str, tuple[int, ...]] = {"a": (0, 1), "b": (2, 3), "c": (2,)}

    def fits(kept: Mapping[str, Sequence[int]]) -> bool:
        return sum(map(len, kept.values())) <= max(allowed, 5)

    kept = widen_kept(MODEL, GROUPS, SCORES, none, fits, round_to=2)
    width = sum(map(len, kept.values()))
    assert all(set(none[name]) <= set(channels) for name, channels in kept.items())
    assert all(len(kept[name]) in (2, 4) for name in "ab")
    assert len(kept["c"]) in (1, 2, 4)  # the next multiple of two is one more
    assert max(allowed, 5) - 2 < width <= max(allowed, 5) or width == 12


def test_kinds_are_classes_sides_and_entries() -> None:
    a, b, c = (kind_of(MODEL, group) for group in GROUPS)
    assert a == b != c
    wide = ChannelGroup("a", 2, (Member("a.weight", 0, "out", ((0, 1), (2, 3)), 4),))
    assert kind_of(MODEL, wide) != a


def test_equal_scores_give_the_same_choice_again() -> None:
    scores = {name: torch.ones(4) for name in "abc"}
    first = select_kept(MODEL, GROUPS, scores, 0.5, scope="global")
    assert first == select_kept(MODEL, GROUPS, scores, 0.5, scope="global")


@pytest.mark.parametrize(
    ("entries", "round_to", "step"), [(1, 16, 16), (64, 16, 1), (4, 16, 4), (6, 16, 8), (3, 1, 1)]
)
def test_rounding_is_of_entries_and_not_of_heads(entries: int, round_to: int, step: int) -> None:
    index = tuple(tuple(range(i * entries, (i + 1) * entries)) for i in range(12))
    group = ChannelGroup("q", 12, (Member("q.weight", 0, "out", index, 12 * entries),))
    assert width_step(group, round_to) == step
    assert step * entries % round_to == 0
    assert all(smaller * entries % round_to for smaller in range(1, step))


def test_a_group_narrower_than_the_step_is_left_alone() -> None:
    assert rounded_width(3, size=12, step=16) == 12


@pytest.mark.parametrize("scope", ["layer", "global", "isomorphic"])
def test_keeping_all_keeps_all(scope: str) -> None:
    kept = select_kept(MODEL, GROUPS, SCORES, 1.0, scope=scope, round_to=3)  # type: ignore[arg-type]
    assert all(len(channels) == 4 for channels in kept.values())


@pytest.mark.parametrize("fraction", [0.0, 1.5, -1.0])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=f"kept_fraction={fraction}"):
        select_kept(MODEL, GROUPS, SCORES, fraction)


def test_an_unknown_scope_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'global'"):
        select_kept(MODEL, GROUPS, SCORES, 0.5, scope="globl")  # type: ignore[arg-type]


def test_the_largest_fraction_that_fits_is_found() -> None:
    steps = [0.1, 0.25, 0.3, 0.7]
    for limit in steps:
        found = largest_fraction(lambda fraction, limit=limit: fraction < limit)
        assert found == pytest.approx(limit, abs=2e-6)
        assert found < limit
    assert largest_fraction(lambda _: True) == 1.0
    assert largest_fraction(lambda _: False) is None


def test_narrowed_groups_describe_the_model_after_the_cut() -> None:
    """Two groups that a concatenation joins: cutting twice equals cutting once."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 4), "c": nn.Linear(7, 1)})
    first = ChannelGroup(
        "a",
        3,
        (
            Member("a.weight", 0, "out", ((0,), (1,), (2,)), 3),
            Member("a.bias", 0, "out", ((0,), (1,), (2,)), 3),
            Member("c.weight", 1, "in", ((0,), (1,), (2,)), 7),
        ),
    )
    four = tuple((i,) for i in range(4))
    second = ChannelGroup(
        "b",
        4,
        (
            Member("b.weight", 0, "out", four, 4),
            Member("b.bias", 0, "out", four, 4),
            Member("c.weight", 1, "in", tuple((3 + i,) for i in range(4)), 7),
        ),
        counts=(Count("c", "in_heads", (1, 2, 3, 4)),),
    )
    groups, once, twice = [first, second], copy.deepcopy(model), copy.deepcopy(model)
    once["c"].in_heads = twice["c"].in_heads = 10
    cut_to(once, groups, {"a": (1,), "b": (1, 3)})
    cut_to(twice, groups, {"a": (1, 2), "b": (0, 1, 3)})
    left = narrowed(groups, {"a": (1, 2), "b": (0, 1, 3)})
    assert [group.size for group in left] == [2, 3]
    cut_to(twice, left, {"a": (0,), "b": (1, 2)})
    assert twice["c"].in_heads == once["c"].in_heads == 6
    for name, value in once.state_dict().items():
        assert twice.state_dict()[name].equal(value), name
