"""The operations of a quantized file as operations of torch, so that the exporter carries them.

Each is put into a graph where the quantizer was, and says what ONNX has for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from onnx.defs import OpSchema
from torch import Tensor

from compressor.export.recurrent import lstm_translations
from compressor.quantization.affine import dequantize as to_floats
from compressor.quantization.affine import quantize as to_integers
from compressor.quantization.dynamic import dynamic_parameters
from compressor.quantization.scheme import ACTIVATION

BLOCKS_OPSET = 21  # the first with 4 bits and with blocks
# domain and names of marks, until the file is finished
MARKS = "compressor"
WIDEN = (MARKS, "Widen")
FOUR_BITS = (MARKS, "FourBits")


@torch.library.custom_op("compressor::round_trip", mutates_args=())
def round_trip(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """QuantizeLinear and DequantizeLinear with one scale; the type is that of `zero_point`."""
    limits = torch.iinfo(zero_point.dtype)
    steps = (x / scale).round() + zero_point.float()
    return (steps.clamp(limits.min, limits.max) - zero_point.float()) * scale


@round_trip.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    del scale, zero_point
    return torch.empty_like(x)


@torch.library.custom_op("compressor::dequantize", mutates_args=())
def dequantize(
    integers: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int
) -> Tensor:
    """DequantizeLinear; `block=0` is a scale for each index of `axis`, else one for each block."""
    if not block:
        shape = [-1 if i == axis else 1 for i in range(integers.dim())]
        return (integers - zero_point.int().view(shape)).float() * scale.view(shape)
    entries = [
        numbers.repeat_interleave(block, dim=axis).narrow(axis, 0, integers.shape[axis])
        for numbers in (zero_point.int(), scale)
    ]
    return (integers - entries[0]).float() * entries[1]


@dequantize.register_fake
def _(integers: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int) -> Tensor:
    del zero_point, axis, block
    return torch.empty_like(integers, dtype=scale.dtype)


@torch.library.custom_op("compressor::widen", mutates_args=())
def widen(x: Tensor) -> Tensor:
    """Floats of 16 bits as float32; written as a mark, which `finish_nodes` makes a Cast."""
    return x.float()


@widen.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


@torch.library.custom_op("compressor::four_bits", mutates_args=())
def four_bits(integers: Tensor) -> Tensor:
    """`integers`; a mark of those that `finish_nodes` stores two in a byte."""
    return integers.clone()


@four_bits.register_fake
def _(integers: Tensor) -> Tensor:
    return torch.empty_like(integers)


@torch.library.custom_op("compressor::dynamic_product", mutates_args=())
def dynamic_product(x: Tensor, integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """DynamicQuantizeLinear and MatMulInteger: (…, in) by (in, out) with a scale for each out."""
    step, shift = dynamic_parameters(x)
    whole = to_integers(x, step, shift, ACTIVATION)
    rows = to_floats(whole, step, shift, ACTIVATION)
    return rows @ ((integers - zero_point.int()).float() * scale)


@dynamic_product.register_fake
def _(x: Tensor, integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    del scale, zero_point
    return x.new_empty(*x.shape[:-1], integers.shape[-1])


@torch.library.custom_op("compressor::keep_float", mutates_args=())
def keep_float(x: Tensor) -> Tensor:
    """`x`; in the file a Clip at the limits of float32.

    ONNX Runtime quantizes the weight of a float layer between DequantizeLinear and QuantizeLinear
    unasked, per tensor (WeightBiasQuantization); an operation between keeps it in float.
    """
    return x.clone()


@keep_float.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def translations(opset: int) -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """What each operation is in ONNX, for `torch.onnx.export`."""
    import onnxscript
    from onnx import TensorProto

    op: Any = getattr(onnxscript, f"opset{opset}")

    def round_trip(x: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    def dequantize(integers: Any, scale: Any, zero_point: Any, axis: int, block: int) -> Any:
        more = {"block_size": block} if block else {}
        return op.DequantizeLinear(integers, scale, zero_point, axis=axis, **more)

    def dynamic_product(x: Any, integers: Any, scale: Any, zero_point: Any) -> Any:
        whole, step, shift = op.DynamicQuantizeLinear(x)
        product = op.Cast(
            op.MatMulInteger(whole, integers, shift, zero_point), to=TensorProto.FLOAT
        )
        return op.Mul(product, op.Mul(step, scale))

    def widen(x: Any) -> Any:
        halves = ["tensor(float16)", "tensor(bfloat16)"]
        return mark(WIDEN, halves, "tensor(float)")(x)

    def four_bits(integers: Any) -> Any:
        return mark(FOUR_BITS, ["tensor(int8)", "tensor(uint8)"], "T")(integers)

    def mark(name: tuple[str, str], kinds: list[str], result: str) -> Any:
        opset = onnxscript.values.Opset(name[0], 1)
        return onnxscript.values.Op(opset, name[1], _schema_of_mark(*name, kinds, result))

    def keep_float(x: Any) -> Any:
        limits = torch.finfo(torch.float32)
        low, high = (op.Constant(value_float=value) for value in (limits.min, limits.max))
        return op.Clip(x, low, high)

    ours: Any = torch.ops.compressor
    return {
        ours.round_trip.default: round_trip,
        ours.dequantize.default: dequantize,
        ours.dynamic_product.default: dynamic_product,
        ours.keep_float.default: keep_float,
        ours.widen.default: widen,
        ours.four_bits.default: four_bits,
        **lstm_translations(op),
    }


def _schema_of_mark(domain: str, name: str, kinds: list[str], result: str) -> OpSchema:
    return OpSchema(
        name,
        domain,
        1,
        inputs=[OpSchema.FormalParameter("x", "T")],
        outputs=[OpSchema.FormalParameter("y", result)],
        type_constraints=[("T", kinds, "")],
    )
