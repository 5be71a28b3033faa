"""Up or down for each weight, learned from the layer's outputs (AdaRound, Nagel et al. 2020).

To the nearest is not best: errors of weights that see correlated inputs may cancel. Each weight has
an h from 0, down, to 1, up; it starts where the float weight lies and is learned with the layer's
squared output error as loss, and with a regulariser that drives it to one of its ends.

Source: Up or down? Adaptive rounding for post-training quantization (2004.10568).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.quantization.affine import fake_quantize, spread
from compressor.quantization.scheme import Scheme

Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of inputs, weight and bias

GAMMA, ZETA = -0.1, 1.1  # the stretched ends of the sigmoid: 0 and 1 are reached (paper, eq. 23)
WARMUP = 0.2  # of the time, the regulariser waits
BETAS = (20.0, 2.0)  # its exponent, first and last: from far off the ends only late
# Of it, all h at 0.5, against the error of rounding to nearest; 10 to 400 end within 5 % of each
# other in that error, 1 leaves half as much again: too many h are undecided at the end.
STRENGTH = 20.0
LEARNING_RATE = 0.03  # of Adam; an h crosses its range in a hundred steps


def adaptive_rounding(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    scheme: Scheme,
    inputs: Tensor,
    targets: Tensor,
    forward: Forward,
    *,
    generator: torch.Generator,
    iterations: int = 1000,
    seconds: float = 60.0,
    batch_size: int = 32,
    clock: Callable[[], float] = time.monotonic,
) -> Tensor:
    """A copy of `weight` on its grid, each entry one of its two neighbours there.

    On all of `inputs`, its error is never above that of rounding to nearest. When the time is
    nearly up, the schedule hastens and ends with it; else the result is that of the generator.

    Args:
        weight: float32, of any shape.
        bias: as `forward` takes it.
        scale: as of `affine.quantize`.
        zero_point: of the shape of `scale`.
        scheme: of few bits.
        inputs: (samples, …), as the layer gets them, with the errors of the layers before.
        targets: (samples, …), the outputs of the float layer, after its activation if `forward`
            has one.
        forward: inputs, weight and bias to outputs, such as `F.linear`.
        generator: on the CPU; draws the minibatches.
        iterations: steps of Adam.
        seconds: after which it ends.
        batch_size: samples of a step.
        clock: in seconds.

    Raises:
        ConfigError: if `scheme` is float, or a number is not above 0.
        DataError: if there are no samples, not as many targets, or values that are not finite.
    """
    _check(scheme, inputs, targets, iterations, seconds, batch_size)
    nearest = fake_quantize(weight.detach(), scale, zero_point, scheme)

    def error(of_weight: Tensor) -> float:
        return _squared_error(of_weight, bias, inputs, targets, forward, batch_size)

    limit = error(nearest)
    if not math.isfinite(limit):
        raise DataError(
            f"Rounded to nearest, the layer has a squared error of {limit}. "
            "Look for NaN or infinity in its weight, its inputs and its targets."
        )
    if limit == 0:
        return nearest
    grid = _Grid(weight.detach(), scale, zero_point, scheme)
    logits = grid.logits().requires_grad_()
    adam = torch.optim.Adam([logits], lr=LEARNING_RATE)
    unit = limit / len(inputs)  # the loss has no unit: it is 1 to nearest
    begin = clock()
    for step in range(iterations):
        progress = max(step / iterations, (clock() - begin) / seconds)
        if progress >= 1:
            break
        chosen = torch.randperm(len(inputs), generator=generator)[:batch_size].to(inputs.device)
        with torch.enable_grad():
            up = rectified_sigmoid(logits)
            outputs = forward(inputs[chosen], grid.weight(up), bias)
            loss = (outputs - targets[chosen]).square().sum() / (len(chosen) * unit)
            (logits.grad,) = torch.autograd.grad(loss + _regulariser(up, progress), [logits])
        adam.step()
    learned = grid.weight((rectified_sigmoid(logits.detach()) >= 0.5).to(weight.dtype))
    return learned if error(learned) < limit else nearest


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """The sigmoid, stretched and clamped to [0, 1].

    >>> rectified_sigmoid(torch.tensor([-3.0, 0.0, 3.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


@dataclass(frozen=True)
class _Grid:
    """The integers next to a weight, and the weights between them."""

    float_weight: Tensor
    scale: Tensor
    zero_point: Tensor
    scheme: Scheme

    def weight(self, up: Tensor) -> Tensor:
        """The weight so far above its lower neighbours, 0 to 1."""
        step, shift = (spread(x, up, self.scheme) for x in (self.scale, self.zero_point))
        integers = (self.float_weight / step).floor() + shift + up
        return (integers.clamp(self.scheme.qmin, self.scheme.qmax) - shift) * step

    def logits(self) -> Tensor:
        """Of the float weight's place between its neighbours."""
        steps = self.float_weight / spread(self.scale, self.float_weight, self.scheme)
        return torch.logit((steps - steps.floor() - GAMMA) / (ZETA - GAMMA))


def _regulariser(up: Tensor, progress: float) -> Tensor | float:
    """0 if each h is at an end; the nearer to the end of the time, the wider it reaches."""
    if progress < WARMUP:
        return 0.0
    late = (progress - WARMUP) / (1 - WARMUP)
    beta = BETAS[1] + (BETAS[0] - BETAS[1]) * (1 + math.cos(math.pi * late)) / 2
    return STRENGTH * (1 - (2 * up - 1).abs().pow(beta)).mean()


@torch.no_grad()
def _squared_error(
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    targets: Tensor,
    forward: Forward,
    batch_size: int,
) -> float:
    """Summed over all samples and outputs."""
    total = 0.0
    for begin in range(0, len(inputs), batch_size):
        part = slice(begin, begin + batch_size)
        errors = forward(inputs[part], weight, bias) - targets[part]
        total += float(errors.double().square().sum())
    return total


def _check(
    scheme: Scheme,
    inputs: Tensor,
    targets: Tensor,
    iterations: int,
    seconds: float,
    batch_size: int,
) -> None:
    if not scheme.has_integers:
        raise ConfigError("Floats have no steps to choose. Give a scheme of 2 to 16 bits.")
    numbers = {"iterations": iterations, "seconds": seconds, "batch_size": batch_size}
    for name, number in numbers.items():
        if not number > 0:
            raise ConfigError(f"{name}={number} leaves nothing to learn with. Give more than 0.")
    if not len(inputs) or len(inputs) != len(targets):
        raise DataError(
            f"There are {len(inputs)} inputs and {len(targets)} targets. "
            "Give one target for each input, and at least one."
        )
