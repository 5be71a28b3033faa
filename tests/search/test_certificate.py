"""When a claim means nothing, and what is claimed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compressor.errors import ConfigError
from compressor.frameworks.base import Judged
from compressor.result import Choice, Cost, Plan, VariantRecord
from compressor.search.certificate import (
    broken_limits,
    check_delta,
    explain,
    make_certificate,
)
from compressor.search.search import Goal, best_record, frontier

GOAL = Goal("accuracy", 0.917, 0.01, is_larger_better=True, resource="latency_ms")


def test_a_point_on_a_fraction_is_refused_with_the_value_to_write() -> None:
    with pytest.raises(ConfigError, match=r"delta=1 accepts every model.*write delta=0\.01"):
        check_delta(1.0, "accuracy", 0.917, is_larger_better=True)


@pytest.mark.parametrize(
    ("delta", "reference", "is_larger_better"),
    [(0.01, 0.917, True), (1.0, 91.7, True), (5.0, 0.3, False), (1.0, -3.0, True)],
)
def test_a_delta_that_can_fail_is_accepted(
    delta: float, reference: float, is_larger_better: bool
) -> None:
    check_delta(delta, "metric", reference, is_larger_better=is_larger_better)


@pytest.mark.parametrize(
    ("metric", "is_larger_better", "within"),
    [(0.908, True, True), (0.906, True, False), (0.926, False, True), (0.928, False, False)],
)
def test_within_delta_follows_the_direction_of_the_metric(
    metric: float, is_larger_better: bool, within: bool
) -> None:
    goal = Goal("accuracy", 0.917, 0.01, is_larger_better, "latency_ms")
    certificate = make_certificate(
        goal,
        Cost(100, 1000, 4000, 2.0),
        0.917,
        Judged({"accuracy": metric}, Cost(50, 250, 500, 0.5)),
        parity=None,
        target={},
        looks=3,
        split="test",
        notes=(),
    )
    assert certificate.within_delta is within
    assert certificate.latency_ratio == 4.0
    assert certificate.size_ratio == 8.0
    assert certificate.macs_ratio == 4.0
    assert certificate.params_ratio == 2.0


def record(name: str, accuracy: float, latency_ms: float, macs: int = 100) -> VariantRecord:
    cost = Cost(1, macs, 1, latency_ms)
    return VariantRecord(name, Plan(), "done", {"accuracy": accuracy}, cost)


RECORDS = [
    record("slow and good", 0.917, 2.0),
    record("fast and good", 0.910, 1.0),
    record("fastest and bad", 0.800, 0.5),
    record("dominated", 0.905, 1.5),
    VariantRecord("failed", Plan(), "failed", reason="nan"),
]


def test_the_best_is_the_cheapest_within_delta() -> None:
    best = best_record(GOAL, RECORDS)
    assert best is not None
    assert best.id == "fast and good"


def test_one_that_meets_the_limits_is_preferred() -> None:
    goal = Goal("accuracy", 0.917, 0.01, True, "latency_ms", limits=(("macs", 50),))
    lean = record("lean", 0.917, 1.9, macs=50)
    best = best_record(goal, [*RECORDS, lean])
    assert best is lean
    assert best_record(goal, RECORDS) is RECORDS[1]


def test_the_frontier_has_no_dominated_variant() -> None:
    assert [r.id for r in frontier(GOAL, RECORDS)] == [
        "fastest and bad",
        "fast and good",
        "slow and good",
    ]


PLAN = Plan((Choice("block_removal", "layer1", {"removed": True}),))
REFERENCE = Cost(1, 100, 1, 2.0)


def changed(record: VariantRecord) -> VariantRecord:
    return replace(record, plan=PLAN)


def test_why_nothing_held_is_said_with_the_nearest() -> None:
    far = explain(GOAL, None, REFERENCE, [changed(RECORDS[2])], choices=3)
    assert "fastest and bad" in far
    assert "0.117" in far
    assert "nan" in explain(GOAL, None, REFERENCE, [RECORDS[4]], choices=3)
    assert "no technique" in explain(GOAL, None, REFERENCE, [], choices=0)
    assert "budget ended" in explain(GOAL, None, REFERENCE, [], choices=3)


def test_a_variant_that_changes_nothing_or_saves_nothing_is_not_an_answer() -> None:
    nothing, slow, fast = RECORDS[1], changed(RECORDS[0]), changed(RECORDS[1])
    assert explain(GOAL, nothing, REFERENCE, [nothing], choices=3)
    assert "less latency_ms" in explain(GOAL, slow, REFERENCE, [slow], choices=3)
    assert explain(GOAL, fast, REFERENCE, [fast], choices=3) == ""


def test_a_limit_that_is_not_met_is_said() -> None:
    goal = Goal("accuracy", 0.917, 0.01, True, "latency_ms", limits=(("macs", 50),))
    assert broken_limits(goal, Cost(1, 50, 1, 1.0)) == []
    (sentence,) = broken_limits(goal, Cost(1, 100, 1, 1.0))
    assert "budget.macs=50 is not met: 100" in sentence
