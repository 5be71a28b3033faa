"""What the numbers in the documentation pass through."""

from __future__ import annotations

import time

import pytest

from benchmarks.common import interleave, markdown_table


def test_the_table_keeps_two_decimals_of_a_percentage() -> None:
    rows = [{"row": "a", "%": 91.642, "ms": 0.42345}, {"row": "b", "%": 100.0, "ms": 12345.678}]
    assert markdown_table(rows).splitlines() == [
        "| row | % | ms |",
        "|---|---|---|",
        "| a | 91.64 | 0.423 |",
        "| b | 100.00 | 12345.68 |",
    ]


def test_a_call_that_takes_longer_measures_longer() -> None:
    calls = {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.006)}
    times = interleave(calls, rounds=3, block_seconds=0.012)
    assert times["short"] >= 2
    assert times["long"] / times["short"] == pytest.approx(3, rel=0.5)
