"""The samples that tell most about a classifier, found in one pass with little memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import ConfigError, MetricError
from compressor.training.inspection.confusion import check_indices


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample of an evaluation, and what the model made of it.

    Attributes:
        index: its place in the pass, from 0.
        image: (C, H, W) or (H, W), on the CPU, as the model got it.
        label: index of its class.
        prediction: index of the most probable class.
        runner_up: index of the second most probable one.
        label_probability: what the model gave the label.
        prediction_probability: what it gave the prediction.
        runner_up_probability: what it gave the runner-up.
        loss: cross entropy, in nats: -log of `label_probability`.
        saliency: (H, W), 0 to 1: `input_gradients` of the prediction; None if there is none.
    """

    index: int
    image: Tensor
    label: int
    prediction: int
    runner_up: int
    label_probability: float
    prediction_probability: float
    runner_up_probability: float
    loss: float
    saliency: Tensor | None = None

    @property
    def is_right(self) -> bool:
        """Whether the prediction is the label."""
        return self.prediction == self.label

    @property
    def margin(self) -> float:
        """How much more probable the prediction is than the runner-up, 0 to 1."""
        return self.prediction_probability - self.runner_up_probability


@dataclass(frozen=True, eq=False)
class Scores:
    """What logits say of each of N samples.

    Attributes:
        labels: (N,) of int64.
        order: (N, 2) of int64: the two most probable classes; the lower index first of equals.
        top: (N, 2) of float64: their probabilities.
        label_probability: (N,) of float64.
        loss: (N,) of float64, in nats.
    """

    labels: Tensor
    order: Tensor
    top: Tensor
    label_probability: Tensor
    loss: Tensor

    @property
    def is_right(self) -> Tensor:
        """(N,) of bool: whether the prediction is the label."""
        return self.order[:, 0] == self.labels

    @property
    def margin(self) -> Tensor:
        """(N,): how much more probable the prediction is than the runner-up."""
        return self.top[:, 0] - self.top[:, 1]


def score(logits: Tensor, labels: Tensor) -> Scores:
    """What `logits` say of each sample, computed in float64 on the CPU.

    Args:
        logits: (N, K), K at least 2.
        labels: (N,) of class indices.

    Raises:
        MetricError: a logit that is NaN or infinite, or a label that is no class.
    """
    logits, labels = logits.detach().cpu().double(), labels.detach().cpu().long()
    check_indices(labels, logits.shape[1], "label")
    log_probabilities = logits.log_softmax(1)
    if log_probabilities.isnan().any():
        raise MetricError(
            "A logit is NaN or infinite, so the samples have no order. Look at the learning rate, "
            "and for the first module whose outputs are not finite."
        )
    probabilities, order = log_probabilities.exp().sort(dim=1, descending=True, stable=True)
    own = log_probabilities.gather(1, labels[:, None]).squeeze(1)
    return Scores(labels, order[:, :2], probabilities[:, :2], own.exp(), -own)


class SampleCollector:
    """Keeps the best, the worst and the most confused samples of all that it is shown.

    - best: predicted right, with the lowest loss;
    - worst: the highest loss;
    - most confused: the smallest margin between the two most probable classes, right or wrong.

    Of equals, the earlier one. Memory for 3 × `count` images.

    Args:
        count: samples of each kind, 1 or more.

    Attributes:
        seen: how many samples there were.
        best, worst, most_confused: the most extreme first.

    >>> collector = SampleCollector(count=1)
    >>> logits = torch.tensor([[0.0, 3.0], [2.0, 0.0], [0.0, 0.1]])
    >>> scores = collector.update(torch.zeros(3, 1, 2, 2), logits, torch.tensor([1, 1, 1]))
    >>> [sample.index for sample in (*collector.best, *collector.worst, *collector.most_confused)]
    [0, 1, 2]
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ConfigError(f"samples={count} shows nothing. Give 1 or more of each kind.")
        self.count = count
        self.seen = 0
        self.best: list[Sample] = []
        self.worst: list[Sample] = []
        self.most_confused: list[Sample] = []

    @property
    def kept(self) -> dict[int, Sample]:
        """All that is kept now, by index; a sample can be of two kinds."""
        return {each.index: each for each in (*self.best, *self.worst, *self.most_confused)}

    def update(self, images: Tensor, logits: Tensor, labels: Tensor) -> Scores:
        """Look at one batch.

        Args:
            images: (N, C, H, W) or (N, H, W).
            logits: (N, K).
            labels: (N,).

        Returns:
            What the logits say of the samples.

        Raises:
            MetricError: a logit that is NaN or infinite, or a label that is no class.
        """
        scores = score(logits, labels)

        def take(kept: list[Sample], keys: Tensor, key: Callable[[Sample], float]) -> list[Sample]:
            bar = key(kept[-1]) if len(kept) == self.count else torch.inf
            rows = keys.sort(stable=True).indices[: self.count].tolist()
            new = [self._sample(images, scores, row) for row in rows if keys[row] < bar]
            return sorted((*kept, *new), key=lambda each: (key(each), each.index))[: self.count]

        only_right = scores.loss.masked_fill(~scores.is_right, torch.inf)
        self.best = take(self.best, only_right, lambda each: each.loss)
        self.worst = take(self.worst, -scores.loss, lambda each: -each.loss)
        self.most_confused = take(self.most_confused, scores.margin, lambda each: each.margin)
        self.seen += len(labels)
        return scores

    def _sample(self, images: Tensor, scores: Scores, row: int) -> Sample:
        return Sample(
            index=self.seen + row,
            # A copy: a view would keep the whole batch.
            image=images[row].detach().to("cpu", copy=True),
            label=int(scores.labels[row]),
            prediction=int(scores.order[row, 0]),
            runner_up=int(scores.order[row, 1]),
            label_probability=scores.label_probability[row].item(),
            prediction_probability=scores.top[row, 0].item(),
            runner_up_probability=scores.top[row, 1].item(),
            loss=scores.loss[row].item(),
        )
