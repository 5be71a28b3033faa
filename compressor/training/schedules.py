"""The learning rate over a fit when the user names no scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from compressor.interfaces.optimizers import Schedule


def warmup_cosine(fraction: float, *, warmup: float = 0.05, start: float = 0.1) -> float:
    """Linear rise, then half a cosine down to 0 (Loshchilov and Hutter, 2017, without restarts).

    Args:
        fraction: of the fit that has passed, 0 to 1.
        warmup: the fraction that the rise takes.
        start: what the first batch gets, so that it is not wasted.

    Returns:
        0 to 1, by which the learning rate is multiplied.

    >>> warmup_cosine(0.0), warmup_cosine(0.05), warmup_cosine(1.0)
    (0.1, 1.0, 0.0)
    """
    if fraction < warmup:
        return start + (1 - start) * fraction / warmup
    return 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))


def make_default_schedule(optimizer: Optimizer, fraction: Callable[[], float]) -> Schedule:
    """`warmup_cosine` on `optimizer` after every batch.

    Args:
        optimizer: its learning rates now are the highest.
        fraction: gives the part of the fit that has passed. Asked anew each time, because a fit may
            be made longer.
    """
    scheduler = LambdaLR(optimizer, lambda _: warmup_cosine(fraction()))

    def refresh() -> None:
        for group, base in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = base * warmup_cosine(fraction())

    return Schedule(scheduler, "iteration", refresh)
