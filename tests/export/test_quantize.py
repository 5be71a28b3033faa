from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor.errors import ConfigError, DataError, ModelError
from compressor.export.corrections import CORRECTIONS, CorrectionReport
from compressor.export.quantize import Quantized, quantize
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.plan import DYNAMIC_INT8, LayerFormat
from compressor.quantization.scheme import Scheme

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)).abs()
LOW = LayerFormat(Scheme(3, signed=True, symmetric=True, axis=0))


class Net(nn.Module):
    """Two convolutions, one of them with a batch norm, a table of numbers and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.back = nn.ConvTranspose2d(8, 40, 2)
        self.head = nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(self.stem(x)).relu()
        return self.head(self.back(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    model(IMAGES)
    return model


@pytest.fixture(scope="module")
def static(net: nn.Module) -> Quantized:
    return quantize(net, IMAGES.split(8))


def error(quantized: Quantized, net: nn.Module) -> float:
    with torch.no_grad():
        expected = copy.deepcopy(net).eval()(IMAGES)
        return float((quantized.module(IMAGES) - expected).norm() / expected.norm())


def test_the_model_is_near_to_float_and_its_original_unchanged(
    net: nn.Module, static: Quantized
) -> None:
    assert 0 < error(static, net) < 0.03
    assert isinstance(net.stem, nn.Sequential)
    assert isinstance(net.stem[1], nn.BatchNorm2d)
    assert net.training
    assert not static.module.training
    assert list(static.plan.formats) == ["stem.0", "depth", "head"]
    assert list(static.skipped) == ["back"], "there is no product of a transposed convolution"
    assert compressor.quantize is quantize


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static_int8", "dynamic_int8", "weight_int8", "weight_int4"])
def test_the_file_computes_what_the_module_computes(
    net: nn.Module, kind: str, tmp_path: Path
) -> None:
    quantized = quantize(net, IMAGES.split(8), format=kind, corrections=["gptq", "bias"])
    path = quantized.save_onnx(tmp_path / "q.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    actual = session.run(None, {"input": IMAGES.numpy()})[0]
    expected = quantized.module(IMAGES).detach().numpy()
    # a tie may be rounded otherwise in a sum of another order: one step of one value
    np.testing.assert_allclose(actual, expected, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize(
    "corrections",
    [["gptq", "adaround"], ["bias"], ["bias", "gptq", "adaround", "equalization"], CORRECTIONS],
    ids="+".join,
)
def test_corrections_bring_three_bits_nearer_to_float(
    net: nn.Module, corrections: Collection[str]
) -> None:
    plain = quantize(net, IMAGES.split(8), format=LOW, corrections=[])
    corrected = quantize(net, IMAGES.split(8), format=LOW, corrections=corrections, seconds=0.3)
    assert error(corrected, net) < error(plain, net)


@pytest.mark.parametrize(("kind", "biased"), [(LOW, True), ("static_int8", False)])
def test_weights_of_few_bits_are_corrected_unasked(
    net: nn.Module, kind: LayerFormat | str, biased: bool
) -> None:
    batches = IMAGES.split(8)
    asked, unasked, plain = (
        quantize(net, batches, format=kind, corrections=corrections)
        for corrections in (["gptq", "bias"], None, [])
    )
    assert unasked.corrected == (asked if biased else plain).corrected
    assert plain.corrected == CorrectionReport()
    assert (error(unasked, net) == error(asked, net)) is biased
    assert (error(unasked, net) < error(plain, net)) is biased


def test_the_report_says_what_was_done(net: nn.Module) -> None:
    report = quantize(
        net, IMAGES.split(8), format=LOW, corrections=CORRECTIONS, seconds=0.3
    ).corrected
    assert report.equalized == (("stem.0", "depth"),)
    assert report.rounded == {"stem.0": "gptq", "depth": "adaround", "head": "gptq"}
    assert report.biased == ("stem.0", "depth", "head")


def test_the_calibration_may_be_an_iterator_of_any_form_of_inputs(
    net: nn.Module, static: Quantized
) -> None:
    forms: list[Any] = [ModelInputs((IMAGES[:8],)), (IMAGES[8:16],), {"x": IMAGES[16:]}]
    other = quantize(net, iter(forms))
    for name, tensor in static.plan.activations.items():
        assert torch.equal(other.plan.activations[name].scale, tensor.scale)
    corrected = quantize(net, iter(IMAGES.split(8)), corrections=["bias"], samples=4)
    for name, tensor in static.plan.activations.items():
        assert torch.equal(corrected.plan.activations[name].scale, tensor.scale)


def test_the_plan_has_the_scales_of_the_module_as_they_are_now(net: nn.Module) -> None:
    quantized = quantize(net, IMAGES.split(8))
    before = quantized.plan.weights["head.weight"].scale
    with torch.no_grad():  # as an optimizer that learns the steps
        for quantizer in quantized.module.quantizers().values():
            quantizer.step *= 2
    assert torch.equal(quantized.plan.weights["head.weight"].scale, 2 * before)


def test_layers_are_chosen_by_name_by_module_and_by_format(net: nn.Module) -> None:
    batches = IMAGES.split(8)
    assert list(quantize(net, batches, layers=["stem", "head"]).plan.formats) == ["stem.0", "head"]
    ignored = quantize(net, batches, ignored=["stem"])
    assert list(ignored.plan.formats) == ["depth", "head"]
    assert "asked" in ignored.skipped["stem.0"]
    mixed = quantize(net, batches, format={"head": "dynamic_int8", "depth": LOW})
    assert mixed.plan.formats == {"depth": LOW, "head": DYNAMIC_INT8}


def test_a_convolution_stays_in_float_where_activations_are_dynamic(net: nn.Module) -> None:
    quantized = quantize(net, IMAGES.split(8), format="dynamic_int8")
    assert list(quantized.plan.formats) == ["head"]
    assert "range is found in each call" in quantized.skipped["depth"]


def test_blocks_are_of_linear_layers(net: nn.Module) -> None:
    plan = quantize(net, IMAGES.split(8), format="weight_int4").plan
    assert plan.weights["depth.weight"].scale.shape == (8,)
    assert plan.weights["head.weight"].scale.shape == (4, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "static_int9"}, "Did you mean 'static_int8'"),
        ({"format": {"head": "int4"}}, "There is no format 'int4'"),
        ({"format": {"heat": "static_int8"}}, "Did you mean 'head'"),
        ({"format": {"head": "static_int8"}, "layers": ["head"]}, "Give one of the two"),
        ({"method": "minimax"}, "Did you mean 'minmax'"),
        ({"corrections": ["biass"]}, "Did you mean 'bias'"),
        ({"corrections": "bias"}, "not a list"),
        ({"layers": ["heat"]}, "Did you mean 'head'"),
        ({"layers": "head"}, "not a list"),
        ({"ignored": ["dept"]}, "Did you mean 'depth'"),
        ({"ignored": ["stem", "depth", "head"]}, "No layer is left"),
        ({"evaluate": len, "delta": "1%"}, "delta='1%' is no drop.*0.01 is one percentage point"),
        ({"evaluate": 0.9, "delta": 0.1}, "evaluate=0.9 is no function"),
        ({"samples": 1.5}, "samples=1.5 is no number of samples"),
        ({"samples": 0}, "samples=0 is no number of samples"),
        ({"seconds": -1}, "seconds=-1 is no time"),
        ({"seconds": "5 min"}, "seconds='5 min' is no time"),
        ({"generator": 3}, r"generator=3 is no torch\.Generator"),
    ],
)
def test_what_cannot_be_meant_is_an_error(
    net: nn.Module, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, ModelError), match=message):
        quantize(net, IMAGES.split(8), **options)


def test_a_function_is_no_model() -> None:
    function: Any = torch.relu
    with pytest.raises(ModelError, match=r"builtin_function.*not a torch\.nn\.Module"):
        quantize(function, IMAGES.split(8))


def test_a_folder_is_no_file(static: Quantized, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder.*model\.onnx"):
        static.save_onnx(tmp_path)


def test_calibration_without_samples_is_an_error(net: nn.Module) -> None:
    with pytest.raises(DataError, match="no calibration batch"):
        quantize(net, [])
    with pytest.raises(DataError, match="no sample"):
        quantize(net, [IMAGES[:0]])
    with pytest.raises(DataError, match="in brackets"):
        quantize(net, IMAGES)


def test_values_that_are_not_finite_are_an_error(net: nn.Module) -> None:
    bad = [IMAGES[:8], IMAGES[8:] * float("nan")]
    with pytest.raises(ModelError, match="the value 'x' was not finite"):
        quantize(net, bad)
    with pytest.raises(DataError, match=r"'stem\.0'"):
        quantize(net, bad, format="weight_int8", corrections=["gptq"])


def test_a_model_without_layers_is_an_error() -> None:
    with pytest.raises(ModelError, match="no convolution or linear layer"):
        quantize(nn.Sequential(nn.ReLU()), IMAGES.split(8))


@pytest.mark.slow
def test_a_format_without_ranges_wants_a_batch_to_trace(net: nn.Module) -> None:
    with pytest.raises(
        DataError, match=r"^No calibration .* traced .* 'dynamic_int8': give a list"
    ):
        quantize(net, format="dynamic_int8")
    assert quantize(net, [IMAGES[:1]], format="dynamic_int8").plan.weights


def test_a_class_is_quantized_by_its_instance() -> None:
    with pytest.raises(ModelError, match=r"`model` is the class Net itself"):
        quantize(Net, [IMAGES])  # type: ignore[arg-type]
