from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from compressor.errors import ExportError
from compressor.export.onnx import export_onnx, read_signature, save_onnx
from compressor.export.post_training import PostTraining
from compressor.export.qdq import integer_kernels
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.plan import STATIC_INT8
from compressor.testing.models import (
    DictModel,
    TiedModel,
    TinyMLP,
    TinyResNet,
    TinyTransformer,
)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def run(path: Path, inputs: ModelInputs) -> Any:
    """The file called like the model."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    signature = read_signature(path)
    names = [value.name for value in session.get_inputs()]
    arrays = [tensor.numpy() for tensor in signature.flatten(inputs)]
    outputs = session.run(None, dict(zip(names, arrays, strict=True)))
    return signature.unflatten([torch.from_numpy(output) for output in outputs])


def largest_difference(actual: Any, expected: Any) -> float:
    leaves, spec = pytree.tree_flatten(actual)
    others, other_spec = pytree.tree_flatten(expected)
    assert spec == other_spec
    pairs = zip(leaves, others, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs if isinstance(a, Tensor))


def images(count: int, channels: int = 1) -> Tensor:
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(count))


def tokens(count: int) -> Tensor:
    return torch.randint(32, (count, 16), generator=torch.Generator().manual_seed(count))


def dictionary(count: int) -> ModelInputs:
    return ModelInputs(({"image": images(count), "scale": torch.ones(count)},))


CASES = {
    "resnet": (TinyResNet, lambda n: ModelInputs((images(n),))),
    "mlp": (TinyMLP, lambda n: ModelInputs((images(n),))),
    "transformer": (TinyTransformer, lambda n: ModelInputs((tokens(n),))),
    "dict": (DictModel, dictionary),
    "tied": (TiedModel, lambda n: ModelInputs((tokens(n),))),
}


@pytest.mark.parametrize("case", CASES)
def test_the_files_agree_with_the_model_at_any_batch_size(case: str, tmp_path: Path) -> None:
    make, inputs = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    path = export_onnx(model, inputs(1), tmp_path / "float.onnx")
    onnx.checker.check_model(onnx.load(path), full_check=True)
    for count in (1, 5):
        expected = inputs(count).call(model)
        assert largest_difference(run(path, inputs(count)), expected) < 1e-5

    quantizer = PostTraining(model, inputs(1), [inputs(32)])
    layers = quantizer.layers
    modules = dict(model.named_modules())
    assert set(layers) == {
        name for name, m in modules.items() if isinstance(m, (nn.Linear, nn.Conv2d))
    }
    quantized = quantizer.write(tmp_path / "int8.onnx", dict.fromkeys(layers, STATIC_INT8))
    onnx.checker.check_model(onnx.load(quantized), full_check=True)
    kernels = integer_kernels(quantized)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in modules.values())
    products = kernels["QGemm"] + kernels["MatMulIntegerToFloat"] + kernels["QLinearMatMul"]
    assert kernels["QLinearConv"] == convolutions
    assert products == len(layers) - convolutions
    assert kernels["Conv"] == kernels["Gemm"] == 0
    for count in (1, 5):
        expected = inputs(count).call(model)
        spread = max(float(t.abs().max()) for t in pytree.tree_leaves(expected))
        assert 0 < largest_difference(run(quantized, inputs(count)), expected) < 0.1 * spread


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyResNet, Path]:
    torch.manual_seed(0)
    model = TinyResNet()
    model.bn1.eval()
    path = export_onnx(model, ModelInputs((images(2),)), tmp_path_factory.mktemp("onnx") / "m.onnx")
    return model, path


def test_the_model_has_its_modes_back(resnet: tuple[TinyResNet, Path]) -> None:
    model, _ = resnet
    assert [name for name, m in model.named_modules() if not m.training] == ["bn1"]


def test_names_are_plain_and_weights_are_inside(resnet: tuple[TinyResNet, Path]) -> None:
    proto = onnx.load(resnet[1], load_external_data=False)
    assert [value.name for value in proto.graph.input] == ["input"]
    assert [value.name for value in proto.graph.output] == ["output"]
    assert "layer1.0.conv1.weight" in {tensor.name for tensor in proto.graph.initializer}
    assert not any(tensor.external_data for tensor in proto.graph.initializer)
    assert [file.name for file in resnet[1].parent.iterdir()] == ["m.onnx"]


def test_batch_norms_are_folded_and_the_mean_is_a_pool(resnet: tuple[TinyResNet, Path]) -> None:
    kinds = {node.op_type for node in onnx.load(resnet[1]).graph.node}
    assert "BatchNormalization" not in kinds
    assert "ReduceMean" not in kinds
    assert "GlobalAveragePool" in kinds


def test_no_path_of_the_machine_is_in_the_file(resnet: tuple[TinyResNet, Path]) -> None:
    assert b".py" not in resnet[1].read_bytes()


def test_the_same_model_gives_the_same_bytes(
    resnet: tuple[TinyResNet, Path], tmp_path: Path
) -> None:
    again = export_onnx(resnet[0], ModelInputs((images(2),)), tmp_path / "again.onnx")
    assert again.read_bytes() == resnet[1].read_bytes()


def test_half_precision_halves_the_file_and_keeps_float_inputs(
    resnet: tuple[TinyResNet, Path], tmp_path: Path
) -> None:
    model, path = resnet
    inputs = ModelInputs((images(3),))
    half = export_onnx(model, inputs, tmp_path / "half.onnx", precision="fp16")
    onnx.checker.check_model(onnx.load(half), full_check=True)
    assert half.stat().st_size < 0.6 * path.stat().st_size
    difference = largest_difference(run(half, inputs), run(path, inputs))
    assert 0 < difference < 0.02


class Mixed(nn.Module):
    """What sits between the convolutions of MobileNets, DenseNets and EfficientNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze = nn.Conv2d(16, 16, 1)
        self.project = nn.Conv2d(32, 16, 1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.last = nn.Conv2d(16, 16, 1)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.depthwise(F.hardswish(self.stem(x))))
        x = self.project(torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1))
        x = x * F.hardsigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = F.silu(self.last(F.relu(self.up(x))))
        return self.mlp(x.flatten(2).transpose(1, 2)).mean(1)


def test_every_kind_of_layer_is_quantized_among_nodes_that_are_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Mixed().eval(), ModelInputs((torch.randn(8, 3, 8, 8),))
    path = export_onnx(model, inputs, tmp_path / "float.onnx")
    quantizer = PostTraining(model, inputs, [inputs])
    layers = quantizer.layers
    assert len(layers) == 7
    quantized = quantizer.write(tmp_path / "int8.onnx", dict.fromkeys(layers, STATIC_INT8))
    kernels = integer_kernels(quantized)
    assert kernels["QLinearConv"] == 5
    assert kernels["MatMulIntegerToFloat"] == 2
    assert kernels["QLinearConcat"] == 1
    assert kernels["QLinearSigmoid"] == kernels["QLinearMul"] == 1, "of the SiLU"
    assert kernels["QLinearGlobalAveragePool"] == 1
    assert kernels["ConvTranspose"] == 1, "it has no integer kernel"
    expected, actual = run(path, inputs), run(quantized, inputs)
    assert largest_difference(actual, expected) < 0.05 * float(expected.abs().max())


class Twice(nn.Module):
    """One layer called twice; an output twice, an input as an output, and what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, flag: bool = False, *, relu: Tensor) -> Any:
        y = torch.relu(self.layer(torch.relu(self.layer(x))) + relu)
        return {"y": y, "same": y, "x": x, "none": None, "count": 3 if flag else 4}


def test_any_structure_of_inputs_and_outputs(tmp_path: Path) -> None:
    model = Twice()
    inputs = ModelInputs((torch.randn(2, 4), True), {"relu": torch.randn(2, 4)})
    path = export_onnx(model, inputs, tmp_path / "m.onnx")
    more = inputs.with_batch(5)
    assert largest_difference(run(path, more), more.call(model)) < 1e-6
    assert run(path, more)["count"] == 3
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [value.name for value in proto.graph.input] == ["x", "relu"]


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), Branch())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_model_that_cannot_be_traced_is_an_error_that_names_the_module(tmp_path: Path) -> None:
    model = Fixed()
    with pytest.raises(ExportError, match=r"module 'inner.1' \(Branch\)"):
        export_onnx(model, ModelInputs((torch.ones(2, 4),)), tmp_path / "m.onnx")
    assert model.training
    assert not list(tmp_path.iterdir())


def test_nothing_is_said_on_the_way(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    export_onnx(TinyMLP(), ModelInputs((images(2),)), tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_file_of_another_program_says_so(tmp_path: Path) -> None:
    graph = onnx.helper.make_graph([], "empty", [], [])
    path = save_onnx(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="does not say how it is called"):
        read_signature(path)


class Singular(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


def test_an_operation_without_a_translation_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"operation that ONNX does not: .*linalg_svd"):
        export_onnx(Singular(), ModelInputs((torch.ones(2, 4, 4),)), tmp_path / "m.onnx")


class Boxes(nn.Module):
    """Sizes: of the batch, twice that, and of what was found."""

    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x + table, torch.cat([x, -x]), x.nonzero()


def test_the_batch_is_called_batch_in_both_files(tmp_path: Path) -> None:
    """It was called s87."""
    inputs = ModelInputs((torch.randn(8, 64),))
    model = TinyMLP(64, 16).eval()
    quantizer = PostTraining(model, inputs, [inputs])
    wanted = dict.fromkeys(quantizer.layers, STATIC_INT8)
    for path in (
        export_onnx(model, inputs, tmp_path / "float.onnx"),
        quantizer.write(tmp_path / "int8.onnx", wanted),
    ):
        graph = onnx.load(path).graph
        shapes = [value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)]
        assert [shape[0].dim_param for shape in shapes] == ["batch", "batch"]
        assert [shape[1].dim_value for shape in shapes] == [64, 10]


def test_other_open_sizes_keep_their_own_names(tmp_path: Path) -> None:
    inputs = ModelInputs((torch.randn(3, 4), torch.randn(4)))
    path = export_onnx(Boxes(), inputs, tmp_path / "m.onnx")
    graph = onnx.load(path).graph
    first = [value.type.tensor_type.shape.dim[0] for value in (*graph.input, *graph.output)]
    assert [dim.dim_param for dim in first[:-1]] == ["batch", "", "batch", "2*batch"]
    assert first[-1].dim_param not in ("", "batch")
    more = inputs.with_batch(5)
    assert all(a.equal(b) for a, b in zip(run(path, more), more.call(Boxes()), strict=True))
