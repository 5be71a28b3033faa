from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ExportError
from compressor.export.lstm_ops import lstm_layers
from compressor.export.onnx import export_onnx
from compressor.interfaces.inputs import ModelInputs

BOTH_WAYS: list[dict[str, Any]] = [
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "bias": False},
    {"num_layers": 2, "bidirectional": True, "proj_size": 3},
    {"proj_size": 3, "bias": False},
]
LENGTH = 4
# torch's own word on projections in every run of the model
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


class States(nn.Module):
    """All that an LSTM returns, samples first."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, (hidden, cell) = self.lstm(x)
        return y, hidden.transpose(0, 1), cell.transpose(0, 1)


def sequences(count: int) -> Tensor:
    return torch.randn(count, LENGTH, 8, generator=torch.Generator().manual_seed(count))


def written(options: dict[str, Any], folder: Path) -> tuple[list[Any], tuple[Tensor, ...]]:
    """What the float file and the model compute, of another batch than it was written with."""
    torch.manual_seed(0)
    model = States(**options).eval()
    path = export_onnx(model, ModelInputs((sequences(2),)), folder / "f.onnx")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": sequences(3).numpy()}), model(sequences(3))


@pytest.mark.parametrize("options", BOTH_WAYS, ids=str)
def test_layer_by_layer_an_lstm_is_what_it_is(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(8, 6, batch_first=True, **options)
    x, directions = sequences(3), 2 if lstm.bidirectional else 1
    begin = [
        torch.randn(lstm.num_layers * directions, 3, size) for size in (lstm.proj_size or 6, 6)
    ]
    with torch.no_grad():
        y, states = lstm(x, tuple(begin))
        found = lstm_layers(
            *(x, begin, list(lstm.parameters()), lstm.bias, lstm.num_layers, 0.0, False),
            is_bidirectional=lstm.bidirectional,
            is_batch_first=True,
        )
    for value, expected in zip(found, (y, *states), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_the_float_file_of_an_lstm_computes_what_torch_computes(tmp_path: Path) -> None:
    # of torch 2.11's exporter the states have four dimensions, and ONNX Runtime refuses the file
    for actual, expected in zip(*written(BOTH_WAYS[0], tmp_path), strict=True):
        np.testing.assert_allclose(actual, expected.detach().numpy(), atol=1e-6)


@pytest.mark.slow
def test_an_lstm_with_a_projection_is_written_as_its_steps(tmp_path: Path) -> None:
    # torch's exporter writes an LSTM without the projection, which no runtime can run
    for actual, expected in zip(*written(BOTH_WAYS[3], tmp_path), strict=True):
        np.testing.assert_allclose(actual, expected.detach().numpy(), atol=1e-6)


@pytest.mark.slow
def test_an_lstm_with_a_projection_of_any_length_is_refused(tmp_path: Path) -> None:
    model = nn.LSTM(8, 6, proj_size=3).eval()
    with pytest.raises(ExportError, match="batch"):
        export_onnx(model, ModelInputs((torch.randn(4, 2, 8),)), tmp_path / "f.onnx")
