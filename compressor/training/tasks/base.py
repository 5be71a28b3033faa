"""The task interface: a model together with how it is called, trained and judged.

By convention the layers are in `self.model`, so that the bare network is at hand after training.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from compressor.errors import MetricError, ModelError
from compressor.interfaces import data

T = TypeVar("T", bound="TaskModel")

# No metric, beside those in a result: which classes torchmetrics' MeanAveragePrecision met.
_NO_METRICS = frozenset({"classes"})


@runtime_checkable
class Metric(Protocol):
    """Anything that gathers and computes; the metrics and collections of torchmetrics are such."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Take one batch in."""

    def compute(self) -> Any:
        """One number, or a dict of them, of all that was taken in."""

    def reset(self) -> Any:
        """Begin anew."""


class TaskModel(nn.Module, ABC):
    """A model that knows its batches: subclass it, put the layers in `self.model`.

    The trainer moves the batch to the device, chooses the mode and switches gradients off where
    none are needed. What a batch is, only the task knows.

    >>> class Regression(TaskModel):
    ...     def __init__(self) -> None:
    ...         super().__init__()
    ...         self.model = nn.Linear(2, 1)
    ...
    ...     def forward(self, batch):
    ...         inputs, _ = batch
    ...         return self.model(inputs)
    ...
    ...     def loss(self, outputs, batch):
    ...         _, targets = batch
    ...         return nn.functional.mse_loss(outputs, targets)
    """

    @abstractmethod
    def forward(self, batch: Any) -> Any:
        """Call the layers on what the loader yields."""

    @abstractmethod
    def loss(self, outputs: Any, batch: Any) -> Tensor | Mapping[str, Tensor]:
        """A scalar, or named scalars that are summed, of what `forward` returned for `batch`.

        Everything that it needs must be in its arguments: algorithms call it with other targets.

        Returns:
            Of shape (): one tensor, which is the term "loss"; or a dict of terms by name. Their sum
            is trained, to which algorithms may add terms; a factor is the task's own business.
            The mean of each over an epoch is `state.train_metrics["train/name"]`, and of the sum
            "train/total".
        """

    def eval_forward(self, batch: Any, outputs: Any = None) -> Any:
        """What metrics are updated with.

        Args:
            batch: as the loader yields it.
            outputs: of `forward` for this batch, where they are known already.
        """
        return self(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> Any:
        """The metrics of training or of evaluation: one, several, a collection, or a dict.

        Return the same objects each time; the trainer resets them. Metrics that are attributes of
        the task go to its device with it, and leave its weights and structure alone.
        """
        del is_train
        return {}

    def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
        """Take one batch into one of the metrics.

        Args:
            batch: as the loader yields it.
            outputs: of `eval_forward`.
            metric: one of `get_metrics`, which may be a collection.
        """
        del batch, outputs, metric
        raise NotImplementedError(
            f"{type(self).__name__} has metrics and no update_metric(batch, outputs, metric). "
            "Write it: take the targets out of the batch and call metric.update(outputs, targets)."
        )

    def sample_count(self, batch: Any) -> int:
        """How many samples are in `batch`."""
        return data.sample_count(batch)

    def split_batch(self, batch: Any, size: int) -> list[Any]:
        """`batch` as batches of at most `size` samples each."""
        return data.split_batch(batch, size)

    def around(self: T, net: nn.Module) -> T:
        """This task with `net` in place of `self.model`; all else is shared, but for hooks.

        So a teacher is called as the student is.

        Raises:
            ModelError: if the layers are not in `self.model`.
        """
        if not isinstance(getattr(self, "model", None), nn.Module):
            raise ModelError(
                f"{type(self).__name__} has no `self.model`, so another network cannot take its "
                "place. Put the layers into self.model, or write `around(net)`."
            )
        task = copy.copy(self)
        for key, store in vars(task).items():
            if "hooks" in key and isinstance(store, dict):  # those of the student are not its own
                vars(task)[key] = type(store)()
            elif key in ("_parameters", "_buffers", "_modules"):
                vars(task)[key] = store.copy()
        task.model = net
        task.training = net.training
        return task


def named_metrics(returned: Any) -> dict[str, Metric]:
    """What `get_metrics` returned, by name.

    A metric without a name has that of its class. A collection counts as one metric: its members
    share what they gather, and have names of their own when they are computed.

    Raises:
        MetricError: if something is no metric, or two have one name.
    """
    if isinstance(returned, (Mapping, nn.ModuleDict)) and not isinstance(returned, Metric):
        return {str(name): _check_metric(metric) for name, metric in returned.items()}
    is_several = isinstance(returned, (list, tuple, nn.ModuleList))
    metrics: Iterable[Any] = returned if is_several else (returned,)
    named: dict[str, Metric] = {}
    for metric in map(_check_metric, metrics):
        name = type(metric).__name__
        if name in named:
            raise MetricError(
                f"There are two metrics of the class {name}. Name them: return a dict, such as "
                f"{{'first': {name}(...), 'second': {name}(...)}}."
            )
        named[name] = metric
    return named


def held_metrics(returned: Any) -> dict[str, Metric] | nn.ModuleDict:
    """The same as an attribute of a task: metrics that are modules go to its device with it.

    Raises:
        MetricError: as `named_metrics`.
    """
    metrics = named_metrics(returned)
    modules = {name: metric for name, metric in metrics.items() if isinstance(metric, nn.Module)}
    if len(modules) < len(metrics):
        return metrics
    for name in modules:
        if "." in name or hasattr(nn.ModuleDict, name):
            raise MetricError(
                f"A metric that is a module cannot be named {name!r}: torch has that name for "
                "something else, or it has a dot. Choose another name."
            )
    return nn.ModuleDict(modules)


def compute_metrics(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The numbers that `metrics` have arrived at; those of a dict keep the names that it has.

    Raises:
        MetricError: if a value is not one number, or two have one name.
    """
    values: dict[str, float] = {}
    for name, metric in metrics.items():
        result = metric.compute()
        found = result if isinstance(result, Mapping) else {name: result}
        for key, value in found.items():
            if key in _NO_METRICS:
                continue
            if key in values:
                raise MetricError(
                    f"Two metrics give a value named {key!r}, one of them is {name!r}. "
                    "Name one otherwise, for a collection with prefix='...'."
                )
            values[str(key)] = _number(str(key), value)
    return values


def _check_metric(metric: Any) -> Metric:
    if isinstance(metric, type):
        raise MetricError(
            f"The metric {metric.__name__} is a class. Give an instance: {metric.__name__}(...)."
        )
    if not isinstance(metric, Metric):
        raise MetricError(
            f"A {type(metric).__name__} is no metric. Give objects with update, compute and reset, "
            "such as those of torchmetrics."
        )
    return metric


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise MetricError(
            f"The metric {name!r} has {value.numel()} values, shape {tuple(value.shape)}. Let it "
            "give one number: average='macro', or class_metrics=False for boxes."
        )
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError) as error:
        raise MetricError(
            f"The metric {name!r} is a {type(value).__name__}. Let its compute() return a number, "
            "or a dict of numbers."
        ) from error
