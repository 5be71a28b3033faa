"""Values in memory, for notebooks, tests and scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressor.errors import MetricError, suggest
from compressor.training.loggers.base import Logger


@dataclass(frozen=True)
class Row:
    """What was logged at one time.

    Attributes:
        step: finished batches.
        metrics: values by name.
    """

    step: int
    metrics: dict[str, float]


class InMemoryLogger(Logger):
    """Keeps all that it is told, also in checkpoints.

    Attributes:
        rows: oldest first.
        hyperparameters: of the training.

    >>> logger = InMemoryLogger()
    >>> logger.log({"accuracy": 0.5}, step=4)
    >>> logger.log({"accuracy": 0.75, "loss": 0.1}, step=8)
    >>> logger.get("accuracy")
    ([4, 8], [0.5, 0.75])
    >>> logger.most_recent["loss"]
    0.1
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.hyperparameters: dict[str, Any] = {}

    @property
    def most_recent(self) -> dict[str, float]:
        """The last value of each name."""
        return {name: value for row in self.rows for name, value in row.metrics.items()}

    def get(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one name, as a plot wants them.

        Raises:
            MetricError: if nothing of that name was logged.
        """
        points = [(row.step, row.metrics[name]) for row in self.rows if name in row.metrics]
        if not points:
            raise MetricError(
                f"Nothing called {name!r} was logged. {suggest(name, self.most_recent)}"
            )
        return [step for step, _ in points], [value for _, value in points]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep a row."""
        self.rows.append(Row(step, {name: float(value) for name, value in metrics.items()}))

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Keep them."""
        self.hyperparameters.update(values)

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        rows = [{"step": row.step, "metrics": dict(row.metrics)} for row in self.rows]
        return {"rows": rows, "hyperparameters": dict(self.hyperparameters)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it."""
        self.rows = [Row(row["step"], dict(row["metrics"])) for row in saved["rows"]]
        self.hyperparameters = dict(saved["hyperparameters"])
