from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from compressor.errors import ExportError
from compressor.export import qdq
from compressor.export.qdq import (
    QuantizedFile,
    activation_tensors,
    integer_kernels,
    quantizable_layers,
    quantize_onnx,
    quantize_weight,
    weight_scale,
)
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.calibrate import calibrate

LAYERS = ["stem", "block.conv1", "block.conv2", "last", "head"]


def quantize(
    float_path: Path, batches: list[ModelInputs], layers: list[str] = LAYERS
) -> QuantizedFile:
    ranges = calibrate(float_path, batches, activation_tensors(float_path, LAYERS))
    return quantize_onnx(float_path, float_path.with_name("q.onnx"), ranges, int8_layers=layers)


def run(path: Path, images: torch.Tensor, *, optimise: bool = True) -> NDArray[np.float32]:
    options = ort.SessionOptions()
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"input": images.numpy()})[0]
    return result


def test_every_layer_is_an_integer_kernel_and_nothing_is_converted_between(
    float_path: Path, batches: list[ModelInputs]
) -> None:
    assert quantizable_layers(float_path) == LAYERS
    kernels = integer_kernels(quantize(float_path, batches).path)
    assert kernels["QLinearConv"] == 4
    assert kernels["QLinearAdd"] == 1
    assert kernels["QLinearGlobalAveragePool"] == 1
    assert kernels["QGemm"] == 1
    assert kernels["QuantizeLinear"] == 1, "of the input"
    assert kernels["DequantizeLinear"] == 0, "the last product writes floats itself"
    assert not kernels.keys() & {"Conv", "Gemm", "Relu", "Add", "GlobalAveragePool"}


def test_the_file_means_the_same_to_the_reference_evaluator(
    float_path: Path, batches: list[ModelInputs], images: torch.Tensor
) -> None:
    path = quantize(float_path, batches).path
    onnx.checker.check_model(onnx.load(path), full_check=True)
    expected = ReferenceEvaluator(onnx.load(path)).run(None, {"input": images.numpy()})[0]
    spread = np.abs(expected).max()
    # rounding of a tie may differ by one step of one value in float sums of another order
    np.testing.assert_allclose(run(path, images, optimise=False), expected, atol=0.01 * spread)
    np.testing.assert_allclose(run(path, images), expected, atol=0.02 * spread)


def test_int8_is_near_to_float(
    float_path: Path, batches: list[ModelInputs], images: torch.Tensor
) -> None:
    expected, actual = run(float_path, images), run(quantize(float_path, batches).path, images)
    assert 0 < np.abs(actual - expected).mean() < 0.02 * np.abs(expected).mean()


def test_weights_are_stored_in_one_byte_each(float_path: Path, batches: list[ModelInputs]) -> None:
    file = quantize(float_path, batches)
    stored = {tensor.name: tensor for tensor in onnx.load(file.path).graph.initializer}
    assert stored["stem.weight.int8"].data_type == onnx.TensorProto.INT8
    weights = {tensor.name for tensor in onnx.load(float_path).graph.initializer}
    assert not weights & stored.keys(), "no float copy is left"


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_left_in_float_runs_in_float_and_its_neighbours_do_not(
    float_path: Path, batches: list[ModelInputs], name: str
) -> None:
    int8 = [layer for layer in LAYERS if layer != name]
    file = quantize(float_path, batches, int8)
    kernels = integer_kernels(file.path)
    assert kernels["QLinearConv"] + kernels["QGemm"] == 4
    assert kernels["Conv"] + kernels["FusedConv"] + kernels["Gemm"] + kernels["FusedGemm"] == 1
    # the sum of a float and an integer branch is done in float: rounding it twice gains nothing
    assert kernels["QLinearAdd"] == (name != "block.conv2")
    assert file.int8_layers == tuple(sorted(int8))


def test_without_a_node_between_the_runtime_quantizes_a_float_layer_unasked(
    float_path: Path, batches: list[ModelInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    # when this fails, ONNX Runtime has learned better, and the Clip may go
    monkeypatch.setattr(qdq, "REQUANTIZED", frozenset())
    int8 = [layer for layer in LAYERS if layer != "block.conv1"]
    assert integer_kernels(quantize(float_path, batches, int8).path)["QLinearConv"] == 4


def test_no_int8_layer_gives_the_float_file(
    float_path: Path, batches: list[ModelInputs], images: torch.Tensor
) -> None:
    file = quantize(float_path, batches, [])
    np.testing.assert_array_equal(run(file.path, images), run(float_path, images))
    assert file.int8_layers == ()


def test_the_batch_stays_dynamic(float_path: Path, batches: list[ModelInputs]) -> None:
    path = quantize(float_path, batches).path
    assert [len(run(path, torch.zeros(n, 3, 8, 8))) for n in (1, 7)] == [1, 7]


def test_one_calibration_serves_every_choice_of_layers(float_path: Path) -> None:
    everything = set(activation_tensors(float_path, LAYERS))
    for layer in LAYERS:
        assert set(activation_tensors(float_path, [layer])) <= everything


def test_a_pad_of_integers_is_filled_with_their_zero(
    float_path: Path, batches: list[ModelInputs], images: torch.Tensor
) -> None:
    # uint8 zero is the lowest value of a range around zero: it must not be what is padded with
    proto = onnx.load(float_path)
    last = next(node for node in proto.graph.node if node.name == "node_last")
    relu = next(node for node in proto.graph.node if node.output[0] == "joined")
    relu.op_type = "Identity"
    del last.attribute[:]
    last.input[0] = "padded"
    pad = onnx.helper.make_node("Pad", ["joined", "sizes"], ["padded"], name="node_pad")
    proto.graph.node.insert(7, pad)
    sizes = np.array([0, 0, 1, 1, 0, 0, 1, 1], dtype=np.int64)
    proto.graph.initializer.append(numpy_helper.from_array(sizes, "sizes"))
    onnx.save(proto, float_path)
    file = quantize(float_path, batches)
    expected, actual = run(float_path, images), run(file.path, images)
    assert np.abs(actual - expected).mean() < 0.03 * np.abs(expected).mean()
    assert integer_kernels(file.path)["DequantizeLinear"] == 0


def test_weights_round_to_the_nearest_step_of_their_channel() -> None:
    weight = np.array([[1.27, -0.634], [0.0127, 0.0]], dtype=np.float32)
    scale = weight_scale(weight, 0, None, np.float32(1.0))
    np.testing.assert_allclose(scale, [0.01, 0.0001], rtol=1e-6)
    np.testing.assert_array_equal(quantize_weight(weight, scale, 0), [[127, -63], [127, 0]])


def test_a_channel_of_zeros_keeps_its_bias() -> None:
    weight, bias = np.zeros((2, 3), dtype=np.float32), np.array([0.7, 0.0], dtype=np.float32)
    scale = weight_scale(weight, 0, bias, np.float32(0.05))
    steps = 0.05 * scale.astype(np.float64)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert np.abs(bias / steps).max() < 2**31
    np.testing.assert_allclose(np.rint(bias / steps) * steps, bias, rtol=1e-6)


def test_an_unknown_layer_is_an_error_with_the_nearest_name(float_path: Path) -> None:
    with pytest.raises(ExportError, match="Did you mean 'stem'"):
        activation_tensors(float_path, ["sten"])


def test_a_missing_range_is_an_error(float_path: Path) -> None:
    with pytest.raises(ExportError, match="The range of 'input' is not known"):
        quantize_onnx(float_path, float_path.with_name("q.onnx"), {}, int8_layers=["stem"])


def test_an_integer_value_that_is_also_an_output_keeps_its_name(
    float_path: Path, batches: list[ModelInputs], images: torch.Tensor
) -> None:
    proto = onnx.load(float_path)
    shape = ["batch", 16, 8, 8]
    joined = onnx.helper.make_tensor_value_info("joined", onnx.TensorProto.FLOAT, shape)
    proto.graph.output.append(joined)
    onnx.save(proto, float_path)
    file = quantize(float_path, batches)
    onnx.checker.check_model(onnx.load(file.path))
    assert integer_kernels(file.path)["QLinearConv"] == 4
    options = ort.SessionOptions()
    expected, actual = (
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(
            ["joined"], {"input": images.numpy()}
        )[0]
        for path in (float_path, file.path)
    )
    assert np.abs(actual - expected).mean() < 0.02 * np.abs(expected).mean()
