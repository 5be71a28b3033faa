"""An end to training that will not come to what is wanted of it, as its learning curve says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

from compressor.logs import get_logger
from compressor.training.algorithm import Callback
from compressor.training.callbacks.watched import Mode, WatchedMetric, check_mode
from compressor.training.events import Event
from compressor.training.state import State

logger = get_logger(__name__)

# With these none of 150 recorded curves (cosine, linear and constant rates, good ones and ones far
# too high) ever went past `reachable_value`; with a factor of 1.5, or over fewer steps, some did.
LEAST_FRACTION = 0.5
LEAST_STEPS = 3
FACTOR = 2.0
ROUNDING = 1e-9  # of fractions of a fit


class LearningCurveStopping(Callback):
    """Ends a fit when its metric is clearly not going to come to `wanted`; see `reachable_value`.

    It is for rates that fall smoothly or stay: a rate that drops late makes a metric jump, of which
    the curve until then knows nothing.

    Args:
        metric: its name in what the evaluation gives; "label/name" if its evaluator has a label.
            Evaluations that do not give it, or give NaN, do not count.
        wanted: the value that has to be reached.
        mode: "max" if more is better.
    """

    events = frozenset({Event.EVAL_END, Event.FIT_END})

    def __init__(self, metric: str, wanted: float, mode: Mode = "max") -> None:
        check_mode(mode)
        self.wanted = wanted
        self.mode = mode
        self._metric = WatchedMetric(metric)
        self._curve: list[tuple[float, float]] = []
        self._epochs: list[int] = []

    def on(self, event: Event, state: State) -> None:
        """Look where the curve leads, and stop."""
        if event is Event.FIT_END:
            self._metric.end()
            return
        value = self._metric.value(state)
        if value is None or value != value:
            return
        self._curve.append((state.fraction, value))
        self._epochs.append(state.clock.epoch)
        if state.is_finished or self._may_be_reached():
            return
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
        """The curve so far."""
        return {"curve": [list(point) for point in self._curve], "epochs": list(self._epochs)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it."""
        self._curve = [(fraction, value) for fraction, value in saved["curve"]]
        self._epochs = list(saved["epochs"])

    def _may_be_reached(self) -> bool:
        reachable = reachable_value(self._curve, self.mode)
        if reachable is None:
            return True
        return reachable >= self.wanted if self.mode == "max" else reachable <= self.wanted

    def _reason(self) -> str:
        first, last = _stretch(self._curve), len(self._curve) - 1
        change = self._curve[last][1] - self._curve[first][1]
        a_step = abs(change) / max(self._epochs[last] - self._epochs[first], 1)
        goes, back = ("rises", "fallen") if self.mode == "max" else ("falls", "risen")
        is_better = change > 0 if self.mode == "max" else change < 0
        moves = f"{goes} by {a_step:.2g} an epoch" if is_better else f"has stayed or {back} of late"
        name, value = self._metric.name, self._curve[last][1]
        return f"{name} {value:.4g} {moves}, {self.wanted:.4g} is out of reach"


def reachable_value(curve: Sequence[tuple[float, float]], mode: Mode = "max") -> float | None:
    """What a metric may come to at most until the end of a fit: a generous guess.

    The best so far, and twice what the metric won and lost over the last stretch that was as long
    as the rest of the fit, and held three steps at least. Where the rest has fewer steps than the
    stretch, each wins what the best of them won. What was lost counts because what is noise at a
    high rate is won when the rate comes down.

    Args:
        curve: (fraction of the fit, value) of each evaluation, in their order.
        mode: "max" if more is better; else the guess is of the least.

    Returns:
        None in the first half of a fit, or before there are four evaluations.

    >>> reachable_value([(0.0, 60.0), (0.25, 80.0), (0.5, 84.0), (0.75, 85.0)])
    125.0
    >>> reachable_value([(0.25, 80.0), (0.5, 84.0), (0.625, 84.5), (0.75, 84.0), (0.875, 85.0)])
    88.0
    """
    if len(curve) <= LEAST_STEPS or curve[-1][0] < LEAST_FRACTION:
        return None
    sign = 1.0 if mode == "max" else -1.0
    values = [sign * value for _, value in curve]
    first = _stretch(curve)
    recent, end = values[first:], curve[-1][0]
    steps = [after - before for before, after in pairwise(recent)]
    rises = (after - before for before, after in combinations(recent, 2))
    steps_left = len(steps) * (1 - end) / max(end - curve[first][0], ROUNDING)
    won = max(min(max(rises), steps_left * max(steps)), 0.0)
    lost = max(-min(steps), 0.0)
    return sign * (max(values) + FACTOR * (won + lost))


def _stretch(curve: Sequence[tuple[float, float]]) -> int:
    """Number of the evaluation at which the stretch begins that is as long as the rest."""
    begin = 2 * curve[-1][0] - 1
    before = [number for number, (at, _) in enumerate(curve) if at <= begin + ROUNDING]
    return max(min(before[-1] if before else 0, len(curve) - 1 - LEAST_STEPS), 0)
