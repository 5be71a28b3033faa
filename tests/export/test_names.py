"""What is in a file has the names of the model; models may have any name that is ours."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.export.names import name_plainly
from compressor.export.onnx import export_onnx
from compressor.export.post_training import PostTraining
from compressor.export.quantize import quantize
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.plan import STATIC_INT8
from compressor.testing.models import TinyResNet

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


OF_THE_EXPORTER = re.compile(r"node_|val_\d|constants\.|quantizers|round_trip|getitem|operations")


def names_in(path: Path) -> list[str]:
    graph = onnx.load(path).graph
    names = [tensor.name for tensor in graph.initializer]
    for node in graph.node:
        names += [node.name, *node.output]
    return names


@pytest.fixture(scope="module")
def resnet_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """In float, with its norms as the exporter fuses them, and in int8."""
    folder = tmp_path_factory.mktemp("named")
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyResNet().eval()
    plain = export_onnx(model, ModelInputs((images,)), folder / "float.onnx")
    quantized = quantize(model, [images], format="static_int8", corrections=[])
    return plain, quantized.save_onnx(folder / "int8.onnx")


@pytest.mark.slow
def test_nodes_are_called_by_their_modules_and_operations(resnet_files: tuple[Path, Path]) -> None:
    for path in resnet_files:
        names = names_in(path)
        assert not [name for name in names if OF_THE_EXPORTER.search(name)]
        assert "layer1.0/Add" in names
        convolutions = [
            node.name.rpartition("/")[0]
            for node in onnx.load(path).graph.node
            if node.op_type == "Conv"
        ]
        paths = [n for n, m in TinyResNet().named_modules() if isinstance(m, nn.Conv2d)]
        assert sorted(convolutions) == sorted(paths)


@pytest.mark.slow
def test_quantizers_are_called_by_what_they_quantize(resnet_files: tuple[Path, Path]) -> None:
    graph = onnx.load(resnet_files[1]).graph
    nodes = {node.name: node for node in graph.node}
    conv = nodes["layer2.0.conv1/Conv"]
    (weight,) = [node for node in graph.node if conv.input[1] in node.output]
    assert weight.name == "layer2.0.conv1/DequantizeLinear_weight"
    assert weight.input[0] == "layer2.0.conv1.weight_int8"
    assert weight.input[1] == "layer2.0.conv1.weight_scale"
    first = nodes["input/QuantizeLinear"]
    assert list(first.input) == ["input", "input.output_scale", "input.output_zero_point"]


@pytest.mark.slow
def test_names_are_distinct_and_every_value_is_still_written(
    resnet_files: tuple[Path, Path],
) -> None:
    for path in resnet_files:
        graph = onnx.load(path).graph
        names = [node.name for node in graph.node]
        assert len(names) == len(set(names))
        known = {value.name for value in graph.input} | {t.name for t in graph.initializer}
        for node in graph.node:
            assert known.issuperset(filter(None, node.input))
            assert known.isdisjoint(node.output)
            known.update(node.output)
        assert known.issuperset(value.name for value in graph.output)


def test_what_a_branch_reads_keeps_its_name() -> None:
    def branch(name: str, other: str) -> onnx.GraphProto:
        node = helper.make_node("Add", ["val_7", other], [f"{name}_out"])
        out = helper.make_tensor_value_info(f"{name}_out", 1, [2])
        return helper.make_graph([node], name, [], [out])

    nodes = [
        helper.make_node("Relu", ["input"], ["val_7"], name="a/node_relu"),
        helper.make_node("Neg", ["val_7"], ["val_8"], name="a/node_neg"),
        helper.make_node(
            "If",
            ["flag"],
            ["val_9"],
            name="node_if",
            then_branch=branch("then", "val_7"),
            else_branch=branch("else", "input"),
        ),
        helper.make_node("Add", ["val_8", "val_9"], ["output"], name="node_add"),
    ]
    values = [helper.make_tensor_value_info(name, 1, [2]) for name in ("input", "output")]
    flag = helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])
    graph = helper.make_graph(nodes, "whole", [values[0], flag], values[1:])
    proto = helper.make_model(graph)
    name_plainly(proto)
    onnx.checker.check_model(proto, full_check=True)
    assert [node.name for node in proto.graph.node] == ["a/Relu", "a/Neg", "If", "Add"]
    assert [node.output[0] for node in proto.graph.node] == [
        "val_7",
        "a/Neg_output",
        "If_output",
        "output",
    ]
