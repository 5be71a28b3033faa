"""What a metric has gathered: nothing at first, and what a checkpoint within an epoch needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from compressor.training.tasks.base import Metric


def begin_metrics(metrics: Mapping[str, Metric], device: torch.device) -> None:
    """Let `metrics` begin anew on `device`; those that are no part of the model stayed behind."""
    for metric in metrics.values():
        to_device = getattr(metric, "to", None)
        if callable(to_device):
            to_device(device)
        metric.reset()


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


def _update_counts(metric: Any) -> list[int]:
    return [int(member._update_count) for member in _members(metric)]


def _members(metric: Any) -> list[Any]:
    is_collection = not hasattr(metric, "_update_count")
    return list(metric.values()) if is_collection else [metric]
