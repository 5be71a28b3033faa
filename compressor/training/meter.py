"""Means of the loss terms over an epoch, and the watch for a loss that is no number."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from compressor.training.clock import Clock
from compressor.training.errors import DivergedError

# Batches between looks at a loss on the GPU: a look waits for the GPU, so not every batch. The sum
# that is looked at stays infinite or NaN once a term was, so nothing is missed, only seen later.
LOOK_EVERY = 50


class LossMeter:
    """Sums of the terms of one epoch, kept where they were computed."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def update(self, losses: Mapping[str, Tensor], total: Tensor, clock: Clock) -> None:
        """Count one batch in.

        Raises:
            DivergedError: if the total is infinite or NaN; on the GPU at the latest after
                `LOOK_EVERY` batches.
        """
        is_cheap = total.device.type == "cpu"
        for name, value in losses.items():
            self._add(name, value, is_cheap)
        self._add("total", total, is_cheap)
        if is_cheap or clock.batch_in_epoch % LOOK_EVERY == 0:
            self._check(clock.epoch + 1, clock.batch_in_epoch + 1)

    def means(self, clock: Clock) -> dict[str, float]:
        """Mean of each term over its batches, by "train/" and the term's name.

        Raises:
            DivergedError: as `update`.
        """
        self._check(clock.epoch + 1, clock.batch_in_epoch)
        return {f"train/{name}": float(s) / self._counts[name] for name, s in self._sums.items()}

    def _add(self, name: str, value: Tensor, is_cheap: bool) -> None:
        item = value.item() if is_cheap else value.detach().double()
        self._sums[name] = self._sums.get(name, 0.0) + item
        self._counts[name] = self._counts.get(name, 0) + 1

    def _check(self, epoch: int, batch: int) -> None:
        total = self._sums.get("total", 0.0)
        value = total.item() if isinstance(total, Tensor) else total
        if not math.isfinite(value):
            odd = [name for name, s in self._sums.items() if not math.isfinite(float(s))]
            raise DivergedError(
                f"The training loss became {value} in epoch {epoch}, batch {batch} "
                f"(terms: {', '.join(odd)}). Lower the learning rate, "
                "or clip gradients harder."
            )
