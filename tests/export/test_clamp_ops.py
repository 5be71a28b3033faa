from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from compressor.export.onnx import export_onnx
from compressor.export.qdq import integer_kernels
from compressor.export.quantize import quantize
from compressor.interfaces.inputs import ModelInputs

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Clipped(nn.Module):
    def __init__(self, low: float | None, high: float | None) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.clamp(self.first(x), self.low, self.high))


@pytest.mark.slow
@pytest.mark.parametrize(("low", "high"), [(0, 0.5), (0.0, 1), (-1, 0.25), (0, 1)])
def test_the_limits_of_a_clamp_may_be_an_integer_and_a_float(
    low: float, high: float, tmp_path: Path
) -> None:
    # torch's exporter has an overload for two integers and one for two floats
    torch.manual_seed(0)
    model = Clipped(low, high).eval()
    path = export_onnx(model, ModelInputs((IMAGES,)), tmp_path / "f.onnx")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"input": IMAGES.numpy()})
    np.testing.assert_allclose(actual, model(IMAGES).detach().numpy(), atol=1e-6)


@pytest.mark.slow
def test_a_clamp_from_an_integer_zero_is_part_of_the_integer_product(tmp_path: Path) -> None:
    path = quantize(Clipped(0, 0.5).eval(), [IMAGES]).save_onnx(tmp_path / "q.onnx")
    kernels = integer_kernels(path)
    assert kernels["QLinearConv"] == 2
    assert kernels["Clip"] == 0
