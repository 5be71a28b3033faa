"""One metric among those that all evaluators give, and which of its values is better."""

from __future__ import annotations

from typing import Literal

from compressor.errors import ConfigError, MetricError, suggest
from compressor.training.state import State

Mode = Literal["max", "min"]


def check_mode(mode: str) -> None:
    """Do nothing if `mode` is one.

    Raises:
        ConfigError: if it is none.
    """
    if mode not in ("max", "min"):
        raise ConfigError(f"There is no mode {mode!r}. {suggest(str(mode), ('max', 'min'))}")


def is_better(value: float, best: float | None, mode: Mode) -> bool:
    """Whether `value` beats `best`; None is beaten by any number, and NaN beats nothing.

    >>> is_better(0.9, None, mode="max"), is_better(0.9, 0.8, mode="min")
    (True, False)
    >>> is_better(float("nan"), None, mode="max")
    False
    """
    if best is None:
        return value == value
    return value > best if mode == "max" else value < best


class WatchedMetric:
    """Tells when a metric was just given: evaluators may differ in what they give, and how often.

    Args:
        name: as `state.metrics` has it: "label/name" if its evaluator has a label.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._is_given = False
        self._is_ended = False
        self._known: tuple[str, ...] = ()

    def value(self, state: State) -> float | None:
        """What the evaluator that just ran gave; None if the metric is of another one.

        Raises:
            MetricError: if it should be of this one, by its label, and is not.
        """
        self._known = tuple(state.metrics)
        if self.name in state.evaluated:
            self._is_given = True
            return state.metrics[self.name]
        label = state.evaluator
        is_of_this = self.name.startswith(f"{label}/") if label else "/" not in self.name
        if is_of_this:
            state.metric(self.name)
        return None

    def end(self) -> None:
        """The fit comes to its end: all evaluators will have run when it is closed."""
        self._is_ended = True

    def close(self) -> None:
        """Do nothing, unless a whole fit with evaluations went by without the metric.

        Raises:
            MetricError: then; all that was trained is saved by that time.
        """
        is_missing = self._is_ended and self._known and not self._is_given
        self._is_ended = False
        if is_missing:
            raise MetricError(
                f"No evaluation of this fit gave {self.name!r}. {suggest(self.name, self._known)}"
            )
