"""What a metric has gathered: at first, in a checkpoint, and in several processes together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from compressor.distributed import Context
from compressor.training.tasks.base import Metric, compute_metrics


def begin_metrics(metrics: Mapping[str, Metric], device: torch.device) -> None:
    """Let `metrics` begin anew on `device`; those that are no part of the model stayed behind."""
    for metric in metrics.values():
        to_device = getattr(metric, "to", None)
        if callable(to_device):
            to_device(device)
        metric.reset()


def compute_together(
    metrics: Mapping[str, Metric], samples: int, context: Context
) -> dict[str, float]:
    """The numbers that `metrics` of all processes arrive at together.

    Those of torchmetrics exchange what they have gathered. Of others the values are averaged, by
    the samples that each has seen.

    Args:
        metrics: of this process.
        samples: that they have seen.
        context: the processes.
    """
    if context.world_size == 1:
        return compute_metrics(metrics)
    with _exchanging(metrics, context):
        computed = compute_metrics(metrics)
    weighted = {name: samples * value for name, value in computed.items()} if samples else {}
    sums, seen = context.total(weighted), context.total(dict.fromkeys(weighted, float(samples)))
    return {name: value / seen[name] for name, value in sums.items()}


def save_metric(metric: Any) -> dict[str, Any]:
    """The state of a metric of torchmetrics, a collection of them, or anything with a `state_dict`.

    Another metric is not saved: it goes on with what comes after the checkpoint.
    """
    if not callable(getattr(metric, "state_dict", None)):
        return {}
    set_persistent = getattr(metric, "persistent", None)
    if not callable(set_persistent):
        return dict(metric.state_dict())
    set_persistent(True)  # by default its state dict leaves out what it has gathered
    try:
        return {**metric.state_dict(), "updates": _update_counts(metric)}
    finally:
        set_persistent(False)


def restore_metric(metric: Any, saved: dict[str, Any]) -> None:
    """Give `metric` what `save_metric` took, in place."""
    if not saved:
        return
    set_persistent = getattr(metric, "persistent", None)
    if not callable(set_persistent):
        metric.load_state_dict(saved)
        return
    saved = dict(saved)
    counts = saved.pop("updates")
    set_persistent(True)
    try:
        metric.load_state_dict(saved)
    finally:
        set_persistent(False)
    for member, count in zip(_members(metric), counts, strict=True):
        member._update_count = count  # else compute() warns that nothing was gathered
        member._computed = None


@contextmanager
def _exchanging(metrics: Mapping[str, Metric], context: Context) -> Iterator[None]:
    """Let metrics of torchmetrics, which only know `torch.distributed`, exchange by `context`."""
    own: list[Any] = []
    if not (dist.is_available() and dist.is_initialized()):
        members = [member for metric in metrics.values() for member in _members(metric)]
        own = [member for member in members if hasattr(member, "distributed_available_fn")]

    def gather(tensor: Tensor, group: object = None) -> list[Tensor]:
        return [each.to(tensor.device) for each in context.gather(tensor.cpu())]

    before = [(each.distributed_available_fn, each.dist_sync_fn) for each in own]
    for each in own:
        each.distributed_available_fn, each.dist_sync_fn = _always, gather
    try:
        yield
    finally:
        for each, (is_available, sync) in zip(own, before, strict=True):
            each.distributed_available_fn, each.dist_sync_fn = is_available, sync


def _always() -> bool:
    return True


def _update_counts(metric: Any) -> list[int]:
    return [int(member._update_count) for member in _members(metric)]


def _members(metric: Any) -> list[Any]:
    has_members = not hasattr(metric, "_update_count") and callable(getattr(metric, "values", None))
    return list(metric.values()) if has_members else [metric]
