"""A CIFAR ResNet in int8: its strided and padded shortcuts among integers."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest
import torch

from compressor.export.post_training import PostTraining
from compressor.export.qdq import integer_kernels
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.plan import STATIC_INT8
from compressor.testing.models import CifarResNet

pytestmark = pytest.mark.slow


def test_resnet20_in_int8_is_fused_and_computes_what_was_simulated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CifarResNet(20)
    images = torch.randn(64, 3, 32, 32)
    with torch.no_grad():
        model.train()(images)  # batch norms of no statistics would hide a wrong fold
    model.eval()
    batches = [ModelInputs((part,)) for part in images.split(16)]
    quantizer = PostTraining(model, ModelInputs((images[:2],)), batches)
    formats = dict.fromkeys(quantizer.layers, STATIC_INT8)
    path = quantizer.write(tmp_path / "int8.onnx", formats)

    kernels = integer_kernels(path)
    assert kernels["QLinearConv"] == 19
    assert kernels["QLinearAdd"] == 9
    assert kernels["QGemm"] == 1
    assert kernels["DequantizeLinear"] == 0
    assert not kernels.keys() & {"Conv", "FusedConv", "Add", "Relu", "BatchNormalization"}

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    in_file = torch.from_numpy(session.run(None, {"input": images.numpy()})[0])
    with torch.no_grad():
        simulated, expected = quantizer.simulate(formats)(images), model(images)
    # a rounding that falls to the other side spreads through twenty layers
    assert (in_file - simulated).norm() < 0.03 * simulated.norm()
    assert (simulated - expected).norm() < 0.15 * expected.norm()
