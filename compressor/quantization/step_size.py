"""Step sizes that are trained, by their logarithm, with the gradient of LSQ (Esser et al. 2020).

LSQ trains the scale, and takes g = 1 / sqrt(count * qmax) of its gradient, so that a step of SGD
changes scale and weights by like parts of themselves. Here u is trained, scale = initial * exp(u),
with the gradient g * dL/dscale / scale. To first order that is the same step of SGD; but the scale
stays positive, Adam changes it by a part of itself where it would step over a scale of 0.005, and
weight decay pulls it to where it began and not to 0. So it needs no learning rate of its own.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

# A channel whose weight is almost all zeros has hardly a scale to take parts of: its gradient would
# outweigh all others.
FINEST = 2.0**-10


def lsq_factor(count: float, qmax: int) -> float:
    """What LSQ multiplies a scale's gradient by.

    Args:
        count: entries that share the scale; of an activation those of one sample.
        qmax: the greatest integer.

    >>> lsq_factor(9, 4)
    0.16666666666666666
    """
    return 1 / math.sqrt(count * qmax)


def grown_scale(initial: Tensor, growth: Tensor, factor: float) -> Tensor:
    """`initial * exp(growth)`; the gradient of `growth` is `factor` * dL/dscale / scale.

    Args:
        initial: scales, positive.
        growth: of their shape.
        factor: of LSQ.

    >>> growth = torch.zeros((), requires_grad=True)
    >>> grown_scale(torch.tensor(0.5), growth, 0.1).backward()
    >>> growth.grad
    tensor(0.2000)
    """
    scale = initial * growth.detach().exp()
    reference = torch.maximum(scale, scale.amax() * FINEST)
    balanced = _Balanced.apply(growth, factor / reference.square())
    return initial * cast(Tensor, balanced).exp()


class _Balanced(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradient * factor, None
