"""Rounding a matrix column by column, each error made up for by the columns to come (GPTQ).

Sources: Frantar et al. (2022), GPTQ: accurate post-training quantization for generative
pre-trained transformers (2210.17323); Hassibi and Stork (1993), Optimal brain surgeon.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.quantization.affine import (
    channel_range,
    dequantize,
    fake_quantize,
    parameters_of_range,
    quantize,
    spread,
)
from compressor.quantization.scheme import Scheme

LEAST_DAMPING = 1e-6  # of the mean diagonal: the first that is tried after none


class Rounded(NamedTuple):
    """A weight on its grid.

    Attributes:
        weight: float32, integers times `scale`.
        scale: as of `affine.parameters_of_range`.
        zero_point: int32, of the shape of `scale`.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor


def accumulate_hessian(hessian: Tensor, inputs: Tensor) -> Tensor:
    """Add 2 XᵀX of one batch of a linear layer's inputs to `hessian`, in place.

    Args:
        hessian: (in, in), zeros before the first batch; float64, or float32 for speed.
        inputs: (…, in). Of a convolution of one group, its patches: `F.unfold(x, …).mT`.

    Returns:
        `hessian`.

    >>> accumulate_hessian(torch.zeros(2, 2), torch.tensor([[1.0, 3.0]])).tolist()
    [[2.0, 6.0], [6.0, 18.0]]
    """
    rows = inputs.reshape(-1, inputs.shape[-1]).to(hessian.dtype)
    return hessian.addmm_(rows.T, rows, alpha=2.0)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
) -> Rounded:
    """The weight rounded such that its outputs on the inputs of `hessian` change little.

    For each row the change is not above that of rounding to nearest with the scales of
    `channel_range`, or with the given ones.

    Args:
        weight: (out, in), float32.
        hessian: (in, in), as of `accumulate_hessian`; its factor does not matter. An input that
            was always 0 has its weights rounded to nearest.
        scheme: of few bits.
        scale: given, or None for the range of the weights. Each block's is then taken when its
            first column is rounded, from the weights as corrected by then; with `act_order`, from
            the float weights.
        zero_point: with `scale`, of its shape.
        damping: of the mean of the hessian's diagonal, added to it; raised tenfold until the
            hessian has a Cholesky factor.
        block_size: columns between two updates of all that follow; it changes only the speed.
        act_order: round the columns of large inputs first.

    Raises:
        ConfigError: if `scheme` is float, only one of scale and zero point is given, or a number
            is out of range.
        DataError: if `hessian` is of another shape, not finite, or no sum of squares.
    """
    _check(weight, hessian, scheme, scale, zero_point, damping, block_size)
    target, hessian = weight.detach().double(), hessian.double()
    is_given = scale is not None
    if scale is None or zero_point is None:
        scale, zero_point = parameters_of_range(*channel_range(weight.detach(), scheme), scheme)
    nearest = Rounded(fake_quantize(weight.detach(), scale, zero_point, scheme), scale, zero_point)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    if not act_order:
        order = order.sort().values
    factor = _inverse_factor(hessian[order][:, order], damping)
    refitted = scheme.block if not (is_given or act_order) else None
    corrected = _sweep(target, factor, order, nearest, scheme, block_size, refitted)
    return _better_rows(corrected, nearest, target, hessian)


def _sweep(
    target: Tensor,
    factor: Tensor,
    order: Tensor,
    nearest: Rounded,
    scheme: Scheme,
    block_size: int,
    refitted: int | None,
) -> Rounded:
    """The columns in `order`, with the scales of `nearest`, or `refitted` to blocks so wide."""
    left = target[:, order]
    step, shift = (
        spread(numbers, target, scheme).expand_as(target)[:, order].clone()
        for numbers in (nearest.scale, nearest.zero_point)
    )
    integers = torch.empty_like(shift)
    by_row, columns = replace(scheme, axis=0, block=None), left.shape[1]
    width = block_size if refitted is None else refitted * max(1, block_size // refitted)
    for begin in range(0, columns, width):
        end = min(begin + width, columns)
        errors = torch.empty_like(left[:, begin:end])
        for column in range(begin, end):
            if refitted is not None and column % refitted == 0:
                block = slice(column, column + refitted)
                ends = channel_range(left[:, block].float(), by_row)
                fitted = parameters_of_range(*ends, by_row)
                step[:, block], shift[:, block] = (numbers[:, None] for numbers in fitted)
            numbers = step[:, column], shift[:, column]
            integers[:, column] = quantize(left[:, column], *numbers, by_row)
            rounded = dequantize(integers[:, column], *numbers, by_row)
            error = (left[:, column] - rounded) / factor[column, column]
            left[:, column:end] -= torch.outer(error, factor[column, column:end])
            errors[:, column - begin] = error
        left[:, end:] -= errors @ factor[begin:end, end:]
    back = order.argsort()
    weight = ((integers - shift) * step)[:, back]
    if refitted is None:
        return Rounded(weight, nearest.scale, nearest.zero_point)
    return Rounded(weight, step[:, ::refitted], shift[:, ::refitted])


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U with UᵀU the inverse of the damped hessian.

    From the Cholesky factor of the hessian with its order reversed, whose inverse it is, reversed
    again: one factorisation, and no inverse of a matrix that may be near singular.
    """
    mean = hessian.diagonal().mean()
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    is_dead = hessian.diagonal() == 0
    alive = hessian + torch.diag(is_dead.to(hessian.dtype) * (mean if mean else 1.0))
    while damping <= 1:
        damped = alive + damping * mean * identity
        lower, failure = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failure:
            inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
            return inverse.flip(0, 1)
        damping = max(10 * damping, LEAST_DAMPING)
    raise DataError(
        "The hessian has no Cholesky factor, even with its mean diagonal added. "
        "Give the sum of 2 XᵀX, as `accumulate_hessian` makes it."
    )


def _better_rows(corrected: Rounded, nearest: Rounded, target: Tensor, hessian: Tensor) -> Rounded:
    """Of each row the one whose outputs change less: damping may have misled the correction."""
    changes = []
    for rounded in (corrected, nearest):
        change = rounded.weight.double() - target
        changes.append(((change @ hessian) * change).sum(1))
    is_better = (changes[0] < changes[1])[:, None]
    weight = torch.where(is_better, corrected.weight, nearest.weight)
    if corrected.scale is nearest.scale:
        return Rounded(weight, nearest.scale, nearest.zero_point)
    return Rounded(
        weight,
        torch.where(is_better, corrected.scale, nearest.scale),
        torch.where(is_better, corrected.zero_point, nearest.zero_point),
    )


def _check(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    scale: Tensor | None,
    zero_point: Tensor | None,
    damping: float,
    block_size: int,
) -> None:
    if not scheme.has_integers:
        raise ConfigError("Floats have no steps to choose. Give a scheme of 2 to 16 bits.")
    if (scale is None) != (zero_point is None):
        raise ConfigError("Scale and zero point belong together. Give both or neither.")
    if not 0 <= damping <= 1 or block_size < 1:
        raise ConfigError(
            f"damping={damping}, block_size={block_size}: write a damping of 0 to 1, such as "
            "0.01, and a block of 1 or more columns."
        )
    if weight.dim() != 2:
        raise ConfigError(
            f"A weight of shape {tuple(weight.shape)} is no matrix. "
            "Flatten a convolution's to (out, in * kernel)."
        )
    if hessian.shape != (weight.shape[1],) * 2:
        raise DataError(
            f"The hessian has shape {tuple(hessian.shape)}, the weight {tuple(weight.shape)}. "
            f"It has to be ({weight.shape[1]}, {weight.shape[1]})."
        )
    if not (hessian.isfinite().all() and weight.isfinite().all()):
        raise DataError(
            "The weight or the hessian has values that are not finite. "
            "Look for NaN in the calibration data, or for an overflow before the layer."
        )
