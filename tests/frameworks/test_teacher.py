"""The teacher of a recovery answers as the reference does, and is no part of it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models import resnet18

from compressor.frameworks.teacher import as_teacher
from compressor.interfaces.inputs import ModelInputs


def trained(model: nn.Module, inputs: Tensor) -> nn.Module:
    """With batch norms that are not at their beginning."""
    torch.manual_seed(0)
    model.train()
    model(inputs)
    return model.eval()


def test_it_answers_alike_without_batch_norms() -> None:
    inputs = torch.randn(4, 3, 32, 32)
    model = trained(resnet18(num_classes=4), inputs)
    before = copy.deepcopy(model.state_dict())
    teacher = as_teacher(model, [ModelInputs((inputs,)), ModelInputs((inputs[:1],))])
    with torch.no_grad():
        assert_close(teacher(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in teacher.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.conv1.weight.is_contiguous(memory_format=torch.channels_last)


class Viewing(nn.Module):
    """Needs what its convolution gives in the usual order of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8 * 36, 2)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.conv(images))
        return self.linear(features.view(len(features), -1))


class Mixed(Viewing):
    """Has weights of five dimensions beside those of four."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(1, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.volume(images[:, None])[:, 0])


class Branching(nn.Module):
    """Takes another path for other inputs, which folding does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        return self.norm(features) if len(images) < 4 else features


def test_a_reference_that_has_no_faster_copy_teaches_itself() -> None:
    inputs = torch.randn(4, 3, 8, 8)
    calls = [ModelInputs((inputs[:2],)), ModelInputs((inputs,))]
    for model in (trained(Viewing(), inputs), trained(Mixed(), inputs)):
        with torch.no_grad():
            assert_close(as_teacher(model, calls)(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    branching = trained(Branching(), inputs[:2])
    assert as_teacher(branching, calls) is branching
    linear = nn.Linear(3, 4)
    assert as_teacher(linear, [ModelInputs((torch.randn(2, 3),))]) is linear
