"""Numbers to few bits and back, bit for bit as ONNX defines it, with gradients to train through.

    integer = clamp(round(x / scale) + zero_point)        QuantizeLinear; ties go to the even one
    y       = (integer - zero_point) * scale              DequantizeLinear

Floats of 16 bits are a Cast there and back.

Sources: Jacob et al. (2018), Quantization and training of neural networks for efficient integer
arithmetic-only inference; Esser et al. (2020), Learned step size quantization.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from compressor.quantization.scheme import Scheme, torch_dtype

TINY = torch.finfo(torch.float32).tiny
# of a row that is all zeros: kernels that sum in floats write noise of so many steps in place of 0
EMPTY = 2.0**-40


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """The integers of `x` as int32, of its shape.

    Args:
        x: any shape, float32.
        scale: () or, along `scheme.axis`, (size,); with blocks (size, blocks). Positive.
        zero_point: integers, of the shape of `scale`.
        scheme: of few bits.
    """
    return _steps(x, scale, zero_point, scheme).to(torch.int32)


def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """The float32 numbers that the integers stand for.

    >>> integers = torch.tensor([0, 128, 255])
    >>> dequantize(integers, torch.tensor(0.5), torch.tensor(128), Scheme(8)).tolist()
    [-64.0, 0.0, 63.5]
    """
    shift, step = (spread(numbers, integers, scheme) for numbers in (zero_point, scale))
    return (integers - shift).to(torch.float32) * step


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """`dequantize(quantize(x))`; of 32 bits, `x`.

    The gradient passes where `x` is within range, and is zero where it is clamped. The gradient of
    `scale` is that of the learned step size. Through floats of 16 bits the gradient passes; what
    is too large for them becomes infinite.
    """
    if scheme.is_float:
        return x
    if scheme.float_type is not None:
        return cast(Tensor, _Cast.apply(x, torch_dtype(scheme)))
    steps = _steps(x, scale, zero_point, scheme)
    return (steps - spread(zero_point, x, scheme).to(x.dtype)) * spread(scale, x, scheme)


def parameters_of_range(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point such that zero is exact and the range is covered.

    A range that begins at 0, after a ReLU, has the least integer as its zero point and ends within
    it, so that a runtime may leave the ReLU or the Clip before it out.

    A tensor of zeros has the scale 1, and a part of one with a scale of its own `EMPTY`. Floats of
    16 bits have 1 and 0.

    Args:
        low: least values, () or (size,) or (size, blocks).
        high: greatest values, of the same shape.
        scheme: of few bits.

    Returns:
        Scales in float32 and zero points in int32.

    >>> scale, zero_point = parameters_of_range(torch.tensor(-1.0), torch.tensor(4.0), Scheme(8))
    >>> round(255 * scale.item(), 5), zero_point.item()
    (5.0, 51)
    """
    if scheme.float_type is not None:
        return torch.ones_like(low, dtype=torch.float32), torch.zeros_like(low, dtype=torch.int32)
    empty = 1.0 if scheme.axis is None else EMPTY
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    if scheme.symmetric:
        scale = (torch.maximum(-low, high) / (scheme.qmax - scheme.middle)).float()
        scale = torch.where(scale < TINY, empty, scale)
        return scale, torch.full_like(scale, scheme.middle, dtype=torch.int32)
    levels = scheme.qmax - scheme.qmin
    scale = ((high - low) / levels).float()
    too_long = (low == 0) & (scale.double() * levels > high)
    scale = torch.where(too_long, torch.nextafter(scale, torch.zeros_like(scale)), scale)
    is_empty = scale < TINY  # nothing but zeros, or denormal: no scale says it
    scale = torch.where(is_empty, empty, scale)
    zero_point = (scheme.qmin - low / scale.double()).round().clamp(scheme.qmin, scheme.qmax)
    zero_point = torch.where(is_empty, float(scheme.qmin), zero_point)
    return scale, zero_point.to(torch.int32)


def fits(x: Tensor, scheme: Scheme) -> bool:
    """Whether no number of `x` is too large for the floats of `scheme`, if it has them.

    >>> fits(torch.tensor([65504.0, 65520.0]), Scheme(16, float_type="float16"))
    False
    """
    return scheme.float_type is None or bool(x.to(torch_dtype(scheme)).isfinite().all())


def spread(numbers: Tensor, x: Tensor, scheme: Scheme) -> Tensor:
    """`numbers` of each channel or block, in a shape that broadcasts with `x`."""
    if scheme.axis is None:
        return numbers
    if scheme.block is not None:
        return blocks_to_entries(numbers, x.shape[1], scheme.block).view(
            *x.shape[:2], *[1] * (x.dim() - 2)
        )
    return numbers.view([-1 if i == scheme.axis % x.dim() else 1 for i in range(x.dim())])


def blocks_to_entries(numbers: Tensor, size: int, block: int) -> Tensor:
    """(rows, blocks) repeated to (rows, size); the last block may be shorter."""
    return numbers.repeat_interleave(block, dim=1)[:, :size]


def channel_range(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each part of `x` that has a scale of its own.

    >>> low, high = channel_range(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), Scheme(axis=0))
    >>> low.tolist(), high.tolist()
    ([-2.0, 3.0], [1.0, 4.0])
    """
    if scheme.axis is None:
        return x.min(), x.max()
    if scheme.block is None:
        rows = x.movedim(scheme.axis, 0).flatten(1)
        return rows.amin(1), rows.amax(1)
    missing = -x.shape[1] % scheme.block
    padded = torch.cat([x, x[:, -1:].expand(-1, missing, *x.shape[2:])], dim=1)
    parts = padded.reshape(len(x), -1, scheme.block, *x.shape[2:]).flatten(2)
    return parts.amin(2), parts.amax(2)


def _steps(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    shift = spread(zero_point, x, scheme).to(x.dtype)
    steps = x / spread(scale, x, scheme)
    return cast(Tensor, _Round.apply(steps, scheme.qmin - shift, scheme.qmax - shift)) + shift


class _Round(torch.autograd.Function):
    """Rounding to even within bounds; the gradient is 1 there, and 0 where something is cut.

    Not `clamp`: its gradient at a bound is 0 in torch 2.15 and was 1 before.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, least: Tensor, most: Tensor) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((x >= least) & (x <= most))
        return x.round().clamp_(least, most)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (is_within,) = ctx.saved_tensors
        return gradient * is_within, None, None


class _Cast(torch.autograd.Function):
    """To another type and back; the gradient passes as it is, where that of `to` is cast too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        del ctx
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        del ctx
        return gradient, None
