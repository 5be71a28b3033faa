"""Outliers of a linear layer's inputs moved into its weight, where they cost less (SmoothQuant).

The inputs X are divided by a scale for each feature, in the normalisation before the layer, and the
weight's columns are multiplied by it: X Wᵀ = (X / s) (W s)ᵀ.

Source: Xiao et al. (2022), SmoothQuant: accurate and efficient post-training quantization for large
language models (2211.10438).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError, ModelError
from compressor.quantization.affine import channel_range, fake_quantize, parameters_of_range
from compressor.quantization.scheme import Scheme

ALPHAS = tuple(number / 10 for number in range(11))


def smoothing_scales(
    activation_absmax: Tensor, weight_absmax: Tensor, alpha: float = 0.5
) -> Tensor:
    """What to divide each input feature by: max|X|^alpha / max|W|^(1 - alpha).

    A feature that is always 0, or that no weight looks at, is left as it is, with 1.

    Args:
        activation_absmax: (in,), the greatest magnitude seen of each feature.
        weight_absmax: (in,), the greatest of its weights, in all layers that take the feature.
        alpha: 0 to 1, how much of the difficulty moves to the weights: 0 makes the ranges of the
            weight's columns alike, 1 those of the features, 0.5 those of a feature and its column.

    Returns:
        (in,), positive.

    Raises:
        ConfigError: if `alpha` is out of range.
        ModelError: if the two do not have the same features, or a range is not finite.

    >>> smoothing_scales(torch.tensor([16.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 2.0])).tolist()
    [4.0, 0.5, 1.0]
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha={alpha} is not within 0 and 1. The usual one is 0.5.")
    if activation_absmax.shape != weight_absmax.shape:
        raise ModelError(
            f"There are ranges of {tuple(activation_absmax.shape)} features and of "
            f"{tuple(weight_absmax.shape)} columns. Take both of the same layer."
        )
    if not (activation_absmax.isfinite().all() and weight_absmax.isfinite().all()):
        raise ModelError(
            "A range is not finite, so nothing can be smoothed. Look for NaN in the calibration "
            "data and in the weights, or for an overflow before the layer."
        )
    ranges = activation_absmax.double(), weight_absmax.double()
    scales = (ranges[0] ** alpha / ranges[1] ** (1 - alpha)).to(activation_absmax.dtype)
    is_usable = (ranges[0] > 0) & (ranges[1] > 0) & (scales > 0) & scales.isfinite()
    return torch.where(is_usable, scales, 1.0)


def smooth(weight: Tensor, scales: Tensor) -> Tensor:
    """A copy of a linear weight (out, in) for inputs that were divided by `scales` (in,)."""
    return weight * scales


def search_alpha(
    weights: Sequence[Tensor],
    inputs: Tensor,
    activation_scheme: Scheme,
    weight_scheme: Scheme,
    alphas: Iterable[float] = ALPHAS,
    *,
    error_fraction: float = 1.0,
) -> float | None:
    """The alpha whose quantized products are nearest to the float ones; None: do not smooth.

    The error is squared and summed over the outputs of all layers that take the inputs. Ranges are
    those of the sample.

    Args:
        weights: (out, in) of each layer.
        inputs: (…, in), a sample of what they all take. With axis 0 in `activation_scheme`, each
            row has a scale of its own.
        activation_scheme: of the inputs.
        weight_scheme: of the weights.
        alphas: to try.
        error_fraction: of the error without smoothing, that the error has to fall below.

    Raises:
        DataError: if the sample is empty or not finite.
    """
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    if not rows.numel() or not rows.isfinite().all():
        raise DataError(
            f"The sample of inputs, of shape {tuple(inputs.shape)}, is empty or not finite. "
            "Give at least one row of calibration data without NaN."
        )
    joined = torch.cat([weight.detach() for weight in weights])
    absmax = rows.abs().amax(0), joined.abs().amax(0)
    outputs = [rows @ weight.T for weight in weights]
    best, least = None, 0.0
    for alpha in (None, *alphas):
        scales = torch.ones_like(absmax[0]) if alpha is None else smoothing_scales(*absmax, alpha)
        smoothed = _fake_quantized(rows / scales, activation_scheme)
        error = sum(
            (smoothed @ _fake_quantized(smooth(weight.detach(), scales), weight_scheme).T - output)
            .double()
            .square()
            .sum()
            .item()
            for weight, output in zip(weights, outputs, strict=True)
        )
        if alpha is None:
            least = error_fraction * error
        elif error < least:
            best, least = alpha, error
    return best


def _fake_quantized(x: Tensor, scheme: Scheme) -> Tensor:
    return fake_quantize(x, *parameters_of_range(*channel_range(x, scheme), scheme), scheme)
