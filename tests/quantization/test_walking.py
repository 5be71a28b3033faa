from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from compressor.errors import DataError
from compressor.export.exported_program import export_program
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.corrections.walking import Walk, cut, first_samples, forward_of
from compressor.quantization.graph import QuantizationGraph
from compressor.quantization.model import QuantizedModel
from compressor.quantization.plan import WEIGHT_INT8, make_plan


class Net(nn.Module):
    """Residual branch, keywords, a split, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.side = nn.Conv2d(4, 4, 1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.side(x) + self.twice(self.twice(x)).relu() * factor
        left, right = x.mean((2, 3)).chunk(2, dim=1)
        return self.head(left - right)


def batch(count: int) -> ModelInputs:
    random = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, 6, 6, generator=random)
    factors = torch.rand(count, 1, 1, 1, generator=random)
    return ModelInputs((), {"factor": factors, "x": images})


@pytest.fixture(scope="module")
def graph() -> QuantizationGraph:
    torch.manual_seed(0)
    return QuantizationGraph(export_program(Net().eval(), batch(2)))


def inputs_seen(module: fx.GraphModule, names: list[str], call: ModelInputs) -> dict[str, Tensor]:
    """What the nodes read, noted by torch's own interpreter."""
    seen: dict[str, Tensor] = {}

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            if n.name in names:
                seen[n.name] = self.fetch_args_kwargs_from_env(n)[0][0]
            return super().run_node(n)

    placeholders = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        Noting(module).run(
            *(call.kwargs[name] for name in placeholders), enable_io_processing=False
        )
    return seen


@pytest.mark.parametrize("kept_bytes", [0, 6000, 2**30])
def test_a_walk_gives_what_each_layer_reads(graph: QuantizationGraph, kept_bytes: int) -> None:
    batches = [batch(3), batch(2)]
    names = [product.node.name for product in graph.products]
    assert len(names) == 5
    expected = [inputs_seen(graph.module, names, call) for call in batches]
    walk = Walk(graph.module, batches, kept_bytes=kept_bytes)
    for product in graph.products:
        seen = list(walk.inputs(product))
        assert len(seen) == 2
        assert all(
            torch.equal(x, noted[product.node.name])
            for x, noted in zip(seen, expected, strict=True)
        )


@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_a_weight_that_changes_on_the_way_is_seen_rounded_anew(kept_bytes: int) -> None:
    torch.manual_seed(0)
    graph = QuantizationGraph(export_program(Net().eval(), batch(2)))
    model = QuantizedModel(graph, make_plan(graph, dict.fromkeys(graph.layers, WEIGHT_INT8), {}))
    walk = Walk(model.graph, [batch(3)], kept_bytes=kept_bytes)
    list(walk.inputs(graph.products[0]))
    with torch.no_grad():
        graph.tensor("stem.weight").mul_(-0.5)
    names = [product.node.name for product in graph.products]
    expected = inputs_seen(model.graph, names, batch(3))
    for product in graph.products[1:]:
        (seen,) = walk.inputs(product)
        assert torch.equal(seen, expected[product.node.name])


def test_a_product_as_a_function_computes_the_layer_and_its_activation(
    graph: QuantizationGraph,
) -> None:
    x = batch(2).kwargs["x"]
    stem = graph.products[0]
    weight, bias = graph.tensor("stem.weight"), graph.tensor("stem.bias")
    expected = nn.functional.conv2d(x, weight, bias, padding=1)
    assert torch.equal(forward_of(stem)(x, weight, bias), expected)
    assert torch.equal(forward_of(stem, tail=True)(x, weight, bias), expected.relu())


def test_parts_hold_all_samples_in_order(graph: QuantizationGraph) -> None:
    parts = cut(graph, [batch(5), batch(3)])
    joined = torch.cat([part.kwargs["x"] for part in parts])
    assert torch.equal(joined, torch.cat([batch(n).kwargs["x"] for n in (5, 3)]))
    with pytest.raises(DataError, match="no calibration sample"):
        cut(graph, [])


@pytest.mark.parametrize("count", [1, 5, 6, 8, 99])
def test_the_first_samples_are_the_first_samples(count: int) -> None:
    batches = iter([batch(5), batch(3), batch(4)])
    taken = list(first_samples(batches, count))
    assert sum(part.batch_size for part in taken) == min(count, 12)
    left = sum(1 for _ in batches)
    assert left == {1: 2, 5: 2, 6: 1, 8: 1, 99: 0}[count], "no batch is drawn in vain"


def test_a_table_of_words_is_no_value_of_a_sample() -> None:
    model = nn.Sequential(nn.Embedding(1000, 4), nn.Linear(4, 8)).eval()
    words = ModelInputs((torch.zeros(2, 5, dtype=torch.long),))
    assert QuantizationGraph(export_program(model, words)).sample_bytes() == 4 * 5 * 8
