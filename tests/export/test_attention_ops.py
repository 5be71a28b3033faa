"""Attention on three and five dimensions in the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.export.onnx import export_onnx
from compressor.interfaces.inputs import ModelInputs
from compressor.targets import OnnxRuntimeModel

pytestmark = pytest.mark.slow


class Attend(nn.Module):
    """Attention of the input with itself, on `shape` behind the batch."""

    def __init__(self, shape: tuple[int, ...], mask: Tensor | None) -> None:
        super().__init__()
        self.shape, self.mask = shape, mask
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, self.shape)
        mask = self.mask
        return F.scaled_dot_product_attention(x @ self.weight, x, x, attn_mask=mask).flatten(1)


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("shape", [(6, 8), (2, 6, 8), (3, 2, 6, 8)])
def test_attention_on_any_dimensions_is_exported(
    shape: tuple[int, ...], has_mask: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Attend(shape, torch.randn(6, 6) if has_mask else None).eval()
    size = int(torch.tensor(shape).prod())
    path = export_onnx(model, ModelInputs((torch.randn(2, size),)), tmp_path / "m.onnx")
    runtime = OnnxRuntimeModel(path)
    for batch in (1, 5):
        x = torch.randn(batch, size)
        with torch.no_grad():
            torch.testing.assert_close(runtime(x), model(x))
