"""An end to training that no longer helps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.errors import ConfigError
from compressor.logs import get_logger
from compressor.training.algorithm import Callback
from compressor.training.callbacks.watched import Mode, WatchedMetric, check_mode, is_better
from compressor.training.events import Event
from compressor.training.state import State

logger = get_logger(__name__)


class EarlyStopping(Callback):
    """Ends the fit after `patience` evaluations in a row without a new best.

    Args:
        metric: its name in what the evaluation gives; "label/name" if its evaluator has a label.
            Evaluations that do not give it do not count.
        patience: 1 or more.
        mode: "max" if more is better.

    Raises:
        ConfigError: if `patience` is less.
    """

    events = frozenset({Event.EVAL_END, Event.FIT_END})

    def __init__(self, metric: str, patience: int, mode: Mode = "max") -> None:
        check_mode(mode)
        if not isinstance(patience, int) or patience < 1:
            raise ConfigError(f"patience={patience!r} is no count. Write 1 or more.")
        self.patience = patience
        self.mode = mode
        self._metric = WatchedMetric(metric)
        self._best: float | None = None
        self._waited = 0

    def on(self, event: Event, state: State) -> None:
        """Compare, and stop."""
        if event is Event.FIT_END:
            self._metric.end()
            return
        value = self._metric.value(state)
        if value is None:
            return
        if is_better(value, self._best, self.mode):
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= self.patience and not state.is_finished:
            reason = self._reason()
            logger.info("stopped after epoch %d: %s", state.clock.epoch, reason)
            state.stop(reason)

    def close(self) -> None:
        """See that the metric was there.

        Raises:
            MetricError: if no evaluation of a whole fit gave it.
        """
        self._metric.close()

    def state_dict(self) -> dict[str, Any]:
        """The best value, and how long ago it was."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self._best, self._waited = saved["best"], saved["waited"]

    def _reason(self) -> str:
        if self._best is None:
            return f"{self._metric.name} was NaN in {self._waited} evaluations"
        return f"{self._metric.name} has not passed {self._best:g} in {self._waited} evaluations"
