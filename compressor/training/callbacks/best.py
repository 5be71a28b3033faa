"""The weights that evaluated best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from compressor.errors import CheckpointError
from compressor.training.algorithm import Callback
from compressor.training.events import Event
from compressor.training.state import State

Mode = Literal["max", "min"]


def is_better(value: float, best: float | None, mode: Mode) -> bool:
    """Whether `value` beats `best`; None is beaten by anything."""
    if best is None:
        return True
    return value > best if mode == "max" else value < best


class KeepBest(Callback):
    """Keeps a copy of the weights of the best evaluation, on the CPU and in the checkpoint.

    To count the weights that a fit begins with, call `trainer.evaluate()` before it.

    Args:
        metric: its name in what the evaluation gives.
        mode: "max" if more is better.

    Attributes:
        value: of the best evaluation; None before the first.
        epoch: finished epochs at that time.
    """

    # The weights are taken when they go into an evaluation: an average is in the model then.
    events = frozenset({Event.EVAL_START, Event.EVAL_END})

    def __init__(self, metric: str, mode: Mode = "max") -> None:
        self.metric = metric
        self.mode = mode
        self.value: float | None = None
        self.epoch = 0
        self._weights: dict[str, Any] = {}
        self._candidate: dict[str, Any] = {}

    def on(self, event: Event, state: State) -> None:
        """Take the weights, and keep them if they turn out to be the best."""
        if event is Event.EVAL_START:
            self._candidate = _copy_weights(state.model)
            return
        value = state.metric(self.metric)
        if is_better(value, self.value, self.mode):
            self.value, self.epoch, self._weights = value, state.clock.epoch, self._candidate
        self._candidate = {}

    def restore(self, model: nn.Module) -> None:
        """Put the best weights into `model`, in place; nothing, if there was no evaluation.

        Raises:
            CheckpointError: if its structure has changed since.
        """
        if self.value is None:
            return
        now = model.state_dict()
        for name in sorted(now.keys() | self._weights.keys()):
            best, own = self._weights.get(name), now.get(name)
            if getattr(best, "shape", None) != getattr(own, "shape", None):
                raise CheckpointError(
                    f"The best weights are of epoch {self.epoch}, and {name!r} has changed its "
                    "shape since. Keep the best of each structure on its own."
                )
        model.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """The best, and its weights."""
        return {"value": self.value, "epoch": self.epoch, "weights": self._weights}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self.value, self.epoch = saved["value"], saved["epoch"]
        self._weights = dict(saved["weights"])


def _copy_weights(model: nn.Module) -> dict[str, Any]:
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for name, value in model.state_dict().items()
    }
