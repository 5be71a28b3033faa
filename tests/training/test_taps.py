from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.training.taps import Taps, find_module, has_module
from compressor.training.tasks.base import TaskModel


class Task(TaskModel):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))

    def forward(self, batch: Any) -> Tensor:
        return self.model(batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return outputs.sum()


def test_outputs_are_recorded_in_order_until_they_are_taken() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    taps = Taps(["0"], is_for_training=False)
    taps.put_on(model)
    inputs = [torch.ones(1, 2), torch.zeros(1, 2)]
    for x in inputs:
        model(x)
    taken = taps.take()["0"]
    assert all(torch.equal(a, model[0](x)) for a, x in zip(taken, inputs, strict=True))
    assert len(taps.take()["0"]) == 2  # of the line before, which called the layer itself
    other = nn.Sequential(nn.Linear(2, 3))
    taps.put_on(other)
    model(inputs[0])
    assert taps.take() == {"0": []}
    taps.take_off()
    other(inputs[0])
    assert taps.take() == {"0": []}
    assert not taps.are_on


def test_calls_without_gradients_are_no_training() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    taps = Taps(["0"], is_for_training=True)
    taps.put_on(model)
    with torch.no_grad():
        model(torch.ones(1, 2))
    assert taps.take() == {"0": []}


def test_the_first_tensor_of_several_is_recorded() -> None:
    model = nn.Sequential(nn.LSTM(2, 3))
    taps = Taps(["0"], is_for_training=False)
    taps.put_on(model)
    outputs, _ = model(torch.ones(1, 4, 2))
    assert torch.equal(taps.take()["0"][0], outputs)


def test_layers_of_a_task_have_their_names_in_the_network() -> None:
    task = Task()
    assert find_module(task, "1") is find_module(task, "model.1") is task.model[1]
    assert not has_module(task, "2")
    with pytest.raises(ConfigError, match=r"Did you mean 'model\.1'"):
        find_module(task, "model.11")
    with pytest.raises(ConfigError, match="no layer ''"):
        find_module(task, "")
