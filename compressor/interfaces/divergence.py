"""How far a model's outputs are from the reference's: the damage of a choice."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

ENERGY_FLOOR = 1e-12  # outputs that are all zero have no scale


def divergence(
    outputs: Iterable[list[Tensor]], reference: Iterable[list[Tensor]], *, is_classifier: bool
) -> float:
    """Mean over samples; 0 for equal outputs, nan or inf if an output is not finite.

    Args:
        outputs: for each batch, the model's floating point outputs.
        reference: the reference's, of the same batches.
        is_classifier: (N, K) outputs are logits and compared by Kullback-Leibler divergence from
            the reference, in nats; all others by squared error over the reference's mean square.
    """
    total, samples = 0.0, 0
    for ours, theirs in zip(outputs, reference, strict=True):
        count = len(theirs[0]) if theirs and theirs[0].dim() else 1
        for a, b in zip(ours, theirs, strict=True):
            if is_classifier and b.dim() == 2 and b.shape[1] > 1:
                total += _kl(a, b)
            else:
                total += count * _relative_square(a, b)
        samples += count
    return total / max(samples, 1)


def _kl(logits: Tensor, reference: Tensor) -> float:
    """Summed over samples."""
    target, ours = reference.double().log_softmax(1), logits.double().log_softmax(1)
    return float((target.exp() * (target - ours)).sum())


def _relative_square(output: Tensor, reference: Tensor) -> float:
    error = (output.double() - reference.double()).square().mean()
    scale = reference.double().square().mean().clamp_min(ENERGY_FLOOR)
    return float(error / scale) if torch.isfinite(error) else float("nan")
