"""The learning rate over a fit when the user names no scheduler of torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from compressor.errors import ConfigError, suggest
from compressor.interfaces.optimizers import Schedule

Shape: TypeAlias = Callable[[float], float]
"""What the learning rate is multiplied by when a fraction of the fit has passed."""

WARMUP = 0.05  # of a fit
START = 0.1  # what the first batch gets, so that it is not wasted


def warmup_cosine(fraction: float, *, warmup: float = WARMUP, start: float = START) -> float:
    """Linear rise, then half a cosine down to 0 (Loshchilov and Hutter, 2017, without restarts).

    Args:
        fraction: of the fit that has passed, 0 to 1.
        warmup: the fraction that the rise takes.
        start: what the first batch gets.

    Returns:
        0 to 1, by which the learning rate is multiplied.

    >>> warmup_cosine(0.0), warmup_cosine(0.05), warmup_cosine(1.0)
    (0.1, 1.0, 0.0)
    """
    if fraction < warmup:
        return start + (1 - start) * fraction / warmup
    return 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))


def warmup_linear(fraction: float) -> float:
    """The rise of `warmup_cosine`, then a straight line down to 0.

    >>> warmup_linear(0.0), warmup_linear(0.05), warmup_linear(1.0)
    (0.1, 1.0, 0.0)
    """
    return warmup_constant(fraction) if fraction < WARMUP else (1 - fraction) / (1 - WARMUP)


def warmup_constant(fraction: float) -> float:
    """The rise of `warmup_cosine`, then 1.

    >>> warmup_constant(0.0), warmup_constant(0.05), warmup_constant(1.0)
    (0.1, 1.0, 1.0)
    """
    return START + (1 - START) * fraction / WARMUP if fraction < WARMUP else 1.0


SHAPES: Mapping[str, Shape] = {
    "cosine": warmup_cosine,
    "linear": warmup_linear,
    "constant": warmup_constant,
}


def shape_called(name: str) -> Shape:
    """One of `SHAPES`.

    Raises:
        ConfigError: if there is none of that name.
    """
    if name not in SHAPES:
        raise ConfigError(
            f"There is no schedule {name!r}. {suggest(name, SHAPES)} "
            "One of torch is {'name': 'StepLR', 'step_size': 10}."
        )
    return SHAPES[name]


def make_default_schedule(
    optimizer: Optimizer, fraction: Callable[[], float], shape: Shape = warmup_cosine
) -> Schedule:
    """`shape` on `optimizer` after every batch.

    Args:
        optimizer: its learning rates now are the highest.
        fraction: gives the part of the fit that has passed. Asked anew each time, because a fit may
            be made longer.
        shape: of the rate.
    """
    scheduler = LambdaLR(optimizer, lambda _: shape(fraction()))

    def refresh() -> None:
        for group, base in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = base * shape(fraction())

    return Schedule(scheduler, "iteration", refresh)
