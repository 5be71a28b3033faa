from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from compressor.errors import DataError
from compressor.training import Trainer
from compressor.training.algorithms import LabelSmoothing
from compressor.training.tasks import ClassifierTask, compute_metrics, named_metrics
from compressor.training.tasks.classifier import as_indices


def make_task(**options: Any) -> ClassifierTask:
    torch.manual_seed(0)
    return ClassifierTask(nn.Linear(4, 3), **options)


def make_batch(samples: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(samples, 4, generator=random), torch.arange(samples) % 3


def measure(task: ClassifierTask, batches: Any, is_train: bool = False) -> dict[str, float]:
    metrics = named_metrics(task.get_metrics(is_train))
    for batch in batches:
        for metric in metrics.values():
            task.update_metric(batch, task.eval_forward(batch), metric)
    return compute_metrics(metrics)


def test_the_loss_is_the_mean_negative_log_probability_of_the_target() -> None:
    task, (inputs, targets) = make_task(), make_batch()
    probabilities = task.model(inputs).exp() / task.model(inputs).exp().sum(1, keepdim=True)
    by_hand = -sum(probabilities[i, target].log() for i, target in enumerate(targets)) / 16
    torch.testing.assert_close(task.loss(task((inputs, targets)), (inputs, targets)), by_hand)


def test_soft_targets_have_the_loss_of_their_mixture() -> None:
    task, (inputs, targets) = make_task(), make_batch()
    outputs, others = task((inputs, targets)), targets.roll(1)
    soft = 0.3 * F.one_hot(targets, 3) + 0.7 * F.one_hot(others, 3)
    mixture = 0.3 * F.cross_entropy(outputs, targets) + 0.7 * F.cross_entropy(outputs, others)
    torch.testing.assert_close(task.loss(outputs, (inputs, soft)), mixture)


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("is_train", [True, False])
def test_accuracy_over_uneven_batches_is_the_count_of_right_answers(
    num_classes: int | None, is_train: bool
) -> None:
    task, (inputs, targets) = make_task(num_classes=num_classes), make_batch(10)
    answers = zip(task.model(inputs), targets, strict=True)
    right = sum(int(row.argmax()) == int(y) for row, y in answers)
    batches = [(inputs[:7], targets[:7]), (inputs[7:], targets[7:])]
    assert measure(task, batches, is_train) == {"accuracy": pytest.approx(right / 10)}
    assert 0 < right < 10


def test_metrics_take_soft_targets_by_their_likeliest_class() -> None:
    task, (inputs, targets) = make_task(), make_batch()
    soft = 0.6 * F.one_hot(targets, 3) + 0.4 / 3
    hard = measure(task, [(inputs, targets)], is_train=False)
    assert measure(task, [(inputs, soft)], is_train=True) == hard


def test_regression_targets_and_pixel_targets_stay_as_they_are() -> None:
    assert torch.equal(as_indices(torch.ones(4), torch.ones(4)), torch.ones(4))
    pixels = torch.zeros(2, 5, 5, dtype=torch.long)
    assert as_indices(pixels, torch.zeros(2, 3, 5, 5)) is pixels


def test_scores_of_pixels_are_counted_by_pixel() -> None:
    task, scores = make_task(), torch.zeros(1, 3, 2, 2)
    scores[:, 1] = 1.0
    labels = torch.tensor([[[1, 1], [1, 0]]])
    metric = named_metrics(task.get_metrics())["accuracy"]
    task.update_metric((None, labels), scores, metric)
    assert compute_metrics({"accuracy": metric}) == {"accuracy": 0.75}


@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
def test_scores_may_be_the_logits_of_what_the_network_returns(kind: Any) -> None:
    class Wrapped(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> Any:
            return kind(logits=super().forward(inputs), features=inputs)

    torch.manual_seed(0)
    bare, wrapped, batch = make_task(), ClassifierTask(Wrapped(4, 3)), make_batch()
    wrapped.load_state_dict(bare.state_dict())
    assert torch.equal(wrapped.loss(wrapped(batch), batch), bare.loss(bare(batch), batch))
    assert measure(wrapped, [batch]) == measure(bare, [batch])
    smoothed = [
        Trainer(task, algorithms=[LabelSmoothing(0.2)], train_dataloader=[batch])
        for task in (bare, wrapped)
    ]
    for trainer in smoothed:
        trainer.fit()
    metrics = [trainer.state.train_metrics["train/loss"] for trainer in smoothed]
    assert metrics[0] == metrics[1]


def test_other_outputs_go_to_a_loss_of_ones_own_as_they_are() -> None:
    task = make_task(loss_fn=lambda outputs, y: outputs["out"].mean())
    assert task.loss({"out": torch.full((2,), 3.0)}, make_batch()) == 3


def test_soft_targets_of_pixels_are_counted_by_their_likeliest_class() -> None:
    labels = torch.tensor([[[0, 2, 1], [1, 1, 2]]])
    assert torch.equal(
        as_indices(F.one_hot(labels).movedim(-1, 1).float(), torch.zeros(1, 3, 2, 3)), labels
    )


def test_given_metrics_take_the_place_of_accuracy() -> None:
    kinds = (MulticlassAccuracy, MulticlassF1Score)
    several = MetricCollection([kind(num_classes=3, average="macro") for kind in kinds])
    task = make_task(train_metrics=(), eval_metrics=several)
    assert named_metrics(task.get_metrics(is_train=True)) == {}
    assert measure(task, [make_batch()]).keys() == {"MulticlassAccuracy", "MulticlassF1Score"}


def test_training_and_evaluation_gather_apart() -> None:
    task, (inputs, _) = make_task(), make_batch()
    wrong = (task.model(inputs).argmax(1) + 1) % 3
    assert measure(task, [(inputs, wrong)], is_train=True) == {"accuracy": 0.0}
    right = task.model(inputs).argmax(1)
    assert measure(task, [(inputs, right)], is_train=False) == {"accuracy": 1.0}


def test_a_given_loss_may_have_named_terms() -> None:
    task = make_task(loss_fn=lambda scores, y: {"a": scores.mean(), "b": y.float().mean()})
    batch = make_batch()
    assert task.loss(task(batch), batch)["b"] == batch[1].float().mean()


def test_dict_batches_are_read_by_key() -> None:
    task, (inputs, targets) = make_task(), make_batch()
    by_key = ClassifierTask(task.model, input_key="image", target_key="label")
    batch = {"image": inputs, "label": targets}
    assert torch.equal(by_key(batch), task((inputs, targets)))
    assert measure(by_key, [batch]) == measure(task, [(inputs, targets)])


def test_a_batch_without_targets_is_an_error() -> None:
    task, (inputs, _) = make_task(), make_batch()
    with pytest.raises(DataError, match=r"has no item 1; it has 1 items"):
        task.loss(task((inputs,)), (inputs,))
    with pytest.raises(DataError, match=r"is a tensor of shape \(16, 4\)"):
        task(inputs)


def test_the_state_dict_is_that_of_the_network() -> None:
    task = make_task()
    measure(task, [make_batch()])
    assert list(task.state_dict()) == [f"model.{name}" for name in task.model.state_dict()]
