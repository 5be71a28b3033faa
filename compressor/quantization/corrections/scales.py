"""Scales of weights that cut the largest a little, such that all together lose least.

It is the error of the weights, not of what the layer computes: with one scale for a tensor it
helps, with one for each channel it may harm, and GPTQ does without it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.quantization.affine import channel_range, fake_quantize, parameters_of_range
from compressor.quantization.graph import QuantizationGraph
from compressor.quantization.plan import QuantizationPlan, TensorPlan
from compressor.quantization.scheme import Scheme

# Of the range; below a third nothing was ever best, not even with 2 bits of a normal weight.
FRACTIONS = tuple(1 - number / 50 for number in range(36))
FEW_BITS = 8  # with so many or more, what is cut costs more than what it gains


def search_scales(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point with the least squared error, for each part of `weight` by itself.

    Tried are ranges of `FRACTIONS` of the whole; so the error is never above that of the range.

    Args:
        weight: any shape.
        scheme: of few bits.

    Returns:
        As of `affine.parameters_of_range`.

    Raises:
        ConfigError: if `scheme` is float.
        DataError: if `weight` is not finite.
    """
    if scheme.is_float:
        raise ConfigError("32 bits are not rounded. Give a scheme of 2 to 16 bits.")
    if not weight.isfinite().all():
        raise DataError("The weight is not finite, so it has no scale. Look for NaN in the model.")
    low, high = channel_range(weight, scheme)
    best, shift = parameters_of_range(low, high, scheme)
    least = torch.full_like(best, torch.inf)
    for fraction in FRACTIONS:
        scale, zero_point = parameters_of_range(fraction * low, fraction * high, scheme)
        errors = (fake_quantize(weight, scale, zero_point, scheme) - weight).square()
        error = sum_of_parts(errors, scheme)
        is_better = error < least
        best, shift = torch.where(is_better, scale, best), torch.where(is_better, zero_point, shift)
        least = torch.where(is_better, error, least)
    return best, shift


def sum_of_parts(x: Tensor, scheme: Scheme) -> Tensor:
    """The sum of each part of `x` that has a scale of its own.

    >>> sum_of_parts(torch.ones(2, 5), Scheme(axis=0, block=4)).tolist()
    [[4.0, 1.0], [4.0, 1.0]]
    """
    if scheme.axis is None:
        return x.sum()
    if scheme.block is None:
        return x.movedim(scheme.axis, 0).flatten(1).sum(1)
    missing = -x.shape[1] % scheme.block
    padded = torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], dim=1)
    return padded.reshape(len(x), -1, scheme.block, *x.shape[2:]).flatten(2).sum(2)


@torch.no_grad()
def search_all_scales(graph: QuantizationGraph, plan: QuantizationPlan) -> Mapping[str, TensorPlan]:
    """Of each weight of `plan` with few bits, by its path.

    Raises:
        DataError: if a weight is not finite; the message names it.
    """
    found = {}
    for path, tensor in plan.weights.items():
        if tensor.scheme.bits >= FEW_BITS:
            continue
        weight = graph.tensor(path).detach().cpu()
        try:
            found[path] = TensorPlan(tensor.scheme, *search_scales(weight, tensor.scheme))
        except DataError as error:
            raise DataError(f"{path!r}: {error}") from error
    return found
