"""What an epoch cost and brought, as rows of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.training.algorithm import Callback
from compressor.training.events import Event
from compressor.training.state import State


class History(Callback):
    """One row an epoch: "epoch", "batch", "lr" (of its end), "train/<term>"; then its metrics.

    An evaluation before the first epoch, or within one, has a row of its own. Several evaluators at
    one time share a row, and each metric is only in the rows of its own evaluations.

    Attributes:
        rows: oldest first.
    """

    events = frozenset({Event.EPOCH_END, Event.EVAL_END})

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on(self, event: Event, state: State) -> None:
        """Add to the row of this batch, which may be a new one."""
        if not self.rows or self.rows[-1]["batch"] != state.clock.batch:
            self.rows.append({})
        row = self.rows[-1]
        row.update(self._position(state))
        if event is Event.EPOCH_END:
            row.update(state.train_metrics)
        else:
            row.update({k: v for k, v in state.metrics.items() if k in state.evaluated})

    def state_dict(self) -> dict[str, Any]:
        """The rows."""
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self.rows = [dict(row) for row in saved["rows"]]

    def _position(self, state: State) -> dict[str, float]:
        position: dict[str, float] = {"epoch": state.clock.epoch, "batch": state.clock.batch}
        if state.optimizer is not None:  # a step of the user's own may have any number of them
            position["lr"] = float(state.optimizer.param_groups[0]["lr"])
        return position
