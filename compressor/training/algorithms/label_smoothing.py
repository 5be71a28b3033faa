"""Targets that leave every class a little (Szegedy et al., 2016, https://arxiv.org/abs/1512.00567)."""

from __future__ import annotations

from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.soft_targets import IGNORED, class_scores, soft_targets
from compressor.training.batch import get_item, set_item
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State


def smooth_labels(
    logits: Tensor, targets: Tensor, smoothing: float = 0.1, ignore_index: int = IGNORED
) -> Tensor:
    """(1 - smoothing) * targets + smoothing / K, as weights of the K classes.

    The weights of a sample keep their sum: smoothing and mixing may come in any order.

    Args:
        logits: (N, K, ...), K > 1; only shape and precision are read.
        targets: class indices (N, ...), or weights (N, K, ...).
        smoothing: 0 to 1; 0 only converts indices.
        ignore_index: a target of no weight; a mean of the loss still divides by it, where torch's
            own `ignore_index` does not.

    Returns:
        (N, K, ...), float32 or float64.

    Raises:
        ConfigError: `smoothing` out of range.
        DataError: if the shapes do not fit.

    >>> import torch
    >>> smooth_labels(torch.zeros(1, 4), torch.tensor([2]), smoothing=0.2)
    tensor([[0.0500, 0.0500, 0.8500, 0.0500]])
    """
    _check_smoothing(smoothing)
    soft = soft_targets(logits, targets, ignore_index)
    classes = soft.shape[1]
    if classes < 2:
        raise DataError(
            f"Outputs of shape {tuple(logits.shape)} have {classes} class, over which nothing can "
            "be smoothed. Leave label smoothing out."
        )
    return soft * (1 - smoothing) + soft.sum(dim=1, keepdim=True) * (smoothing / classes)


class LabelSmoothing(Algorithm):
    """Smooths the targets that the loss sees; those of evaluations stay as they are.

    The loss must take weights of the classes, as cross entropy does.

    Args:
        smoothing: above 0, at most 1: what is taken from the target and dealt out to all classes.
        target_key: place of the targets in a batch.

    Raises:
        ConfigError: `smoothing` out of range.
    """

    events = frozenset({Event.AFTER_FORWARD})
    card = Card(
        summary="Takes a little weight from the right class and gives it to all alike.",
        source="Szegedy et al. (2016), Rethinking the Inception Architecture for Computer Vision",
        functional="smooth_labels",
        use_when="A classifier is too sure of itself, or some labels are wrong.",
        avoid_when="A teacher is trained that others shall be distilled from; each class is "
        "judged by itself (several labels a sample), where 1 / K is not the middle.",
        cost="Next to nothing: one tensor in the shape of the outputs.",
    )

    def __init__(self, smoothing: float = 0.1, *, target_key: int | str = 1) -> None:
        _check_smoothing(smoothing)
        self.smoothing = smoothing
        self.target_key = target_key

    def on(self, event: Event, state: State) -> None:
        """Smooth."""
        targets = get_item(state.batch, self.target_key)
        smooth = smooth_labels(class_scores(state.outputs), targets, self.smoothing)
        state.batch = set_item(state.batch, self.target_key, smooth)


def _check_smoothing(smoothing: float) -> None:
    if not 0 <= smoothing <= 1:
        raise ConfigError(f"smoothing={smoothing} is no share. Write 0 to 1, such as 0.1.")
