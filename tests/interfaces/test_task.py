from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import MetricError
from compressor.interfaces import Accuracy, Device, Task, TorchForwardPass

BATCH = (torch.rand(4, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4).long())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def make_task(eval_key: str | None = "accuracy") -> Task:
    return Task(TorchForwardPass(), cross_entropy, Accuracy(), eval_key)


def test_inputs_are_what_the_model_is_called_with() -> None:
    model = Net()
    inputs = make_task().inputs(model, BATCH)
    assert torch.equal(inputs.args[0], BATCH[0])
    assert inputs.batch_size == 4
    assert model.training
    assert model.norm.num_batches_tracked == 0  # asking does not change the statistics


def test_outputs_leave_mode_and_grad_to_the_caller() -> None:
    model = Net()
    for device in (Device.CPU, torch.device("cpu")):
        assert make_task().outputs(model, BATCH, device).requires_grad
    assert model.norm.num_batches_tracked == 2


def test_the_loss_has_named_terms() -> None:
    model = Net().eval()
    terms = make_task().loss(model, BATCH)
    assert terms.keys() == {"loss"}
    assert torch.equal(terms["loss"], cross_entropy(model, BATCH))


def test_the_metric_that_counts_must_be_there() -> None:
    model = Net().eval()
    right = (model(BATCH[0]).argmax(1) == 0).float().mean().item()
    for key in ("accuracy", None):
        assert make_task(key).evaluate(model, [BATCH], Device.CPU) == {"accuracy": 100 * right}
    with pytest.raises(MetricError, match=r"no 'miou', .* Known: accuracy"):
        make_task("miou").evaluate(model, [BATCH], Device.CPU)
