"""Learning rates of a batch that is larger, because several processes have one each.

Goyal et al. (2017), Accurate, large minibatch SGD: training ImageNet in 1 hour: a batch k times as
large takes a learning rate k times as high, which is reached by a linear rise from the old one.
"""

from __future__ import annotations

from typing import Any

from compressor.training.algorithm import Algorithm
from compressor.training.events import Event
from compressor.training.schedules import WARMUP
from compressor.training.state import State


def linear_warmup(fraction: float, factor: float, *, warmup: float = WARMUP) -> float:
    """The part of a learning rate that is allowed in the rise to `factor` times the old one.

    Args:
        fraction: of the fit that has passed, 0 to 1.
        factor: 1 or more.
        warmup: the fraction that the rise takes: 5 of 90 epochs in the paper.

    Returns:
        1 / `factor`, which is the old rate, up to 1.

    >>> linear_warmup(0.0, 8), linear_warmup(0.05, 8), linear_warmup(1.0, 8)
    (0.125, 1.0, 1.0)
    """
    return 1 / factor + (1 - 1 / factor) * min(1.0, fraction / warmup)


class LargeBatchWarmup(Algorithm):
    """Holds back learning rates that were multiplied by `factor`, at the beginning of a fit.

    A schedule that begins lower by itself, as the default does, is not held back further. Between
    steps the optimizer has its own rates, so that schedules and checkpoints know nothing of it.

    A checkpoint belongs to its factor, because batches and rates are others with another.

    Args:
        factor: by which the optimizer's rates have been multiplied.
    """

    events = frozenset({Event.BEFORE_STEP, Event.AFTER_STEP})
    pairs = ((Event.BEFORE_STEP, Event.AFTER_STEP),)

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.key = f"{type(self).__name__}-{factor:g}"
        self._held: list[tuple[dict[str, Any], Any]] = []

    def on(self, event: Event, state: State) -> None:
        """Lower the rates for the step, and put them back."""
        if event is Event.AFTER_STEP:
            self.close()
            return
        allowed = linear_warmup(state.fraction, self.factor)
        assert state.optimizer is not None
        if allowed < 1:
            for group in state.optimizer.param_groups:
                self._hold(group, allowed)

    def close(self) -> None:
        """Put the rates back."""
        for group, rate in self._held:
            group["lr"] = rate
        self._held = []

    def _hold(self, group: dict[str, Any], allowed: float) -> None:
        rate = group["lr"]
        # Of the highest rate: schedules of torch keep the one that they began with.
        limit = allowed * max(float(rate), float(group.get("initial_lr", rate)))
        if rate > limit:
            self._held.append((group, rate))
            group["lr"] = rate * (limit / float(rate))  # a tensor remains one
