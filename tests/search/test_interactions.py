"""Damages of pairs: where they are measured, and what the allocation makes of them."""

from __future__ import annotations

import itertools

import pytest

from compressor.result import Choice, Plan
from compressor.search.interactions import Interactions
from compressor.search.space import LayerChange, LayerState, Space
from compressor.search.strategy import DamageSearch

LAYERS = {f"layer{i}": LayerState(8, 8) for i in range(6)}
CHOICES = [Choice("block_removal", layer, {"removed": True}) for layer in LAYERS]
ALONE = {choice.key: 0.1 for choice in CHOICES}
CLASH = 0.5  # of neighbours that are both removed


def strategy() -> DamageSearch:
    effects = {c.key: {c.site: LayerChange(removes=True)} for c in CHOICES}
    space = Space(CHOICES, effects, LAYERS)

    def cost(_: str, state: LayerState) -> float:
        return 0.0 if state.is_removed else 1.0

    return DamageSearch(space.problem(ALONE, cost), space, allowed_fraction=0.01)


def measured(plan: Plan) -> float:
    """Neighbours clash; otherwise damages add."""
    places = sorted(int(choice.site.removeprefix("layer")) for choice in plan)
    return 0.1 * len(places) + CLASH * sum(b - a == 1 for a, b in itertools.pairwise(places))


def interactions(said: list[str], has_time: bool = True) -> Interactions:
    return Interactions(measured, lambda name: False, lambda question: has_time, said.append)


def test_a_plan_avoids_what_clashes_once_pairs_were_measured() -> None:
    said: list[str] = []
    search, pairs = strategy(), interactions(said)
    first = search.at(0.3)
    assert first is not None
    while pairs.learn(search, first):
        first = search.at(0.3)
        assert first is not None
    assert first.cost == 3.0  # three layers of six are left, none of the others beside another
    assert measured(first.plan) == pytest.approx(search.damage_of(first.plan)) == pytest.approx(0.3)
    assert said
    assert "3 changes" in said[0]


def test_what_was_told_is_reckoned_anew() -> None:
    search = strategy()
    both = Plan(tuple(CHOICES[:2]))
    search.tell(both, 0.9)
    assert search.damage_of(both) == pytest.approx(0.2)
    interactions([]).learn(search, search.describe(both))
    assert search.damage_of(both) == pytest.approx(0.2 + CLASH)


def test_damages_that_add_are_left_as_they_are() -> None:
    said: list[str] = []
    search = strategy()
    apart = Plan((CHOICES[0], CHOICES[2], CHOICES[4]))
    assert not interactions(said).learn(search, search.describe(apart))
    assert not said


def test_without_time_nothing_is_measured() -> None:
    search = strategy()
    proposal = search.describe(Plan(tuple(CHOICES)))
    assert not interactions([], has_time=False).learn(search, proposal)
