from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ConfigError, DataError
from compressor.export.corrections import correct
from compressor.export.post_training import PostTraining
from compressor.export.qdq import export_quantized
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.corrections.smoothed import find_smoothable, smooth_graph
from compressor.quantization.plan import DYNAMIC_INT8, STATIC_INT8, WEIGHT_INT8, LayerFormat

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
    """The norm is read by the next residual branch as well, as in BERT; two features are large."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.other = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.bare, self.plain = nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 16)
        with torch.no_grad():
            self.norm.weight.mul_(OUTLIERS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.plain(self.bare(x + self.inner(x) * self.other(x)))


def quantizer_of(model: nn.Module) -> PostTraining:
    return PostTraining(model, ModelInputs((ROWS[:2],)), [ModelInputs((ROWS,))])


@pytest.fixture
def block() -> nn.Module:
    torch.manual_seed(0)
    return Block().eval()


def test_norms_and_products_that_linear_layers_alone_read_are_found(block: nn.Module) -> None:
    places = find_smoothable(quantizer_of(block).graph)
    assert [((*place.paths, None)[0], [r.layer for r in place.readers]) for place in places] == [
        ("first_norm.weight", ["query", "key"]),
        ("second_norm.weight", ["up"]),
        ("up.weight", ["middle"]),
        (None, ["down"]),
        ("last_norm.weight", ["head"]),
    ]


def test_layers_that_share_a_norm_with_a_residual_branch_are_found_together() -> None:
    places = find_smoothable(quantizer_of(AfterResidual()).graph)
    assert [(place.paths, [r.layer for r in place.readers]) for place in places] == [
        ((), ["inner", "other"]),
        ((), ["plain"]),
    ]


def test_a_norm_is_found_across_the_transposes_of_an_attention() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True).eval()
    places = find_smoothable(quantizer_of(layer).graph)
    assert ("norm1.weight", "norm1.bias") in [place.paths for place in places]


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothing_keeps_the_function(block: nn.Module, alpha: float) -> None:
    expected = block.double()(ROWS.double()).detach()
    quantizer = quantizer_of(block.float())
    formats = dict.fromkeys(quantizer.layers, STATIC_INT8)
    before = quantizer.model.query.weight.detach().clone()
    chosen = smooth_graph(quantizer.graph, formats, [ModelInputs((ROWS,))], alpha=alpha)
    assert list(chosen.values()) == [alpha] * 5
    assert not torch.equal(quantizer.model.query.weight, before)
    for smoothed in (quantizer.model, quantizer.graph.module):
        actual = smoothed.double()(ROWS.double()).detach()
        atol = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("form", [STATIC_INT8, DYNAMIC_INT8], ids=["static", "dynamic"])
def test_what_a_residual_branch_reads_as_well_is_multiplied_for_the_layers_alone(
    form: LayerFormat, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = AfterResidual().eval()
    expected = model(ROWS).detach()
    plain, quantizer = quantizer_of(model), quantizer_of(model)
    formats = dict.fromkeys(quantizer.layers, form)
    chosen = smooth_graph(quantizer.graph, formats, [ModelInputs((ROWS,))])
    assert list(chosen) == ["layer_norm"], "the other norm has no outliers: nothing is gained"
    assert [node.target for node in quantizer.graph.nodes].count(torch.ops.aten.mul.Tensor) == 2
    for kept in (quantizer.model, quantizer.graph.module):
        torch.testing.assert_close(kept(ROWS).detach(), expected, rtol=0, atol=1e-4)
    with torch.no_grad():
        errors = [(q.simulate(formats)(ROWS) - expected).norm() for q in (plain, quantizer)]
    assert errors[1] < 0.5 * errors[0]
    simulated = quantizer.simulate(formats).eval()
    path = export_quantized(simulated, ModelInputs((ROWS[:2],)), tmp_path / "smoothed.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"input": ROWS.numpy()})
    # a tie may be rounded otherwise: one step of one value
    atol = 0.01 * float(expected.abs().max())
    torch.testing.assert_close(
        torch.from_numpy(actual), simulated(ROWS).detach(), rtol=0, atol=atol
    )


def test_layers_in_float_read_what_they_read() -> None:
    quantizer = quantizer_of(AfterResidual().eval())
    before = quantizer.graph.tensor("other.weight").clone()
    smooth_graph(quantizer.graph, {"inner": STATIC_INT8}, [ModelInputs((ROWS,))], alpha=0.5)
    sources = {product.layer: product.source for product in quantizer.graph.products}
    assert sources["inner"].args[0] is sources["other"]
    assert torch.equal(quantizer.graph.tensor("other.weight"), before)


def test_integers_are_not_made_floats_to_be_smoothed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    ).eval()
    with torch.no_grad():
        model[4].weight[:, 0] *= 100
    images = ModelInputs((torch.rand(8, 2, 6, 6, generator=torch.Generator().manual_seed(0)),))
    quantizer = PostTraining(model, images.with_batch(2), [images])
    for form, smoothed in ((STATIC_INT8, 0), (DYNAMIC_INT8, 1)):
        formats = {"4": form, "0": STATIC_INT8} if form is STATIC_INT8 else {"4": form}
        assert len(smooth_graph(quantizer.graph, formats, [images], alpha=0.5)) == smoothed
    # TensorRT pools in float
    other = PostTraining(model, images.with_batch(2), [images], runtime="tensorrt")
    assert correct(other, {"4": STATIC_INT8, "0": STATIC_INT8}, ["smoothing"]).smoothed


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
    assert list(chosen) == ["layer_norm_2"]


def test_bad_input_is_an_error(block: nn.Module) -> None:
    quantizer = quantizer_of(block)
    formats = dict.fromkeys(quantizer.layers, STATIC_INT8)
    with pytest.raises(DataError, match="not finite"):
        smooth_graph(quantizer.graph, formats, [ModelInputs((ROWS * float("nan"),))])
    with pytest.raises(ConfigError, match="alpha=2"):
        smooth_graph(quantizer.graph, formats, [ModelInputs((ROWS,))], alpha=2)
