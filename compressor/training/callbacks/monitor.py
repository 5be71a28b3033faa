"""A look at training every now and then."""

from __future__ import annotations

from abc import abstractmethod

from compressor.training.algorithm import Callback
from compressor.training.clock import DurationLike, Every
from compressor.training.events import Event
from compressor.training.state import State


class Monitor(Callback):
    """Looks whenever an interval has passed, counted from the beginning of training.

    Args:
        interval: between looks: '1ep', '50ba', '5m'.
    """

    events = frozenset({Event.FIT_START, Event.BATCH_END, Event.EPOCH_END})

    def __init__(self, interval: DurationLike = "1ep") -> None:
        self._every = Every(interval)

    def on(self, event: Event, state: State) -> None:
        """Look, if it is time."""
        if event is Event.FIT_START:
            self._every.begin(state.clock)
        elif event in (Event.BATCH_END, Event.EPOCH_END) and self._every.is_due(state.clock):
            self.look(state)

    @abstractmethod
    def look(self, state: State) -> None:
        """Measure, and hand the values to `state.log`."""
