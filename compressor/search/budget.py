"""What the search may spend: minutes and trials. Those of an interrupted run count."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Spending:
    """A clock of the run and a counter of its trials."""

    def __init__(
        self,
        minutes: float | None,
        trials: int,
        *,
        already_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            minutes: for the whole run; None is no limit.
            trials: variants that may be fine-tuned in the search.
            already_seconds: what earlier attempts of the same run took.
            clock: seconds, for tests.
        """
        self.limit_seconds = None if minutes is None else minutes * 60
        self.trials_left = trials
        self._clock = clock
        self._start = clock() - already_seconds

    @property
    def seconds(self) -> float:
        """Spent so far, earlier attempts included."""
        return self._clock() - self._start

    @property
    def seconds_left(self) -> float:
        """Until the limit; infinity without one, 0 beyond it."""
        if self.limit_seconds is None:
            return math.inf
        return max(self.limit_seconds - self.seconds, 0.0)

    @property
    def is_timed(self) -> bool:
        """Whether minutes are limited."""
        return self.limit_seconds is not None

    @property
    def fraction_left(self) -> float:
        """Of the limit, 0 to 1; 1 without one."""
        return self.seconds_left / self.limit_seconds if self.limit_seconds else 1.0

    def take_trial(self) -> bool:
        """Count one trial; False if none is left."""
        if self.trials_left <= 0:
            return False
        self.trials_left -= 1
        return True

    def part(self, until_seconds: float, trials: int) -> Spending:
        """A share of this: the same clock, until it shows so much, and at most so many trials."""
        share = Spending(None, min(trials, self.trials_left), clock=self._clock)
        share._start = self._start
        share.limit_seconds = None if math.isinf(until_seconds) else until_seconds
        return share
