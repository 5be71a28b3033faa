"""What deepsearch finds in a dozen trials, beside simpler searches, in synthetic worlds.

OMP_NUM_THREADS=1 python -m benchmarks.deepsearch --json deepsearch.json

In a world drop is a power of damage times an effect of each setting, measured with noise; cost is a
power of damage. Known is a variant that holds, of damage 1, and one beyond it. Saving is the
logarithm of the cost, as a fraction of that of the cheapest that truly holds: 0 is what was known,
1 is all there is. "Measured" is of the cheapest that was measured to hold, "true" of the cheapest
of those that truly do. All searches see the same worlds and the same noise, so the difference from
deepsearch has an error of its own. Errors are standard errors of the mean over worlds.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import sem

from benchmarks.common import finish, make_parser
from compressor.result import Cost, Plan, VariantRecord
from compressor.search import deepsearch
from compressor.search.deepsearch import CONFIGURED, IN_TWO_STEPS, ORDERS, DeepSearch
from compressor.search.goal import Goal
from compressor.seeding import derive_seed

GOAL = Goal("accuracy", reference=90.0, delta=1.0, is_larger_better=True, resource="latency_ms")
BEYOND = 1.4  # damage of the other known variant; that of the first is 1
Floats = NDArray[np.float64]


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    torch.set_num_threads(1)
    savings = {
        name: np.array([simulate(search, arguments, number) for number in range(arguments.worlds)])
        for name, search in SEARCHES.items()
    }
    rows = [row(name, each, savings["deepsearch"]) for name, each in savings.items()]
    summary = {
        "deepsearch_true_saving": rows[0]["true saving"],
        "least_ahead": min(each["deepsearch is ahead by"] for each in rows[1:]),
    }
    finish(rows, summary, arguments, started)


def simulate(search: Search, arguments: argparse.Namespace, number: int) -> tuple[float, ...]:
    """One search in one world: saving as measured, true saving, whether the choice truly holds."""
    world = World(np.random.default_rng(derive_seed(arguments.seed, "world", number)))
    tried = [Trial(Settings(), world.drop(Settings())), world.measure(Settings(BEYOND))]
    search(world, tried, arguments.trials, derive_seed(arguments.seed, "search", number))
    measured = [trial.settings for trial in tried if trial.drop <= 1]
    true = [settings for settings in measured if world.drop(settings) <= 1]
    is_true = world.drop(min(measured, key=world.cost)) <= 1
    return world.saving(measured), world.saving(true), float(is_true)


def row(name: str, savings: Floats, deepsearch_savings: Floats) -> dict[str, Any]:
    """One search; savings are (worlds, 3), as of `simulate`."""
    measured, true, are_true = savings.T
    ahead = deepsearch_savings[:, 1] - true
    return {
        "search": name,
        "measured saving": float(measured.mean()),
        "error of measured": float(sem(measured)),
        "true saving": float(true.mean()),
        "error of true": float(sem(true)),
        "deepsearch is ahead by": float(ahead.mean()),
        "error of ahead": float(sem(ahead)),
        "choices that hold %": 100 * float(are_true.mean()),
    }


@dataclass(frozen=True)
class Settings:
    """What a variant is made with; by default what is configured, at the damage that held."""

    damage: float = 1.0
    importance: str = deepsearch.IMPORTANCES[0]
    order: str = ORDERS[0]
    lr_factor: float = CONFIGURED.lr_factor
    distillation_weight: float = CONFIGURED.distillation_weight or 0.0
    temperature: float = CONFIGURED.temperature or 1.0
    scheduler: str = deepsearch.SCHEDULERS[0]


class Trial(NamedTuple):
    """One variant, judged."""

    settings: Settings
    drop: float  # as measured


class World:
    """A made-up model: what its variants cost and how far they drop, truly and as measured."""

    def __init__(self, random: np.random.Generator) -> None:
        """Effects are on the logarithm of drop: 0.1 is a tenth of the drop."""
        self._random = random
        self._exponent = random.uniform(0.8, 1.6)  # drop is damage to the power of this
        self._cost_exponent = -random.uniform(0.15, 0.35)
        self._importance = dict(zip(deepsearch.IMPORTANCES, random.normal(0, 0.12, 4), strict=True))
        self._in_two_steps = random.normal(-0.08, 0.12)
        self._linear = random.normal(0.03, 0.05)
        self._best = Settings(
            importance=min(self._importance, key=self._importance.__getitem__),
            order=ORDERS[self._in_two_steps < 0],
            lr_factor=log_uniform(random, (0.2, 2.0)),
            distillation_weight=random.uniform(*deepsearch.DISTILLATION_WEIGHTS),
            temperature=log_uniform(random, deepsearch.TEMPERATURES),
            scheduler=deepsearch.SCHEDULERS[self._linear < 0],
        )
        self._curvatures = random.uniform((0.1, 0.0, 0.0), (0.4, 2.0, 0.12))
        self._noise = random.uniform(0.03, 0.15)
        self._scale = 1.0
        self._scale = random.uniform(0.6, 0.98) / self.drop(Settings())

    def drop(self, settings: Settings) -> float:
        """The true one."""
        distances = (
            math.log(settings.lr_factor / self._best.lr_factor),
            settings.distillation_weight - self._best.distillation_weight,
            math.log(settings.temperature / self._best.temperature),
        )
        effect = (
            self._importance[settings.importance]
            + self._in_two_steps * (settings.order == IN_TWO_STEPS)
            + self._linear * (settings.scheduler == "linear")
            + float(self._curvatures @ np.square(distances))
        )
        return float(self._scale * math.exp(effect) * settings.damage**self._exponent)

    def cost(self, settings: Settings) -> float:
        """As a fraction of that of damage 1."""
        return float(settings.damage**self._cost_exponent)

    def measure(self, settings: Settings) -> Trial:
        """Make and judge it. The noise depends on how many were measured before, not on which."""
        return Trial(settings, self.drop(settings) + self._random.normal(0, self._noise))

    def best(self) -> Settings:
        """The cheapest settings that truly hold, within the ranges that deepsearch has."""
        damage = self.drop(self._best) ** (-1 / self._exponent)
        return replace(self._best, damage=min(damage, deepsearch.DAMAGES[1]))

    def saving(self, tried: Sequence[Settings]) -> float:
        """Of the cheapest, as a fraction of what is possible."""
        least = min(self.cost(settings) for settings in tried)
        return math.log(least) / math.log(self.cost(self.best()))


Search = Callable[[World, list[Trial], int, int], None]  # adds so many trials; the last is a seed


def by_deepsearch(world: World, tried: list[Trial], trials: int, seed: int) -> None:
    known = [record(f"known{number}", world, trial) for number, trial in enumerate(tried)]
    options: Any = {"seed": seed, "center": Settings.damage, "importance": Settings.importance}
    with (
        tempfile.TemporaryDirectory() as folder,
        DeepSearch(Path(folder) / "study.db", "worlds", GOAL, known=known, **options) as search,
    ):
        for _ in range(trials):
            question = search.ask()
            settings = Settings(question.damage, question.importance, question.order)
            tried.append(world.measure(replace(settings, **question.tuning.to_json())))
            search.tell(question, record(f"v{question.number}", world, tried[-1]))


def by_rule_at_random(world: World, tried: list[Trial], trials: int, seed: int) -> None:
    """Deepsearch that never leaves its startup, where settings are drawn at random."""
    with patch.object(deepsearch, "STARTUP", sys.maxsize):
        by_deepsearch(world, tried, trials, seed)


def by_damage(world: World, tried: list[Trial], trials: int, seed: int) -> None:
    """Where the last drop would be delta, or half way between what held and what did not."""
    for _ in range(trials):
        held = max(t.settings.damage for t in tried if t.drop <= 1)
        above = [t.settings.damage for t in tried if t.drop > 1 and t.settings.damage > held]
        failed = min(above, default=2 * deepsearch.DAMAGES[1])
        last, drop = tried[-1]
        proportional = last.damage / drop if drop > 0 else failed
        damage = proportional if held < proportional < failed else math.sqrt(held * failed)
        tried.append(world.measure(Settings(min(damage, deepsearch.DAMAGES[1]))))


def at_random(world: World, tried: list[Trial], trials: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    tried += [world.measure(draw(random)) for _ in range(trials)]


SEARCHES: dict[str, Search] = {
    "deepsearch": by_deepsearch,
    "damage by the rule, settings at random": by_rule_at_random,
    "damage searched for, configured settings": by_damage,
    "damage and settings at random": at_random,
}


def draw(random: np.random.Generator) -> Settings:
    """Any settings that deepsearch may try."""
    return Settings(
        log_uniform(random, deepsearch.DAMAGES),
        str(random.choice(deepsearch.IMPORTANCES)),
        str(random.choice(ORDERS)),
        log_uniform(random, deepsearch.LR_FACTORS),
        random.uniform(*deepsearch.DISTILLATION_WEIGHTS),
        log_uniform(random, deepsearch.TEMPERATURES),
        str(random.choice(deepsearch.SCHEDULERS)),
    )


def log_uniform(random: np.random.Generator, bounds: tuple[float, float]) -> float:
    return math.exp(random.uniform(*np.log(bounds)))


def record(name: str, world: World, trial: Trial) -> VariantRecord:
    """As the engine would hand it to deepsearch."""
    metrics, predicted = {GOAL.key: GOAL.reference - trial.drop}, {"damage": trial.settings.damage}
    cost = Cost(params=1, macs=1, size_bytes=1, latency_ms=world.cost(trial.settings))
    return VariantRecord(name, Plan(), "done", metrics, cost, predicted, epochs=1)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--worlds", type=int, default=50, help="at least 2")
    parser.add_argument("--trials", type=int, default=12, help="of each search, beside the known")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.worlds, arguments.trials = 2, 4
    if arguments.worlds < 2 or arguments.trials < 1:
        parser.error("errors take 2 worlds or more, and a search 1 trial or more")
    return arguments


if __name__ == "__main__":
    main()
