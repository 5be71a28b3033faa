from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import compressor
from compressor.errors import ExportError
from compressor.export import qdq
from compressor.export.onnx import export_onnx
from compressor.export.quantize import Quantized
from compressor.export.runtime_graph import check_loads, float_operations
from compressor.interfaces.inputs import ModelInputs

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """Convolutions with an activation that has no integer kernel between them, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.norm(x + self.block(x))
        return self.head(torch.tanh(x).mean((2, 3)))


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture(scope="module")
def quantized(mixed: nn.Module) -> Quantized:
    return compressor.quantize(mixed, IMAGES.split(8))


def test_what_has_no_integer_kernel_is_reported_with_its_module(quantized: Quantized) -> None:
    found = quantized.float_operations()
    assert found.pop("Gelu") == ("block.1",)
    assert found.pop("Tanh") == ("",), "of the model itself"
    assert found.pop("InstanceNormalization") == ("norm",)
    assert found.pop("GlobalAveragePool") == ("",), "it reads floats"
    assert set(found) <= {"Mul", "Add"}, "scale and shift of the norm; convolutions are integers"
    assert {scope for scopes in found.values() for scope in scopes} == {"norm"}


def test_a_layer_left_in_float_is_reported_by_its_name(mixed: nn.Module) -> None:
    found = compressor.quantize(mixed, IMAGES.split(8), ignored=["block.2"]).float_operations()
    kinds = {kind for kind, scopes in found.items() if "block.2" in scopes}
    assert kinds & {"Conv", "FusedConv"}


def test_a_file_of_integer_kernels_alone_has_nothing_to_report() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4)
    assert compressor.quantize(nn.Sequential(*layers), IMAGES.split(8)).float_operations() == {}


class Recurrent(nn.Module):
    """Two layers of an LSTM, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(8, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.memory(x)
        return self.head(states[:, -1])


def test_a_recurrent_layer_is_reported_by_its_name_where_it_runs_in_float() -> None:
    torch.manual_seed(0)
    model, rows = Recurrent(), [torch.randn(4, 5, 8)]
    found = [
        compressor.quantize(model, rows, format=kind).float_operations()
        for kind in ("weight_int8", "dynamic_int8")
    ]
    assert found == [{"LSTM": ("memory",)}, {}], "of the second all kernels are of integers"


@pytest.mark.parametrize("kind", ["static_int8", "weight_int8"])
def test_what_the_runtime_writes_out_has_the_name_of_the_whole(kind: str) -> None:
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.Hardswish(), nn.Linear(16, 16), nn.Mish(), nn.Linear(16, 4)
    rows = [torch.randn(4, 5, 8)]
    found = compressor.quantize(nn.Sequential(*layers), rows, format=kind).float_operations()
    parts = {kind: found[kind] for kind in ("HardSigmoid", "Softplus", "Tanh", "Mul")}
    names = {"HardSigmoid": ("1",), "Softplus": ("3",), "Tanh": ("3",), "Mul": ("1", "3")}
    assert parts == names


@pytest.mark.parametrize("kind", ["dynamic_int8", "weight_int8"])
def test_products_of_few_bit_weights_are_not_reported(kind: str) -> None:
    torch.manual_seed(0)
    layers = nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)
    rows = [torch.randn(4, 5, 64)]
    found = compressor.quantize(nn.Sequential(*layers), rows, format=kind).float_operations()
    assert found == {"Tanh": ("1",)}


def test_nodes_of_a_float_file_have_the_names_of_their_modules(
    mixed: nn.Module, tmp_path: Path
) -> None:
    path = export_onnx(mixed, ModelInputs((IMAGES[:2],)), tmp_path / "float.onnx")
    names = {node.op_type: node.name for node in onnx.load(path).graph.node}
    assert names["Gelu"].startswith("block.1/")
    assert names["Gemm"].startswith("head/")
    assert "/" not in names["Tanh"]


def test_scopes_change_nothing_that_the_file_computes(
    quantized: Quantized, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_scopes = onnx.load(quantized.save_onnx(tmp_path / "with.onnx")).graph
    monkeypatch.setattr(qdq, "keep_scopes", lambda module: None)
    without = onnx.load(quantized.save_onnx(tmp_path / "without.onnx")).graph
    assert [node.op_type for node in with_scopes.node] == [node.op_type for node in without.node]
    assert wiring(with_scopes) == wiring(without)


def wiring(graph: onnx.GraphProto) -> list[list[object]]:
    """What each node reads: of which node, by its place, or which constant."""
    known: dict[str, object] = {value.name: value.name for value in graph.input}
    known |= {
        tensor.name: onnx.numpy_helper.to_array(tensor).tobytes() for tensor in graph.initializer
    }
    read = []
    for place, node in enumerate(graph.node):
        read.append([known[name] for name in node.input])
        known |= {name: (place, number) for number, name in enumerate(node.output)}
    return read


def bad_file() -> bytes:
    node = helper.make_node("Unheard", ["x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([node], "bad", [x], [y])
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def test_a_file_that_the_runtime_refuses_is_an_error_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="No Op registered for Unheard"):
        check_loads(bad_file())
    (tmp_path / "bad.onnx").write_bytes(bad_file())
    with pytest.raises(ExportError, match=f"ONNX Runtime {ort.__version__} refuses"):
        float_operations(tmp_path / "bad.onnx")


def test_of_a_file_that_the_runtime_refuses_nothing_is_left(
    quantized: Quantized, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def spoil(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].op_type = "Unheard"

    monkeypatch.setattr(qdq, "finish_nodes", spoil)
    path: Any = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match=r"Unheard.*`ignored`"):
        quantized.save_onnx(path)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"before")
    with pytest.raises(ExportError, match="Unheard"):
        quantized.save_onnx(path)
    assert path.read_bytes() == b"before"
