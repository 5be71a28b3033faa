"""Models whose modules have the names that this package gives to what it adds to a graph."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.export.post_training import PostTraining
from compressor.export.quantize import quantize
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.plan import STATIC_INT8

ROWS = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x)


class Alike(nn.Module):
    """The paths "a.b.weight" and "a_b.weight"."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_b = Inner(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a_b(self.a(x).relu())


class Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(8, 8))
        self.last = nn.Linear(8, 4)
        self._name = name

    def forward(self, type: Tensor) -> Tensor:  # a name that no child of a module may have
        return self.last(self.get_submodule(self._name)(type).relu())


def run(path: Path, rows: Tensor) -> Tensor:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: rows.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize("format", ["static_int8", "dynamic_int8", "weight_fp16"])
def test_paths_that_differ_in_a_dot_are_two_weights(format: str, tmp_path: Path) -> None:
    """The file had the second weight in both places."""
    torch.manual_seed(0)
    quantized = quantize(Alike().eval(), [ROWS], format=format, corrections=[])
    with torch.no_grad():
        expected = quantized.module(ROWS)
    torch.testing.assert_close(run(quantized.save_onnx(tmp_path / "q.onnx"), ROWS), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["quantizers", "operations", "constants", "rounded", "door", "taps", "smoothing"]
)
def test_a_module_may_have_any_name_of_ours(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    corrections = ["smoothing", "gptq", "bias"]
    quantized = quantize(Named(name).eval(), [ROWS], corrections=corrections)
    with torch.no_grad():
        expected = quantized.module(ROWS)
        assert torch.equal(quantized.module.frozen()(ROWS), expected)
    torch.testing.assert_close(run(quantized.save_onnx(tmp_path / "q.onnx"), ROWS), expected)
    assert list(quantized.plan.weights) == [f"{name}.weight", "last.weight"]


@pytest.mark.parametrize("name", ["graph", "code", "meta"])
def test_a_name_that_graphs_of_torch_have_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"'{name}.weight'.*another name"):
        PostTraining(Named(name).eval(), ModelInputs((ROWS,)))


@pytest.mark.slow
def test_nodes_of_the_file_have_the_names_of_modules_called_like_ours(tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized = quantize(Named("operations").eval(), [ROWS], format={"last": STATIC_INT8})
    assert quantized.float_operations()["Gemm"] == ("operations",)
