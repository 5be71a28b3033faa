"""One convolution or linear layer as an ONNX file, written in a millisecond by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from compressor.export.signature import METADATA_KEY, Signature
from compressor.interfaces.inputs import ModelInputs

OPSET = 20
IR_VERSION = 10  # of that opset; a newer one may be refused by an older runtime


def write_layer(layer: _ConvNd | nn.Linear, input_shape: Sequence[int], path: Path) -> None:
    """Write `layer` followed by a ReLU, with a dynamic batch; its name in the file is "layer".

    It is called like a file of `export_onnx`. Padding is with zeros, whatever `padding_mode` says.
    """
    weight, bias = layer.weight, layer.bias
    if isinstance(layer, nn.Linear):
        nodes, weight = (
            _linear(layer, len(input_shape)),
            weight if len(input_shape) == 2 else weight.T,
        )
    else:
        nodes = [_convolution(layer)]
    nodes.append(helper.make_node("Relu", [nodes[-1].output[0]], ["output"], "relu"))
    constants = [_constant("layer.weight", weight)]
    if bias is not None:
        constants.append(_constant("layer.bias", bias))
    float32 = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("input", float32, ["batch", *input_shape[1:]])],
        [helper.make_tensor_value_info("output", float32, None)],
        constants,
    )
    opset = [helper.make_opsetid("", OPSET)]
    proto = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    sample = torch.empty(0)
    signature = Signature.of(layer, ModelInputs((sample,)), sample)
    proto.metadata_props.add(key=METADATA_KEY, value=signature.to_json())
    onnx.save(proto, path)


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


def _constant(name: str, tensor: Tensor) -> TensorProto:
    return numpy_helper.from_array(tensor.detach().cpu().float().contiguous().numpy(), name)
