"""The damage map of a job: what each choice costs in quality, as a problem to be searched.

Measured from the reference, and again from a recovered variant when the search goes on from one:
what training has healed costs less there than it did before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from compressor.errors import CompressorError
from compressor.evidence import HOPELESS, Sensed
from compressor.logs import get_logger
from compressor.progress import Progress
from compressor.result import Choice, Plan, VariantRecord
from compressor.search.budget import Spending
from compressor.search.goal import Goal
from compressor.search.making import Base
from compressor.search.sensitivity import sense
from compressor.search.space import NOTHING, Effects, LayerCost, LayerState, Space
from compressor.search.strategy import DamageSearch
from compressor.search.study import Study

logger = get_logger(__name__)

SENSE_UNTIL = 0.6  # fraction of the minutes that is left for the search
NUMBERS_SECONDS = 20.0  # at least, for what changes numbers alone


class Bench(Protocol):
    """The part of a workbench that measures damages and costs."""

    def digest(self) -> str:
        """Of what damages depend on."""

    def is_number(self, technique: str) -> bool:
        """Whether that technique leaves structure and weights as they are."""

    def damage_of(self, plan: Plan, base: Base[Any] | None = None) -> float:
        """Divergence of the outputs from the reference's."""

    def further(self, choices: Sequence[Choice], made: Plan) -> list[Choice]:
        """Those of `choices` that can be made of a variant in which `made` was."""

    def layers(self) -> Mapping[str, LayerState]:
        """The layers whose cost can change."""

    def effects(self, choices: Sequence[Choice]) -> Effects:
        """What each choice does to each layer."""

    def layer_cost(self, resource: str) -> LayerCost:
        """Cost of a layer in a state."""


class DamageMap:
    """All choices of a job, with their damages."""

    def __init__(
        self,
        bench: Bench,
        choices: Sequence[Choice],
        path: Path,
        study: Study,
        spending: Spending,
        progress: Progress,
    ) -> None:
        """Collect what it works with; nothing is measured yet.

        Args:
            bench: measures.
            choices: of all techniques.
            path: of the map on disk, JSON.
            study: remembers damages of plans.
            spending: minutes; choices for which they do not suffice are left out.
            progress: shows how far it is.
        """
        self._bench = bench
        self._choices = choices
        self._path = path
        self._study = study
        self._spending = spending
        self._progress = progress
        self._effects: Effects = {}
        self._damage: dict[str, float] = {}
        self._assumed: Collection[str] = ()  # keys of those that were not measured
        self._key = bench.digest()

    @property
    def choices(self) -> Sequence[Choice]:
        """Those whose damage is known, or assumed."""
        return self._choices

    def sense(self) -> None:
        """Measure the damage of each choice alone; drop those for which there is no time.

        Of what changes numbers alone nothing is dropped: formats of few bits are judged together,
        and what was not measured counts as much as the median of what was.
        """
        # What changes numbers alone comes first: the minutes must suffice for it.
        numbers, others = self._split(self._choices)
        until = self._spending.seconds + NUMBERS_SECONDS

        def is_early() -> bool:
            return self._spending.fraction_left > SENSE_UNTIL

        measured = self._measure(numbers, lambda: is_early() or self._spending.seconds < until)
        completed = _completed(numbers, measured)
        if len(completed) > len(measured):
            logger.warning(
                "%d formats were not sensed: they count as the median of the %d that were",
                len(completed) - len(measured),
                len(measured),
            )
        self._assumed = completed.keys() - measured.keys()
        self._damage = completed | self._measure(others, is_early)
        self._choices = [choice for choice in self._choices if choice.key in self._damage]
        self._effects = self._bench.effects(self._choices)

    def sensed(self, goal: Goal) -> tuple[Sensed, ...]:
        """Each choice made alone of the reference: its damage, and what it saves by itself.

        What is hopeless has an infinite damage; what there was no time to measure is left out.
        """
        layers = self._bench.layers()
        costs = {resource: self._bench.layer_cost(resource) for resource in goal.resources}

        def saved(choice: Choice, cost: LayerCost) -> float:
            return sum(
                cost(name, layers[name]) - cost(name, change.applied_to(layers[name]))
                for name, change in self._effects[choice.key].items()
            )

        return tuple(
            Sensed(
                choice.technique,
                choice.site,
                choice.label,
                damage if (damage := self._damage[choice.key]) < HOPELESS else math.inf,
                {resource: saved(choice, cost) for resource, cost in costs.items()},
            )
            for choice in self._choices
            if choice.key not in self._assumed
        )

    def holds(self, plan: Plan) -> bool:
        """Whether `plan` is made at this map's sites, by the same techniques."""
        sites = {(choice.technique, choice.site) for choice in self._choices}
        return all((choice.technique, choice.site) in sites for choice in plan)

    def strategy(self, goal: Goal) -> DamageSearch:
        """From the reference."""
        return self._strategy(goal, self._choices, self._damage, NOTHING)

    def strategy_from(
        self,
        goal: Goal,
        record: VariantRecord,
        base: Base[Any],
        has_time: Callable[[], bool],
    ) -> DamageSearch:
        """From a recovered variant, whose structure every plan then has.

        Raises:
            CompressorError: if the variant's structure cannot be gone on from.
        """
        made = self.structure(record.plan)
        numbers, others = self._split(self._choices)
        others = self._bench.further(others, made)
        damage = self._measure(
            others,
            has_time,
            key=f"{self._key} {record.id}",
            damage_of=lambda choice: self.damage_of(Plan((choice,)), made, base, record.id),
        )
        damage |= {choice.key: self._damage[choice.key] for choice in numbers}
        choices = [choice for choice in (*numbers, *others) if choice.key in damage]
        missing = [choice for choice in made if choice.key not in self._effects]
        self._effects = {**self._effects, **self._bench.effects(missing)}
        return self._strategy(goal, choices, damage, made)

    def damage_of(
        self,
        plan: Plan,
        made: Plan = NOTHING,
        base: Base[Any] | None = None,
        name: str = "",
    ) -> float:
        """Of the choices of `plan` together, beyond what `made` does; measured once.

        Args:
            plan: of structure alone.
            made: structure of `base`.
            base: None is the reference.
            name: of the base.
        """
        sites = {(choice.technique, choice.site) for choice in plan}
        kept = tuple(c for c in made if (c.technique, c.site) not in sites)
        whole = self._remembered(Plan((*kept, *plan)), base, name)
        return whole if base is None else max(whole - self._remembered(made, base, name), 0.0)

    def structure(self, plan: Plan) -> Plan:
        """`plan` without what changes numbers alone."""
        return Plan(tuple(self._split(plan.choices)[1]))

    def _remembered(self, plan: Plan, base: Base[Any] | None, name: str) -> float:
        question = f"damage {self._key} {name} {plan.digest}"
        known = self._study.fact(question)
        if known is None:
            found = self._damage_of(plan, base)
            known = found if math.isfinite(found) else HOPELESS
            self._study.set_fact(question, known)
        return float(known)

    def _damage_of(self, plan: Plan, base: Base[Any] | None = None) -> float:
        """Measured; infinite for a plan that cannot be made."""
        try:
            return self._bench.damage_of(plan, base)
        except CompressorError as error:
            logger.warning("%s cannot be made: %s", plan.describe(), error)
            return math.inf

    def _measure(
        self,
        choices: Sequence[Choice],
        has_time: Callable[[], bool],
        *,
        key: str | None = None,
        damage_of: Callable[[Choice], float] | None = None,
    ) -> dict[str, float]:
        return sense(
            choices,
            damage_of or (lambda choice: self._damage_of(Plan((choice,)))),
            path=self._path,
            key=key or self._key,
            has_time=has_time,
            progress=self._progress,
        )

    def _strategy(
        self, goal: Goal, choices: Sequence[Choice], damage: Mapping[str, float], made: Plan
    ) -> DamageSearch:
        space = Space(choices, self._effects, self._bench.layers(), made)
        limits = [(self._bench.layer_cost(name), bound) for name, bound in goal.limits]
        with self._progress.task(f"{' and '.join(goal.resources)} of each layer", total=None):
            problem = space.problem(damage, self._layer_cost(goal), limits)
        return DamageSearch(problem, space, allowed_fraction=goal.delta_fraction)

    def _layer_cost(self, goal: Goal) -> LayerCost:
        """The objective's part of each layer."""
        costs = [self._bench.layer_cost(resource) for resource in goal.resources]
        pairs = list(zip(costs, goal.weights, strict=True))
        return lambda name, state: sum(weight * cost(name, state) for cost, weight in pairs)

    def _split(self, choices: Sequence[Choice]) -> tuple[list[Choice], list[Choice]]:
        """Those that change numbers alone, and the others."""
        is_number = self._bench.is_number
        numbers = [choice for choice in choices if is_number(choice.technique)]
        return numbers, [choice for choice in choices if not is_number(choice.technique)]


def _completed(choices: Sequence[Choice], damage: Mapping[str, float]) -> dict[str, float]:
    """`damage` by key; of the other `choices` the median of what is known of their technique."""
    known: dict[str, list[float]] = {}
    for choice in choices:
        if choice.key in damage:
            known.setdefault(choice.technique, []).append(damage[choice.key])
    return {
        choice.key: damage.get(choice.key, median(known[choice.technique]))
        for choice in choices
        if choice.technique in known
    }
