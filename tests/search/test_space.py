"""Choices to a problem and back."""

from __future__ import annotations

import functools
import itertools
import time

import pytest

from compressor.result import Choice, Plan
from compressor.search import space as space_module
from compressor.search.allocate import Problem, least_cost
from compressor.search.space import LayerChange, LayerState, Space

LAYERS = {"a": LayerState(3, 8), "b": LayerState(8, 8), "c": LayerState(8, 2)}
NARROW = Choice("channel_pruning", "a", {"kept": [0, 1, 2, 3]})
NARROWER = Choice("channel_pruning", "a", {"kept": [0, 1]})
REMOVE = Choice("block_removal", "b", {"removed": True})
INT8 = {layer: Choice("quantization", layer, {"format": "static_int8"}) for layer in LAYERS}
CHOICES = [NARROW, NARROWER, REMOVE, *INT8.values()]
EFFECTS = {
    NARROW.key: {"a": LayerChange(outputs=-4), "b": LayerChange(inputs=-4)},
    NARROWER.key: {"a": LayerChange(outputs=-6), "b": LayerChange(inputs=-6)},
    REMOVE.key: {"b": LayerChange(removes=True)},
    **{choice.key: {layer: LayerChange(bits=8)} for layer, choice in INT8.items()},
}


def weight_bits(_: str, state: LayerState) -> float:
    return 0.0 if state.is_removed else float(state.inputs * state.outputs * state.bits)


def make() -> tuple[Space, Problem]:
    space = Space(CHOICES, EFFECTS, LAYERS)
    damage = {choice.key: 0.1 * (i + 1) for i, choice in enumerate(CHOICES)}
    return space, space.problem(damage, weight_bits)


def test_cost_of_a_combination_is_that_of_the_layers_it_leaves() -> None:
    space, problem = make()
    plan = Plan((NARROW, INT8["b"]))
    by_hand = 3 * 4 * 32 + 4 * 8 * 8 + 8 * 2 * 32
    assert problem.cost(space.options(plan)) == by_hand


def test_a_removed_layer_costs_nothing_whatever_else_is_chosen() -> None:
    space, problem = make()
    assert problem.cost(space.options(Plan((REMOVE,)))) == (3 * 8 + 8 * 2) * 32


def test_plans_and_options_are_each_others_inverse() -> None:
    space, problem = make()
    for options in itertools.product(*[range(len(site.damage)) for site in problem.sites]):
        assert space.options(space.plan(options)) == list(options)


def test_a_removed_layer_is_not_quantized_as_well() -> None:
    _, problem = make()
    names = [site.name for site in problem.sites]
    removal, inner = names.index("block_removal:b"), names.index("quantization:b")
    assert (removal, inner) in problem.overrules
    assert (removal, names.index("quantization:a")) not in problem.overrules


def test_within_a_damage_the_largest_saving_is_taken() -> None:
    space, problem = make()
    options = least_cost(problem, damage_limit=0.2)
    assert options is not None
    assert space.plan(options) == Plan((NARROWER,))


def test_negative_damage_counts_as_none() -> None:
    space = Space([REMOVE], {REMOVE.key: EFFECTS[REMOVE.key]}, LAYERS)
    assert space.problem({REMOVE.key: -0.5}, weight_bits).sites[0].damage == pytest.approx((0, 0))


def test_changes_of_one_layer_add_up() -> None:
    state = LayerState(8, 8)
    changes = [
        LayerChange(inputs=-4),
        LayerChange(bits=8),
        LayerChange(form="svd", ranks=(2,)),
        LayerChange(stored_bits=6.0),
        LayerChange(outputs=-2, stored_bits=5.0),
    ]
    for order in itertools.permutations(changes):
        after = functools.reduce(lambda state, change: change.applied_to(state), order, state)
        assert after == LayerState(4, 6, 8, form="svd", ranks=(2,), stored_bits=5.0)


def make_concatenated(sites: int, options: int) -> Space:
    """A layer that reads the concatenated outputs of `sites` others, each pruned in its own way."""
    pruned = list(itertools.product(range(sites), range(1, options)))
    choices = [Choice("channel_pruning", f"in{i}", {"pruned": count}) for i, count in pruned]
    effects = {
        choice.key: {"sum": LayerChange(inputs=-count)}
        for choice, (_, count) in zip(choices, pruned, strict=True)
    }
    return Space(choices, effects, {"sum": LayerState(16 * sites, 8)})


def test_additive_costs_are_the_same_one_by_one_as_in_every_combination(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space = make_concatenated(sites=3, options=3)
    damage = dict.fromkeys(space.effects, 0.0)
    exact = space.problem(damage, weight_bits)
    monkeypatch.setattr(space_module, "MOST_ENTRIES", 26)
    additive = space.problem(damage, weight_bits)
    assert [len(problem.factors) for problem in (exact, additive)] == [1, 4]
    for options in itertools.product(range(3), repeat=3):
        assert additive.cost(options) == exact.cost(options)


def test_a_layer_that_two_dozen_others_feed_is_no_table_of_all_combinations() -> None:
    """The 4 ** 24 combinations of a DenseNet's last layer filled the memory."""
    space = make_concatenated(sites=24, options=4)
    began = time.perf_counter()
    problem = space.problem(dict.fromkeys(space.effects, 0.0), weight_bits)
    assert time.perf_counter() - began < 0.5
    assert sum(factor.cost.size for factor in problem.factors) == 1 + 24 * 4
    assert problem.cost([3] * 24) == (24 * 16 - 24 * 3) * 8 * 32
    assert least_cost(problem) == [3] * 24
