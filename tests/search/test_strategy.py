"""The search for the damage whose drop is as large as is allowed."""

from __future__ import annotations

import math

import pytest

from compressor.result import Choice, Plan
from compressor.search.space import LayerChange, LayerState, Space
from compressor.search.strategy import LARGEST_STEP, DamageSearch

COUNT = 12
LAYERS = {f"layer{i}": LayerState(8, 8) for i in range(COUNT)}
CHOICES = [Choice("block_removal", layer, {"removed": True}) for layer in LAYERS]
CHOICES_PLAN = Plan(tuple(CHOICES))
DAMAGE = {choice.key: 0.05 * (i + 1) for i, choice in enumerate(CHOICES)}


def make(limit: float | None = None) -> DamageSearch:
    effects = {c.key: {c.site: LayerChange(removes=True)} for c in CHOICES}
    space = Space(CHOICES, effects, LAYERS)

    def cost(_: str, state: LayerState) -> float:
        return 0.0 if state.is_removed else 1.0

    limits = [] if limit is None else [(cost, limit)]
    return DamageSearch(space.problem(DAMAGE, cost, limits), space, allowed_fraction=0.01)


def drop(damage: float, points_per_damage: float) -> float:
    return points_per_damage * damage


@pytest.mark.parametrize("points_per_damage", [0.3, 1.0, 5.0, 30.0])
def test_the_cheapest_plan_that_holds_is_found_in_few_trials(points_per_damage: float) -> None:
    allowed = 1.0
    found, trials = COUNT, 0
    strategy = make()
    while (proposal := strategy.ask(allowed)) is not None and trials < 8:
        trials += 1
        lost = drop(proposal.damage, points_per_damage)
        strategy.tell(proposal.plan, lost)
        if lost <= allowed:
            found = min(found, int(proposal.cost))
    best = COUNT  # brute force: with equal savings, the least damaging choices go first
    total = 0.0
    for i, damage in enumerate(sorted(DAMAGE.values())):
        total += damage
        if drop(total, points_per_damage) <= allowed:
            best = COUNT - (i + 1)
    assert found <= best + 1


def test_no_plan_is_asked_twice_and_the_empty_one_never() -> None:
    strategy = make()
    asked = []
    for number in range(50):
        proposal = strategy.ask(1.0)
        if proposal is None:
            break
        asked.append(proposal.plan.digest)
        strategy.tell(proposal.plan, math.inf if number % 3 == 0 else 0.5)
    assert len(asked) == len(set(asked))
    assert Plan().digest not in asked


def test_beyond_what_dropped_as_far_as_allowed_the_next_plan_is_a_small_step_away() -> None:
    """Half of the way to `MAX_DAMAGE` was skipped: ResNet-56 lost 25 of its 27 blocks at once."""
    for lost in (1.0, 0.999):  # the rule ends at the known plan, and just beyond it
        strategy = make()
        known = Plan(tuple(CHOICES[:4]))
        strategy.tell(known, lost)
        proposal = strategy.ask(1.0)
        assert proposal is not None
        assert strategy.describe(known).damage == pytest.approx(0.5)
        assert proposal.plan == Plan(tuple(CHOICES[:5]))


def test_a_larger_allowance_proposes_at_least_as_much_damage() -> None:
    strategy = make()
    first = strategy.ask(1.0)
    assert first is not None
    strategy.tell(first.plan, 1.0)
    small, large = strategy.at(first.damage), strategy.ask(4.0)
    assert small is not None
    assert large is not None
    assert large.damage > small.damage
    assert large.cost < small.cost


def test_a_plan_that_costs_more_than_the_best_is_not_proposed() -> None:
    strategy = make()
    proposal = strategy.ask(1.0, cost_below=6.0)
    assert proposal is not None
    assert proposal.cost < 6.0
    strategy.tell(proposal.plan, math.inf)
    while (proposal := strategy.ask(1.0, cost_below=6.0)) is not None:
        assert proposal.cost < 6.0
        strategy.tell(proposal.plan, math.inf)


def test_plans_that_break_a_limit_are_not_proposed() -> None:
    strategy = make(limit=8.0)
    proposal = strategy.ask(1.0)
    assert proposal is not None
    assert proposal.cost <= 8.0


def test_beside_a_plan_others_halve_what_is_open_near_it() -> None:
    strategy = make()
    strategy.tell(CHOICES_PLAN, 100.0)  # so much damage fails
    first = strategy.ask(1.0)
    assert first is not None
    beside = strategy.ask_beside(first, 3, 1.0)
    assert 1 <= len(beside) <= 3
    plans = {first.plan.digest, *(each.plan.digest for each in beside)}
    assert len(plans) == 1 + len(beside)
    fails = strategy.damage_of(CHOICES_PLAN)
    for each in beside:
        assert each.damage < min(fails, LARGEST_STEP * first.damage)
    assert strategy.ask_beside(first, 0, 1.0) == []


def test_a_limit_holds_for_what_is_measured_where_layers_promise_less() -> None:
    """The sum over the layers leaves out what the rest of the graph takes."""
    bound, overhead = 6.0, 1.4
    strategy = make(bound)
    just = strategy.describe(Plan(tuple(CHOICES[: COUNT // 2])))
    assert just.cost == bound
    assert strategy.at(just.damage) is not None
    strategy.tell(just.plan, 0.5, [overhead * just.cost])
    assert strategy.at(just.damage) is None
    deeper = strategy.ask(1.0)
    assert deeper is not None
    assert overhead * deeper.cost <= bound
