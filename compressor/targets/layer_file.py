"""One convolution or linear layer as an ONNX file, written in a millisecond by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from compressor.export.signature import METADATA_KEY, Signature
from compressor.interfaces.inputs import ModelInputs

OPSET = 20
Array = NDArray[Any]
IR_VERSION = 10  # of that opset; a newer one may be refused by an older runtime


def write_layer(
    layer: _ConvNd | nn.Linear, input_shape: Sequence[int], path: Path, *, int8: bool = False
) -> None:
    """Write `layer` followed by a ReLU, with a dynamic batch; its name in the file is "layer".

    It is called like a file of `export_onnx`. Padding is with zeros, whatever `padding_mode` says.
    In int8 it reads, and a convolution writes, numbers from 0 to 1.
    """
    weight, bias = layer.weight, layer.bias
    is_row_product = isinstance(layer, nn.Linear) and len(input_shape) != 2
    if isinstance(layer, nn.Linear):
        nodes, weight = _linear(layer, len(input_shape)), weight.T if is_row_product else weight
    else:
        nodes = [_convolution(layer)]
    nodes.append(helper.make_node("Relu", [nodes[-1].output[0]], ["output"], "relu"))
    constants = {"layer.weight": _array(weight)}
    if bias is not None:
        constants["layer.bias"] = _array(bias)
    if int8:
        axis = 1 if is_row_product else 0
        _quantize(nodes, constants, axis, writes_integers=not isinstance(layer, nn.Linear))
    float32 = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("input", float32, ["batch", *input_shape[1:]])],
        [helper.make_tensor_value_info("output", float32, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = [helper.make_opsetid("", OPSET)]
    proto = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    sample = torch.empty(0)
    signature = Signature.of(layer, ModelInputs((sample,)), sample)
    proto.metadata_props.add(key=METADATA_KEY, value=signature.to_json())
    onnx.save(proto, path)


def _quantize(
    nodes: list[NodeProto], constants: dict[str, Array], axis: int, *, writes_integers: bool
) -> None:
    """Let the first node read integers, and the last one write them, in place."""
    weight = constants.pop("layer.weight")
    channels = weight.shape[axis]
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = (np.abs(weight).max(others) / 127 + np.finfo(np.float32).tiny).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    step = np.float32(1 / 255)
    constants |= {
        "weight": np.rint(weight / scale.reshape(shape)).astype(np.int8),
        "weight_scale": scale,
        "weight_zero": np.zeros(channels, np.int8),
        "step": np.array(step),
        "zero": np.array(0, np.uint8),
    }
    before = [
        helper.make_node("QuantizeLinear", ["input", "step", "zero"], ["whole"]),
        helper.make_node("DequantizeLinear", ["whole", "step", "zero"], ["read"]),
        helper.make_node(
            "DequantizeLinear",
            ["weight", "weight_scale", "weight_zero"],
            ["layer.weight"],
            axis=axis,
        ),
    ]
    first = nodes[0]
    first.input[0] = "read"
    if len(first.input) > 2:
        bias = constants.pop("layer.bias")
        constants |= {
            "bias": np.rint(bias / (step * scale).astype(np.float64)).astype(np.int32),
            "bias_scale": step * scale,
            "bias_zero": np.zeros(channels, np.int32),
        }
        before.append(
            helper.make_node(
                "DequantizeLinear", ["bias", "bias_scale", "bias_zero"], ["layer.bias"], axis=0
            )
        )
    nodes[:0] = before
    if writes_integers:
        nodes[-1].output[0] = "float"
        nodes += [
            helper.make_node("QuantizeLinear", ["float", "step", "zero"], ["result"]),
            helper.make_node("DequantizeLinear", ["result", "step", "zero"], ["output"]),
        ]


def _convolution(layer: _ConvNd) -> NodeProto:
    is_transposed = isinstance(layer, _ConvTransposeNd)
    # torch lists (begin, end) from the last dimension on; ONNX all begins, then all ends
    pairs = layer._reversed_padding_repeated_twice
    settings: dict[str, Any] = {
        "kernel_shape": layer.kernel_size,
        "strides": layer.stride,
        "dilations": layer.dilation,
        "group": layer.groups,
        "pads": [*reversed(pairs[::2]), *reversed(pairs[1::2])],
    }
    if is_transposed:
        settings |= {"pads": [*layer.padding, *layer.padding]}
        settings |= {"output_padding": layer.output_padding}
    kind = "ConvTranspose" if is_transposed else "Conv"
    return helper.make_node(kind, _inputs(layer), ["product"], "layer", **settings)


def _linear(layer: nn.Linear, dims: int) -> list[NodeProto]:
    """As the exporter writes it: Gemm for (N, in), else MatMul and Add."""
    if dims == 2:
        return [helper.make_node("Gemm", _inputs(layer), ["product"], "layer", transB=1)]
    product = helper.make_node("MatMul", ["input", "layer.weight"], ["product"], "layer")
    if layer.bias is None:
        return [product]
    return [product, helper.make_node("Add", ["product", "layer.bias"], ["sum"], "add")]


def _inputs(layer: nn.Module) -> list[str]:
    return ["input", "layer.weight", *(["layer.bias"] if layer.bias is not None else [])]


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().float().contiguous().numpy()
    return array
