"""One layer of an LSTM on integers as an operation of torch: ONNX Runtime's DynamicQuantizeLSTM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from onnx.defs import OpSchema
from torch import Tensor

from compressor.export.lstm_ops import TO_ONNX, rowwise
from compressor.quantization.dynamic import DynamicLSTM

DOMAIN = "com.microsoft"
TO_TORCH = (0, 2, 3, 1)  # the inverse of TO_ONNX


@torch.library.custom_op("compressor::lstm", mutates_args=())
def lstm(
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    weight: Tensor,
    recurrent: Tensor,
    bias: Tensor,
    weight_scale: Tensor,
    recurrent_scale: Tensor,
    zero_point: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a `DynamicLSTM` computes, with weights as `lstm_constants` makes them."""
    del zero_point
    factors: list[Tensor] = []
    for i in range(len(weight)):
        for integers, scale in ((weight[i], weight_scale[i]), (recurrent[i], recurrent_scale[i])):
            factors.append(_reordered((integers * scale).T, TO_TORCH))
        factors += [_reordered(part, TO_TORCH) for part in bias[i].chunk(2)]
    layer = DynamicLSTM(is_bidirectional=len(weight) == 2)
    result: tuple[Tensor, Tensor, Tensor] = layer(x, hidden, cell, *factors)
    return result


@lstm.register_fake
def _(x: Tensor, hidden: Tensor, cell: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    states = x.new_empty(*x.shape[:2], hidden.shape[0] * hidden.shape[2])
    return states, torch.empty_like(hidden), torch.empty_like(cell)


def lstm_constants(
    matrices: Sequence[tuple[Tensor, Tensor]], biases: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The constants of `lstm`, in the order of its arguments.

    Args:
        matrices: of each direction the two matrices, int8 (4 * hidden, n), and their scales, () or
            (4 * hidden,).
        biases: of each direction two, or none at all.
    """
    rows = len(matrices[0][0])
    biases = biases or [torch.zeros(rows)] * len(matrices)
    parts = [_reordered(bias, TO_ONNX) for bias in biases]
    pairs = matrices[::2], matrices[1::2]
    integers = [torch.stack([_reordered(w, TO_ONNX).T for w, _ in kind]) for kind in pairs]
    scales = [
        torch.stack([_reordered(scale.expand(rows), TO_ONNX) for _, scale in kind])
        for kind in pairs
    ]
    return {
        "int8": integers[0],
        "recurrent_int8": integers[1],
        "bias": torch.stack(parts).view(len(matrices) // 2, -1),
        "scale": scales[0],
        "recurrent_scale": scales[1],
        "zero_point_int8": torch.zeros_like(scales[0], dtype=torch.int8),
    }


def lstm_translations(op: Any) -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """What `lstm` is in the opset `op` and ONNX Runtime's own, for `torch.onnx.export`."""
    from onnxscript import values

    kernel = values.Op(values.Opset(DOMAIN, 1), "DynamicQuantizeLSTM", _schema())

    def lstm(
        x: Any,
        hidden: Any,
        cell: Any,
        weight: Any,
        recurrent: Any,
        bias: Any,
        weight_scale: Any,
        recurrent_scale: Any,
        zero_point: Any,
    ) -> Any:
        directions, _, rows = weight.shape
        scales = (weight_scale, zero_point, recurrent_scale, zero_point)
        states, hidden, cell = kernel(
            *(x, weight, recurrent, bias, None, hidden, cell, None, *scales),
            hidden_size=rows // 4,
            direction="bidirectional" if directions == 2 else "forward",
        )
        return rowwise(op, states), hidden, cell

    ours: Any = torch.ops.compressor
    return {ours.lstm.default: lstm}


def _reordered(rows: Tensor, gates: Sequence[int]) -> Tensor:
    """The four gates of (4 * hidden, …) in another order."""
    parts = rows.chunk(4)
    return torch.cat([parts[i] for i in gates])


def _schema() -> OpSchema:
    """Of onnxruntime/docs/ContribOperators.md; the exporter has only those of ONNX itself."""
    optional = OpSchema.FormalParameterOption.Optional
    floats, integers, lengths = (
        ("T", "tensor(float)"),
        ("T2", "tensor(int8)"),
        ("T1", "tensor(int32)"),
    )
    inputs = [
        OpSchema.FormalParameter(name, kind, param_option=optional)
        for name, kind in (
            ("X", "T"),
            ("W", "T2"),
            ("R", "T2"),
            ("B", "T"),
            ("sequence_lens", "T1"),
            ("initial_h", "T"),
            ("initial_c", "T"),
            ("P", "T"),
            ("W_scale", "tensor(float)"),
            ("W_zero_point", "T2"),
            ("R_scale", "tensor(float)"),
            ("R_zero_point", "T2"),
        )
    ]
    return OpSchema(
        "DynamicQuantizeLSTM",
        DOMAIN,
        1,
        inputs=inputs,
        outputs=[OpSchema.FormalParameter(name, "T") for name in ("Y", "Y_h", "Y_c")],
        type_constraints=[(name, [kind], "") for name, kind in (floats, integers, lengths)],
        attributes=[
            OpSchema.Attribute("direction", OpSchema.AttrType.STRING, "", required=False),
            OpSchema.Attribute("hidden_size", OpSchema.AttrType.INT, "", required=False),
        ],
    )
