"""What a weight's numbers in few bits are made of, and which weight has none."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.quantization.affine import channel_range, fits, parameters_of_range
from compressor.quantization.scheme import FLOAT16, Scheme, torch_dtype

# a bias in steps of (scale of the input) * (scale of the weight) must fit 32 bits
BIAS_STEPS = 2.0**30


def weight_parameters(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point, on the CPU, that cover the range of `weight`."""
    return parameters_of_range(*channel_range(weight.detach().cpu(), scheme), scheme)


def fitting_bias(scale: Tensor, bias: Tensor, source_scale: Tensor) -> Tensor:
    """A weight's scales, no finer than that the bias, in steps of both scales, fits 32 bits.

    It matters for a channel whose weight is almost all zeros.
    """
    if scale.dim() != 1:
        return scale
    least = bias.detach().cpu().abs() / (source_scale * BIAS_STEPS)
    return torch.maximum(scale, least.to(scale.dtype))


def check_weight(path: str, weight: Tensor, scheme: Scheme) -> None:
    """Refuse a weight that few bits cannot say.

    Raises:
        ModelError: if it is not finite, or too large for the floats of `scheme`.
    """
    weight = weight.detach()
    if not weight.isfinite().all():
        raise ModelError(
            f"The weight {path!r} has values that are not finite. Train the model again, or leave "
            "the layer out."
        )
    if not fits(weight, scheme):
        way_out = "Write weight_bf16, or leave" if scheme == FLOAT16 else "Leave"
        raise ModelError(
            f"The weight {path!r} has values up to {float(weight.abs().max()):.6g}, and "
            f"{scheme.float_type} ends at {torch.finfo(torch_dtype(scheme)).max:.6g}. {way_out} "
            "the layer in float."
        )
