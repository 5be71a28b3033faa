"""The cross entropy of a language model as a metric: a mean over tokens, not over batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from compressor.errors import MetricError


class LanguageCrossEntropy(Metric):
    """Mean cross entropy per token, in nats; its exponential is the perplexity.

    Args:
        vocab_size: V, which is then checked; None takes any.
        ignore_index: label of tokens that do not count.
        kwargs: for `torchmetrics.Metric`.

    >>> metric = LanguageCrossEntropy(vocab_size=5)
    >>> metric.update(torch.zeros(2, 3, 5), torch.tensor([[1, 2, -100], [0, 4, 3]]))
    >>> metric.compute() == torch.tensor(5.0).log()
    tensor(True)
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(
        self, vocab_size: int | None = None, ignore_index: int = -100, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.ignore_index = ignore_index
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take one batch in.

        Args:
            logits: (..., V), of the tokens that the labels name.
            labels: (...).

        Raises:
            MetricError: if V is not `vocab_size`.
        """
        size = logits.shape[-1]
        if self.vocab_size is not None and size != self.vocab_size:
            raise MetricError(
                f"The model scores {size} tokens, and LanguageCrossEntropy was made for "
                f"vocab_size={self.vocab_size}. Write vocab_size={size}."
            )
        flat = labels.reshape(-1)
        loss = F.cross_entropy(
            logits.reshape(-1, size).float(), flat, ignore_index=self.ignore_index, reduction="sum"
        )
        self.total += loss.double()
        self.count += (flat != self.ignore_index).sum()

    def compute(self) -> Tensor:
        """The mean of all tokens so far, of shape ()."""
        return (self.total / self.count).float()
