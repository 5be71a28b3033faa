from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.export.exported_program import export_program
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.corrections.channels import find_pairs
from compressor.quantization.corrections.equalization import input_absmax, output_absmax
from compressor.quantization.corrections.pairs import equalize
from compressor.quantization.graph import QuantizationGraph

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """A convolution of 4 channels, a function, a convolution."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


class Flattened(nn.Module):
    """A convolution of 4 channels, a function, a linear layer."""

    def __init__(self, function: Callable[[Tensor], Tensor], features: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Linear(features, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


class Inverted(nn.Module):
    """Expansion, depthwise, projection, as in MobileNet, and a head behind a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False),
            nn.LeakyReLU(),
            nn.Conv2d(8, 6, 1, groups=2),
        )
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Twice(nn.Module):
    """A layer that runs twice, and one with the weight of another."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.tied = nn.Conv2d(3, 3, 1)
        self.tied.weight = self.last.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.last(self.twice(self.twice(x))))


def graph_of(model: nn.Module, sample: Tensor = IMAGES) -> QuantizationGraph:
    return QuantizationGraph(export_program(model.eval(), ModelInputs((sample,))))


def pairs_of(model: nn.Module, sample: Tensor = IMAGES) -> list[tuple[str, str]]:
    pairs = find_pairs(graph_of(model, sample))
    return [(pair.first.layer, pair.second.layer) for pair in pairs]


def uneven(model: nn.Module) -> nn.Module:
    """Its channels have ranges that differ a hundredfold."""
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        rows = 10 ** (2 * torch.rand(len(parameter), generator=random) - 1)
        parameter.data.normal_(generator=random).mul_(rows.view(-1, *[1] * (parameter.dim() - 1)))
    return model


KEEPING = {
    "nothing": lambda x: x,
    "relu": F.relu,
    "leaky": F.leaky_relu,
    "clamp from 0": lambda x: x.clamp(min=0),
    "max pool": lambda x: F.max_pool2d(x.relu(), 2),
    "average pool": lambda x: F.avg_pool2d(x, 2),
    "zero padding": lambda x: F.pad(x, (1, 1, 1, 1)),
    "rows": lambda x: x[:, :, ::2],
    "dropout": lambda x: F.dropout(x, training=False),
}
MIXING = {
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "clamp": lambda x: x.clamp(0, 3),
    "clamp from 1": lambda x: x.clamp(min=1),
    "padding of ones": lambda x: F.pad(x, (1, 1, 1, 1), value=1.0),
    "another order": lambda x: x.flip(1),
    "channels moved": lambda x: x.transpose(1, 2).reshape_as(x),
    "residual": lambda x: x + x.relu(),
    "sigmoid gate": lambda x: x * x.sigmoid(),
    "sum": lambda x: x + 1,
}


@pytest.mark.parametrize("name", KEEPING)
def test_what_keeps_channels_apart_and_is_homogeneous_makes_a_pair(name: str) -> None:
    torch.manual_seed(0)
    model = uneven(Between(KEEPING[name]))
    expected = model.double()(IMAGES.double()).detach()
    graph = graph_of(model.float())
    assert equalize(graph) == [("first", "second")]
    torch.testing.assert_close(
        model.double()(IMAGES.double()).detach(), expected, rtol=1e-6, atol=1e-5
    )
    first, second = graph.tensor("first.weight"), graph.tensor("second.weight")
    torch.testing.assert_close(output_absmax(first), input_absmax(second))


@pytest.mark.parametrize("name", MIXING)
def test_what_is_not_homogeneous_or_mixes_channels_makes_none(name: str) -> None:
    assert pairs_of(Between(MIXING[name])) == []


def test_a_flattening_is_refused_unless_one_pixel_is_left() -> None:
    assert pairs_of(Flattened(lambda x: x.flatten(1), 4 * 36)) == []
    pooled = Flattened(lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), 4)
    assert pairs_of(pooled) == [("first", "second")]
    # a linear layer along the width does not read channels
    assert pairs_of(Flattened(lambda x: x, 6)) == []


def test_linear_layers_are_pairs_along_their_last_dimension() -> None:
    rows = torch.zeros(2, 5, 3)
    assert pairs_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), rows)
    pooled = nn.Sequential(nn.Linear(3, 4), nn.AvgPool1d(2), nn.Linear(2, 2))
    assert pairs_of(pooled, rows) == [], "a pool of features mixes them"


def test_a_chain_with_a_depthwise_layer_converges_and_keeps_the_function() -> None:
    model = uneven(Inverted())
    expected = model.double()(IMAGES.double()).detach()
    graph = graph_of(model.float())
    found = equalize(graph)
    assert found == [("body.0", "body.2"), ("body.2", "body.4"), ("body.4", "head")]
    actual = model.double()(IMAGES.double()).detach()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    weights = [graph.tensor(f"{name}.weight") for name in ("body.0", "body.2", "body.4", "head")]
    for first, second, groups in zip(weights[:-1], weights[1:], (8, 2, 1), strict=True):
        ranges = output_absmax(first), input_absmax(second, groups)
        torch.testing.assert_close(*ranges, rtol=0.01, atol=0)


def test_shared_weights_are_left_alone() -> None:
    assert pairs_of(Twice()) == []


def test_only_pairs_with_a_layer_of_the_list_are_equalized() -> None:
    graph = graph_of(uneven(Inverted()))
    assert equalize(graph, ["head"]) == [("body.4", "head")]
    assert equalize(graph, []) == []


def test_a_weight_that_is_not_finite_is_an_error() -> None:
    model = Between(F.relu)
    with torch.no_grad():
        model.first.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        equalize(graph_of(model))
