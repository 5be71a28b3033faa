"""Callbacks of recipes that measure: each puts numbers into `state["metrics"]`."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ConfigError, MetricError, suggest
from compressor.interfaces.data import sample_count
from compressor.interfaces.metrics import count_right
from compressor.training.batch import get_item
from compressor.training.inspection.confusion import class_scores, confusion_matrix
from compressor.training.tasks.classifier import as_indices


class Log:
    """Puts a number that the step returned among the metrics, as it is.

    Args:
        name: of what the step returned.
        to: name of the metric; None: `name`.
    """

    def __init__(self, name: str, to: str | None = None) -> None:
        self.name = name
        self.to_name = name if to is None else to

    def on_batch_end(self, state: dict[str, Any]) -> None:
        """Post it."""
        state["metrics"][self.to_name] = _number(state, self.name)


class _Average(ABC):
    """Base: an average of one number over batches."""

    def __init__(self, name: str, post_each_batch: bool = True) -> None:
        self.name = name
        self.post_each_batch = post_each_batch

    def on_batch_end(self, state: dict[str, Any]) -> None:
        """Take the number in, and post the average."""
        self._take(_number(state, self.name), state)
        if self.post_each_batch:
            state["metrics"][self.name] = self._value()

    def on_epoch_end(self, state: dict[str, Any]) -> None:
        """Post the average."""
        state["metrics"][self.name] = float(self._value())

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What was taken in."""

    @abstractmethod
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it."""

    @abstractmethod
    def _take(self, number: Tensor | float, state: dict[str, Any]) -> None:
        """One more."""

    @abstractmethod
    def _value(self) -> Tensor | float:
        """The average; a tensor where the number is one on a GPU, for which nobody waited."""


class EpochMetricAvg(_Average):
    """The mean of a number over the epoch so far; each batch counts by its samples.

    Args:
        name: of what the step returned, and of the metric.
        post_each_batch: or only when the epoch ends.
    """

    def __init__(self, name: str, post_each_batch: bool = True) -> None:
        super().__init__(name, post_each_batch)
        self._sum: Tensor | float = 0.0
        self._count = 0

    def on_epoch_start(self, state: dict[str, Any]) -> None:
        """Begin anew."""
        del state
        self._sum, self._count = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Sum and count."""
        return {"sum": float(self._sum), "count": self._count}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self._sum, self._count = saved["sum"], saved["count"]

    def _take(self, number: Tensor | float, state: dict[str, Any]) -> None:
        samples = sample_count(state["batch"])
        self._sum = self._sum + samples * number
        self._count += samples

    def _value(self) -> Tensor | float:
        return self._sum / max(self._count, 1)


class WindowedMetricAvg(_Average):
    """The mean of a number over the last batches, across epochs.

    Args:
        name: of what the step returned, and of the metric.
        window: how many batches.
        post_each_batch: or only when an epoch ends.

    Raises:
        ConfigError: if the window is empty.
    """

    def __init__(self, name: str, window: int = 100, post_each_batch: bool = True) -> None:
        super().__init__(name, post_each_batch)
        if window < 1:
            raise ConfigError(f"window={window} holds nothing. Write 1 or more.")
        self._window: deque[Tensor | float] = deque(maxlen=window)

    def state_dict(self) -> dict[str, Any]:
        """The numbers."""
        return {"window": [float(number) for number in self._window]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self._window.clear()
        self._window.extend(saved["window"])

    def _take(self, number: Tensor | float, state: dict[str, Any]) -> None:
        self._window.append(number)

    def _value(self) -> Tensor | float:
        return sum(self._window) / max(len(self._window), 1)


class ExponentialMetricAvg(_Average):
    """An exponential average of a number, in which the first batch does not weigh for ever.

    After n batches: the sum of beta**(n - i) * number i, over the sum of these weights.

    Args:
        name: of what the step returned, and of the metric.
        beta: 0 to 1, without 1.
        post_each_batch: or only when an epoch ends.

    Raises:
        ConfigError: if beta is out of range.
    """

    def __init__(self, name: str, beta: float = 0.98, post_each_batch: bool = True) -> None:
        super().__init__(name, post_each_batch)
        if not 0 <= beta < 1:
            raise ConfigError(f"beta={beta} is no weight of the past. Write 0 or more, below 1.")
        self.beta = beta
        self._sum: Tensor | float = 0.0
        self._weight = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Weighted sum, and sum of the weights."""
        return {"sum": float(self._sum), "weight": self._weight}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self._sum, self._weight = saved["sum"], saved["weight"]

    def _take(self, number: Tensor | float, state: dict[str, Any]) -> None:
        self._sum = self.beta * self._sum + number
        self._weight = self.beta * self._weight + 1

    def _value(self) -> Tensor | float:
        return self._sum / max(self._weight, 1.0)


class AccAvg:
    """The part of the epoch's samples, so far, whose label is among the k highest scores.

    The metric is "accuracy", or "top5_accuracy" for k = 5; 0 to 1.

    Args:
        k: how many scores.
        post_each_batch: or only when the epoch ends.
        pred_key: of the scores (N, K, ...) that the step returned.
        target_key: place of the labels in the batch: indices, or probabilities as mixing makes.
    """

    def __init__(
        self,
        k: int = 1,
        *,
        post_each_batch: bool = True,
        pred_key: str = "pred",
        target_key: int | str = 1,
    ) -> None:
        self.k = k
        self.name = "accuracy" if k == 1 else f"top{k}_accuracy"
        self.post_each_batch = post_each_batch
        self.pred_key = pred_key
        self.target_key = target_key
        self._right: Tensor | int = 0
        self._count = 0

    def on_epoch_start(self, state: dict[str, Any]) -> None:
        """Begin anew."""
        del state
        self._right, self._count = 0, 0

    def on_batch_end(self, state: dict[str, Any]) -> None:
        """Count, and post."""
        scores, labels = _pair(state, self.pred_key, self.target_key)
        right = count_right(scores, labels, (self.k,))[0]
        self._right = self._right + (right if right.is_cuda else int(right))
        self._count += scores.numel() // scores.shape[1] if scores.dim() > 1 else len(scores)
        if self.post_each_batch:
            state["metrics"][self.name] = self._right / self._count

    def on_epoch_end(self, state: dict[str, Any]) -> None:
        """Post."""
        state["metrics"][self.name] = int(self._right) / max(self._count, 1)

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"right": int(self._right), "count": self._count}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self._right, self._count = saved["right"], saved["count"]


class ConfusionMatrix:
    """Which class was taken for which in the epoch: `state["confusion"]`, when the epoch ends.

    It is (K, K) of int64: labels in rows, predictions in columns. The metric "macro_f1" follows
    from it.

    Args:
        classes: K names, by index.
        pred_key: of the scores (N, K) that the step returned.
        target_key: place of the labels in the batch: indices, or probabilities as mixing makes.
    """

    def __init__(
        self, classes: Sequence[object], *, pred_key: str = "pred", target_key: int | str = 1
    ) -> None:
        self.classes = tuple(str(name) for name in classes)
        self.pred_key = pred_key
        self.target_key = target_key
        self._matrix = self._zeros()

    def on_epoch_start(self, state: dict[str, Any]) -> None:
        """Begin anew."""
        del state
        self._matrix = self._zeros()

    def on_batch_end(self, state: dict[str, Any]) -> None:
        """Count."""
        scores, labels = _pair(state, self.pred_key, self.target_key)
        predictions, labels = scores.argmax(dim=1), as_indices(labels, scores)
        self._matrix = self._matrix + confusion_matrix(predictions, labels, len(self.classes))

    def on_epoch_end(self, state: dict[str, Any]) -> None:
        """Post."""
        state["confusion"] = self._matrix
        state["metrics"]["macro_f1"] = class_scores(self._matrix).macro_f1

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"matrix": self._matrix}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self._matrix = saved["matrix"].clone()

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)


class Throughput:
    """Samples per second over the last batches, as the metric "samples_per_second".

    Loading and callbacks count; recipes that `CallRecipe` ran in between do not.

    Args:
        window: how many batches.
        clock: gives seconds.
    """

    def __init__(self, window: int = 50, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last: float | None = None
        self._tested = 0.0
        self._window: deque[tuple[int, float]] = deque(maxlen=window)

    def on_epoch_start(self, state: dict[str, Any]) -> None:
        """What was between epochs does not count."""
        self._begin(state)

    def on_batch_start(self, state: dict[str, Any]) -> None:
        """Begin here, where a resumed epoch did not start."""
        if self._last is None:
            self._begin(state)

    def on_batch_end(self, state: dict[str, Any]) -> None:
        """Count, and post."""
        assert self._last is not None
        now, tested = self._clock(), state.get("test_seconds", 0.0)
        seconds = now - self._last - (tested - self._tested)
        self._last, self._tested = now, tested
        self._window.append((sample_count(state["batch"]), seconds))
        spent = sum(seconds for _, seconds in self._window)
        if spent > 0:
            samples = sum(samples for samples, _ in self._window)
            state["metrics"]["samples_per_second"] = samples / spent

    def close(self) -> None:
        """Forget when the last batch was."""
        self._last = None

    def _begin(self, state: dict[str, Any]) -> None:
        self._last, self._tested = self._clock(), state.get("test_seconds", 0.0)


def _number(state: Mapping[str, Any], name: str) -> Tensor | float:
    """What the step returned as `name`: a float, or shape () on a GPU, so that nobody waits.

    Raises:
        MetricError: if it returned no such thing, or no number.
    """
    value = _returned(state, name)
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_cuda:
        return value.detach().double().reshape(())
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MetricError(
            f"The step's {name!r} is no number: {type(value).__name__}. Return its mean, or name "
            "another value."
        ) from error


def _pair(state: Mapping[str, Any], pred_key: str, target_key: int | str) -> tuple[Any, Any]:
    scores = _returned(state, pred_key)
    if not isinstance(scores, Tensor) or not scores.dim():
        raise MetricError(
            f"The step's {pred_key!r} is a {type(scores).__name__}, not scores of samples. "
            "Return a tensor (N, K) as it."
        )
    labels: Tensor = get_item(state["batch"], target_key)
    return scores, labels.to(scores.device)


def _returned(state: Mapping[str, Any], name: str) -> Any:
    if name not in state:
        raise MetricError(f"The step returned no {name!r}. {suggest(name, map(str, state))}")
    return state[name]
