"""Where each call of `fit` is to end, also in a program that was killed and is run again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from compressor.training.clock import Duration, DurationLike, parse_total
from compressor.training.state import State


class Fits:
    """The calls of `fit` of one trainer.

    Args:
        is_kept: the calls are counted, so that a program that is run again knows which it is at.

    Attributes:
        ends: where each call was to end.
    """

    def __init__(self, *, is_kept: bool) -> None:
        self.ends: list[Duration] = []
        self._is_kept = is_kept
        self._known: list[Duration] = []  # those of the run that is resumed

    def forget(self) -> None:
        """Count anew."""
        self.ends, self._known = [], []

    def expect(self, ends: Iterable[str]) -> None:
        """The program is run again: its calls end where they were to end."""
        self._known = [Duration.parse(end) for end in ends]

    def begin(self, state: State, duration: DurationLike | None) -> bool:
        """Set where a call ends; False if it was complete when the program ran before.

        A call that had begun then ends where it was to end.
        """
        number, before = len(self.ends), state.max_duration
        if duration is not None:
            more = parse_total(duration)
            if number < len(self._known):
                state.max_duration = self._known[number]
            else:
                state.max_duration = replace(more, value=state.clock.now(more.unit) + more.value)
                state.stop_reason = ""
        if self._is_kept:
            self.ends.append(state.max_duration)
        schedule = state.schedule
        if schedule is not None and schedule.refresh is not None and state.max_duration != before:
            schedule.refresh()  # of a longer whole, less has passed
        return number >= len(self._known) - 1
