"""Files for TensorRT keep the rules of its documentation, which the tests say one by one.

[parser]: QuantDequantLinearHelper and Conv in onnx-tensorrt's onnxOpImporters.cpp.
[docs]: "Working with Quantized Types" and "Explicit Quantization" of the TensorRT documentation,
with its Q/DQ Layer-Placement Recommendations.
[toolkit]: "Add Custom QDQ Insertion Case" of NVIDIA's tools/tensorflow-quantization.
[reports]: NVIDIA/TensorRT issue 2774, onnx/onnx-tensorrt issue 850.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import compressor
from compressor.errors import ConfigError
from compressor.export.graph import Graph, attribute
from compressor.export.post_training import ACTIVATIONS, PostTraining
from compressor.export.quantize import Quantized
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.model import Quantizer
from compressor.quantization.plan import (
    STATIC_INT8,
    LayerFormat,
    QuantizationPlan,
    TensorPlan,
    observed_values,
    place_static,
)
from compressor.quantization.scheme import WEIGHT, Scheme

IMAGES = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(64, 6, 32, generator=torch.Generator().manual_seed(0))
WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
MOVES = {"Reshape", "Flatten", "Transpose", "MaxPool", "Squeeze", "Unsqueeze"}


class Block(nn.Module):
    """Two convolutions, and x or a third one, are added."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.down = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.norm(self.conv1(x)).relu()) + self.down(x)).relu()


class Residual(nn.Module):
    """A ResNet with a pool behind the stem, three blocks, a pool and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2)
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2), Block(16, 16, 1))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.pool(self.stem(x).relu())).mean((2, 3)))


class Encoder(nn.Module):
    """Two layers of a transformer; classes from the first row."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[:, 0])


SAMPLES: dict[type[nn.Module], Tensor] = {Residual: IMAGES, Encoder: ROWS}


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    model(SAMPLES[kind])  # statistics of the batch norms
    return model.eval()


@pytest.fixture(scope="module", params=SAMPLES, ids=lambda kind: kind.__name__)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Quantized, onnx.ModelProto, Tensor]:
    sample = SAMPLES[request.param]
    quantized = compressor.quantize(make(request.param), sample.split(16), runtime="tensorrt")
    path = quantized.save_onnx(tmp_path_factory.mktemp("file") / "model.onnx")
    return quantized, onnx.load(path), sample


def violations(proto: onnx.ModelProto) -> list[str]:
    """Every rule of TensorRT that the file breaks."""
    graph = Graph(proto)
    found = []
    if next(item.version for item in proto.opset_import if not item.domain) > 25:
        found.append("opset above 25, the last that TensorRT 11 reads")
    for node in graph.nodes:
        if node.op_type in {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}:
            found.append(f"{node.op_type} is not supported (operators.md of onnx-tensorrt)")
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            found += [f"{node.name}: {rule}" for rule in quantizer_violations(graph, node)]
        if node.op_type in WEIGHTED:
            found += [f"{node.name}: {rule}" for rule in product_violations(graph, node)]
        if node.op_type == "Add":
            found += [f"{node.name}: {rule}" for rule in sum_violations(graph, node)]
    return found


def quantizer_violations(graph: Graph, node: NodeProto) -> list[str]:
    read, scale, zero = node.input
    found = []
    if scale not in graph.constants or zero not in graph.constants:
        return ["scale and zero point shall be known when the engine is built"]
    scales, zeros = (numpy_helper.to_array(graph.constants[name]) for name in (scale, zero))
    if not (scales > 0).all():
        found.append("scale coefficients must all be positive [parser]")
    if graph.constants[zero].data_type != TensorProto.INT8:
        found.append("int8 alone; uint8 is for DLA and int32 is refused [parser, reports]")
    if zeros.any():
        found.append("a zero point is not zero [parser, reports]")
    if zeros.size != scales.size:
        found.append("as many scales as zero points [parser]")
    if read in graph.constants:
        stored = numpy_helper.to_array(graph.constants[read])
        if stored.dtype != np.int8 or stored.min() < -127:
            found.append("weights are int8 in [-127, 127] [docs]")
        if scales.ndim == 1 and scales.size != stored.shape[attribute(node, "axis", 1)]:
            found.append("a scale for each channel of the axis [parser]")
    elif scales.size != 1:
        found.append("one scale for an activation [docs]")
    if node.op_type == "QuantizeLinear" and read in graph.constants:
        found.append("a weight would stay in float in the file")
    return found


def product_violations(graph: Graph, node: NodeProto) -> list[str]:
    source, weight = (graph.producers.get(name) for name in node.input[:2])
    if weight is None or weight.op_type != "DequantizeLinear":
        return []  # of two activations, or a layer in float
    found = []
    if weight.input[0] not in graph.constants:
        return []
    if source is None or source.op_type != "DequantizeLinear":
        found.append("all inputs of weighted operations are quantized [docs]")
    stored, axis = graph.constants[weight.input[0]], attribute(weight, "axis", 1)
    channels = 1 if node.op_type == "MatMul" else 0
    if axis != channels or (node.op_type == "Gemm" and not attribute(node, "transB", 0)):
        found.append(f"scales along output channels [docs], not along {axis} of {stored.dims}")
    if len(node.input) > 2 and node.input[2] not in graph.constants:
        found.append("a bias is a float initializer: no DequantizeLinear of int32 [reports]")
    return found


def sum_violations(graph: Graph, node: NodeProto) -> list[str]:
    """Of an addition behind a convolution whose sum is quantized."""
    writers = [graph.producers.get(name) for name in node.input]
    kinds = [writer.op_type if writer is not None else "" for writer in writers]
    result, behind = node.output[0], graph.only_consumer(node.output[0])
    if behind is not None and behind.op_type == "Relu":
        result = behind.output[0]
    while (moved := graph.only_consumer(result)) is not None and moved.op_type in MOVES:
        result = moved.output[0]
    readers = {reader.op_type for reader in graph.consumers.get(result, [])}
    if "Conv" not in {*kinds, *through_quantizers(graph, writers)} or readers != {"QuantizeLinear"}:
        return []
    if kinds.count("DequantizeLinear") != 1 or kinds.count("Conv") != 1:
        return [f"the residual input alone is quantized [docs, toolkit], not {kinds}"]
    return []


def through_quantizers(graph: Graph, writers: list[NodeProto | None]) -> list[str]:
    found = []
    for writer in writers:
        if writer is not None and writer.op_type == "DequantizeLinear":
            writer = graph.producers.get(graph.producers[writer.input[0]].input[0])
            found.append(writer.op_type if writer is not None else "")
    return found


def test_the_file_keeps_every_rule(made: tuple[Quantized, onnx.ModelProto, Tensor]) -> None:
    quantized, proto, _ = made
    assert violations(proto) == []
    products = [node for node in proto.graph.node if node.op_type in WEIGHTED]
    graph = Graph(proto)
    weights = [graph.producers.get(node.input[1]) for node in products]
    assert sum(
        weight is not None and weight.input[0] in graph.constants for weight in weights
    ) == len(quantized.plan.formats), "no layer was left out"


def test_the_checker_sees_what_a_file_for_onnx_runtime_does_otherwise(tmp_path: Path) -> None:
    path = compressor.quantize(make(Residual), IMAGES.split(16)).save_onnx(tmp_path / "q.onnx")
    found = "\n".join(violations(onnx.load(path)))
    assert "uint8 is for DLA" in found
    assert "a zero point is not zero" in found
    assert "a bias is a float initializer" in found
    assert "the residual input alone is quantized" in found


def test_a_sum_reads_integers_where_it_writes_them_and_never_those_of_its_own_product(
    made: tuple[Quantized, onnx.ModelProto, Tensor],
) -> None:
    graph = Graph(made[1])
    sums = [node for node in graph.nodes if node.op_type == "Add"]
    writers = [
        {graph.producers[name].op_type for name in node.input if name in graph.producers}
        for node in sums
    ]
    if made[2] is IMAGES:
        # the last block's x is int8 already: the convolution beside it reads it
        assert writers == [{"Conv", "DequantizeLinear"}] * 3
    else:
        assert not any("DequantizeLinear" in kinds for kinds in writers), "norms read them in float"


@pytest.mark.parametrize("by", ["onnx.reference", "onnxruntime"])
def test_the_file_computes_what_the_simulation_computes(
    made: tuple[Quantized, onnx.ModelProto, Tensor], by: str
) -> None:
    quantized, proto, sample = made
    sample = sample * 1.5  # what lies outside of the ranges is cut at -128 by both
    with torch.no_grad():
        expected = quantized.module(sample).numpy()
    actual = (by_definition if by == "onnx.reference" else by_runtime)(proto, sample)
    assert (actual.argmax(1) == expected.argmax(1)).mean() == 1.0
    # a tie may be rounded otherwise in a sum of another order: one step of one value
    np.testing.assert_allclose(actual, expected, atol=0.01 * np.abs(expected).max())


def by_definition(proto: onnx.ModelProto, sample: Tensor) -> NDArray[np.float32]:
    (result,) = ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: sample.numpy()})
    return result


def by_runtime(proto: onnx.ModelProto, sample: Tensor) -> NDArray[np.float32]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    result: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: sample.numpy()})[
        0
    ]
    return result


def test_it_is_near_to_the_float_model(
    made: tuple[Quantized, onnx.ModelProto, Tensor],
) -> None:
    quantized, _, sample = made
    with torch.no_grad():
        expected, actual = quantized.model(sample), quantized.module(sample)
    assert 0 < (actual - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "dynamic_int8"}, "has dynamic activations"),
        ({"format": "weight_int8"}, "has float activations"),
        ({"format": "weight_int4"}, "has float activations"),
        ({"format": {"head": LayerFormat(WEIGHT.with_bits(4))}}, "weights of int8"),
        ({"format": LayerFormat(Scheme(8, axis=0))}, "weights of int8"),
        ({"runtime": "tensort"}, "Did you mean 'tensorrt'"),
    ],
)
def test_what_tensorrt_cannot_compute_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compressor.quantize(make(Residual), IMAGES.split(16), **{"runtime": "tensorrt", **options})


def test_one_calibration_serves_every_choice_of_layers() -> None:
    quantizer = PostTraining(make(Residual), ModelInputs((IMAGES[:2],)), runtime="tensorrt")
    observed = observed_values(quantizer.graph, quantizer.layers, "tensorrt")
    for layer in quantizer.layers:
        for layers in ([layer], [name for name in quantizer.layers if name != layer]):
            formats = dict.fromkeys(layers, STATIC_INT8)
            needed = place_static(quantizer.graph, formats, "tensorrt").origins
            assert {node.name for node in needed} <= set(observed)


def test_rounding_and_biases_can_be_corrected(tmp_path: Path) -> None:
    model, options = make(Residual), {"runtime": "tensorrt", "corrections": ["gptq", "bias"]}
    quantized = compressor.quantize(model, IMAGES.split(16), **options)  # type: ignore[arg-type]
    assert quantized.corrected.biased
    assert violations(onnx.load(quantized.save_onnx(tmp_path / "q.onnx"))) == []


def test_a_range_that_training_follows_stays_symmetric() -> None:
    scheme = ACTIVATIONS["tensorrt"]
    quantizer = Quantizer(TensorPlan(scheme, torch.tensor(0.5), torch.tensor(0).int()))
    quantizer.follow_range()
    quantizer.is_following = True
    quantizer(torch.tensor([-1.0, 12.7]))
    quantizer.take_range(1.0)
    assert quantizer.zero_point == 0
    assert quantizer.scale.item() == pytest.approx(0.1)


def test_a_plan_keeps_the_runtime_that_it_is_for() -> None:
    quantizer = PostTraining(
        make(Residual), ModelInputs((IMAGES[:2],)), [ModelInputs((IMAGES,))], runtime="tensorrt"
    )
    plan = quantizer.plan(dict.fromkeys(quantizer.layers, STATIC_INT8))
    again = QuantizationPlan.from_json(plan.to_json())
    with torch.no_grad():
        expected, actual = (quantizer.simulate(item).eval()(IMAGES) for item in (plan, again))
    assert torch.equal(actual, expected)
    assert quantizer.simulate(again).plan().runtime == "tensorrt"
