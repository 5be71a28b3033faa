"""Files that store and compute in bfloat16, judged by the ONNX checker and its reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from compressor.errors import ExportError
from compressor.export.onnx import export_onnx
from compressor.interfaces.inputs import ModelInputs
from compressor.testing.models import TinyResNet


class Wide(nn.Module):
    """It goes on in float32 by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x.float())
        return result


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = TinyResNet().train()
    for _ in range(3):  # norms that are worth folding
        model(torch.randn(16, 1, 8, 8))
    return model.eval()


@pytest.mark.slow
def test_the_file_is_valid_half_as_large_and_right_by_definition(
    resnet: nn.Module, tmp_path: Path
) -> None:
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = ModelInputs((images,))
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    path = export_onnx(resnet, inputs, tmp_path / "bf16.onnx", precision="bf16")
    assert all(torch.equal(tensor, before[name]) for name, tensor in resnet.state_dict().items())
    assert not resnet._forward_hooks
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    floats = {item.data_type for item in proto.graph.initializer if len(item.dims) > 1}
    assert floats == {TensorProto.BFLOAT16}
    assert [value.type.tensor_type.elem_type for value in proto.graph.input] == [TensorProto.FLOAT]
    float_path = export_onnx(resnet, inputs, tmp_path / "float.onnx")
    assert path.stat().st_size < 0.6 * float_path.stat().st_size
    (actual,) = ReferenceEvaluator(proto).run(None, {"input": images.numpy()})
    expected = resnet(images).detach().numpy()
    assert np.asarray(actual).dtype == np.float32
    error = np.abs(np.asarray(actual) - expected).max()
    # a dozen roundings of 2 ** -9 each
    assert 0 < error < 12 * 2**-9 * np.abs(expected).max()


@pytest.mark.slow
def test_onnx_runtime_has_no_kernels_for_it(resnet: nn.Module, tmp_path: Path) -> None:
    # when this fails it has, and what we say of it is to be changed
    inputs = ModelInputs((torch.zeros(2, 1, 8, 8),))
    path = export_onnx(resnet, inputs, tmp_path / "bf16.onnx", precision="bf16")
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_a_model_that_does_not_compute_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"does not compute in bfloat16.*Write precision='fp32'"):
        export_onnx(Wide(), ModelInputs((torch.zeros(2, 4),)), tmp_path / "x", precision="bf16")
    assert not list(tmp_path.iterdir())
