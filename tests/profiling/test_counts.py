from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.counts import LayerCount, count
from compressor.testing.models import CifarResNet, TiedModel, TinyResNet, TinyTransformer


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def macs(model: nn.Module, *shapes: tuple[int, ...]) -> int:
    counts = count(model, ModelInputs(tuple(torch.zeros(shape) for shape in shapes)))
    assert not counts.uncounted
    return counts.macs


def by_name(model: nn.Module, inputs: ModelInputs) -> dict[str, LayerCount]:
    return {layer.name: layer for layer in count(model, inputs).layers}


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv2d(16, 32, 3, padding=1), (1, 16, 8, 8), 294_912),
        (nn.Conv2d(16, 32, 3, padding=1, groups=4), (1, 16, 8, 8), 294_912 // 4),
        (nn.Conv2d(16, 16, 3, padding=1, groups=16), (1, 16, 8, 8), 16 * 9 * 64),
        (nn.Conv2d(3, 8, 3, stride=2), (5, 3, 9, 9), 5 * 16 * 8 * 27),
        (nn.Conv1d(3, 8, 5), (1, 3, 12), 8 * 8 * 15),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 5), 25 * 4 * 6 * 9),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (1, 4, 5, 5), 25 * 4 * 3 * 9),
        (nn.Linear(7, 11), (2, 7), 154),
        (nn.Linear(7, 11, bias=False), (2, 3, 7), 462),
        (nn.RNN(4, 8), (3, 2, 4), 6 * 8 * (4 + 8)),
        (nn.GRU(4, 8, num_layers=2), (3, 2, 4), 6 * 3 * 8 * (4 + 8 + 8 + 8)),
        (nn.LSTM(4, 8), (3, 2, 4), 6 * 4 * 8 * (4 + 8)),
        (nn.LSTM(4, 8, bidirectional=True, batch_first=True), (2, 3, 4), 2 * 6 * 4 * 8 * 12),
        (nn.LSTMCell(4, 8), (5, 4), 5 * 4 * 8 * 12),
    ],
    ids=repr,
)
def test_macs_of_a_layer_are_its_formula(
    layer: nn.Module, shape: tuple[int, ...], expected: int
) -> None:
    assert macs(layer, shape) == expected


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (torch.matmul, [(2, 3), (3, 5)], 30),
        (torch.matmul, [(4, 2, 3), (4, 3, 5)], 120),
        (torch.matmul, [(2, 3), (3,)], 6),
        (torch.matmul, [(3,), (3,)], 3),
        (torch.baddbmm, [(4, 2, 5), (4, 2, 3), (4, 3, 5)], 120),
        (torch.addbmm, [(2, 5), (4, 2, 3), (4, 3, 5)], 120),
        (torch.addmv, [(2,), (2, 3), (3,)], 6),
        (lambda a, b: torch.einsum("nid,njd->nij", a, b), [(2, 3, 4), (2, 5, 4)], 120),
        (F.scaled_dot_product_attention, [(2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)], 1920),
        (lambda a, b: F.bilinear(a, b, torch.ones(5, 3, 4)), [(2, 3), (2, 4)], 120),
        (lambda a: F.hardswish(a.clone(), inplace=True), [(2, 3)], 0),
        (lambda a: F.softmax(F.relu(a) * 2 + 1, 1).mean(1).clamp_(0, 1), [(2, 3)], 0),
    ],
)
def test_macs_of_an_operation_are_its_formula(
    function: Callable[..., Tensor], shapes: list[tuple[int, ...]], expected: int
) -> None:
    assert macs(Function(function), *shapes) == expected


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (TinyResNet(), torch.zeros(2, 1, 8, 8)),
        (CifarResNet(20), torch.zeros(1, 3, 32, 32)),
        (TinyTransformer(), torch.zeros(2, 8, dtype=torch.long)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.zeros(2, 3, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_models_have_half_the_flops_of_torchs_counter(model: nn.Module, inputs: Tensor) -> None:
    torch.backends.mha.set_fastpath_enabled(False)  # hides attention from torch's counter
    try:
        # torch 2.14 and older do not count the fused attention of the CPU.
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as flops,
            torch.no_grad(),
        ):
            model.eval()(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    counts = count(model, ModelInputs((inputs,)))
    assert 2 * counts.macs == flops.get_total_flops() > 0
    assert counts.params == sum(parameter.numel() for parameter in model.parameters())
    assert not counts.uncounted


def test_an_operation_of_unknown_cost_is_listed() -> None:
    counts = count(Function(lambda x: torch.cdist(x, x)), ModelInputs((torch.zeros(2, 3),)))
    assert dict(counts.uncounted) == {"aten::_cdist_forward": 1}


def test_a_tied_parameter_counts_once_and_frozen_ones_count() -> None:
    model = TiedModel(vocabulary=32, dim=16)
    model.hidden.requires_grad_(False)
    counts = count(model, ModelInputs((torch.zeros(1, 4, dtype=torch.long),)))
    assert counts.params == 32 * 16 + 16 * 16 + 16
    assert {layer.name: layer.params for layer in counts.layers} == {
        "embedding": 512,
        "hidden": 272,
        "head": 0,
    }
    assert sum(layer.parameter_bytes for layer in counts.layers) == 4 * counts.params


def test_a_module_called_twice_has_the_macs_of_both_calls_and_one_row() -> None:
    shared = nn.Linear(4, 4)
    layers = by_name(nn.Sequential(shared, nn.ReLU(), shared), ModelInputs((torch.zeros(1, 4),)))
    assert list(layers) == ["0"]
    assert (layers["0"].macs, layers["0"].params) == (32, 20)


def test_the_root_may_be_a_layer_itself() -> None:
    layers = by_name(nn.Linear(3, 4), ModelInputs((torch.zeros(2, 3),)))
    assert layers == {"": LayerCount("", "Linear", 16, 24, (2, 3), (2, 4), 64)}


def test_arithmetic_of_a_container_is_booked_on_it() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.project(x) @ x.transpose(1, 2)

    layers = by_name(nn.Sequential(Attention()), ModelInputs((torch.zeros(1, 3, 4),)))
    assert {name: layer.macs for name, layer in layers.items()} == {"0": 36, "0.project": 48}


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), Function(lambda x: x + torch.rand(4)))
    model[1].eval()
    state = torch.get_rng_state()
    count(model, ModelInputs((torch.zeros(2, 4),)))
    assert [module.training for module in model] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_forward_that_fails_leaves_no_hooks() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).train()
    with pytest.raises(RuntimeError, match="shapes"):
        count(model, ModelInputs((torch.zeros(2, 5),)))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_double_parameters_have_eight_bytes() -> None:
    (layer,) = count(nn.Linear(3, 4).double(), ModelInputs((torch.zeros(2, 3).double(),))).layers
    assert layer.parameter_bytes == 8 * 16
