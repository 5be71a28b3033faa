"""How near one pass of the search comes to the best plan that its minutes could have finished.

OMP_NUM_THREADS=1 python -m benchmarks.search_worlds --json search_worlds.json

In a made-up world drop is a power of damage, falls with a power of the epochs, has a factor of each
plan's own that nothing foretells, and is measured with noise; choices are blocks of a network that
all save the same and damage differently. Powers, noise and damages are drawn anew for every world,
about those of ResNet-56 on CIFAR-10. Time is counted, not waited for. The saving is a fraction of
the ideal's, which knows the world but no plan's own factor, and trains one plan for `IDEAL_SHARE`
of the minutes. A measurement may count a plan in that is truly outside: "truly within" says how
many of the results are not. With --width variants are made at once, as by so many workers; a round
takes as long as its longest.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.common import finish, make_parser
from compressor.progress import SILENT
from compressor.result import Choice, Cost, Plan, VariantRecord
from compressor.search.attempts import Attempts
from compressor.search.budget import Spending
from compressor.search.effort import TRIALS
from compressor.search.finishing import Effort
from compressor.search.goal import Goal
from compressor.search.search import SEARCH_SHARE, Search
from compressor.search.space import LayerChange, LayerState, Space
from compressor.search.strategy import DamageSearch
from compressor.search.variants import Wish
from compressor.seeding import derive_seed

BLOCKS = 40
REMOVABLE_SHARE = 0.6  # of an epoch's time that the blocks take
GOAL = Goal("accuracy", reference=90.0, delta=1.0, is_larger_better=True, resource="macs")
LAYERS = {f"block{i}": LayerState(8, 8) for i in range(BLOCKS)}
CHOICES = [Choice("block_removal", name, {"removed": True}) for name in LAYERS]
EPOCH_SECONDS, JUDGE_SECONDS = 40.0, 8.0  # of the reference, at one thread
IDEAL_SHARE = 0.7
MANY = 100


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    torch.set_num_threads(1)
    rows = [row(minutes, arguments) for minutes in arguments.minutes]
    summary = {
        f"saving_{each['minutes']:g}_minutes": each["part of the ideal saving"] for each in rows
    }
    finish(rows, summary, arguments, started)


def row(minutes: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """All worlds with one budget."""
    seeds = [derive_seed(arguments.seed, "world", number) for number in range(arguments.worlds)]
    outcomes = np.array([simulate(seed, minutes, arguments.width) for seed in seeds])
    mean = outcomes.mean(axis=0)
    return {
        "minutes": minutes,
        "width": arguments.width,
        "part of the ideal saving": float(mean[0]),
        "error of the mean": float(outcomes[:, 0].std() / math.sqrt(len(outcomes))),
        "truly within": float(mean[1]),
        "minutes used": float(mean[2]),
        "variants": float(mean[3]),
        "worlds": arguments.worlds,
    }


@dataclass(frozen=True)
class World:
    """One network and its metric.

    Attributes:
        power: of the damage, with which the drop grows.
        rate: of the epochs, with which it falls.
        unit: damage at which the drop would be 1 without training.
        noise: standard deviation of a measured drop.
        luck: standard deviation of the logarithm of a plan's own factor, in its drop: of two plans
            that should lose as much, one may recover far better.
        damages: of each choice.
        seed: of the plans' luck.
    """

    power: float
    rate: float
    unit: float
    noise: float
    luck: float
    damages: dict[str, float]
    seed: int

    @classmethod
    def drawn(cls, random: np.random.Generator) -> World:
        """One of those that are like ResNet-56's."""
        ramp = np.exp(3.2 * np.arange(BLOCKS) / BLOCKS) * random.uniform(0.7, 1.4, BLOCKS)
        return cls(
            power=random.uniform(1.3, 2.8),
            rate=random.uniform(0.2, 1.0),
            unit=random.uniform(0.06, 0.25),
            noise=random.uniform(0.1, 0.4),
            luck=random.uniform(0.1, 0.6),
            damages={choice.key: 0.004 * x for choice, x in zip(CHOICES, ramp, strict=True)},
            seed=int(random.integers(2**32)),
        )

    def drop(self, plan: Plan, damage: float, epochs: float) -> float:
        """Without noise."""
        own = np.random.default_rng([self.seed, int(plan.digest, 16)]).normal(0, self.luck)
        return float(
            math.exp(own) * (damage / self.unit) ** self.power * (1 + epochs) ** -self.rate
        )

    def most_removed(self, epochs: float) -> int:
        """Blocks of the largest plan that holds after so many epochs."""
        limit = self.unit * (GOAL.delta * (1 + epochs) ** self.rate) ** (1 / self.power)
        sums = itertools.accumulate(sorted(self.damages.values()))
        return sum(total <= limit for total in sums)


class Clockwork:
    """Makes variants of a world in no time, and moves the clock."""

    def __init__(self, world: World, random: np.random.Generator, width: int) -> None:
        self.world, self.random, self.width = world, random, width
        self.turns, self.seconds = 1, 0.0
        self._numbers = itertools.count()

    def make(self, wishes: Sequence[Wish]) -> list[VariantRecord]:
        """A round, which takes as long as its longest, and judges one after the other."""
        records = [self._make(wish) for wish in wishes]
        self.seconds += max((record.seconds for record in records), default=0.0)
        self.seconds += JUDGE_SECONDS * len(records)
        return records

    def _make(self, wish: Wish) -> VariantRecord:
        epochs = wish.epochs + wish.epochs_before
        drop = self.world.drop(wish.plan, wish.predicted["damage"], epochs)
        drop += self.random.normal(0, self.world.noise)
        return VariantRecord(
            f"v{next(self._numbers)}",
            wish.plan,
            "done",
            {GOAL.key: GOAL.reference - drop},
            Cost(1, BLOCKS - len(wish.plan), 1, 1.0),
            wish.predicted,
            epochs,
            seconds=wish.epochs * EPOCH_SECONDS * (1 - REMOVABLE_SHARE * len(wish.plan) / BLOCKS),
            is_final=wish.is_final,
            start=wish.start.id if wish.start else "",
        )


def simulate(seed: int, minutes: float, width: int) -> tuple[float, bool, float, int]:
    """Saving as a part of the ideal's, whether it truly holds, minutes used, variants."""
    random = np.random.default_rng(seed)
    world = World.drawn(random)
    made = Clockwork(world, random, width)
    space = Space(CHOICES, {c.key: {c.site: LayerChange(removes=True)} for c in CHOICES}, LAYERS)
    answers: dict[str, int] = {}
    attempts = Attempts(
        GOAL,
        made,  # type: ignore[arg-type]
        lambda question, answer: answers.setdefault(question, int(answer())),
        SILENT,
    )
    problem = space.problem(world.damages, lambda _, state: 0.0 if state.is_removed else 1.0)
    Search(
        GOAL,
        attempts,
        DamageSearch(problem, space, allowed_fraction=GOAL.delta_fraction),
        Spending(minutes, MANY, clock=lambda: made.seconds),
        Effort(max(int(minutes * 60 * SEARCH_SHARE / TRIALS[1] / EPOCH_SECONDS), 1), None, MANY),
        is_number=lambda technique: False,
    ).run()
    best = attempts.best()
    removed = len(best.plan) if best else 0
    holds = (
        best is None or world.drop(best.plan, best.predicted["damage"], best.epochs) <= GOAL.delta
    )
    epochs = IDEAL_SHARE * minutes * 60 / (EPOCH_SECONDS * (1 - REMOVABLE_SHARE / 2))
    ideal = max(world.most_removed(epochs), 1)
    return removed / ideal, holds, made.seconds / 60, len(attempts.records)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, nargs="+", default=[8, 15, 30, 60])
    parser.add_argument("--worlds", type=int)
    parser.add_argument("--width", type=int, default=1, help="variants that are made at once")
    arguments = parser.parse_args()
    arguments.worlds = arguments.worlds or (3 if arguments.quick else 50)
    return arguments


if __name__ == "__main__":
    main()
