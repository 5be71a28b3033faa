"""The learning rate as it was used."""

from __future__ import annotations

from compressor.errors import ConfigError
from compressor.training.callbacks.monitor import Monitor
from compressor.training.clock import DurationLike
from compressor.training.events import Event
from compressor.training.state import State


class LearningRateMonitor(Monitor):
    """Logs the rate with which the last step was made: "lr", or "lr/0", "lr/1" … of each group.

    A group that has a "name" is called by it.

    Args:
        interval: between values.
    """

    events = frozenset({*Monitor.events, Event.AFTER_STEP})

    def __init__(self, interval: DurationLike = "1ep") -> None:
        super().__init__(interval)
        self._rates: dict[str, float] = {}

    def on(self, event: Event, state: State) -> None:
        """Read the rates at a step, before the schedule goes on; log them when it is time.

        Raises:
            ConfigError: if there is no optimizer.
        """
        if event is Event.AFTER_STEP:
            self._rates = _rates(state)
            return
        if event is Event.FIT_START and state.optimizer is None:
            raise ConfigError(
                "LearningRateMonitor has no optimizer to read: the step is a ManualStep. "
                "Return the rate from the step, and leave the monitor out."
            )
        super().on(event, state)

    def look(self, state: State) -> None:
        """Log the rates of the last step."""
        state.log(self._rates)


def _rates(state: State) -> dict[str, float]:
    assert state.optimizer is not None
    groups = state.optimizer.param_groups
    if len(groups) == 1:
        return {"lr": float(groups[0]["lr"])}
    return {f"lr/{group.get('name', i)}": float(group["lr"]) for i, group in enumerate(groups)}
