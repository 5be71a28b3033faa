"""One evaluation: a loader and what is measured on it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from compressor.errors import ConfigError, DataError, MetricError, suggest
from compressor.interfaces.data import kept_generators, move
from compressor.interfaces.evaluation import evaluating
from compressor.interfaces.loaders import whole_loader
from compressor.training.clock import Clock, Duration, DurationLike, Every
from compressor.training.metric_state import begin_metrics
from compressor.training.state import State
from compressor.training.step import Step
from compressor.training.tasks.base import Metric, TaskModel, compute_metrics, named_metrics


@dataclass(frozen=True)
class Evaluator:
    """What to evaluate on, how, and how often.

    Without `function`, a `TaskModel` gives its own metrics; any other model, or a task without
    metrics, the means of its loss terms, "loss" if there is one.

    Attributes:
        dataloader: yields batches; may be None with a `function`.
        label: comes before the names of its metrics: "label/name". '': the names as they are.
        metric_names: regular expressions, of which a task's metric must match one; None: all.
        max_batches: takes so many; None: all.
        interval: between evaluations; None: the trainer's.
        function: model -> metrics. Called in eval mode, without gradients.
    """

    dataloader: Iterable[Any] | None = None
    label: str = ""
    metric_names: tuple[str, ...] | None = None
    max_batches: int | None = None
    interval: DurationLike | None = None
    function: Callable[[nn.Module], Mapping[str, float]] | None = None

    def __post_init__(self) -> None:
        """Check that there is something to evaluate."""
        if self.dataloader is None and self.function is None:
            raise ConfigError("The Evaluator has nothing to evaluate. Give a dataloader.")
        if isinstance(self.metric_names, str):
            raise ConfigError(
                f"metric_names={self.metric_names!r} is a string. Write a tuple of names."
            )


def make_evaluators(
    given: Iterable[Any] | Evaluator | Iterable[Evaluator] | None,
) -> tuple[Evaluator, ...]:
    """Evaluators from what a user gives: one, several, a loader, or nothing.

    Raises:
        ConfigError: if two have one label.
    """
    if given is None:
        return ()
    if isinstance(given, Evaluator):
        return (given,)
    kinds = (Evaluator, DataLoader)
    if isinstance(given, (list, tuple)) and any(isinstance(each, kinds) for each in given):
        evaluators = [each if isinstance(each, Evaluator) else Evaluator(each) for each in given]
        labels = [evaluator.label for evaluator in evaluators]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(
                    f"Two evaluators have the label {label!r}. Give each its own: "
                    "Evaluator(loader, 'name')."
                )
        return tuple(evaluators)
    return (Evaluator(given),)


class Evaluations:
    """When which evaluator runs.

    Args:
        evaluators: each with its own interval, or none.
        interval: of those that have none.
        skip: none runs before so much has been trained, but for the end.
    """

    def __init__(
        self, evaluators: Sequence[Evaluator], interval: DurationLike, skip: DurationLike
    ) -> None:
        self.all = tuple(evaluators)
        self.intervals = [
            Every(interval if evaluator.interval is None else evaluator.interval)
            for evaluator in evaluators
        ]
        Every(interval)  # is checked also without evaluators
        self._skip = Duration.parse(skip)
        self._complete_at = -1  # finished batches when all had run

    def due(self, state: State) -> list[Evaluator]:
        """Those whose interval has passed."""
        pairs = zip(self.all, self.intervals, strict=True)
        due = [evaluator for evaluator, every in pairs if every.is_due(state.clock)]
        return due if state.clock.has_reached(self._skip, state.max_duration) else []

    def note(self, evaluators: Sequence[Evaluator], clock: Clock) -> None:
        """They have run."""
        if len(evaluators) == len(self.all):
            self._complete_at = clock.batch

    def is_up_to_date(self, clock: Clock) -> bool:
        """Whether all have run since the last batch."""
        return self._complete_at == clock.batch


def run_evaluator(evaluator: Evaluator, state: State, step: Step | None) -> dict[str, float]:
    """The metrics of `state.model` as it is; mode and the loader's own generators are put back.

    Raises:
        MetricError: if no metric of the task fits `metric_names`, or one is no number.
        DataError: if the loader gives no batch.
    """
    model = state.model
    with evaluating(model), torch.no_grad(), kept_generators(evaluator.dataloader):
        if evaluator.function is not None:
            values: Mapping[str, Any] = evaluator.function(model)
        else:
            values = _measure(evaluator, state, step)
    prefix = f"{evaluator.label}/" if evaluator.label else ""
    return {f"{prefix}{name}": float(value) for name, value in values.items()}


def _measure(evaluator: Evaluator, state: State, step: Step | None) -> dict[str, float]:
    metrics = {}
    if isinstance(state.model, TaskModel):
        metrics = choose(
            named_metrics(state.model.get_metrics(is_train=False)), evaluator.metric_names
        )
    batches = (
        move(batch, state.device, non_blocking=True)
        for batch in islice(_guarded(evaluator), evaluator.max_batches)
    )
    if metrics:
        begin_metrics(metrics, state.device)
        values = _measure_metrics(state.model, metrics, batches)
        return _chosen_values(values, evaluator.metric_names)
    return _mean_loss(state, step, batches)


def _measure_metrics(
    task: Any, metrics: Mapping[str, Metric], batches: Iterable[Any]
) -> dict[str, float]:
    is_empty = True
    for batch in batches:
        outputs = task.eval_forward(batch, None)
        for metric in metrics.values():
            task.update_metric(batch, outputs, metric)
        is_empty = False
    _check_some(is_empty)
    return compute_metrics(metrics)


def _mean_loss(state: State, step: Step | None, batches: Iterable[Any]) -> dict[str, float]:
    if step is None:
        raise ConfigError(
            "A ManualStep says nothing of the loss, so there is nothing to evaluate. Give the "
            "Evaluator a function of the model."
        )
    sums: dict[str, float] = {}
    seen = 0
    for batch in batches:
        count = step.sample_count(batch)
        if not count:
            continue
        terms = step.terms(state.model, batch)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + count * float(value)
        seen += count
    _check_some(not seen)
    return {name: value / seen for name, value in sums.items()}


def choose(metrics: Mapping[str, Metric], names: tuple[str, ...] | None) -> dict[str, Metric]:
    """Those of `metrics` of which a whole name matches one of the regular expressions `names`.

    A collection has the names of its members too, and is chosen as a whole.

    Raises:
        MetricError: if an expression matches none.
    """
    if names is None:
        return dict(metrics)
    known = {name: {name, *_member_names(metric)} for name, metric in metrics.items()}
    every = sorted(set().union(*known.values()))
    for name in names:
        if not any(re.fullmatch(name, other) for other in every):
            raise MetricError(f"The task has no metric {name!r}. {suggest(name, every)}")
    return {
        key: metrics[key]
        for key, own in known.items()
        if any(re.fullmatch(name, other) for name in names for other in own)
    }


def check_evaluators(evaluators: Iterable[Evaluator], model: nn.Module) -> None:
    """Do nothing if the metrics that are named are the task's.

    Raises:
        MetricError: if one is not.
    """
    for evaluator in evaluators:
        if isinstance(model, TaskModel) and evaluator.function is None:
            choose(named_metrics(model.get_metrics(is_train=False)), evaluator.metric_names)


def _chosen_values(values: Mapping[str, float], names: tuple[str, ...] | None) -> dict[str, float]:
    """Of a collection, only the members that were named; all, if it was named itself."""
    chosen = {
        name: value
        for name, value in values.items()
        if names is None or any(re.fullmatch(other, name) for other in names)
    }
    return chosen or dict(values)


def _member_names(metric: Metric) -> list[str]:
    names = getattr(metric, "keys", None)
    return [str(name) for name in names()] if callable(names) else []


def _guarded(evaluator: Evaluator) -> Iterator[Any]:
    try:
        if evaluator.dataloader is not None:
            yield from whole_loader(evaluator.dataloader)
    except Exception as error:
        label = f" {evaluator.label!r}" if evaluator.label else ""
        raise DataError(
            f"The loader of the evaluation{label} failed: {type(error).__name__}: {error}. "
            "Check its dataset."
        ) from error


def _check_some(is_empty: bool) -> None:
    if is_empty:
        raise DataError("The loader of the evaluation yields no batch. Check its dataset.")
