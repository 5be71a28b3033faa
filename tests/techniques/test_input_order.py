"""Where channels may stand in any order, and where not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.interfaces.inputs import ModelInputs
from compressor.structure.groups import ChannelGroup, Member
from compressor.structure.trace import copy_model
from compressor.techniques import input_order
from compressor.techniques.input_order import InputOrder, may_be_ordered

CHANNELS = tuple((channel,) for channel in range(8))
GROUP = ChannelGroup(
    "0",
    8,
    (
        Member("0.weight", 0, "out", CHANNELS, 8),
        Member("0.bias", 0, "out", CHANNELS, 8),
        Member("2.weight", 1, "in", CHANNELS, 8),
    ),
)


class Ramp(nn.Module):
    """Scales each channel by its number, by no parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.arange(1, 9, dtype=x.dtype)


def make(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), middle, nn.Linear(8, 4))


def inputs() -> ModelInputs:
    return ModelInputs((torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),))


def test_an_order_is_tried_before_it_is_used() -> None:
    assert may_be_ordered(make(nn.ReLU()), GROUP, inputs())
    assert not may_be_ordered(make(Ramp()), GROUP, inputs())
    beyond = ChannelGroup("0", 8, (Member("0.weight", 0, "out", CHANNELS, 8),))
    assert not may_be_ordered(make(nn.ReLU()), beyond, inputs())  # the reader is left out


def test_a_model_whose_groups_cannot_be_found_keeps_its_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise ModelError("It has no graph.")

    monkeypatch.setattr(input_order, "find_groups", fail)
    model = make(nn.ReLU())
    before = copy_model(model)
    scores = {"2": model[2].weight.detach().abs()}
    assert not InputOrder().improve(model, scores, inputs())
    assert model[2].weight.equal(before[2].weight)
