"""The channels between two layers scaled such that both weights have like ranges.

The function stays as it is if what lies between the layers is positively homogeneous, f(s x) =
s f(x) for s > 0: nothing, ReLU, LeakyReLU, PReLU, pooling. ReLU6 is not.

Source: Nagel et al. (2019), Data-free quantization through weight equalization and bias correction
(1906.04721), section 4.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compressor.errors import ModelError


class EqualizedPair(NamedTuple):
    """Two layers that compute together what they did before.

    Attributes:
        first_weight: (channels, …).
        first_bias: (channels,), or None as before.
        second_weight: (out, channels / groups, …).
    """

    first_weight: Tensor
    first_bias: Tensor | None
    second_weight: Tensor


def output_absmax(weight: Tensor) -> Tensor:
    """The greatest magnitude for each output of a linear or convolution weight, (out,)."""
    return weight.abs().flatten(1).amax(1)


def input_absmax(weight: Tensor, groups: int = 1) -> Tensor:
    """The greatest magnitude for each input of a linear or convolution weight, (in,).

    Args:
        weight: (out, in / groups, …).
        groups: of the convolution; as many as inputs if it is depthwise.

    >>> input_absmax(torch.tensor([[1.0, -2.0], [3.0, 0.0]])).tolist()
    [3.0, 2.0]
    >>> input_absmax(torch.tensor([[1.0, -2.0], [3.0, 0.0]]), groups=2).tolist()
    [1.0, 2.0, 3.0, 0.0]
    """
    by_group = weight.abs().reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return by_group.amax((1, 3)).flatten()


def equalizing_scales(first_absmax: Tensor, second_absmax: Tensor) -> Tensor:
    """What to divide each channel of the first layer by: then both have the range √(r₁ r₂).

    A channel that one of the layers does not use is left as it is, with 1.

    Args:
        first_absmax: (channels,), as of `output_absmax`.
        second_absmax: (channels,), as of `input_absmax`.

    Returns:
        (channels,), positive.

    Raises:
        ModelError: if the layers do not have the same channels, or a range is not finite.

    >>> equalizing_scales(torch.tensor([8.0, 1.0, 0.0]), torch.tensor([2.0, 4.0, 3.0])).tolist()
    [2.0, 0.5, 1.0]
    """
    if first_absmax.shape != second_absmax.shape:
        raise ModelError(
            f"The first layer has outputs {tuple(first_absmax.shape)}, the second inputs "
            f"{tuple(second_absmax.shape)}. Only layers with the same channels between them can be "
            "equalized; after a flattening, repeat those of the first."
        )
    if not (first_absmax.isfinite().all() and second_absmax.isfinite().all()):
        raise ModelError(
            "A weight has values that are not finite, so its range cannot be equalized. "
            "Look for NaN in the layers' weights."
        )
    scales = (first_absmax.double().sqrt() / second_absmax.double().sqrt()).to(first_absmax.dtype)
    is_usable = (scales > 0) & scales.isfinite()
    return torch.where(is_usable, scales, 1.0)


def equalize_pair(
    first_weight: Tensor,
    first_bias: Tensor | None,
    second_weight: Tensor,
    scales: Tensor,
    *,
    groups: int = 1,
) -> EqualizedPair:
    """Copies of both layers, each channel between them divided by its scale and multiplied again.

    Args:
        first_weight: (channels, …), of a linear layer or a convolution of any groups.
        first_bias: (channels,), or None.
        second_weight: (out, channels / groups, …).
        scales: (channels,), as of `equalizing_scales`.
        groups: of the second layer; as many as channels if it is depthwise.

    Raises:
        ModelError: if the layers do not have the channels of `scales`.
    """
    channels = len(first_weight), groups * second_weight.shape[1]
    if channels != (len(scales), len(scales)):
        raise ModelError(
            f"There are {len(scales)} scales for a first layer of {channels[0]} outputs and a "
            f"second of {channels[1]} inputs. Give one scale for each channel between them."
        )
    divisors = scales.view(-1, *[1] * (first_weight.dim() - 1))
    bias = None if first_bias is None else first_bias / scales
    rows = scales.view(groups, -1).repeat_interleave(len(second_weight) // groups, dim=0)
    factors = rows.view(*rows.shape, *[1] * (second_weight.dim() - 2))
    return EqualizedPair(first_weight / divisors, bias, second_weight * factors)
