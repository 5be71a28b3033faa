"""What a training method costs in time: whole short fits with it and without it, in turns.

It is the time of the processor, on one thread, and not that of the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.methods_places import Place
from benchmarks.methods_table import Method
from compressor.seeding import derive_seed, isolated_rng


class TimedBatches:
    """The same few batches in every epoch, and how long they were with the trainer.

    Attributes:
        seconds: of the processor, from handing out the first batch of an epoch to being asked for
            one after the last. What else the machine does is not in them.
    """

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        started = time.process_time()
        yield from self.batches
        self.seconds = time.process_time() - started


def step_time(
    place: Place, method: Method, plain: Method, steps: int, rounds: int, seed: int
) -> dict[str, Any]:
    """Time of a step with `method`, and its ratio to one without, over a whole fit.

    What a method does once, at SETUP, when a fit begins or ends, is not in it. Which of the two is
    first changes from round to round.

    Args:
        place: where.
        method: that is timed.
        plain: what it is compared with.
        steps: of a fit; methods that follow a schedule do so over these.
        rounds: of both.
        seed: of the fits.

    Returns:
        Medians over the rounds "ratio" and "ms"; half the range of the middle half of the ratios,
        "spread".
    """
    with isolated_rng(derive_seed(seed, "batches")):
        epochs = place.epochs()
        batches = [batch for batch, _ in zip(epochs, range(steps), strict=False)]
    loader = TimedBatches(batches)
    ratios, milliseconds = [], []
    for number in range(rounds):
        order = (plain, method) if number % 2 else (method, plain)
        seconds = {each.name: time_fit(place, each, loader, seed) for each in order}
        ratios.append(seconds[method.name] / seconds[plain.name])
        milliseconds.append(1000 * seconds[method.name] / len(batches))
    quarters = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "ratio": statistics.median(ratios),
        "spread": (quarters[2] - quarters[0]) / 2,
        "ms": statistics.median(milliseconds),
        "rounds": rounds,
    }


def time_fit(place: Place, method: Method, loader: TimedBatches, seed: int) -> float:
    """Seconds of the processor for the batches of one epoch."""
    net = place.net(seed) if method.net is None else method.net(place, seed)
    task = place.task(net) if method.task is None else method.task()
    with torch.random.fork_rng():
        trainer = place.trainer(task, method.make(place), loader, seed, epochs=1)
        trainer.fit()
    return loader.seconds
