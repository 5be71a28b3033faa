"""How fast training goes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from compressor.errors import ConfigError
from compressor.training.callbacks.monitor import Monitor
from compressor.training.clock import DurationLike
from compressor.training.events import Event
from compressor.training.state import State


class ThroughputMonitor(Monitor):
    """Logs "throughput/batches_per_second" and "throughput/samples_per_second" of late batches.

    Waiting for data and writing checkpoints count, evaluations do not.

    Args:
        interval: between values.
        window: batches that are averaged over, of the present fit.
        now: seconds on a clock that never goes back.

    Raises:
        ConfigError: if `window` is less than 1.
    """

    events = frozenset({*Monitor.events, Event.EVAL_START, Event.EVAL_END})

    def __init__(
        self,
        interval: DurationLike = "1ep",
        window: int = 100,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(interval)
        if window < 1:
            raise ConfigError(f"window={window} has no batch to measure. Write 1 or more.")
        self._now = now
        self._ends: deque[tuple[float, int, int]] = deque(maxlen=window + 1)
        self._last = 0.0  # when the last event came
        self._pause_began = 0.0
        self._paused = 0.0

    def on(self, event: Event, state: State) -> None:
        """Note the time, and log when it is time."""
        moment = self._now()
        if event is Event.FIT_START:
            self._ends.clear()
            self._paused = 0.0
        if event in (Event.FIT_START, Event.BATCH_END):
            self._ends.append((moment - self._paused, state.clock.batch, state.clock.sample))
        elif event is Event.EVAL_START:
            # From the event before: what algorithms prepare for an evaluation is a part of it.
            self._pause_began = self._last
        elif event is Event.EVAL_END:
            self._paused += moment - self._pause_began
        self._last = moment
        super().on(event, state)

    def look(self, state: State) -> None:
        """Log the rates, once there is something to tell."""
        if len(self._ends) < 2:
            return
        (began, first_batch, first_sample), (ended, batch, sample) = self._ends[0], self._ends[-1]
        seconds = ended - began
        if seconds > 0:  # a coarse clock may stand still
            state.log(
                {
                    "throughput/batches_per_second": (batch - first_batch) / seconds,
                    "throughput/samples_per_second": (sample - first_sample) / seconds,
                }
            )
