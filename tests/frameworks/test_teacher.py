"""The teacher of a recovery answers as the reference does, and is no part of it."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models import resnet18

from compressor.frameworks.teacher import as_teacher
from compressor.interfaces.inputs import ModelInputs


def trained_resnet() -> tuple[nn.Module, torch.Tensor]:
    """With batch norms that are not at their beginning."""
    torch.manual_seed(0)
    model, inputs = resnet18(num_classes=4), torch.randn(4, 3, 32, 32)
    model.train()
    model(inputs)
    return model.eval(), inputs


def test_it_answers_alike_without_batch_norms() -> None:
    model, inputs = trained_resnet()
    before = copy.deepcopy(model.state_dict())
    teacher = as_teacher(model, ModelInputs((inputs,)))
    with torch.no_grad():
        assert_close(teacher(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in teacher.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_model_that_cannot_be_folded_teaches_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    teacher = as_teacher(model, ModelInputs((torch.randn(2, 7),)))  # inputs that it does not take
    inputs = torch.randn(5, 3)
    assert teacher is not model
    assert_close(teacher(inputs), model(inputs))
