"""The expected end of a search against the end of searches on variants that are numbers."""

from __future__ import annotations

from typing import Any

import pytest

from compressor.search.budget import Spending
from compressor.search.eta import Eta, usual_epochs
from compressor.search.finishing import Effort
from tests.search.test_search import EPOCH_SECONDS, run


@pytest.mark.parametrize(
    ("minutes", "trials", "effort"),
    [
        (None, 4, {"final_epochs": 10, "finalists": 3}),
        (None, 8, {"final_epochs": 20, "finalists": 3}),
        (10, 100, {"final_epochs": None}),
        (30, 100, {"final_epochs": 30}),
    ],
)
def test_the_end_is_foreseen_within_a_factor_of_one_and_a_half(
    minutes: float | None, trials: int, effort: dict[str, Any]
) -> None:
    _, attempts, seconds = run(minutes, trials, **effort)
    first = attempts.records[0]
    clock = [first.seconds]
    spending = Spending(minutes, trials, clock=lambda: clock[0])
    spending._start = 0.0
    settings = Effort(**{"trial_epochs": 2, "finalists": 100, **effort})
    eta = Eta(spending, usual_epochs(settings, trials, 1, is_timed=minutes is not None))
    eta.tell(first)
    assert first.seconds == 2 * EPOCH_SECONDS
    assert eta.seconds is not None
    assert 1 / 1.5 <= seconds / eta.seconds <= 1.5


def test_it_is_said_once() -> None:
    _, attempts, _ = run(None, 3)
    eta = Eta(Spending(None, 3), 10.0)
    eta.tell(attempts.records[0])
    first = eta.seconds
    eta.tell(attempts.records[-1])
    assert eta.seconds == first
