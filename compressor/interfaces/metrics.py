"""Right answers counted, and what a drop of a metric may be: plain functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.errors import ConfigError, MetricError


def count_right(logits: Tensor, labels: Tensor, topk: Sequence[int]) -> Tensor:
    """How many labels are among the k highest scores, for each k.

    Args:
        logits: (samples, classes, ...); (samples,) or (samples, 1) is the logit of yes or no.
        labels: class indices (samples, ...) or (samples, 1), or scores shaped like `logits`.
        topk: values of k.

    Returns:
        (len(topk),) integers.

    Raises:
        MetricError: if the shapes do not belong together.

    >>> count_right(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]]), torch.tensor([1, 1]), (1, 2))
    tensor([1, 2])
    """
    if logits.dim() < 2 or logits.shape[1] == 1:  # yes or no: as the scores of two classes
        logits = logits.reshape(len(logits), 1)
        logits = torch.cat([-logits, logits], dim=1)
    if labels.shape == logits.shape and labels.is_floating_point():  # one-hot or soft
        labels = labels.argmax(dim=1)
    answers = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    if labels.numel() != len(answers):
        raise MetricError(
            f"The model's output {tuple(logits.shape)} and the labels {tuple(labels.shape)} do not "
            "belong together. Give outputs (samples, classes, ...) and labels (samples, ...)."
        )
    highest = answers.topk(min(max(topk), answers.shape[1]), dim=1).indices
    is_hit = highest == labels.reshape(-1, 1)
    return torch.stack([is_hit[:, :k].any(dim=1).sum() for k in topk])


def answer_count(logits: Tensor) -> int:
    """How many answers there are: one a sample, or one a pixel."""
    return logits.numel() // logits.shape[1] if logits.dim() > 1 else len(logits)


def check_delta(delta: float, key: str, reference: float, *, is_larger_better: bool) -> None:
    """Refuse a delta that every model would keep.

    Raises:
        ConfigError: with the value to write instead.
    """
    if not is_larger_better or reference <= 0 or delta < reference:
        return
    likely = f"; for one percentage point write delta={delta / 100:g}" if reference <= 1 else ""
    raise ConfigError(
        f"delta={delta:g} accepts every model: the reference's {key!r} is {reference:.4g}. "
        f"delta is an absolute drop on the metric's own scale{likely}."
    )
