"""Right answers counted: plain functions of scores and labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.errors import MetricError


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
