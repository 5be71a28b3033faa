"""An end to training that no longer helps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.errors import ConfigError
from compressor.logs import get_logger
from compressor.training.algorithm import Callback
from compressor.training.callbacks.best import Mode, is_better
from compressor.training.events import Event
from compressor.training.state import State

logger = get_logger(__name__)


class EarlyStopping(Callback):
    """Ends the fit after `patience` evaluations in a row without a new best.

    Args:
        metric: its name in what the evaluation gives.
        patience: 1 or more.
        mode: "max" if more is better.

    Raises:
        ConfigError: if `patience` is less.
    """

    events = frozenset({Event.EVAL_END})

    def __init__(self, metric: str, patience: int, mode: Mode = "max") -> None:
        if patience < 1:
            raise ConfigError(f"patience={patience} never lets training go on. Write 1 or more.")
        self.metric = metric
        self.patience = patience
        self.mode = mode
        self._best: float | None = None
        self._waited = 0

    def on(self, event: Event, state: State) -> None:
        """Compare, and stop."""
        value = state.metric(self.metric)
        if is_better(value, self._best, self.mode):
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= self.patience and not state.is_finished:
            reason = f"{self.metric} has not passed {self._best:g} in {self._waited} evaluations"
            logger.info("stopped after epoch %d: %s", state.clock.epoch, reason)
            state.stop(reason)

    def state_dict(self) -> dict[str, Any]:
        """The best value, and how long ago it was."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self._best, self._waited = saved["best"], saved["waited"]
