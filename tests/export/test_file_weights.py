"""How weights of few bits are stored, and that the runtime has the fastest kernel for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from compressor.export.post_training import PostTraining
from compressor.export.qdq import integer_kernels
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.plan import (
    STATIC_INT8,
    WEIGHT_INT4,
    WEIGHT_INT8,
    LayerFormat,
)
from compressor.quantization.scheme import WEIGHT, Scheme
from tests.export.test_weight_only import run

STATIC_INT4 = LayerFormat(WEIGHT.with_bits(4))
INT4 = LayerFormat(WEIGHT.with_bits(4), "float")
UINT4_BLOCKS = LayerFormat(Scheme(4, axis=0, block=24), "float")

pytestmark = pytest.mark.slow


class Convolutions(nn.Module):
    """Equal channel counts, so their zero points are equal; and a name that ends like a type."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.gain_int4 = nn.Parameter(torch.rand(16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.stem(x).relu()) * self.gain_int4


class Repeated(nn.Module):
    """One linear layer that runs four times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + nn.functional.gelu(self.layer(x))
        return x


class ReadTwice(nn.Module):
    """A ReLU and the caller read one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.first(x)
        return z, self.second(z.relu())


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def of(model: type[nn.Module], x: Tensor) -> PostTraining:
    torch.manual_seed(0)
    inputs = ModelInputs((x,))
    return PostTraining(model().eval(), inputs.with_batch(2), [inputs])


@pytest.mark.parametrize(
    ("formats", "kernels"),
    [
        ({"stem": STATIC_INT8, "last": STATIC_INT4}, 2),
        ({"stem": STATIC_INT4, "last": STATIC_INT4}, 2),
        ({"stem": WEIGHT_INT8, "last": INT4}, 0),
        ({"stem": LayerFormat(Scheme(4, axis=0), "float"), "last": STATIC_INT4}, 1),
    ],
    ids=["8 and 4 static", "4 static", "8 and 4 weights", "affine"],
)
def test_convolutions_of_four_bits_run_the_kernels_of_eight_bits_or_of_float(
    formats: Mapping[str, LayerFormat], kernels: int, tmp_path: Path
) -> None:
    """Zero points that are equal are one constant: with 8 and 4 bits the runtime refused the file.

    It dequantized weights of four bits in every call: 2.7 times as slow.
    """
    images = numbers(8, 3, 8, 8)
    quantizer = of(Convolutions, images)
    path = quantizer.write(tmp_path / "q.onnx", formats)
    found = integer_kernels(path)
    assert found["QLinearConv"] == kernels
    assert found["Conv"] == 2 - kernels
    assert found["DequantizeLinear"] <= 1, "of what the last convolution writes"
    with torch.no_grad():
        expected = quantizer.simulate(formats)(images).numpy()
    # a tie of a rounding may go the other way: one step of 255
    np.testing.assert_allclose(run(path, images), expected, atol=0.01 * np.abs(expected).max())
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    kinds = [tensor.data_type for tensor in stored.values() if len(tensor.dims) == 4]
    few = sum(form.weight.bits == 4 for form in formats.values())
    assert sum(kind in {TensorProto.INT4, TensorProto.UINT4} for kind in kinds) == few
    assert stored["gain_int4"].data_type == TensorProto.FLOAT


@pytest.mark.parametrize("shape", [(4, 64), (4, 5, 64)], ids=["matrix", "rows"])
@pytest.mark.parametrize("form", [WEIGHT_INT8, WEIGHT_INT4, UINT4_BLOCKS], ids=["8", "4", "blocks"])
def test_a_layer_that_runs_several_times_is_as_fast_as_in_float(
    form: LayerFormat, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """The runtime has no kernel for them and dequantized in each call: 8 to 25 times as slow."""
    rows = numbers(*shape)
    quantizer = of(Repeated, rows)
    path = quantizer.write(tmp_path / "q.onnx", {"layer": form})
    float_path = quantizer.write(tmp_path / "float.onnx", {})
    assert integer_kernels(path) == integer_kernels(float_path)
    with torch.no_grad():
        expected = quantizer.simulate({"layer": form})(rows).numpy()
    np.testing.assert_allclose(run(path, rows), expected, atol=1e-4)
    assert path.stat().st_size < float_path.stat().st_size - 2.5 * 64 * 64


@pytest.mark.parametrize("form", [STATIC_INT8, WEIGHT_INT8, WEIGHT_INT4], ids=["static", "8", "4"])
def test_a_sum_that_a_relu_and_others_read_keeps_its_kernel(
    form: LayerFormat, tmp_path: Path
) -> None:
    rows = numbers(32, 64)
    quantizer = of(ReadTwice, rows)
    formats = dict.fromkeys(quantizer.layers, form)
    path = quantizer.write(tmp_path / "q.onnx", formats)
    kernels = integer_kernels(path)
    assert not kernels.keys() & {"Gemm", "MatMul", "DequantizeLinear"}
    with torch.no_grad():
        expected = quantizer.simulate(formats)(rows)[0].numpy()
    np.testing.assert_allclose(run(path, rows), expected, atol=1e-4)


@pytest.mark.parametrize("form", [WEIGHT_INT8, WEIGHT_INT4], ids=["8", "4"])
def test_a_row_of_zeros_gives_its_bias(form: LayerFormat, tmp_path: Path) -> None:
    """With a scale of 1 the kernel wrote noise of 0.03: it subtracts sums of large floats."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 32)).eval()
    with torch.no_grad():
        model[0].weight[3] = 0
    rows = 10 * numbers(16, 512)
    quantizer = PostTraining(model, ModelInputs((rows,)))
    path = quantizer.write(tmp_path / "q.onnx", {"0": form})
    bias = model[0].bias[3].item()
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"input": rows.numpy()})[0]
    np.testing.assert_allclose(outputs[:, 3], bias, rtol=1e-6)
