from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.export.qdq import integer_kernels
from compressor.export.quantize import quantize
from compressor.quantization.plan import LayerFormat
from compressor.quantization.scheme import WEIGHT

KINDS: list[dict[str, Any]] = [
    {"batch_first": True},
    {"batch_first": False, "bias": False},
    {"batch_first": True, "num_layers": 2, "bidirectional": True},
]
LENGTH, WIDE, SIZE = 7, 12, 16


class Sequences(nn.Module):
    """All that an LSTM on (N, LENGTH, 8) returns, and classes from its last output."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(8, WIDE)
        self.lstm = nn.LSTM(WIDE, SIZE, **options)
        self.head = nn.LazyLinear(3)
        self(torch.zeros(1, LENGTH, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.first(x)
        if self.lstm.batch_first:
            y, (hidden, cell) = self.lstm(x)
        else:
            y, (hidden, cell) = self.lstm(x.transpose(0, 1))
            y = y.transpose(0, 1)
        return self.head(y[:, -1]), y, hidden.transpose(0, 1), cell.transpose(0, 1)


class Gated(nn.Module):
    """A layer of each recurrent kind that has no integers, and one that is linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.projected = nn.LSTM(8, 8, proj_size=4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.projected(self.gru(self.table(x))[0])[0][:, -1])


class Starting(nn.Module):
    """The hidden state begins with what a layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.Linear(8, SIZE)
        self.lstm = nn.LSTM(8, SIZE, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        state = self.begin(x[:, 0]).unsqueeze(0)
        return self.lstm(x, (state, state.tanh()))[0]


def sequences(count: int) -> Tensor:
    return torch.randn(count, LENGTH, 8, generator=torch.Generator().manual_seed(count))


def run(path: Path, x: Tensor) -> list[NDArray[np.float32]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # with several, each has its own part of the batch
    # products of few-bit weights round what they read to eight bits if they may
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    result: list[NDArray[np.float32]] = session.run(None, {"input": x.numpy()})
    return result


def stored(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "format"),
    [
        *((options, "dynamic_int8") for options in KINDS),
        (KINDS[2], "weight_int8"),
        (KINDS[0], "weight_fp16"),
    ],
    ids=str,
)
def test_the_file_of_an_lstm_computes_what_the_simulation_computes(
    options: dict[str, Any], format: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Sequences(**options).eval()
    quantized = quantize(model, [sequences(4)], format=format)
    assert "lstm" in quantized.plan.formats
    assert not quantized.skipped
    path = quantized.save_onnx(tmp_path / "q.onnx")
    matrices = (t for name, t in stored(path).items() if "lstm" in name and len(t.dims) > 1)
    kind = "FLOAT16" if format == "weight_fp16" else "INT8"
    assert onnx.TensorProto.DataType.Value(kind) in {tensor.data_type for tensor in matrices}
    for count in (1, 3):
        x = sequences(count)
        with torch.no_grad():
            simulated, plain = quantized.module(x), model(x)
        for actual, expected, floats in zip(run(path, x), simulated, plain, strict=True):
            # sums in another order; a tie of a rounded state would be 1e-3, and there is none
            np.testing.assert_allclose(actual, expected.numpy(), atol=1e-6)
            assert 1e-6 < (expected - floats).abs().max() < 0.02


@pytest.mark.slow
def test_an_lstm_in_dynamic_int8_is_one_kernel_for_each_layer_with_weights_of_int8(
    tmp_path: Path,
) -> None:
    model = Sequences(**KINDS[2]).eval()
    path = quantize(model, [sequences(4)], format="dynamic_int8").save_onnx(tmp_path / "q.onnx")
    kernels = integer_kernels(path)
    assert kernels["DynamicQuantizeLSTM"] == 2
    assert kernels["LSTM"] == 0
    weights = {n: t for n, t in stored(path).items() if t.data_type == onnx.TensorProto.INT8}
    # (directions, in, 4 * hidden), of the first layer and of the one that reads both directions
    assert sorted(list(t.dims) for n, t in weights.items() if "lstm" in n and len(t.dims) == 3) == [
        [2, WIDE, 4 * SIZE],
        [2, SIZE, 4 * SIZE],
        [2, SIZE, 4 * SIZE],
        [2, 2 * SIZE, 4 * SIZE],
    ]


@pytest.mark.slow
def test_a_state_that_is_given_to_an_lstm_is_read_at_the_first_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Starting().eval()
    quantized = quantize(model, [sequences(4)], format="dynamic_int8")
    path = quantized.save_onnx(tmp_path / "q.onnx")
    x = sequences(3)
    np.testing.assert_allclose(run(path, x)[0], quantized.module(x).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("static_int8", "no LSTM of integers whose ranges are fixed"),
        ("weight_int4", "stored in 8 bits"),
        (LayerFormat(WEIGHT.with_bits(4), "float"), "stored in 8 bits"),
    ],
)
def test_an_lstm_stays_in_float_where_a_format_is_not_for_it(
    format: str | LayerFormat, message: str
) -> None:
    quantized = quantize(Sequences(batch_first=True).eval(), [sequences(4)], format=format)
    assert list(quantized.plan.formats) == ["first", "head"]
    assert message in quantized.skipped["lstm"]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_what_is_not_quantized_says_why() -> None:
    tokens = torch.arange(8).view(2, 4)
    skipped = quantize(Gated().eval(), [tokens], format="dynamic_int8").skipped
    assert "table" not in skipped
    assert "no GRU of integers" in skipped["gru"]
    assert "proj_size=4" in skipped["projected"]
