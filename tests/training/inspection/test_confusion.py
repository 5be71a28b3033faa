"""Confusion matrix and class scores against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics

from compressor.errors import MetricError
from compressor.training.inspection.confusion import (
    class_scores,
    confusion_matrix,
    frequent_mistakes,
)


def draw(classes: int, samples: int = 900) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    predictions, labels = torch.randint(0, classes, (2, samples), generator=generator)
    return predictions, labels


@pytest.mark.parametrize("classes", [2, 7, 400])
def test_matrix_is_that_of_scikit_learn(classes: int) -> None:
    predictions, labels = draw(classes)
    expected = metrics.confusion_matrix(labels, predictions, labels=range(classes))
    assert np.array_equal(confusion_matrix(predictions, labels, classes), expected)


@pytest.mark.parametrize("classes", [2, 7, 400])  # of 400 classes, some are never met
def test_scores_are_those_of_scikit_learn(classes: int) -> None:
    predictions, labels = draw(classes)
    scores = class_scores(confusion_matrix(predictions, labels, classes))
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, predictions, labels=range(classes), zero_division=0
    )
    np.testing.assert_allclose(scores.precision, precision)
    np.testing.assert_allclose(scores.recall, recall)
    np.testing.assert_allclose(scores.f1, f1)
    macro = metrics.f1_score(labels, predictions, average="macro", zero_division=0)
    assert scores.macro_f1 == pytest.approx(macro)


def test_a_fraction_of_nothing_is_zero() -> None:
    scores = class_scores(torch.tensor([[3, 0, 0], [1, 0, 0], [0, 0, 0]]))
    assert scores.precision.tolist() == [0.75, 0.0, 0.0]
    assert scores.recall.tolist() == [1.0, 0.0, 0.0]
    assert scores.is_present.tolist() == [True, True, False]
    assert class_scores(torch.zeros(2, 2)).macro_f1 == 0.0


def test_mistakes_come_most_frequent_first_and_none_is_made_up() -> None:
    matrix = torch.tensor([[9, 2, 0], [5, 9, 2], [0, 0, 9]])
    assert frequent_mistakes(matrix, 5) == [(1, 0, 5), (0, 1, 2), (1, 2, 2)]
    assert frequent_mistakes(matrix, 1) == [(1, 0, 5)]
    assert matrix[0, 0] == 9


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([0, 1], [0, 3], r"a label 3, and there are 3 classes: 0 to 2\."),
        ([0, -1], [0, 1], r"a prediction -1, and"),
        ([0, 1], [0], r"shape \(2,\) and the labels \(1,\)"),
    ],
)
def test_what_is_no_class_is_refused(
    predictions: list[int], labels: list[int], message: str
) -> None:
    with pytest.raises(MetricError, match=message):
        confusion_matrix(torch.tensor(predictions), torch.tensor(labels), 3)
