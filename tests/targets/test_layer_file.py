from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from torch import nn

from compressor.export.qdq import integer_kernels
from compressor.quantization.plan import find_format
from compressor.targets.layer_file import write_layer


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=(2, 1), bias=False), (2, 4, 9, 7)),
        (nn.Conv2d(4, 8, 3, groups=4, dilation=2), (1, 4, 9, 9)),
        (nn.Conv2d(4, 6, (4, 3), padding="same"), (1, 4, 9, 7)),
        (nn.Conv1d(4, 6, 3, padding=1), (1, 4, 9)),
        (nn.Conv3d(2, 3, 3), (1, 2, 4, 5, 6)),
        (nn.ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1, groups=2), (1, 4, 5, 5)),
        (nn.Linear(5, 3), (2, 5)),
        (nn.Linear(5, 3, bias=False), (2, 5)),
        (nn.Linear(5, 3), (2, 4, 5)),
        (nn.Linear(5, 3, bias=False), (2, 4, 5)),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_the_file_computes_the_layer_and_a_relu(
    layer: nn.Module, shape: tuple[int, ...], tmp_path: Path
) -> None:
    write_layer(layer, shape, tmp_path / "layer.onnx")
    session = ort.InferenceSession(str(tmp_path / "layer.onnx"))
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (result,) = session.run(None, {"input": sample.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), layer(sample).relu().detach())


@pytest.mark.parametrize(
    ("layer", "shape", "form", "kernel"),
    [
        (nn.Conv2d(4, 8, 3, padding=1), (2, 4, 9, 9), "static_int8", "QLinearConv"),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), (1, 4, 9, 9), "static_int8", "QLinearConv"),
        (nn.Linear(5, 3), (2, 5), "static_int8", "QGemm"),
        (nn.Linear(5, 3), (2, 4, 5), "static_int8", "MatMulIntegerToFloat"),
        (nn.Linear(5, 3, bias=False), (2, 4, 5), "static_int8", "MatMulIntegerToFloat"),
        (nn.Linear(5, 3), (2, 5), "dynamic_int8", "DynamicQuantizeMatMul"),
        (nn.Linear(5, 3), (2, 4, 5), "dynamic_int8", "DynamicQuantizeMatMul"),
        (nn.Linear(64, 3), (2, 4, 64), "weight_int8", "MatMulNBits"),
        (nn.Linear(64, 3, bias=False), (2, 64), "weight_int4", "MatMulNBits"),
        (nn.Linear(40, 3), (2, 4, 40), "weight_int4", "MatMulNBits"),
    ],
    ids=repr,
)
def test_quantized_it_is_one_kernel_that_computes_nearly_the_same(
    layer: nn.Module, shape: tuple[int, ...], form: str, kernel: str, tmp_path: Path
) -> None:
    path = tmp_path / "layer.onnx"
    write_layer(layer, shape, path, form=find_format(form))
    assert integer_kernels(path)[kernel] == 1
    sample = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    (result,) = ort.InferenceSession(str(path)).run(None, {"input": sample.numpy()})
    expected = layer(sample).relu().detach()
    if kernel == "QLinearConv":
        expected = expected.clamp(max=1)
    atol = 0.08 if form == "weight_int4" else 0.02
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=0, atol=atol)
