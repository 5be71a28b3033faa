from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, ModelError
from compressor.export.post_training import PostTraining
from compressor.export.quantize import quantize
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.plan import DYNAMIC_INT8, LayerFormat
from compressor.quantization.scheme import WEIGHT

WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "matmul": lambda x, w, b: x @ w + b,
    "mm": lambda x, w, b: torch.mm(x.flatten(0, 1), w).unflatten(0, x.shape[:2]) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w).unflatten(0, x.shape[:2]),
}
UPRIGHT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "T": lambda x, w: x @ w.T,
    "t": lambda x, w: x @ w.t(),
    "transpose": lambda x, w: x @ w.transpose(-2, -1),
    "permute": lambda x, w: x @ w.permute(1, 0),
}
INPUTS, OUTPUTS = 6, 5


def rows(count: int = 4) -> Tensor:
    return torch.randn(count, 3, INPUTS, generator=torch.Generator().manual_seed(count))


class Conv1D(nn.Module):
    """A linear layer with a weight (in, out), as GPT-2 has it, written in one of `WAYS`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(INPUTS, OUTPUTS))
        self.bias = nn.Parameter(torch.randn(OUTPUTS))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return WAYS[self.way](x, self.weight, self.bias)


class Upright(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OUTPUTS, INPUTS))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return UPRIGHT[self.way](x, self.weight)


class Both(nn.Module):
    """One matrix is multiplied by from both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(INPUTS, INPUTS))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).relu() @ self.weight.T


class Tied(nn.Module):
    """A language model: an embedding that is the last layer as well, and one layer of two names."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, INPUTS)
        self.first = nn.Linear(INPUTS, INPUTS)
        self.second = self.first
        self.third, self.fourth = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, INPUTS)
        self.fourth.weight = self.third.weight
        self.head = nn.Linear(INPUTS, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.second(self.first(self.table(tokens)).relu()).relu()
        return self.head(self.fourth(self.third(x).relu()))


@pytest.fixture
def tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied().eval()


TOKENS = [torch.arange(18).view(6, 3) % 9]


def product(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(model).eval()


@pytest.mark.parametrize("way", WAYS)
def test_a_product_by_a_matrix_is_quantized_like_the_linear_layer_that_it_is(way: str) -> None:
    model = product(Conv1D(way))
    linear = nn.Sequential(nn.Linear(INPUTS, OUTPUTS))
    with torch.no_grad():
        linear[0].weight.copy_(model[0].weight.T)
        linear[0].bias.copy_(model[0].bias)
    for format in ("dynamic_int8", "weight_int4"):
        ours, theirs = (
            quantize(item, [rows()], format=format, corrections=[]) for item in (model, linear)
        )
        assert list(ours.plan.formats) == ["0"]
        assert not ours.skipped
        scales = (quantized.plan.weights["0.weight"].scale for quantized in (ours, theirs))
        torch.testing.assert_close(*scales, atol=0, rtol=0)
        torch.testing.assert_close(ours.module(rows(5)), theirs.module(rows(5)))
    static = quantize(model, [rows()]).module(rows())
    assert 0 < (static - model(rows())).norm() < 0.02 * model(rows()).norm()


@pytest.mark.parametrize("way", UPRIGHT)
def test_a_product_by_a_transposed_matrix_is_that_of_the_matrix(way: str) -> None:
    model = product(Upright(way))
    quantized = quantize(model, [rows()], format="dynamic_int8")
    linear = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False))
    linear[0].weight = model[0].weight
    expected = quantize(linear, [rows()], format="dynamic_int8").module(rows(5))
    torch.testing.assert_close(quantized.module(rows(5)), expected)


def test_the_float_graph_and_the_model_are_as_they_were() -> None:
    for model in (product(Conv1D("addmm")), product(Upright("T")), product(Both())):
        before = copy.deepcopy(model.state_dict())
        graph = PostTraining(model, ModelInputs((rows(),))).graph
        torch.testing.assert_close(graph.module(rows(5)), model(rows(5)))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])


def test_training_moves_the_weight_of_the_model_itself() -> None:
    quantizer = PostTraining(product(Conv1D("addmm")), ModelInputs((rows(),)))
    assert quantizer.shares_parameters
    simulation = quantizer.simulate({"0": DYNAMIC_INT8}).train()
    before = quantizer.model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(simulation.parameters(), lr=0.1)
    simulation(rows()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(quantizer.model[0].weight, before)
    moved = quantizer.graph.tensor("0.weight")
    assert torch.equal(moved, quantizer.model[0].weight.T)


def test_of_a_matrix_that_is_read_from_both_sides_one_product_is_quantized() -> None:
    graph = PostTraining(product(Both()), ModelInputs((rows(),))).graph
    assert [(item.layer, item.weight) for item in graph.products] == [("0", "0.weight")]


def test_the_last_layer_is_called_by_its_own_name_and_not_by_that_of_an_embedding(
    tied: nn.Module,
) -> None:
    quantized = quantize(tied, TOKENS, format="dynamic_int8")
    assert list(quantized.plan.formats) == ["first", "third", "head"]
    assert not quantized.skipped, "the table has the numbers of the head"


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("first", "first"),
        ("second", "first"),
        ("third", "third"),
        ("fourth", "third"),
        ("head", "head"),
        ("table", "head"),
    ],
)
def test_each_name_of_a_shared_weight_means_the_one_layer(
    tied: nn.Module, name: str, layer: str
) -> None:
    alone = quantize(tied, TOKENS, layers=[name])
    assert list(alone.plan.formats) == [layer]
    assert list(alone.plan.weights) == [f"{layer}.weight"]
    without = quantize(tied, TOKENS, ignored=[name])
    assert layer not in without.plan.formats
    assert len(without.plan.formats) == 2
    assert list(quantize(tied, TOKENS, format={name: "static_int8"}).plan.formats) == [layer]


def test_two_formats_for_one_weight_are_refused(tied: nn.Module) -> None:
    same = {"third": "weight_int8", "fourth": "weight_int8"}
    assert list(quantize(tied, TOKENS, format=same).plan.formats) == ["third"]
    with pytest.raises(ConfigError, match="'third' and 'fourth' share it"):
        quantize(tied, TOKENS, format={"third": "weight_int8", "fourth": "dynamic_int8"})
    with pytest.raises(ModelError, match="Did you mean 'fourth'"):
        quantize(tied, TOKENS, format={"forth": "dynamic_int8"})


def test_rounding_leaves_the_rows_that_an_embedding_looks_up(tied: nn.Module) -> None:
    # GPTQ lets one weight make up for another in a product, and rows are looked up alone
    three = LayerFormat(WEIGHT.with_bits(3), "float")
    quantized = quantize(tied, TOKENS, format=three, corrections=["gptq"])
    assert torch.equal(quantized.model.table.weight, tied.table.weight)
    assert set(quantized.corrected.rounded) == {"first", "third"}
