"""What the tasks are for: each kind is trained and evaluated by the trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from compressor.interfaces import Accuracy, TorchForwardPass
from compressor.training import Trainer
from compressor.training.evaluator import Evaluator
from compressor.training.tasks import AdaptedTask, ClassifierTask
from tests.training.helpers import cross_entropy, make_dataset, make_loader, make_model
from tests.training.tasks import test_detection as boxes

SGD = {"name": "SGD", "lr": 0.1}


def train(task: Any, **options: Any) -> Trainer:
    options = {"train_dataloader": make_loader(), "max_duration": "2ep", **options}
    trainer = Trainer(task, optimizers=SGD, **options)
    trainer.fit()
    return trainer


def test_a_classifier_task_is_trained_as_the_function_of_the_same_loss() -> None:
    task, net = ClassifierTask(make_model()), make_model()
    train(task)
    Trainer(
        net, cross_entropy, train_dataloader=make_loader(), optimizers=SGD, max_duration="2ep"
    ).fit()
    for mine, theirs in zip(task.model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_accuracy_of_a_trainer_is_the_share_of_right_answers() -> None:
    task = ClassifierTask(make_model())
    trainer = train(task, eval_dataloader=make_loader())
    inputs, labels = make_dataset().tensors
    task.eval()
    right = (task.model(inputs).argmax(1) == labels).float().mean().item()
    assert trainer.state.metrics["accuracy"] == pytest.approx(right)


def test_an_adapted_task_is_evaluated_by_the_users_function() -> None:
    task = AdaptedTask(make_model(), TorchForwardPass(), cross_entropy, Accuracy())
    loader = make_loader()
    trainer = train(task, eval_dataloader=Evaluator(function=lambda _: task.evaluate(loader)))
    expected = ClassifierTask(make_model())
    train(expected)
    for mine, theirs in zip(task.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert trainer.state.metrics == Accuracy()(task.model, loader)


@pytest.mark.slow
def test_a_detector_is_trained_in_micro_batches_and_judged() -> None:
    images, targets = boxes.make_batch(4)
    loader = DataLoader(
        list(zip(images, targets, strict=True)),  # type: ignore[arg-type]
        batch_size=4,
        collate_fn=lambda samples: tuple(zip(*samples, strict=True)),
    )
    task = boxes.make_task(boxes.make_ssd, metrics=None)
    before = task.model.backbone[0].weight.detach().clone()
    trainer = train(task, train_dataloader=loader, eval_dataloader=loader, micro_batch_size=3)
    assert not torch.equal(task.model.backbone[0].weight, before)
    assert {"map", "map_50"} <= trainer.state.metrics.keys()


@pytest.mark.slow
def test_a_transformer_is_trained_and_judged() -> None:
    from tests.training.tasks import test_huggingface as texts

    metrics = texts.LanguageCrossEntropy(texts.VOCABULARY)
    task = texts.HuggingFaceTask(texts.make_gpt2(), metrics=metrics)
    batch = texts.make_tokens()
    trainer = train(
        task,
        train_dataloader=[batch],
        eval_dataloader=[batch],
        max_duration="30ep",
        micro_batch_size=2,
    )
    loss = task.eval().model(**batch).loss.item()
    assert trainer.state.metrics["LanguageCrossEntropy"] == pytest.approx(loss, rel=1e-5)
    assert loss < torch.tensor(float(texts.VOCABULARY)).log()


def test_metrics_of_training_are_given_beside_the_loss() -> None:
    task = ClassifierTask(nn.Sequential(nn.Linear(4, 2)))
    trainer = train(task)
    assert 0 < trainer.state.train_metrics["train/accuracy"] <= 1
