"""Layers with weights of few bits and activations in float: which kernels the runtime has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.export.post_training import PostTraining
from compressor.export.qdq import integer_kernels
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.plan import STATIC_INT8, WEIGHT_INT8, LayerFormat, find_format
from compressor.quantization.scheme import Scheme

pytestmark = pytest.mark.slow


def run(path: Path, sample: Tensor) -> NDArray[np.float32]:
    options = ort.SessionOptions()
    # or else activations that meet weights of few bits are rounded to eight
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"input": sample.numpy()})[0]
    return result


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, groups=32, bias=False),
        nn.Conv2d(32, 64, 3),
    ).eval()


@pytest.mark.parametrize(
    "form",
    [WEIGHT_INT8, LayerFormat(Scheme(8, signed=False, axis=0), "float")],
    ids=["symmetric", "affine"],
)
def test_convolutions_run_the_kernels_of_float_in_a_quarter_of_the_bytes(
    form: LayerFormat, tmp_path: Path
) -> None:
    """With a DequantizeLinear in each call they took half as long again as in float."""
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    quantizer = PostTraining(convolutions(), ModelInputs((images[:2],)))
    formats = dict.fromkeys(quantizer.layers, form)
    path = quantizer.write(tmp_path / "int8.onnx", formats)
    float_path = quantizer.write(tmp_path / "float.onnx", {})
    assert integer_kernels(path) == integer_kernels(float_path)
    with torch.no_grad():
        expected = quantizer.simulate(formats)(images).numpy()
    np.testing.assert_allclose(run(path, images), expected, atol=1e-5)
    count = sum(quantizer.graph.tensor(f"{name}.weight").numel() for name in formats)
    assert float_path.stat().st_size - path.stat().st_size > 2.5 * count


def test_a_convolution_of_integers_keeps_its_integer_weight(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = ModelInputs((images,))
    quantizer = PostTraining(convolutions(), inputs, [inputs])
    path = quantizer.write(tmp_path / "q.onnx", {"0": WEIGHT_INT8, "3": STATIC_INT8})
    kernels = integer_kernels(path)
    assert kernels["QLinearConv"] + kernels["Conv"] + kernels["FusedConv"] == 3
    assert kernels["QLinearConv"] == 1


@pytest.mark.parametrize("name", ["weight_int8", "weight_int4"])
@pytest.mark.parametrize("shape", [(4, 64), (4, 5, 64)], ids=["matrix", "rows"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear_layers_before_a_relu_have_the_kernel_of_few_bits(
    name: str, shape: tuple[int, ...], bias: bool, tmp_path: Path
) -> None:
    """ONNX Runtime dequantized their weights in every call: 15 times as slow."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 64, bias=bias),
        nn.ReLU(),
        nn.Linear(64, 64, bias=bias),
        nn.ReLU6(),
        nn.Linear(64, 8, bias=bias),
    ).eval()
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantizer = PostTraining(model, ModelInputs((rows[:2],)))
    formats = dict.fromkeys(quantizer.layers, find_format(name))
    path = quantizer.write(tmp_path / "q.onnx", formats)
    kernels = integer_kernels(path)
    assert kernels["MatMulNBits"] == 3
    assert not kernels["DequantizeLinear"]
    with torch.no_grad():
        expected = quantizer.simulate(formats)(rows).numpy()
    np.testing.assert_allclose(run(path, rows), expected, atol=1e-5)
