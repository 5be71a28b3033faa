from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ConfigError, LossError, MetricError
from compressor.interfaces import Accuracy, Device, LossFunction, TorchForwardPass
from compressor.training.tasks import AdaptedTask


class Loss(LossFunction):
    """Two terms, one of them of the weights."""

    def __call__(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        labels, inputs = (part.to(self.device.torch_device) for part in batch)
        penalty = sum(p.square().sum() for p in model.parameters())
        return {"ce": F.cross_entropy(model(inputs), labels), "decay": 0.01 * penalty}


class Counter(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def make_task(**options: Any) -> AdaptedTask:
    torch.manual_seed(0)
    options = {"loss_function": Loss(), **options}
    return AdaptedTask(Counter(4, 3), TorchForwardPass(("_", 0)), **options)


def make_batch() -> tuple[Tensor, Tensor]:
    return torch.arange(6) % 3, torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def test_loss_and_gradients_are_those_of_the_loss_function_itself() -> None:
    task, batch = make_task(), make_batch()
    terms = task.loss(task(batch), batch)
    sum(terms.values()).backward()  # type: ignore[union-attr]
    gradient = task.model.weight.grad.clone()
    task.model.zero_grad()
    direct = Loss()(task.model, batch)
    sum(direct.values()).backward()  # type: ignore[union-attr]
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {name: term.item() for name, term in direct.items()}
    )
    torch.testing.assert_close(gradient, task.model.weight.grad)


def test_the_model_runs_once_for_a_batch() -> None:
    task, batch = make_task(), make_batch()
    task.loss(task(batch), batch)
    assert task.model.calls == 1


def test_the_loss_sees_outputs_and_targets_that_were_replaced() -> None:
    task, (labels, inputs) = make_task(), make_batch()
    outputs, others = torch.randn(6, 3), labels.roll(1)
    terms = task.loss(outputs, (others, inputs))
    torch.testing.assert_close(terms["ce"], F.cross_entropy(outputs, others))


def test_a_loss_that_calls_the_model_twice_is_an_error() -> None:
    def twice(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[1]) - model(batch[1])).mean()

    task, batch = make_task(loss_function=twice), make_batch()
    with pytest.raises(LossError, match="called the model more often"):
        task.loss(task(batch), batch)


def test_a_loss_that_is_no_scalar_is_an_error() -> None:
    task, batch = make_task(loss_function=lambda model, batch: model(batch[1])), make_batch()
    with pytest.raises(LossError, match=r"has shape \(6, 3\)"):
        task.loss(task(batch), batch)


def test_a_loss_is_told_once_where_the_model_is() -> None:
    told = []

    class Moving(Loss):
        def to_device(self, device: Device) -> None:
            told.append(device)
            super().to_device(device)

    loss = Moving()
    task, batch = make_task(loss_function=loss), make_batch()
    told.clear()
    for _ in range(3):
        task.loss(task(batch), batch)
    assert told == [Device.CPU]


def test_the_evaluation_is_the_users_own() -> None:
    evaluation = Accuracy(TorchForwardPass(("_", 0)), label=0)
    task, batch = make_task(eval_function=evaluation), make_batch()
    task.train()
    right = (task.model(batch[1]).argmax(1) == batch[0]).float().mean().item()
    assert task.evaluate([batch]) == {"accuracy": pytest.approx(100 * right)}
    assert task.training
    assert task.model.training


def test_an_evaluation_that_is_missing_or_ambiguous_is_an_error() -> None:
    with pytest.raises(ConfigError, match="has no evaluation"):
        make_task().evaluate([make_batch()])

    def two(model: nn.Module, loader: Any) -> Mapping[str, float]:
        return {"a": 1.0, "b": 2.0}

    with pytest.raises(MetricError, match="no eval_key"):
        make_task(eval_function=two).evaluate([make_batch()])
    values = make_task(eval_function=two, eval_key="b").evaluate([make_batch()])
    assert values == {"a": 1.0, "b": 2.0}


def test_a_teacher_is_called_as_the_model_is() -> None:
    task, batch = make_task(), make_batch()
    teacher = nn.Linear(4, 3)
    assert torch.equal(task.around(teacher)(batch), teacher(batch[1]))
