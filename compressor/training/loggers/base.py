"""Where measured values go: what a destination does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compressor.distributed import current_context
from compressor.training.algorithm import Callback
from compressor.training.events import Event

if TYPE_CHECKING:
    from compressor.training.state import State


class Logger(Callback):
    """A destination of numbers. A trainer tells its loggers of losses, metrics, and monitors.

    Callbacks hand values to all loggers with `state.log`. A logger opens what it needs when it is
    first told something, and again after a `close`: there may be a second fit. In a checkpoint it
    saves how far it was, so that a resumed training repeats nothing. Of several processes, only the
    first writes: ask `is_first_process`.
    """

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take values.

        Args:
            metrics: by name, such as "train/loss"; NaN and infinity are values too.
            step: finished batches.
        """

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Take what the training was started with: numbers, strings, bools and None by name."""
        del values

    def on(self, event: Event, state: State) -> None:
        """Nothing: few loggers need an event."""
        del event, state


def is_first_process() -> bool:
    """Whether this process is the one that writes: rank 0, or the only one."""
    return current_context().rank == 0
