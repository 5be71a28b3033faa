from __future__ import annotations

import torch
from torch import Tensor, nn

from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.memory import peak_activation_memory

KB = torch.zeros(256)  # 1024 bytes of float32


def peak(forward: nn.Module, inputs: Tensor = KB) -> int:
    return peak_activation_memory(forward, ModelInputs((inputs,)))


def test_what_is_alive_together_adds_up() -> None:
    class Keeps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b, c = x + 1, x + 2, x + 3
            return a + b + c  # a + b is a fourth, and the result a fifth

    class Frees(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(5):
                x = x + 1
            return x

    assert peak(Keeps()) == 5 * 1024
    assert peak(Frees()) == 2 * 1024  # the old one and the new one


def test_views_and_in_place_operations_need_nothing() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 1).relu_().view(16, 16).transpose(0, 1).mul_(2)

    assert peak(InPlace()) == 1024


def test_parameters_and_inputs_are_not_activations() -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1000))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.detach(), self.weight.view(10, 100)

    assert peak(Same()) == 0


def test_the_peak_grows_with_the_batch() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    one, four = (peak(model, torch.zeros(n, 1, 8, 8)) for n in (1, 4))
    # 8 maps of 8×8 before and after the batch norm; whatever else it keeps does not grow
    assert one >= 2 * 8 * 64 * 4
    assert four - one == 3 * 2 * 8 * 64 * 4


def test_the_mode_is_restored_and_a_second_call_says_the_same() -> None:
    model = nn.Sequential(nn.Linear(256, 8), nn.Dropout())
    assert peak(model) == peak(model)
    assert model.training
    assert torch.is_grad_enabled()
