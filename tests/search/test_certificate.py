"""What is claimed of a file."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compressor.frameworks.base import Judged
from compressor.result import Cost, Plan, VariantRecord
from compressor.search.certificate import broken_limits, make_certificate
from compressor.search.goal import Goal, best_record, frontier

GOAL = Goal("accuracy", 0.917, 0.01, is_larger_better=True, resource="latency_ms")


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
        paired="The evaluation does not take a part of the split.",
        target={},
        looks=3,
        split="test",
        notes=(),
    )
    assert certificate.within_delta is within
    assert certificate.interval is None
    assert not certificate.is_certain
    assert certificate.notes == ("The evaluation does not take a part of the split.",)
    assert certificate.latency_ratio == 4.0
    assert certificate.size_ratio == 8.0
    assert certificate.macs_ratio == 4.0
    assert certificate.params_ratio == 2.0


@pytest.mark.parametrize(
    ("after_ms", "resource", "said"),
    [
        (2.5, "size_bytes", ("latency_ratio=0.80", "optimization='latency'", "precision 32")),
        (2.5, "latency_ms", ("latency_ratio=0.80", "Leave layers in float")),
        (2.02, "size_bytes", ()),  # the noise of timing
        (0.5, "size_bytes", ()),
    ],
)
def test_a_file_that_is_slower_says_so_with_the_way_out(
    after_ms: float, resource: str, said: tuple[str, ...]
) -> None:
    certificate = make_certificate(
        replace(GOAL, resource=resource),
        Cost(100, 1000, 4000, 2.0),
        0.917,
        Judged({"accuracy": 0.917}, Cost(100, 1000, 1000, after_ms)),
        parity=None,
        paired="",
        target={},
        looks=3,
        split="test",
        notes=(),
    )
    assert len(certificate.notes) == bool(said)
    assert all(part in certificate.notes[0] for part in said)
    offers_latency = any("optimization='latency'" in note for note in certificate.notes)
    assert offers_latency is ("optimization='latency'" in said)


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


def test_a_limit_that_is_not_met_is_said() -> None:
    goal = Goal("accuracy", 0.917, 0.01, True, "latency_ms", limits=(("macs", 50),))
    assert broken_limits(goal, Cost(1, 50, 1, 1.0)) == []
    (sentence,) = broken_limits(goal, Cost(1, 100, 1, 1.0))
    assert "budget.macs=50 is not met: 100" in sentence
