from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ConfigError, DataError
from compressor.export.post_training import PostTraining
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.corrections.smoothed import find_smoothable, smooth_graph
from compressor.quantization.plan import STATIC_INT8, WEIGHT_INT8

ROWS = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0))
OUTLIERS = torch.ones(16).index_fill_(0, torch.tensor([3, 9]), 60.0)


class Block(nn.Module):
    """Before each branch a norm, as in a vision transformer; in it gates, a ReLU, a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(16), nn.LayerNorm(16)
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.middle, self.down = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 16)
        self.last_norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)
        with torch.no_grad():
            self.first_norm.weight.mul_(OUTLIERS)
            self.last_norm.weight.mul_(OUTLIERS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first_norm(x)
        x = x + self.query(y) * self.key(y).sigmoid()
        y = self.up(self.second_norm(x)).relu()
        x = x + self.down(F.gelu(self.middle(y)))
        return self.head(self.last_norm(x)[:, 0])


class AfterResidual(nn.Module):
    """The norm is read by the next residual branch as well, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.plain = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.bare = nn.LayerNorm(16, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.plain(self.bare(x + self.inner(x)))


def quantizer_of(model: nn.Module) -> PostTraining:
    return PostTraining(model, ModelInputs((ROWS[:2],)), [ModelInputs((ROWS,))])


@pytest.fixture
def block() -> nn.Module:
    torch.manual_seed(0)
    return Block().eval()


def test_norms_and_products_that_linear_layers_alone_read_are_found(block: nn.Module) -> None:
    places = find_smoothable(quantizer_of(block).graph)
    assert [(place.paths[0], [r.layer for r in place.readers]) for place in places] == [
        ("first_norm.weight", ["query", "key"]),
        ("second_norm.weight", ["up"]),
        ("up.weight", ["middle"]),
        ("last_norm.weight", ["head"]),
    ]


def test_a_norm_with_another_reader_or_without_a_weight_is_not(block: nn.Module) -> None:
    assert find_smoothable(quantizer_of(AfterResidual()).graph) == []


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothing_keeps_the_function(block: nn.Module, alpha: float) -> None:
    expected = block.double()(ROWS.double()).detach()
    quantizer = quantizer_of(block.float())
    formats = dict.fromkeys(quantizer.layers, STATIC_INT8)
    before = quantizer.model.query.weight.detach().clone()
    chosen = smooth_graph(quantizer.graph, formats, [ModelInputs((ROWS,))], alpha=alpha)
    assert list(chosen.values()) == [alpha] * 4
    assert not torch.equal(quantizer.model.query.weight, before)
    actual = quantizer.model.double()(ROWS.double()).detach()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_the_searched_alpha_makes_the_quantized_model_better(block: nn.Module) -> None:
    expected = block(ROWS).detach()
    errors = []
    for is_smoothed in (False, True):
        quantizer = quantizer_of(block)
        formats = dict.fromkeys(quantizer.layers, STATIC_INT8)
        if is_smoothed:
            smooth_graph(quantizer.graph, formats, [ModelInputs((ROWS,))])
        with torch.no_grad():
            errors.append(float((quantizer.simulate(formats)(ROWS) - expected).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_layers_whose_activations_stay_in_float_are_not_smoothed(block: nn.Module) -> None:
    quantizer = quantizer_of(block)
    formats = {**dict.fromkeys(quantizer.layers, WEIGHT_INT8), "head": STATIC_INT8}
    chosen = smooth_graph(quantizer.graph, formats, [ModelInputs((ROWS,))], alpha=0.5)
    assert len(chosen) == 1


def test_bad_input_is_an_error(block: nn.Module) -> None:
    quantizer = quantizer_of(block)
    formats = dict.fromkeys(quantizer.layers, STATIC_INT8)
    with pytest.raises(DataError, match="not finite"):
        smooth_graph(quantizer.graph, formats, [ModelInputs((ROWS * float("nan"),))])
    with pytest.raises(ConfigError, match="alpha=2"):
        smooth_graph(quantizer.graph, formats, [ModelInputs((ROWS,))], alpha=2)
