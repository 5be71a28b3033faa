"""The rank correlation of `benchmarks.prediction`."""

from __future__ import annotations

import math

import pytest

from benchmarks.prediction import WAYS, rank_correlation, summarize


def test_a_rank_correlation_sees_the_order_alone() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 10, 100, 1000]) == 1
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    # By hand: differences of ranks 1, 1, 0, 0, so 1 - 6 * 2 / (4 * 15).
    assert rank_correlation([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(0.8)


def test_values_that_are_all_equal_order_nothing() -> None:
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_damage_that_grows_as_the_accuracy_falls_is_a_good_prediction() -> None:
    rows = [
        {f"{kind}, {way}": damage for kind in ("allocated", "joint") for way in WAYS}
        | {"accuracy %": accuracy, "MACs ratio": ratio}
        for damage, accuracy, ratio in [(0.1, 91.0, 2), (0.5, 90.0, 1), (2.0, 70.0, 3)]
    ]
    rows[0]["joint, raw drop"], rows[2]["joint, raw drop"] = 5.0, 0.0
    summary = summarize(rows)
    assert summary["plans"] == 3
    assert summary["spearman MACs ratio alone"] == pytest.approx(0.5)
    assert summary["spearman allocated, repaired divergence"] == 1
    assert summary["spearman joint, raw drop"] == -1
