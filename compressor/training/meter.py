"""Means of the loss terms over an epoch, and the watch for a loss that is no number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor.distributed import Context
from compressor.errors import MetricError
from compressor.interfaces.inputs import device_of
from compressor.training.clock import Clock, DurationLike, Every
from compressor.training.errors import DivergedError
from compressor.training.metric_state import (
    begin_metrics,
    compute_together,
    restore_metric,
    save_metric,
)
from compressor.training.tasks.base import Metric, TaskModel, named_metrics

if TYPE_CHECKING:
    from compressor.training.state import State

# Batches between looks at a loss on the GPU: a look waits for the GPU, so not every batch. The sum
# that is looked at stays infinite or NaN once a term was, so nothing is missed, only seen later.
LOOK_EVERY = 50


class LossMeter:
    """Sums of the terms since it was made, kept where they were computed."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, float] = {}

    def update(self, losses: Mapping[str, Tensor], total: Tensor, share: float = 1.0) -> None:
        """Count a part of a batch in.

        Args:
            losses: terms, each of shape ().
            total: their weighted sum.
            share: of the batch.
        """
        is_cheap = not total.is_cuda
        last: Tensor | None = None
        item: Tensor | float = 0.0
        for name, value in losses.items():
            last = value
            item = value.item() if is_cheap else value.detach().double()
            self._add(name, item, share)
        if total is not last:  # a total of one term is that term
            item = total.item() if is_cheap else total.detach().double()
        self._add("total", item, share)

    def check(self, clock: Clock) -> None:
        """Do nothing if the total is a number; on the GPU that is looked at now and then.

        Raises:
            DivergedError: if the total is infinite or NaN; on the GPU at the latest after
                `LOOK_EVERY` batches.
        """
        total = self._sums.get("total", 0.0)
        if isinstance(total, float):
            if not math.isfinite(total):
                self._raise(total, clock.epoch + 1, clock.batch_in_epoch + 1)
        elif clock.batch_in_epoch % LOOK_EVERY == 0 and not math.isfinite(total.item()):
            self._raise(total.item(), clock.epoch + 1, clock.batch_in_epoch + 1)

    def means(self, clock: Clock, context: Context) -> dict[str, float]:
        """Mean of each term over its batches in all processes, by "train/" and the term's name.

        Raises:
            DivergedError: if the total is infinite or NaN.
        """
        sums = context.total({name: float(value) for name, value in self._sums.items()})
        counts = context.total(self._counts)
        total = sums.get("total", 0.0)
        if not math.isfinite(total):
            self._raise(total, clock.epoch + 1, clock.batch_in_epoch)
        return {f"train/{name}": value / counts[name] for name, value in sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        return {
            "sums": {name: float(value) for name, value in self._sums.items()},
            "counts": dict(self._counts),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self._sums, self._counts = dict(saved["sums"]), dict(saved["counts"])

    def _add(self, name: str, item: Tensor | float, share: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + (item if share == 1.0 else share * item)
        self._counts[name] = self._counts.get(name, 0.0) + share

    def _raise(self, value: float, epoch: int, batch: int) -> None:
        odd = [name for name, s in self._sums.items() if not math.isfinite(float(s))]
        raise DivergedError(
            f"The training loss became {value} in epoch {epoch}, batch {batch} "
            f"(terms: {', '.join(odd)}). Lower the learning rate, or clip gradients harder."
        )


def merge_meters(saved: Sequence[Mapping[str, Any]], rank: int) -> dict[str, Any]:
    """What a `TrainMeter` loads where the number of processes is not that of a checkpoint.

    Sums are rank 0's. Of metrics each process has its own, and those of processes that are gone
    are lost.

    Args:
        saved: the states of all that there were.
        rank: of the process that loads.
    """
    own = saved[rank] if rank < len(saved) else {"metrics": {}, "samples": 0}
    meters = saved if rank == 0 else []
    windows = [each["window"] for each in meters if each["window"] is not None]
    return {
        "epoch": _merge_losses([each["epoch"] for each in meters]),
        "window": _merge_losses(windows),
        "metrics": own["metrics"],
        "samples": own.get("samples", 0),
    }


def _merge_losses(saved: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of a `LossMeter` that has seen what those of the states `saved` have."""
    merged: dict[str, dict[str, float]] = {"sums": {}, "counts": {}}
    for each in saved:
        for kind, totals in merged.items():
            for name, value in each[kind].items():
                totals[name] = totals.get(name, 0.0) + value
    return merged


class TrainMeter:
    """All that is measured while training: losses of the epoch, since the last log, and metrics.

    Args:
        model: a `TaskModel` may have metrics of its own for training.
        log_interval: between the losses that loggers are told of.
    """

    def __init__(self, model: nn.Module, log_interval: DurationLike) -> None:
        self._task = model if isinstance(model, TaskModel) else None
        self._metrics: dict[str, Metric] = {}
        self._samples = 0  # that the metrics have seen
        self.every = Every(log_interval)
        self._epoch = LossMeter()
        self._window = None if self.every.is_by_epoch else LossMeter()

    def check_own_metrics(self) -> None:
        """Do nothing if no metric of training is one of evaluation too.

        Raises:
            MetricError: if one is: an evaluation within an epoch would forget what was gathered.
        """
        if self._task is None:
            return
        own, others = (
            named_metrics(self._task.get_metrics(is_train=is_train)) for is_train in (True, False)
        )
        shared = {id(metric) for metric in own.values()} & {id(each) for each in others.values()}
        for name, metric in own.items():
            if id(metric) in shared:
                raise MetricError(
                    f"get_metrics gives the same object {name!r} for training and evaluation, and "
                    "an evaluation within an epoch would forget what training gathered. Give each "
                    "its own: metric.clone()."
                )

    def begin_epoch(self) -> None:
        """Forget the epoch before."""
        self._epoch = LossMeter()
        self._samples = 0
        if self._task is not None:
            self._metrics = named_metrics(self._task.get_metrics(is_train=True))
            begin_metrics(self._metrics, device_of(self._task))

    def update(self, state: State, total: Tensor, share: float) -> None:
        """Count a micro-batch in, of which the state holds losses, targets and outputs."""
        if self._window is None and not self._metrics:
            self._epoch.update(state.losses, total, share)
        else:
            self.count(state.losses, state.batch, state.outputs, total, share)

    def count(
        self, losses: Mapping[str, Tensor], batch: Any, outputs: Any, total: Tensor, share: float
    ) -> None:
        """Count a micro-batch in, which is `share` of its batch."""
        self._epoch.update(losses, total, share)
        if self._window is not None:
            self._window.update(losses, total, share)
        if self._metrics and self._task is not None and share:  # 0: another process counts them
            self._samples += self._task.sample_count(batch)
            with torch.no_grad():
                outputs = self._task.eval_forward(batch, outputs)
                for metric in self._metrics.values():
                    self._task.update_metric(batch, outputs, metric)

    def check(self, clock: Clock) -> None:
        """Do nothing if the loss is a number.

        Raises:
            DivergedError: if it is not.
        """
        self._epoch.check(clock)

    def end_epoch(self, clock: Clock, context: Context) -> dict[str, float]:
        """Means over the epoch, and over all processes, by "train/" and the name."""
        means = self._epoch.means(clock, context)
        if self._metrics:
            computed = compute_together(self._metrics, self._samples, context)
            means |= {f"train/{name}": value for name, value in computed.items()}
        return means

    def log_epoch_if_due(self, state: State) -> None:
        """Tell the loggers of the last epoch."""
        if self._window is None and self.every.is_due(state.clock):
            state.log(state.train_metrics)

    def log_if_due(self, state: State) -> None:
        """Tell the loggers of the batches since they were told last."""
        if self._window is not None and self.every.is_due(state.clock):
            state.log(self._window.means(state.clock, state.context))
            self._window = LossMeter()

    def state_dict(self) -> dict[str, Any]:
        """What was counted in."""
        return {
            "epoch": self._epoch.state_dict(),
            "window": None if self._window is None else self._window.state_dict(),
            "metrics": {name: save_metric(metric) for name, metric in self._metrics.items()},
            "samples": self._samples,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it."""
        self.begin_epoch()
        self._epoch.load_state_dict(saved["epoch"])
        self._samples = saved.get("samples", 0)
        if self._window is not None and saved["window"] is not None:
            self._window.load_state_dict(saved["window"])
        for name, metric in self._metrics.items():
            if name in saved["metrics"]:
                restore_metric(metric, saved["metrics"][name])
