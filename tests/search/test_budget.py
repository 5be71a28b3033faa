"""Minutes and trials."""

from __future__ import annotations

import math

from compressor.search.budget import Spending


def test_time_of_an_earlier_attempt_counts() -> None:
    now = [100.0]
    spending = Spending(2.0, trials=1, already_seconds=50.0, clock=lambda: now[0])
    now[0] += 40.0
    assert spending.seconds == 90.0
    assert spending.seconds_left == 30.0
    now[0] += 60.0
    assert spending.seconds_left == 0.0


def test_without_minutes_time_does_not_end() -> None:
    assert Spending(None, trials=1).seconds_left == math.inf


def test_trials_are_counted_down() -> None:
    spending = Spending(None, trials=2)
    assert [spending.take_trial() for _ in range(3)] == [True, True, False]
