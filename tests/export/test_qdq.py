from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from compressor.errors import ConfigError, DataError, ModelError
from compressor.export import qdq
from compressor.export.onnx import export_onnx
from compressor.export.post_training import PostTraining
from compressor.export.qdq import integer_kernels
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.plan import (
    DYNAMIC_INT8,
    STATIC_INT8,
    WEIGHT_INT4,
    WEIGHT_INT8,
    LayerFormat,
)
from compressor.quantization.scheme import WEIGHT, Scheme

LAYERS = ["stem", "conv1", "conv2", "last", "head"]
FORMATS = {
    "static": STATIC_INT8,
    "dynamic": DYNAMIC_INT8,
    "int8": WEIGHT_INT8,
    "int4": WEIGHT_INT4,
}
pytestmark = pytest.mark.slow


class Residual(nn.Module):
    """stem, ReLU, (conv1, ReLU, conv2) + x, ReLU, last, ReLU6, pool, head: 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 16, 3, padding=1, stride=2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu_()
        x = (self.conv2(self.conv1(x).relu()) + x).relu()
        return self.head(nn.functional.relu6(self.last(x)).mean((2, 3)))


class Rows(nn.Module):
    """A feed-forward block of a transformer, on (N, L, 64); classes from the first row."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.down(nn.functional.gelu(self.up(x))))
        return self.head(x[:, 0])


class Padded(nn.Module):
    """Values below zero go through a pad, a slice and a split, to two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3)
        self.left, self.right = nn.Conv2d(16, 8, 3), nn.Conv2d(16, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.first(x)[:, :, ::1, ::2], (1, 1, 1, 1))
        left, right = x.chunk(2, dim=1)
        return torch.cat([self.left(left), self.right(right)], dim=1)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture(scope="module")
def quantizer(residual: nn.Module, images: Tensor) -> PostTraining:
    return of(residual, images)


def of(model: nn.Module, sample: Tensor) -> PostTraining:
    batches = [ModelInputs((sample[:10],)), ModelInputs((sample[10:],))]
    return PostTraining(model, ModelInputs((sample[:2],)), batches)


def static(layers: list[str]) -> Mapping[str, LayerFormat]:
    return dict.fromkeys(layers, STATIC_INT8)


def run(path: Path, sample: Tensor, *, optimise: bool = True) -> NDArray[np.float32]:
    options = ort.SessionOptions()
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"input": sample.numpy()})[0]
    return result


def simulated(quantizer: PostTraining, formats: Mapping[str, LayerFormat], x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = quantizer.simulate(formats)(x)
    return result


def test_every_layer_is_an_integer_kernel_and_nothing_is_converted_between(
    quantizer: PostTraining, tmp_path: Path
) -> None:
    assert quantizer.layers == LAYERS
    kernels = integer_kernels(quantizer.write(tmp_path / "q.onnx", static(LAYERS)))
    assert kernels["QLinearConv"] == 4
    assert kernels["QLinearAdd"] == 1
    assert kernels["QLinearGlobalAveragePool"] == 1
    assert kernels["QGemm"] == 1
    assert kernels["QuantizeLinear"] == 1, "of the input"
    assert kernels["DequantizeLinear"] == 0, "the last product writes floats itself"
    assert not kernels.keys() & {"Conv", "Gemm", "Relu", "Clip", "Add", "GlobalAveragePool"}


def test_the_file_computes_what_the_simulation_computes(
    quantizer: PostTraining, images: Tensor, tmp_path: Path
) -> None:
    path = quantizer.write(tmp_path / "q.onnx", static(LAYERS))
    onnx.checker.check_model(onnx.load(path), full_check=True)
    expected = simulated(quantizer, static(LAYERS), images).numpy()
    spread = np.abs(expected).max()
    by_definition = ReferenceEvaluator(onnx.load(path)).run(None, {"input": images.numpy()})[0]
    # rounding of a tie may differ by one step of one value in float sums of another order
    np.testing.assert_allclose(by_definition, expected, atol=0.01 * spread)
    np.testing.assert_allclose(run(path, images, optimise=False), expected, atol=0.01 * spread)
    np.testing.assert_allclose(run(path, images), expected, atol=0.02 * spread)


@pytest.mark.parametrize("kind", FORMATS)
def test_linear_layers_in_every_format_compute_what_the_simulation_computes(
    kind: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, rows = Rows().eval(), torch.randn(16, 5, 64)
    quantizer = of(model, rows)
    formats = dict.fromkeys(["up", "down", "head"], FORMATS[kind])
    path = quantizer.write(tmp_path / "q.onnx", formats)
    expected = simulated(quantizer, formats, rows).numpy()
    np.testing.assert_allclose(run(path, rows, optimise=False), expected, atol=1e-4)
    # an accelerated product of few-bit weights rounds what it reads to eight bits
    np.testing.assert_allclose(run(path, rows), expected, atol=0.03)
    kernels = integer_kernels(path)
    if kind == "static":
        assert kernels["MatMulIntegerToFloat"] + kernels["QGemm"] == 3
    elif kind == "dynamic":
        assert kernels["DynamicQuantizeMatMul"] == 3
    else:
        assert kernels["MatMulNBits"] == 3
    size = path.stat().st_size
    float_size = export_onnx(model, ModelInputs((rows[:2],)), tmp_path / "f.onnx").stat().st_size
    assert size < (0.25 if kind == "int4" else 0.4) * float_size


def test_pads_slices_and_splits_stay_integers(images: Tensor, tmp_path: Path) -> None:
    # uint8 zero is the lowest value of a range around zero: it must not be what is padded with
    torch.manual_seed(0)
    model = Padded().eval()
    quantizer = of(model, images)
    path = quantizer.write(tmp_path / "q.onnx", static(quantizer.layers))
    kernels = integer_kernels(path)
    assert kernels["QLinearConv"] == 3
    assert kernels["DequantizeLinear"] == 1, "of the output"
    expected = model(images).detach().numpy()
    assert np.abs(run(path, images) - expected).mean() < 0.03 * np.abs(expected).mean()


class PaddedFirst(nn.Module):
    """Padding apart from the convolution that it is for, as TensorFlow's "same" comes to torch."""

    def __init__(self, *, is_read_twice: bool) -> None:
        super().__init__()
        self.is_read_twice = is_read_twice
        self.pad, self.stem = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 16, 3, stride=2)
        self.wider, self.last = nn.ZeroPad2d((1, 2, 2, 1)), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wider(self.stem(self.pad(x)))
        return self.last(x) + (x[:, :8] if self.is_read_twice else 0.0)


@pytest.mark.parametrize(("is_read_twice", "pads"), [(False, 0), (True, 1)])
def test_convolutions_do_the_padding_that_they_alone_read(
    images: Tensor, tmp_path: Path, is_read_twice: bool, pads: int
) -> None:
    torch.manual_seed(0)
    model = PaddedFirst(is_read_twice=is_read_twice).eval()
    quantizer = of(model, images)
    path = quantizer.write(tmp_path / "q.onnx", static(quantizer.layers))
    kernels = integer_kernels(path)
    assert (kernels["Pad"], kernels["QLinearConv"]) == (pads, 2)
    simulated = quantizer.simulate(static(quantizer.layers)).eval()(images)
    steps = (torch.from_numpy(run(path, images)) - simulated).abs() / simulated.abs().max()
    assert steps.mean() < 1e-3
    assert steps.max() < 0.02, "the edges are right as well"


def test_int8_is_near_to_float(
    residual: nn.Module, quantizer: PostTraining, images: Tensor, tmp_path: Path
) -> None:
    expected = residual(images).detach().numpy()
    actual = run(quantizer.write(tmp_path / "q.onnx", static(LAYERS)), images)
    assert 0 < np.abs(actual - expected).mean() < 0.02 * np.abs(expected).mean()


def test_weights_are_stored_in_one_byte_each(quantizer: PostTraining, tmp_path: Path) -> None:
    path = quantizer.write(tmp_path / "q.onnx", static(LAYERS))
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    assert stored["stem.weight_int8"].data_type == onnx.TensorProto.INT8
    large = [tensor for tensor in stored.values() if np.prod(tensor.dims) > 16]
    assert {tensor.data_type for tensor in large} == {onnx.TensorProto.INT8}, "no float copy"


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_left_in_float_runs_in_float_and_its_neighbours_do_not(
    quantizer: PostTraining, name: str, tmp_path: Path
) -> None:
    int8 = [layer for layer in LAYERS if layer != name]
    kernels = integer_kernels(quantizer.write(tmp_path / "q.onnx", static(int8)))
    assert kernels["QLinearConv"] + kernels["QGemm"] == 4
    assert kernels["Conv"] + kernels["FusedConv"] + kernels["Gemm"] + kernels["FusedGemm"] == 1
    # the sum of a float and an integer branch is done in float: rounding it twice gains nothing
    assert kernels["QLinearAdd"] == (name != "conv2")


def test_without_a_node_between_the_runtime_quantizes_a_float_layer_unasked(
    quantizer: PostTraining, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # when this fails, ONNX Runtime has learned better, and the Clip may go
    monkeypatch.setattr(qdq, "REQUANTIZED", qdq.REQUANTIZED - qdq.CONVOLUTIONS)
    int8 = [layer for layer in LAYERS if layer != "conv1"]
    path = quantizer.write(tmp_path / "q.onnx", static(int8))
    assert integer_kernels(path)["QLinearConv"] == 4


def test_no_format_gives_the_float_model(
    residual: nn.Module, quantizer: PostTraining, images: Tensor, tmp_path: Path
) -> None:
    path = quantizer.write(tmp_path / "q.onnx", {})
    expected = residual(images).detach().numpy()
    np.testing.assert_allclose(run(path, images), expected, atol=1e-5)


def test_the_batch_stays_dynamic(quantizer: PostTraining, tmp_path: Path) -> None:
    path = quantizer.write(tmp_path / "q.onnx", static(LAYERS))
    assert [len(run(path, torch.zeros(n, 3, 8, 8))) for n in (1, 7)] == [1, 7]


def test_an_unknown_layer_is_an_error_with_the_nearest_name(quantizer: PostTraining) -> None:
    with pytest.raises(ModelError, match="Did you mean 'stem'"):
        quantizer.simulate(static(["sten"]))


def test_static_layers_without_calibration_are_an_error(
    residual: nn.Module, images: Tensor
) -> None:
    quantizer = PostTraining(residual, ModelInputs((images[:2],)))
    with pytest.raises(DataError, match="nothing to calibrate on"):
        quantizer.simulate(static(LAYERS))
    with pytest.raises(DataError, match="no calibration batch"):
        PostTraining(residual, ModelInputs((images[:2],)), []).simulate(static(LAYERS))


def test_a_value_that_is_not_finite_is_named(residual: nn.Module, images: Tensor) -> None:
    bad = images.clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match="the value 'x' was not finite"):
        of(residual, bad).simulate(static(LAYERS))


class Own(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x).relu()))


class TwoWays(nn.Module):
    """One layer that reads rows and a matrix, with a buffer whose name a file could want."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 24)
        self.layer.register_buffer("weight_scale", torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.layer(x.mean(1)).unsqueeze(1)
        scale: Tensor = self.layer.weight_scale  # type: ignore[assignment]
        return (self.layer(x) + mean) * scale


class NormedByHand(nn.Module):
    """A norm without affine parameters behind a weight of the module's own, and another bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.bias = nn.Parameter(torch.full((8,), 5.0))
        self.register_buffer("mean", torch.ones(8))
        self.register_buffer("variance", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        normed = nn.functional.batch_norm(
            nn.functional.conv2d(x, self.weight), self.mean, self.variance
        )
        return (normed + self.bias.view(1, -1, 1, 1)).relu()


HARD = {
    "pad by ones": lambda x: nn.functional.pad(x, (1, 1, 1, 1), value=1.0),
    "pool, rounded up": lambda x: nn.functional.avg_pool2d(x[:, :, :7, :7], 2, 2, ceil_mode=True),
}


@pytest.mark.parametrize("between", HARD)
def test_what_integers_would_get_wrong_stays_in_float(
    between: str, images: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Own(HARD[between]).eval()
    quantizer = of(model, images)
    formats = static(quantizer.layers)
    expected = simulated(quantizer, formats, images).numpy()
    spread = np.abs(expected).max()
    actual = run(quantizer.write(tmp_path / "q.onnx", formats), images)
    np.testing.assert_allclose(actual, expected, atol=0.02 * spread)
    with torch.no_grad():
        np.testing.assert_allclose(expected, model(images).numpy(), atol=0.05 * spread)


def test_a_layer_that_reads_rows_and_a_matrix_is_stored_for_both(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, rows = TwoWays().eval(), torch.randn(16, 5, 16)
    quantizer = of(model, rows)
    formats = static(["layer"])
    expected = simulated(quantizer, formats, rows).numpy()
    actual = run(quantizer.write(tmp_path / "q.onnx", formats), rows)
    np.testing.assert_allclose(actual, expected, atol=0.02 * np.abs(expected).max())
    with torch.no_grad():
        np.testing.assert_allclose(expected, model(rows).numpy(), atol=0.2)


def test_a_folded_norm_leaves_the_module_its_own_bias(images: Tensor) -> None:
    torch.manual_seed(0)
    model = NormedByHand().eval()
    quantizer = of(model, images)
    with torch.no_grad():
        torch.testing.assert_close(quantizer.graph.module(images), model(images))


def test_weights_that_are_buffers_are_written(images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    layer = model[1]
    for name in ("weight", "bias"):
        value = layer._parameters.pop(name)
        layer.register_buffer(name, value.detach())  # type: ignore[union-attr]
    quantizer = of(model, images)
    path = quantizer.write(tmp_path / "q.onnx", static(["1"]))
    expected = simulated(quantizer, static(["1"]), images).numpy()
    np.testing.assert_allclose(run(path, images), expected, atol=0.02 * np.abs(expected).max())


def test_a_weight_that_is_not_finite_is_named(residual: nn.Module, images: Tensor) -> None:
    bad = copy.deepcopy(residual)
    with torch.no_grad():
        bad.get_parameter("conv1.weight")[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"'conv1.weight' has values that are not finite"):
        PostTraining(bad, ModelInputs((images[:2],))).simulate({"conv1": WEIGHT_INT8})


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda: LayerFormat(activations=cast(Any, "statik")), "Did you mean 'static'"),
        (lambda: LayerFormat(cast(Any, "int8")), "is no Scheme"),
        (lambda: LayerFormat(Scheme(8, signed=True, symmetric=True, axis=1)), "axis=1"),
        (lambda: LayerFormat(WEIGHT.with_bits(16)), "16 bits"),
        (lambda: LayerFormat(WEIGHT.with_bits(4), "dynamic"), "need weights of 8 bits"),
    ],
)
def test_a_format_that_no_file_can_have_is_refused(
    form: Callable[[], LayerFormat], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        form()
