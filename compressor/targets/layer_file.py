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
from compressor.quantization.affine import quantize
from compressor.quantization.plan import LayerFormat, TensorPlan
from compressor.quantization.scheme import Scheme
from compressor.quantization.weights import weight_parameters

OPSET = 21
Array = NDArray[Any]
IR_VERSION = 10  # of that opset; a newer one may be refused by an older runtime


def write_layer(
    layer: _ConvNd | nn.Linear,
    input_shape: Sequence[int],
    path: Path,
    *,
    form: LayerFormat | None = None,
) -> None:
    """Write `layer` followed by a ReLU, with a dynamic batch; its name in the file is "layer".

    It is called like a file of `export_onnx`. Padding is with zeros, whatever `padding_mode` says.
    Where its activations are static, it reads, and a convolution writes, numbers from 0 to 1. Its
    weight is of integers, or float32: what a runtime makes of floats of 16 bits.
    """
    weight, bias = layer.weight, layer.bias
    if isinstance(layer, _ConvTransposeNd) or (form and not form.weight.has_integers):
        form = None  # a transposed convolution has no integer kernel
    is_static = form is not None and form.activations == "static"
    is_row_product = isinstance(layer, nn.Linear) and (
        len(input_shape) != 2 or (form is not None and not is_static)
    )
    if isinstance(layer, nn.Linear):
        nodes, weight = (
            _linear(layer, by_rows=is_row_product),
            weight.T if is_row_product else weight,
        )
    else:
        nodes = [_convolution(layer)]
    nodes.append(helper.make_node("Relu", [nodes[-1].output[0]], ["output"], "relu"))
    constants = {"layer.weight": _array(weight)}
    if bias is not None:
        constants["layer.bias"] = _array(bias)
    tensors: list[TensorProto] = []
    if form is not None:
        axis = 1 if is_row_product else 0
        plan = _plan_weight(layer.weight, form.weight)
        tensors = _store_weight(nodes, constants, plan, axis, is_row_product)
        if form.activations == "dynamic":
            _multiply_dynamically(nodes)
        elif is_static:
            _compute_on_integers(nodes, constants, plan, not isinstance(layer, nn.Linear))
    float32 = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("input", float32, ["batch", *input_shape[1:]])],
        [helper.make_tensor_value_info("output", float32, None)],
        [*tensors, *(numpy_helper.from_array(array, name) for name, array in constants.items())],
    )
    opset = [helper.make_opsetid("", OPSET)]
    proto = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    sample = torch.empty(0)
    signature = Signature.of(layer, ModelInputs((sample,)), sample)
    proto.metadata_props.add(key=METADATA_KEY, value=signature.to_json())
    onnx.save(proto, path)


def _plan_weight(weight: Tensor, scheme: Scheme) -> TensorPlan:
    return TensorPlan(scheme, *weight_parameters(weight.float(), scheme))


def _store_weight(
    nodes: list[NodeProto],
    constants: dict[str, Array],
    plan: TensorPlan,
    axis: int,
    is_transposed: bool,
) -> list[TensorProto]:
    """Let the weight come from integers, in place; returns them."""
    scheme, scale = plan.scheme, plan.scale
    weight = torch.from_numpy(constants.pop("layer.weight"))
    whole = weight.T if is_transposed else weight
    integers = quantize(whole, scale, plan.zero_point, scheme)
    if is_transposed:
        integers, scale = integers.T, scale.T if scale.dim() == 2 else scale
    kind = {"int8": TensorProto.INT8, "int4": TensorProto.INT4}[scheme.storage]
    stored = {"weight": integers, "weight_zero": torch.zeros(scale.shape, dtype=torch.int32)}
    constants["weight_scale"] = scale.numpy()
    settings: dict[str, Any] = {"axis": axis}
    if scheme.block is not None:
        settings = {"axis": 0 if is_transposed else 1, "block_size": scheme.block}
    names = ["weight", "weight_scale", "weight_zero"]
    nodes.insert(0, helper.make_node("DequantizeLinear", names, ["layer.weight"], **settings))
    return [
        helper.make_tensor(name, kind, tensor.shape, tensor.flatten().tolist())
        for name, tensor in stored.items()
    ]


def _multiply_dynamically(nodes: list[NodeProto]) -> None:
    """Exchange the product for one whose input's range is found in every call, in place."""
    del nodes[0]  # the weight is not dequantized
    product = nodes.index(next(node for node in nodes if node.op_type == "MatMul"))
    result = nodes[product].output[0]
    nodes[product : product + 1] = [
        helper.make_node("DynamicQuantizeLinear", ["input"], ["whole", "step", "zero"]),
        helper.make_node("MatMulInteger", ["whole", "weight", "zero", "weight_zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["steps"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["step", "weight_scale"], ["scales"]),
        helper.make_node("Mul", ["steps", "scales"], [result]),
    ]


def _compute_on_integers(
    nodes: list[NodeProto], constants: dict[str, Array], plan: TensorPlan, writes_integers: bool
) -> None:
    """Let the product read integers from 0 to 1, and the last node write them, in place."""
    step, scale = np.float32(1 / 255), plan.scale.numpy()
    constants |= {"step": np.array(step), "zero": np.array(0, np.uint8)}
    product = next(node for node in nodes if "input" in node.input)
    product.input[0] = "read"
    before = [
        helper.make_node("QuantizeLinear", ["input", "step", "zero"], ["whole"]),
        helper.make_node("DequantizeLinear", ["whole", "step", "zero"], ["read"]),
    ]
    if len(product.input) > 2:
        bias = constants.pop("layer.bias")
        constants |= {
            "bias": np.rint(bias / (step * scale).astype(np.float64)).astype(np.int32),
            "bias_scale": step * scale,
            "bias_zero": np.zeros(len(scale), np.int32),
        }
        names = ["bias", "bias_scale", "bias_zero"]
        before.append(helper.make_node("DequantizeLinear", names, ["layer.bias"], axis=0))
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


def _linear(layer: nn.Linear, *, by_rows: bool) -> list[NodeProto]:
    """As the exporter writes it: Gemm for (N, in), else MatMul and Add."""
    if not by_rows:
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
