"""Classification: inputs and targets, cross entropy, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F

from compressor.training.batch import get_item
from compressor.training.tasks.base import TaskModel, held_metrics

OutputLoss: TypeAlias = Callable[[Any, Any], "Tensor | Mapping[str, Tensor]"]


class ClassifierTask(TaskModel):
    """A network of class scores (N, K, ...), trained and judged on (inputs, targets).

    Targets are class indices (N, ...) or probabilities (N, K, ...), as mixing makes them; metrics
    see the likeliest class of these. Scores may also be the "logits" of a mapping, or the attribute
    `logits` of an object: loss and metrics are given these alone.

    Args:
        net: is called with the inputs of a batch.
        num_classes: K, which the metrics then check; None: they take any.
        loss_fn: (scores, targets) to a scalar or to named ones; None is cross entropy.
        train_metrics: as `get_metrics` may return them; None is the accuracy, 0 to 1; () is none.
        eval_metrics: likewise, for evaluation.
        input_key: place of the inputs in a batch.
        target_key: place of the targets.

    >>> import torch
    >>> task = ClassifierTask(nn.Linear(2, 3))
    >>> batch = (torch.ones(4, 2), torch.tensor([0, 1, 2, 0]))
    >>> task(batch).shape, task.loss(task(batch), batch).shape
    (torch.Size([4, 3]), torch.Size([]))
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int | None = None,
        loss_fn: OutputLoss | None = None,
        train_metrics: Any = None,
        eval_metrics: Any = None,
        *,
        input_key: int | str = 0,
        target_key: int | str = 1,
    ) -> None:
        super().__init__()
        self.model = net
        self.loss_fn = F.cross_entropy if loss_fn is None else loss_fn
        self.train_metrics = held_metrics(
            _accuracy(num_classes) if train_metrics is None else train_metrics
        )
        self.eval_metrics = held_metrics(
            _accuracy(num_classes) if eval_metrics is None else eval_metrics
        )
        self.input_key = input_key
        self.target_key = target_key

    def forward(self, batch: Any) -> Any:
        """What the network returns: scores (N, K, ...), or what has them as "logits"."""
        return self.model(get_item(batch, self.input_key))

    def loss(self, outputs: Any, batch: Any) -> Tensor | Mapping[str, Tensor]:
        """The cross entropy, or what `loss_fn` returns."""
        return self.loss_fn(_scores(outputs), get_item(batch, self.target_key))

    def get_metrics(self, is_train: bool = False) -> Any:
        """The accuracy, unless others were given."""
        return self.train_metrics if is_train else self.eval_metrics

    def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
        """Take in the scores, and the targets as class indices."""
        scores = _scores(outputs)
        metric.update(scores, as_indices(get_item(batch, self.target_key), scores))


def as_indices(targets: Any, scores: Any) -> Any:
    """Class indices (N, ...) in place of probabilities shaped like `scores`; all else as it is.

    >>> import torch
    >>> as_indices(torch.tensor([[0.2, 0.8]]), torch.zeros(1, 2))
    tensor([1])
    """
    is_soft = (
        isinstance(targets, Tensor)
        and isinstance(scores, Tensor)
        and targets.is_floating_point()
        and targets.shape == scores.shape
        and targets.dim() > 1
    )
    return targets.argmax(dim=1) if is_soft else targets


def _scores(outputs: Any) -> Any:
    """The logits among what a network returned; all else as it is, for a loss of the user's own."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs)
    return getattr(outputs, "logits", outputs)


def _accuracy(num_classes: int | None) -> dict[str, nn.Module]:
    # Here, because it takes seconds: torchmetrics imports torchvision and transformers.
    from torchmetrics.classification import MulticlassAccuracy

    return {"accuracy": MulticlassAccuracy(num_classes=num_classes, average="micro")}
