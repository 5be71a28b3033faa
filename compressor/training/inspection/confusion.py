"""Which class is taken for which: the confusion matrix and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import MetricError


def confusion_matrix(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How often each class was taken for each.

    Args:
        predictions: (N,) of class indices.
        labels: (N,) of class indices.
        classes: how many there are.

    Returns:
        (classes, classes) of int64 on the CPU: labels in rows, predictions in columns.

    Raises:
        MetricError: if the two differ in shape, or an index is no class.

    >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), classes=2)
    tensor([[1, 1],
            [0, 1]])
    """
    if predictions.shape != labels.shape or labels.dim() != 1:
        raise MetricError(
            f"The predictions have shape {tuple(predictions.shape)} and the labels "
            f"{tuple(labels.shape)}. Give one class index for each sample."
        )
    predictions, labels = predictions.long().cpu(), labels.long().cpu()
    check_indices(predictions, classes, "prediction")
    check_indices(labels, classes, "label")
    return torch.bincount(labels * classes + predictions, minlength=classes**2).view(
        classes, classes
    )


@dataclass(frozen=True, eq=False)
class ClassScores:
    """Scores of each class, all (K,) of float64, 0 to 1.

    A fraction of nothing is 0, as in scikit-learn: the precision of a class that was never
    predicted, the recall of one that never occurs.

    Attributes:
        precision: of what was predicted to be of the class, the part that is.
        recall: of what is of the class, the part that was predicted to be.
        f1: their harmonic mean.
        is_present: (K,) of bool: the class occurs among the labels or the predictions.
    """

    precision: Tensor
    recall: Tensor
    f1: Tensor
    is_present: Tensor

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that are present; each counts alike."""
        return self.f1[self.is_present].mean().item() if self.is_present.any() else 0.0


def class_scores(matrix: Tensor) -> ClassScores:
    """Precision, recall and F1 of each class.

    Args:
        matrix: of `confusion_matrix`.

    >>> class_scores(torch.tensor([[1, 1], [0, 1]])).recall
    tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    right, predicted, labelled = matrix.diagonal(), matrix.sum(0), matrix.sum(1)
    return ClassScores(
        precision=_fraction(right, predicted),
        recall=_fraction(right, labelled),
        f1=_fraction(2 * right, predicted + labelled),
        is_present=(predicted + labelled) > 0,
    )


def frequent_mistakes(matrix: Tensor, count: int) -> list[tuple[int, int, int]]:
    """The `count` most frequent mistakes: (label, prediction, times); fewer, if there are fewer."""
    wrong = matrix.clone().fill_diagonal_(0)
    times, places = wrong.flatten().sort(descending=True, stable=True)
    return [
        (place // len(matrix), place % len(matrix), number)
        for number, place in zip(times[:count].tolist(), places[:count].tolist(), strict=True)
        if number
    ]


def check_indices(indices: Tensor, classes: int, noun: str) -> None:
    """Do nothing if all `indices` are of one of `classes` classes.

    Raises:
        MetricError: if one is not; `noun` says what it is.
    """
    outside = indices[(indices < 0) | (indices >= classes)]
    if len(outside):
        raise MetricError(
            f"There is a {noun} {outside[0].item()}, and there are {classes} classes: 0 to "
            f"{classes - 1}. Give the name of every class, in the order of their indices."
        )


def _fraction(part: Tensor, whole: Tensor) -> Tensor:
    return part.double() / whole.clamp(min=1)  # the part of nothing is 0 already
