"""Averages of the weights along training: exponential (EMA), or equal over the late ones (SWA)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor.distributed.agreement import agree_on
from compressor.errors import ConfigError
from compressor.logs import get_logger
from compressor.training import binding
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.batchnorm import reestimate_in_training
from compressor.training.algorithms.windows import refuse_window
from compressor.training.card import Card
from compressor.training.clock import Duration, DurationLike, Every
from compressor.training.events import Event
from compressor.training.state import State

if TYPE_CHECKING:
    from compressor.structure.surgery import Edit

logger = get_logger(__name__)


def update_average(average: Tensor, value: Tensor, decay: float) -> None:
    """Set `average` to decay * average + (1 - decay) * value, in place; no floats: to `value`.

    >>> average = torch.tensor([1.0])
    >>> update_average(average, torch.tensor([2.0]), decay=0.75)
    >>> average
    tensor([1.2500])
    """
    if average.is_floating_point():
        average.lerp_(value, 1 - decay)
    else:
        average.copy_(value)


class WeightAverage(Algorithm, ABC):
    """Base: an average of parameters and buffers, in the model while it is evaluated, and at last.

    It follows surgery like the parameters, and is saved. A trainer takes one: the model that is
    kept can be only one of two averages.
    """

    pairs = ((Event.EVAL_START, Event.EVAL_END),)
    conflicts = MappingProxyType(
        {
            "WeightAverage": "each want to put an average of the weights into the model, and only "
            "one can be evaluated and kept. Leave one out."
        }
    )

    _average: dict[str, Tensor]
    _trained: dict[str, Tensor]

    @abstractmethod
    def _forget(self) -> None:
        """Begin anew: what was averaged is of another trainer's model."""

    @abstractmethod
    def _follow(self, event: Event, state: State) -> None:
        """Take the weights of `state.model` into the average, if it is the moment."""

    def _begin(self, state: State) -> None:
        """A fit begins."""
        self._put_out(state)  # if an evaluation failed
        self._average = {name: value.to(state.device) for name, value in self._average.items()}

    def on(self, event: Event, state: State) -> None:
        """Begin, follow, or exchange."""
        if event is Event.SETUP:
            self._forget()
        elif event is Event.FIT_START:
            self._begin(state)
        elif event is Event.EVAL_START:
            if self._average and not self._trained:
                self._trained = _copy(state.model)
                self._put_in(state)
        elif event is Event.EVAL_END:
            self._put_out(state)
        elif event is Event.CHECKPOINT:
            self._agree(state)
        elif event is Event.FIT_END:
            self._put_in(state)
        else:
            self._follow(event, state)

    def reestimate_own(self, state: State, reestimate: Callable[[], None]) -> None:
        """Give the average batch norm statistics of its own, while it is in the model."""
        if not self._average:
            return
        trained = _copy(state.model)
        _put(state.model, self._average)
        try:
            reestimate()
            self._take_buffers(state.model)
        finally:
            _put(state.model, trained)

    def _agree(self, state: State) -> None:
        """What processes have seen differs, and what is written is to go on for all of them."""
        names = [name for name, _ in state.model.named_buffers() if name in self._average]
        agree_on(state.context, [self._average[name] for name in names])

    def _take_buffers(self, model: nn.Module) -> None:
        for name, value in model.named_buffers():
            self._average[name] = value.detach().clone()

    def _put_in(self, state: State) -> None:
        _put(state.model, self._average)

    def _put_out(self, state: State) -> None:
        _put(state.model, self._trained)
        self._trained = {}


class EMA(WeightAverage):
    """An exponential moving average after every step that was not skipped.

    With a `window` it begins with the first step in it, and stays as it is when the window closes.

    Args:
        decay_rate: 0 to below 1, once it has grown: decay_rate * (1 - exp(-step / period)).
        period: steps, above 0, over which it grows, so that the first weights do not weigh for
            ever.

    Raises:
        ConfigError: if one of them cannot be meant.
    """

    events = frozenset(
        {
            Event.SETUP,
            Event.FIT_START,
            Event.AFTER_STEP,
            Event.EVAL_START,
            Event.EVAL_END,
            Event.CHECKPOINT,
            Event.FIT_END,
        }
    )
    card = Card(
        summary="Evaluates and keeps an exponential moving average of weights and statistics.",
        source="Polyak and Juditsky (1992), Acceleration of stochastic approximation by averaging",
        functional="update_average",
        settings="`decay_rate` and `period`: a fit of a few hundred steps wants a mean "
        "over some tens, such as 0.98 and 20.",
        use_when="The learning rate stays high: less noise in what is evaluated, and no tuning of "
        "the last steps.",
        avoid_when="A fit of few steps beside `period`, or a learning rate that ends at 0 anyway.",
        cost="Memory for a copy of the model, and another during evaluation; one pass over the "
        "weights a step.",
    )

    _slots: list[tuple[str, dict[str, Any], str]]

    def __init__(self, decay_rate: float = 0.9999, period: float = 2000) -> None:
        if not 0 <= decay_rate < 1:
            raise ConfigError(
                f"decay_rate={decay_rate} averages nothing. Write 0 to below 1, such as 0.999: the "
                "part of the average that is left after a step."
            )
        if not isinstance(period, (int, float)) or not period > 0:
            raise ConfigError(
                f"period={period!r} is no number of steps. Write a number above 0, without a unit."
            )
        self.decay_rate = decay_rate
        self.period = period
        self._forget()

    def rebind(self, edit: Edit, state: State) -> None:
        """Cut averages like their parameters; begin anew what is new or of another size."""
        if self._average:
            self._average = {**_copy(state.model), **_cut(self._average, edit, state.model)}
        self._slots = []

    def state_dict(self) -> dict[str, Any]:
        """Steps and average."""
        return {"steps": self._steps, "average": self._average}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self._steps = saved["steps"]
        self._average, self._trained, self._slots = dict(saved["average"]), {}, []

    def close(self) -> None:
        """Let go of the model."""
        self._slots = []

    def _forget(self) -> None:
        self._steps = 0
        self._average, self._trained = {}, {}
        self._slots = []

    def _begin(self, state: State) -> None:
        super()._begin(state)
        if not self._average and self.window is None:
            self._average = _copy(state.model)

    def _follow(self, event: Event, state: State) -> None:
        if state.step_skipped:
            return
        if not self._average:  # a loop without FIT_START, or the first step in the window
            self._average = _copy(state.model)
        self._slots = self._slots or _slots(state.model)
        self._steps += 1
        decay = self.decay_rate * (1 - math.exp(-self._steps / self.period))
        averages, values = [], []
        with torch.no_grad():
            for name, store, key in self._slots:
                average, value = self._average[name], store[key]
                if average.is_floating_point():
                    averages.append(average)
                    values.append(value)
                else:
                    average.copy_(value)
            # `update_average` of all: on a GPU in a few kernels
            torch._foreach_lerp_(averages, values, 1 - decay)


class SWA(WeightAverage):
    """The equal mean of the weights at several late moments (Izmailov et al., 2018).

    Before the mean is evaluated, its batch norms are re-estimated on the training data: theirs are
    the statistics of other networks. A fit that follows a complete one begins a new mean. It has no
    `window`: `start` says when it begins.

    Args:
        start: of averaging.
        interval: between the moments: '1ep', '100ba'. An epoch's end is one.
        batchnorm_batches: for the re-estimation; None takes all, 0 keeps the mean of the
            statistics instead.

    Raises:
        ConfigError: if one of them cannot be meant.
    """

    events = frozenset(
        {
            Event.SETUP,
            Event.FIT_START,
            Event.BATCH_END,
            Event.EPOCH_END,
            Event.EVAL_START,
            Event.EVAL_END,
            Event.CHECKPOINT,
            Event.FIT_END,
        }
    )
    card = Card(
        summary="Evaluates and keeps the mean of the weights at the end of the last epochs.",
        source="Izmailov et al. (2018), Averaging weights leads to wider optima and better "
        "generalization",
        functional="update_average",
        settings="`start`, and `interval` between the weights that are averaged.",
        use_when="Training ends at a learning rate that is high or constant.",
        avoid_when="The learning rate falls to 0: late weights are alike, and EMA is simpler. "
        "Masks of GradualSparsity that still grow in `start` to the end.",
        cost="Memory for a copy of the model, and another during evaluation; `batchnorm_batches` "
        "forward passes at the first evaluation of each mean, if the model has batch norms.",
    )

    _counts: dict[str, int]  # a layer that came later has a shorter mean

    def __init__(
        self,
        start: DurationLike = "0.7dur",
        interval: DurationLike = "1ep",
        *,
        batchnorm_batches: int | None = 20,
    ) -> None:
        if batchnorm_batches is not None and batchnorm_batches < 0:
            raise ConfigError(
                f"batchnorm_batches={batchnorm_batches} is no number of batches. Write 0 or more."
            )
        if not Duration.parse(interval).value:
            raise ConfigError(f"interval={interval!r} is no interval. Write '1ep', or '100ba'.")
        self.start = Duration.parse(start)
        self.batchnorm_batches = batchnorm_batches
        self._every = Every(interval)
        self._forget()

    def rebind(self, edit: Edit, state: State) -> None:
        """Cut averages like their parameters; forget those of what is new or of another size."""
        self._average = _cut(self._average, edit, state.model)
        self._counts = {name: self._counts[name] for name in self._average}
        self._is_estimated = False

    def state_dict(self) -> dict[str, Any]:
        """The mean, and of how many."""
        return {
            "average": self._average,
            "counts": dict(self._counts),
            "is_estimated": self._is_estimated,
            "is_over": self._is_over,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self._average, self._trained = dict(saved["average"]), {}
        self._counts = dict(saved["counts"])
        self._is_estimated, self._is_over = saved["is_estimated"], saved["is_over"]

    def on(self, event: Event, state: State) -> None:
        """Begin, follow, or exchange; say so if there was nothing to average."""
        if event is Event.SETUP:
            refuse_window(self, "`start` and `interval`", "its mean would miss what is outside")
        super().on(event, state)
        if event is Event.FIT_END:
            self._is_over = True
            if not self._average:
                logger.warning(
                    "SWA averaged nothing: the fit ended before an interval after %s. "
                    "Set an earlier start or a shorter interval.",
                    self.start,
                )

    def reestimate_own(self, state: State, reestimate: Callable[[], None]) -> None:
        """Give the mean statistics of its own now, unless it will do so when it is put in."""
        if self.batchnorm_batches == 0:
            super().reestimate_own(state, reestimate)

    def _take_buffers(self, model: nn.Module) -> None:
        super()._take_buffers(model)
        self._counts = {name: self._counts.get(name, 1) for name in self._average}

    def _forget(self) -> None:
        self._average, self._trained = {}, {}
        self._counts = {}
        self._is_estimated = False
        self._is_over = False

    def _begin(self, state: State) -> None:
        super()._begin(state)
        self._every.begin(state.clock)
        if self._is_over:
            self._average, self._counts, self._is_over = {}, {}, False

    def _follow(self, event: Event, state: State) -> None:
        is_due = (event is Event.EPOCH_END) == self._every.is_by_epoch and self._every.is_due(
            state.clock
        )
        if not is_due or not state.clock.has_reached(self.start, state.max_duration):
            return
        self._is_estimated = False
        with torch.no_grad():
            for name, value in _tensors(state.model).items():
                count = self._counts.get(name, 0)
                if count:
                    update_average(self._average[name], value, count / (count + 1))
                else:
                    self._average[name] = value.detach().clone()
                self._counts[name] = count + 1

    def _put_in(self, state: State) -> None:
        super()._put_in(state)
        if self._average and self.batchnorm_batches != 0 and not self._is_estimated:
            reestimate_in_training(state, self.batchnorm_batches)
            self._take_buffers(state.model)
            self._is_estimated = True


def _slots(model: nn.Module) -> list[tuple[str, dict[str, Any], str]]:
    """Name, and place, of each tensor: faster than walking through the model at every step."""
    slots, seen = [], set()
    for prefix, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    slots.append((f"{prefix}.{key}".lstrip("."), store, key))
    return slots


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: store[key] for name, store, key in _slots(model)}


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in _tensors(model).items()}


def _put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write `values` into the tensors that have one, in place."""
    if not values:
        return
    with torch.no_grad():
        for name, value in _tensors(model).items():
            if name in values:
                value.copy_(values[name])


def _cut(values: Mapping[str, Tensor], edit: Edit, model: nn.Module) -> dict[str, Tensor]:
    """Those of `values` that, cut like their parameters, still fit `model`."""
    fitting = {}
    for name, value in _tensors(model).items():
        if name in values and name not in edit.added:
            kept = binding.cut(values[name], edit.sliced.get(name, ()))
            if kept.shape == value.shape:
                fitting[name] = kept
    return fitting
