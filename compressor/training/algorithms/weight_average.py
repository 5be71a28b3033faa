"""An exponential moving average of the weights (Polyak and Juditsky, 1992), which is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor.training import binding
from compressor.training.algorithm import Algorithm
from compressor.training.events import Event
from compressor.training.state import State

if TYPE_CHECKING:
    from compressor.structure.surgery import Edit


def update_average(average: Tensor, value: Tensor, decay: float) -> None:
    """Set `average` to decay * average + (1 - decay) * value, in place; no floats: to `value`."""
    if average.is_floating_point():
        average.lerp_(value, 1 - decay)
    else:
        average.copy_(value)


class WeightAverage(Algorithm):
    """Averages parameters and buffers after every step that was not skipped.

    The average is in the model while it is evaluated, and stays there when the fit ends.

    Args:
        decay_rate: 0 to 1, once it has grown: decay_rate * (1 - exp(-step / period)).
        period: steps over which it grows, so that the first weights do not weigh for ever.
    """

    events = frozenset(
        {Event.FIT_START, Event.AFTER_STEP, Event.EVAL_START, Event.EVAL_END, Event.FIT_END}
    )

    def __init__(self, decay_rate: float = 0.9999, period: int = 2000) -> None:
        self.decay_rate = decay_rate
        self.period = period
        self._steps = 0
        self._average: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] = {}

    def on(self, event: Event, state: State) -> None:
        """Begin, follow, or exchange."""
        if event is Event.FIT_START:
            begin = self._average or _copy(state.model)
            self._average = {name: value.to(state.device) for name, value in begin.items()}
        elif event is Event.AFTER_STEP and not state.step_skipped:
            self._follow(state.model)
        elif event is Event.EVAL_START and self._average:
            self._trained = _copy(state.model)
            _put(state.model, self._average)
        elif event is Event.EVAL_END and self._trained:
            _put(state.model, self._trained)
            self._trained = {}
        elif event is Event.FIT_END:
            _put(state.model, self._average)

    def rebind(self, edit: Edit, state: State) -> None:
        """Cut averages like their parameters; begin anew what is new or of another size."""
        if not self._average:
            return
        old, self._average = self._average, _copy(state.model)
        for name, value in self._average.items():
            if name in old and name not in edit.added:
                kept = binding.cut(old[name], edit.sliced.get(name, ()))
                if kept.shape == value.shape:
                    self._average[name] = kept

    def state_dict(self) -> dict[str, Any]:
        """Steps and average."""
        return {"steps": self._steps, "average": self._average}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self._steps = saved["steps"]
        self._average = dict(saved["average"])

    def _follow(self, model: nn.Module) -> None:
        self._steps += 1
        decay = self.decay_rate * (1 - math.exp(-self._steps / self.period))
        with torch.no_grad():
            for name, value in _tensors(model).items():
                update_average(self._average[name], value, decay)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in _tensors(model).items()}


def _put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in _tensors(model).items():
            value.copy_(values[name])
