"""Weights in floats of 16 bits: the simulation, the plan, the file, and what passes them by."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import compressor
from compressor.errors import ConfigError, ModelError
from compressor.export.corrections import CORRECTIONS
from compressor.export.onnx import export_onnx
from compressor.export.post_training import PostTraining
from compressor.export.qdq import integer_kernels
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.affine import fake_quantize
from compressor.quantization.aware import QuantizationAwareTraining
from compressor.quantization.plan import (
    DYNAMIC_INT8,
    STATIC_INT8,
    WEIGHT_FP16,
    LayerFormat,
    QuantizationPlan,
    find_format,
)
from compressor.quantization.scheme import BFLOAT16, FLOAT16, Scheme, torch_dtype

HALVES = ("weight_fp16", "weight_bf16")
ONE, ZERO = torch.tensor(1.0), torch.tensor(0)
FloatArray = NDArray[np.float32]


class Mixed(nn.Module):
    """Convolutions with and without groups, rows and a matrix, ReLUs: all that has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.depth = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.rows = nn.Linear(32, 64)
        self.hidden = nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(self.stem(x).relu()).relu()
        x = self.rows(x.flatten(2).transpose(1, 2)).mean(1)
        return self.head(self.hidden(x).relu())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def casts_of_onnx(array: FloatArray, kind: int) -> FloatArray:
    """To `kind` and back, as `onnx.reference` runs it."""
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=kind),
        helper.make_node("Cast", ["half"], ["y"], to=TensorProto.FLOAT),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name in ("x", "y")
    ]
    graph = helper.make_graph(nodes, "casts", values[:1], values[1:])
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    result: FloatArray = np.asarray(ReferenceEvaluator(file).run(None, {"x": array})[0])
    return result


def run(path: Path, images: Tensor) -> FloatArray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    result: FloatArray = session.run(None, {"input": images.numpy()})[0]
    return result


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=2), elements=st.floats(width=32)))
@settings(derandomize=True, deadline=None, max_examples=100)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_it_is_the_cast_of_numpy_and_of_the_onnx_reference_bit_for_bit(array: FloatArray) -> None:
    rounded = fake_quantize(torch.from_numpy(array), ONE, ZERO, FLOAT16).numpy()
    np.testing.assert_array_equal(rounded, array.astype(np.float16).astype(np.float32))
    for scheme, kind in ((FLOAT16, TensorProto.FLOAT16), (BFLOAT16, TensorProto.BFLOAT16)):
        rounded = fake_quantize(torch.from_numpy(array), ONE, ZERO, scheme).numpy()
        expected = casts_of_onnx(array, kind)
        numbers = ~np.isnan(expected)  # of NaN there are many
        assert rounded.dtype == expected.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(rounded), ~numbers)
        bits = (item[numbers].view(np.int32) for item in (rounded, expected))
        np.testing.assert_array_equal(*bits)


def test_the_gradient_passes_even_where_it_is_too_small_for_the_type() -> None:
    x = torch.tensor([1.0, -3e-9, 70000.0], requires_grad=True)
    (fake_quantize(x, ONE, ZERO, FLOAT16) * 1e-12).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([1e-12] * 3, abs=0, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", HALVES)
def test_the_file_has_half_the_bytes_and_the_result_of_the_simulation(
    name: str, model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    quantized = compressor.quantize(model, [images], format=name)
    path = quantized.save_onnx(tmp_path / "half.onnx")
    onnx.checker.check_model(onnx.load(path), full_check=True)
    with torch.no_grad():
        expected = quantized.module(images).numpy()
    assert np.abs(expected - model(images).detach().numpy()).max() > 1e-6, "it does round"
    np.testing.assert_allclose(run(path, images), expected, atol=1e-6)
    weights = [item for item in onnx.load(path).graph.initializer if len(item.dims) > 1]
    kind = TensorProto.FLOAT16 if name == "weight_fp16" else TensorProto.BFLOAT16
    assert [item.data_type for item in weights] == [kind] * 5
    float_path = export_onnx(model, ModelInputs((images[:2],)), tmp_path / "float.onnx")
    saved = float_path.stat().st_size - path.stat().st_size
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    assert 0 <= 2 * count - saved < 300 * len(weights), "a Cast takes bytes too"


@pytest.mark.slow
@pytest.mark.parametrize("name", HALVES)
def test_the_runtime_runs_the_kernels_of_float(
    name: str, model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    """So it takes the time of float: the Cast is computed when the file is loaded."""
    quantizer = PostTraining(model, ModelInputs((images[:2],)))
    formats = dict.fromkeys(quantizer.layers, find_format(name))
    kernels = integer_kernels(quantizer.write(tmp_path / "half.onnx", formats))
    assert kernels == integer_kernels(quantizer.write(tmp_path / "float.onnx", {}))
    assert "Cast" not in kernels


@pytest.mark.slow
def test_beside_integers_it_stays_float(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    formats = {"stem": STATIC_INT8, "depth": WEIGHT_FP16, "rows": DYNAMIC_INT8, "head": STATIC_INT8}
    inputs = ModelInputs((images,))
    quantizer = PostTraining(model, inputs, [inputs])
    path = quantizer.write(tmp_path / "mixed.onnx", formats)
    with torch.no_grad():
        expected = quantizer.simulate(formats)(images).numpy()
    np.testing.assert_allclose(run(path, images), expected, atol=0.02 * np.abs(expected).max())
    stored = {item.name: item.data_type for item in onnx.load(path).graph.initializer}
    assert stored["depth.weight_float16"] == TensorProto.FLOAT16
    kernels = integer_kernels(path)
    assert kernels["QLinearConv"] + kernels["ConvInteger"] <= 1


@pytest.mark.parametrize("name", HALVES)
def test_a_plan_comes_back_from_json(name: str, model: nn.Module, images: Tensor) -> None:
    quantized = compressor.quantize(model, [images], format=name)
    plan = QuantizationPlan.from_json(json.loads(json.dumps(quantized.plan.to_json())))
    assert plan.formats == quantized.plan.formats
    again = PostTraining(model, ModelInputs((images[:2],))).simulate(plan)
    with torch.no_grad():
        assert torch.equal(again(images), quantized.module(images))


@pytest.mark.parametrize(
    ("largest", "name", "message"),
    [
        (70000.0, "weight_fp16", r"up to 70000, and float16 ends at 65504\. Write weight_bf16"),
        (3.4e38, "weight_bf16", r"bfloat16 ends at 3\.38953e\+38\. Leave the layer"),
    ],
)
def test_a_weight_that_is_too_large_is_named(largest: float, name: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model.get_parameter("1.weight")[0, 0] = -largest
    with pytest.raises(ModelError, match=f"'1.weight' has values {message}|'1.weight'.*{message}"):
        compressor.quantize(model, [torch.zeros(2, 4)], format=name)
    if name == "weight_fp16":
        compressor.quantize(model, [torch.zeros(2, 4)], format="weight_bf16")


def test_what_is_rounded_to_65504_fits() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 0] = 65519.0
    quantized = compressor.quantize(model, [torch.zeros(2, 2)], format="weight_fp16")
    with torch.no_grad():
        quantized.module(torch.tensor([[1.0, 0.0]]))
        assert fake_quantize(torch.tensor(65519.0), ONE, ZERO, FLOAT16) == 65504.0


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_corrections_leave_the_weights_as_they_are_or_keep_the_function(
    correction: str, model: nn.Module, images: Tensor
) -> None:
    formats: dict[str, str | LayerFormat] = {
        "stem": "weight_fp16",
        "depth": "static_int8",
        "rows": "weight_bf16",
        "head": "weight_int4",
    }
    quantized = compressor.quantize(
        model, [images], format=formats, corrections=[correction], seconds=0.2
    )
    with torch.no_grad():
        error = (quantized.module(images) - model(images)).norm() / model(images).norm()
        assert float(error) < 0.2
        given, made = (of.get_parameter("rows.weight") for of in (model, quantized.model))
        assert torch.equal(given, made)
    assert not {"stem", "rows"} & quantized.corrected.rounded.keys()


def test_training_through_it_moves_weights_by_less_than_the_type_has() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1, bias=False)).eval()
    weight = model.get_parameter("0.weight")
    with torch.no_grad():
        weight.fill_(1.0)
    quantizer = PostTraining(model, ModelInputs((torch.zeros(2, 4),)))
    simulation = quantizer.simulate({"0": WEIGHT_FP16})
    optimizer = torch.optim.SGD(simulation.parameters(), lr=1e-4)
    for _ in range(10):  # of 2 ** -11 above 1 nothing is left in float16
        optimizer.zero_grad()
        simulation(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    moved = quantizer.graph.tensor("0.weight")
    assert moved.tolist() == [pytest.approx([1 - 1e-3] * 4)]
    with torch.no_grad():
        half = moved.half().float().sum()
        assert float(simulation(torch.ones(1, 4))) == pytest.approx(float(half))


@pytest.mark.slow
def test_training_for_quantization_goes_on_without_scales() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    rows, labels = torch.randn(32, 4), torch.randint(2, (32,))
    quantizer = PostTraining(model, ModelInputs((rows[:2],)))
    simulation = quantizer.simulate(dict.fromkeys(["0", "2"], WEIGHT_FP16))
    before = copy.deepcopy(quantizer.model.state_dict())
    compressor.Trainer(
        compressor.ClassifierTask(simulation, num_classes=2),
        train_dataloader=torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(rows, labels), batch_size=8
        ),
        algorithms=[QuantizationAwareTraining()],
        optimizers={"name": "SGD", "lr": 0.1},
        max_duration="1ep",
    ).fit()
    after = quantizer.model.state_dict()
    assert not torch.equal(before["0.weight"], after["0.weight"])
    assert not [name for name, _ in simulation.named_parameters() if name.endswith("growth")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheme(16, float_type="float8"), "Known: bfloat16, float16"),
        (lambda: Scheme(8, float_type="float16"), r"Write Scheme\(16, float_type='float16'\)"),
        (lambda: Scheme(16, axis=0, float_type="bfloat16"), "axis=0: it has 16 bits and no"),
    ],
)
def test_floats_with_scales_or_other_bits_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_integers_are_not_multiplied_by_floats(activations: str) -> None:
    with pytest.raises(ConfigError, match=r"in float16 .* Write activations='float'"):
        LayerFormat(FLOAT16, activations)  # type: ignore[arg-type]


def test_types_and_bits() -> None:
    assert [torch_dtype(scheme) for scheme in (FLOAT16, BFLOAT16)] == [
        torch.float16,
        torch.bfloat16,
    ]
    assert [find_format(name).stored_bits for name in HALVES] == [16, 16]
    assert not FLOAT16.has_integers
    assert not FLOAT16.is_float
