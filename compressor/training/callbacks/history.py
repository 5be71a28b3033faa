"""What an epoch cost and brought, as rows of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.training.algorithm import Callback
from compressor.training.events import Event
from compressor.training.state import State


class History(Callback):
    """One row an epoch: "epoch", "batch", "lr" (of its end), "train/<term>"; then its metrics.

    An evaluation before the first epoch, or within one, has a row of its own.

    Attributes:
        rows: oldest first.
    """

    events = frozenset({Event.EPOCH_END, Event.EVAL_END})

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on(self, event: Event, state: State) -> None:
        """Add a row, or metrics to the last one."""
        if event is Event.EPOCH_END:
            self.rows.append({**self._position(state), **state.train_metrics})
            return
        if not self.rows or self.rows[-1]["batch"] != state.clock.batch:
            self.rows.append(self._position(state))
        self.rows[-1].update(state.metrics)

    def state_dict(self) -> dict[str, Any]:
        """The rows."""
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self.rows = [dict(row) for row in saved["rows"]]

    def _position(self, state: State) -> dict[str, float]:
        assert state.optimizer is not None
        return {
            "epoch": state.clock.epoch,
            "batch": state.clock.batch,
            "lr": float(state.optimizer.param_groups[0]["lr"]),
        }
