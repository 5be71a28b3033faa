"""Which variant becomes the result, and what is said where none does."""

from __future__ import annotations

import pytest

from compressor.result import Choice, Cost, Plan, VariantRecord
from compressor.search.choosing import choose, explain
from compressor.search.goal import Goal

GOAL = Goal("accuracy", 0.917, 0.01, is_larger_better=True, resource="latency_ms")
REFERENCE = Cost(1, 100, 1, 2.0)
PLAN = Plan((Choice("block_removal", "layer1", {"removed": True}),))


def made(id: str, accuracy: float, latency_ms: float, plan: Plan = PLAN) -> VariantRecord:
    cost = Cost(1, 100, 1, latency_ms)
    return VariantRecord(id, plan, "done", {"accuracy": accuracy}, cost)


FAST, SLOW = made("fast", 0.910, 1.0), made("slow", 0.917, 1.8)
BAD = made("bad", 0.800, 0.5)
RECORDS = [SLOW, FAST, BAD]


def test_why_nothing_held_is_said_with_the_nearest() -> None:
    failed = VariantRecord("failed", PLAN, "failed", reason="nan")
    far = explain(GOAL, None, REFERENCE, [BAD], choices=3)
    assert "bad" in far
    assert "0.117" in far
    assert "nan" in explain(GOAL, None, REFERENCE, [failed], choices=3)
    assert "no technique" in explain(GOAL, None, REFERENCE, [], choices=0)
    assert "budget ended" in explain(GOAL, None, REFERENCE, [], choices=3)


def test_a_variant_that_changes_nothing_or_saves_nothing_is_not_an_answer() -> None:
    nothing, dear = made("nothing", 0.917, 1.0, Plan()), made("dear", 0.917, 2.0)
    assert explain(GOAL, nothing, REFERENCE, [nothing], choices=3)
    assert "less latency_ms" in explain(GOAL, dear, REFERENCE, [dear], choices=3)
    assert explain(GOAL, FAST, REFERENCE, [FAST], choices=3) == ""


@pytest.mark.parametrize(
    ("measured_again", "taken"),
    [
        ({"fast": 1.2, "slow": 1.8}, "fast"),
        ({"fast": 2.4, "slow": 1.8}, "slow"),
        ({"fast": 2.4, "slow": 2.1}, None),
    ],
)
def test_a_file_that_is_slower_than_the_reference_is_not_the_answer(
    measured_again: dict[str, float], taken: str | None
) -> None:
    said: list[str] = []
    best, reason, latency_ms = choose(
        GOAL,
        FAST,
        REFERENCE,
        RECORDS,
        choices=3,
        deploy=lambda record: measured_again[record.id] if record else 2.0,
        cost=lambda latency: Cost(1, 100, 1, latency),
        say=said.append,
    )
    assert (best.id if best else None) == taken
    assert latency_ms == (measured_again[taken] if taken else 2.0)
    assert bool(reason) == (taken is None)
    refused = [name for name in ("fast", "slow") if f"Variant {name} is not taken: " in str(said)]
    assert refused == {"fast": [], "slow": ["fast"], None: ["fast", "slow"]}[taken]
    last = "The reference itself is the answer" if taken is None else f"Variant {taken} is taken"
    assert last in said[-1]
