"""The search's turns, on variants that are numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from compressor.progress import SILENT
from compressor.result import Choice, Cost, VariantRecord
from compressor.search.attempts import Attempts
from compressor.search.budget import Spending
from compressor.search.finishing import Effort
from compressor.search.goal import Goal
from compressor.search.search import Search
from compressor.search.space import LayerChange, LayerState, Space
from compressor.search.strategy import DamageSearch
from compressor.search.variants import Wish

LAYERS = {f"layer{i}": LayerState(8, 8) for i in range(20)}
CHOICES = [Choice("block_removal", layer, {"removed": True}) for layer in LAYERS]
DAMAGE = {choice.key: 0.05 * (i + 1) for i, choice in enumerate(CHOICES)}
GOAL = Goal("accuracy", 90.0, 1.0, is_larger_better=True, resource="macs")
EPOCH_SECONDS = 10.0


def macs(_: str, state: LayerState) -> float:
    return 0.0 if state.is_removed else 1.0


class Numbers:
    """Variants that lose a point per damage, of which training keeps half, then less."""

    def __init__(self, clock: list[float], width: int) -> None:
        self.clock, self.width, self.turns = clock, width, width
        self.ids: Iterator[int] = itertools.count()

    def make(self, wishes: Sequence[Wish]) -> list[VariantRecord]:
        return [self._make(wish) for wish in wishes]

    def _make(self, wish: Wish) -> VariantRecord:
        total = wish.epochs + (wish.start.epochs if wish.start else 0)
        self.clock[0] += wish.epochs * EPOCH_SECONDS
        lost = 4.0 * wish.predicted["damage"] / (1 + total / 2)
        return VariantRecord(
            f"v{next(self.ids)}",
            wish.plan,
            "done",
            {"accuracy": 90.0 - lost},
            Cost(1, int(100 * wish.predicted["cost"]), 1, 1.0),
            wish.predicted,
            total,
            seconds=wish.epochs * EPOCH_SECONDS,
            is_final=wish.is_final,
            start=wish.start.id if wish.start else "",
        )


def run(
    minutes: float | None, trials: int = 100, goal: Goal = GOAL, width: int = 1, **effort: Any
) -> tuple[Search, Attempts, float]:
    """The pass, what it tried, and the seconds that it took."""
    clock = [0.0]
    effects = {c.key: {c.site: LayerChange(removes=True)} for c in CHOICES}
    space = Space(CHOICES, effects, LAYERS)
    answers: dict[str, int] = {}
    attempts = Attempts(
        goal,
        Numbers(clock, width),  # type: ignore[arg-type]
        lambda question, compute: answers.setdefault(question, int(compute())),
        SILENT,
    )
    search = Search(
        goal,
        attempts,
        DamageSearch(space.problem(DAMAGE, macs), space, allowed_fraction=0.01),
        Spending(minutes, trials, clock=lambda: clock[0]),
        Effort(**{"trial_epochs": 2, "final_epochs": 20, "finalists": 100, **effort}),
        is_number=lambda technique: technique == "quantization",
    )
    search.run()
    return search, attempts, clock[0]


def test_latencies_are_predicted_where_they_are_the_objective() -> None:
    _, attempts, _ = run(None, trials=3, goal=replace(GOAL, resource="latency_ms"))
    assert attempts.records
    for record in attempts.records:
        assert record.predicted["latency_ms"] == record.predicted["cost"]
    assert all("latency_ms" not in r.predicted for r in run(None, trials=3)[1].records)


def test_more_minutes_never_end_in_a_dearer_variant() -> None:
    costs = []
    for minutes in (3, 10, 30, 90):
        _, attempts, _ = run(minutes)
        within = [r.cost.macs for r in attempts.records if r.cost and GOAL.holds(r)]
        costs.append(min(within, default=10_000))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0]


def test_the_minutes_are_kept_within_one_trial() -> None:
    for minutes in (2, 5, 10, 30):
        *_, seconds = run(minutes)
        assert seconds <= minutes * 60 + 2 * EPOCH_SECONDS


def test_nothing_is_tried_that_there_is_no_time_to_finish() -> None:
    """Once a finalist was left, wider and wider trials used to be made until the end."""
    _, attempts, _ = run(10)
    last_final = max(i for i, r in enumerate(attempts.records) if r.is_final)
    trials_after = [r for r in attempts.records[last_final + 1 :] if not r.is_final]
    assert len(trials_after) <= 2


def test_a_finalist_teaches_how_far_a_trial_may_drop() -> None:
    """Full training keeps little of a drop here, so deeper plans than the first guess hold."""
    _, attempts, _ = run(None, trials=30)
    finals = [r for r in attempts.records if r.is_final]
    assert len(finals) >= 2
    best = min(r.cost.macs for r in attempts.records if r.cost and GOAL.holds(r))
    first = finals[0].cost
    assert first is not None
    assert best <= first.macs


def test_no_more_finalists_than_the_effort_allows() -> None:
    _, attempts, _ = run(None, trials=30, finalists=1)
    assert sum(r.is_final for r in attempts.records) == 1


def test_a_wide_round_ends_no_worse_than_a_narrow_one() -> None:
    """Of as many trials; one that is asked for beside another cannot know what came of it."""
    best = {}
    for width in (1, 2, 4):
        _, attempts, _ = run(None, trials=16, width=width)
        trials = [r for r in attempts.records if not (r.is_final or r.start)]
        assert len(trials) <= 16
        best[width] = min(r.cost.macs for r in attempts.records if r.cost and GOAL.holds(r))
    assert max(best.values()) <= 1.15 * best[1]


def test_a_round_asks_for_different_plans() -> None:
    _, attempts, _ = run(None, trials=12, width=4)
    plans = [r.plan.digest for r in attempts.records if not (r.is_final or r.start)]
    assert len(set(plans)) == len(plans)
    assert len(plans) >= 4


def test_finalists_of_a_wide_round_share_the_minutes_where_they_follow_each_other() -> None:
    for width in (1, 2, 4):
        *_, seconds = run(20, width=width)
        assert seconds <= 20 * 60 + 2 * width * EPOCH_SECONDS


def test_minutes_that_are_left_go_into_the_trial_that_lacks_least() -> None:
    """A search used to end with half of its minutes because a trial lost a little too much."""
    _, attempts, seconds = run(10, final_epochs=None)
    said = [s for s in attempts.decisions if s.startswith("Minutes are left")]
    assert said
    for record in attempts.records:
        if any(f"variant {record.id} " in sentence for sentence in said):
            assert any(r.is_final and r.start == record.id for r in attempts.records)
    assert seconds > 0.85 * 10 * 60


def test_where_trials_end_the_search_only_what_is_promising_is_finished() -> None:
    _, attempts, _ = run(None, trials=20)
    assert not any(s.startswith("Minutes are left") for s in attempts.decisions)
