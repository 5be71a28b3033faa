"""Targets that leave every class a little (Szegedy et al., 2016, https://arxiv.org/abs/1512.00567)."""

from __future__ import annotations

from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.soft_targets import (
    IGNORED,
    class_dim_of,
    class_scores,
    soft_targets,
)
from compressor.training.batch import get_item, set_item
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State


def smooth_labels(
    logits: Tensor,
    targets: Tensor,
    smoothing: float = 0.1,
    ignore_index: int = IGNORED,
    class_dim: int = 1,
) -> Tensor:
    """(1 - smoothing) * targets + smoothing / K, as weights of the K classes.

    The weights of a sample keep their sum: smoothing and mixing may come in any order. The mean
    cross entropy of them is torch's own with `label_smoothing`, also where targets are ignored; but
    not with weights of the classes, by whose sum torch divides for indices alone.

    Args:
        logits: (N, K, ...), K > 1; only shape and precision are read.
        targets: class indices (N, ...), or weights (N, K, ...), at least 0 and of the sum 1.
        smoothing: 0 to 1; 0 only converts indices.
        ignore_index: a target of no weight, as in `soft_targets`.
        class_dim: where K is in `logits`; -1 for tokens (N, T, K).

    Returns:
        In the shape of `logits`, float32 or float64.

    Raises:
        ConfigError: `smoothing` out of range.
        DataError: if the shapes do not fit, or (on the CPU) weights are none, as the targets of a
            regression or of several labels a sample.

    >>> import torch
    >>> smooth_labels(torch.zeros(1, 4), torch.tensor([2]), smoothing=0.2)
    tensor([[0.0500, 0.0500, 0.8500, 0.0500]])
    """
    _check_smoothing(smoothing)
    soft = soft_targets(logits, targets, ignore_index, class_dim)
    classes = soft.shape[class_dim]
    if classes < 2:
        raise DataError(
            f"Outputs of shape {tuple(logits.shape)} have {classes} class, over which nothing can "
            "be smoothed. Leave label smoothing out."
        )
    sums = soft.sum(dim=class_dim, keepdim=True)
    if targets.shape == logits.shape and soft.device.type == "cpu" and soft.numel():
        _check_weights(soft, sums)
    return soft * (1 - smoothing) + sums * (smoothing / classes)


class LabelSmoothing(Algorithm):
    """Smooths the targets that the loss sees; those of evaluations stay as they are.

    Targets become weights of the classes, in the shape of the outputs. The loss must take these, as
    cross entropy does; one that takes class indices only fails at the first batch. Class weights in
    a loss are not what they are in torch's `label_smoothing`: see `smooth_labels`.

    Beside `Distillation` it acts on the task's own loss alone: what the teacher says is not
    smoothed, whichever comes first. A teacher that was trained with it teaches less.

    Args:
        smoothing: 0 to 1: what is taken from the target and dealt out to all classes.
        target_key: place of the targets in a batch.
        ignore_index: a target that does not count.
        class_dim: where the classes are in the outputs; None: where the task says, or 1. Write -1
            for tokens (N, T, K).

    Raises:
        ConfigError: `smoothing` out of range.
    """

    events = frozenset({Event.AFTER_FORWARD})
    card = Card(
        summary="Takes a little weight from the right class and gives it to all alike.",
        source="Szegedy et al. (2016), Rethinking the Inception Architecture for Computer Vision",
        functional="smooth_labels",
        settings="`smoothing`, the weight that is shared out.",
        use_when="A classifier is too sure of itself, or some labels are wrong.",
        avoid_when="A teacher is trained that others shall be distilled from; each class is "
        "judged by itself (several labels a sample), where 1 / K is not the middle.",
        cost="Next to nothing: one tensor in the shape of the outputs.",
    )

    def __init__(
        self,
        smoothing: float = 0.1,
        *,
        target_key: int | str = 1,
        ignore_index: int = IGNORED,
        class_dim: int | None = None,
    ) -> None:
        _check_smoothing(smoothing)
        self.smoothing = smoothing
        self.target_key = target_key
        self.ignore_index = ignore_index
        self.class_dim = class_dim

    def on(self, event: Event, state: State) -> None:
        """Smooth."""
        targets = get_item(state.batch, self.target_key)
        scores = class_scores(state.outputs)
        class_dim = class_dim_of(state, scores, self.class_dim)
        smooth = smooth_labels(scores, targets, self.smoothing, self.ignore_index, class_dim)
        state.batch = set_item(state.batch, self.target_key, smooth)


def _check_weights(weights: Tensor, sums: Tensor) -> None:
    # Their mean: where targets are ignored and mixed, single sums are not 1 (see `soft_targets`).
    least, mean = weights.min().item(), sums.mean().item()
    if least < 0 or abs(mean - 1) > 0.01:  # 0.01: targets may come in bfloat16
        raise DataError(
            "The targets have the outputs' shape and are no weights of the classes: the least is "
            f"{least:.3g} and the mean sum of a sample {mean:.3g}; 0 and 1 are wanted. Leave "
            "label smoothing out, of a regression and of several labels a sample."
        )


def _check_smoothing(smoothing: float) -> None:
    if not 0 <= smoothing <= 1:
        raise ConfigError(f"smoothing={smoothing} is no share. Write 0 to 1, such as 0.1.")
