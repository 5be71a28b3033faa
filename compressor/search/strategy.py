"""Which plan to try next: the cheapest one of a given damage; the damage is searched for.

Drop in the metric grows with allocated damage, so what is known brackets the damage whose drop is
as large as is allowed. Inside the bracket the next damage is where the drop would be that large if
it were proportional to damage (regula falsi); where that falls outside, the bracket's middle.
Scales are logarithmic: what counts is a ratio.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from compressor.result import Choice, Plan
from compressor.search.allocate import Problem, least_cost
from compressor.search.space import Space

DAMAGE_PER_PERCENT = 0.1  # first guess: nats of divergence, repaired, that a drop of 1 % allows
MIN_DAMAGE = 1e-4
MAX_DAMAGE = 5.0  # outputs that have nothing to do with the reference's any more
RESOLUTION = 1.2  # a bracket narrower than this ratio of damages is decided
LARGEST_STEP = 4.0  # proportionality is not believed further than this


@dataclass(frozen=True)
class Proposal:
    """A plan, and what the allocation promises of it."""

    plan: Plan
    cost: float
    damage: float


class DamageSearch:
    """Ask for a plan, tell its drop; each answer narrows the bracket.

    A plan is asked for again until something is told of it.
    """

    def __init__(self, problem: Problem, space: Space, *, allowed_fraction: float) -> None:
        """Start from a guess.

        Args:
            problem: sites, damages, costs.
            space: that it was made from.
            allowed_fraction: drop that is allowed, as a fraction of the reference's metric.
        """
        self._problem = problem
        self._space = space
        self._guess = DAMAGE_PER_PERCENT * allowed_fraction * 100
        self._told: list[tuple[Plan, float]] = []  # with its drop
        self._known: set[str] = {self.describe(Plan()).plan.digest}

    def ask(self, allowed: float, *, cost_below: float = math.inf) -> Proposal | None:
        """The next plan, for a drop of `allowed`; None when nothing new is in the bracket.

        Args:
            allowed: drop of the metric.
            cost_below: of the best so far; a plan that costs more teaches nothing.
        """
        holds, fails = self._bracket(allowed)
        damage = self._next(holds, fails, allowed)
        while holds * RESOLUTION < fails:
            proposal = self.at(damage)
            if proposal is not None and self._is_new(proposal, cost_below):
                return proposal
            # Plans are discrete: up to this damage there is nothing new.
            holds = damage
            damage = math.sqrt(holds * fails)
        return None

    def tell(self, plan: Plan, drop: float) -> None:
        """Say how far the metric of `plan` dropped; infinitely, if it failed."""
        self._known.add(plan.digest)
        self._told.append((plan, drop))

    def knows(self, plan: Plan) -> bool:
        """Whether it is made of this space's choices."""
        return self._space.holds(plan)

    def learn(self, interactions: Mapping[tuple[str, str], float]) -> None:
        """Take what choices do to each other into account, from now on and in what was told.

        Args:
            interactions: the damage of two choices, by their keys, beyond the sum of both.
        """
        factors = self._space.interactions(interactions)
        self._problem = replace(self._problem, interactions=factors)

    def new_choices(self, plan: Plan) -> list[Choice]:
        """Those of `plan` that not every plan has, in the order of the sites."""
        return self._space.taken(self._space.options(plan))

    def damage_of(self, plan: Plan) -> float:
        """What the allocation reckons with."""
        return self.describe(plan).damage

    @property
    def first_damage(self) -> float:
        """Of the first guess."""
        return self._guess

    @property
    def cost_of_nothing(self) -> float:
        """The objective where no choice is made."""
        return self.describe(Plan()).cost

    def at(self, damage_limit: float) -> Proposal | None:
        """The cheapest plan of that damage or less."""
        options = least_cost(self._problem, damage_limit)
        return None if options is None else self._proposal(options)

    def describe(self, plan: Plan) -> Proposal:
        """What the allocation says of a given plan."""
        return self._proposal(self._space.options(plan))

    def _proposal(self, options: list[int]) -> Proposal:
        return Proposal(
            self._space.plan(options), self._problem.cost(options), self._problem.damage(options)
        )

    def _is_new(self, proposal: Proposal, cost_below: float) -> bool:
        return proposal.plan.digest not in self._known and proposal.cost < cost_below

    def _bracket(self, allowed: float) -> tuple[float, float]:
        """The largest damage that held, and the smallest above it that did not."""
        told = self._told_damages()
        holds = max((d for d, drop in told if drop <= allowed), default=MIN_DAMAGE)
        failed = (d for d, drop in told if drop > allowed and d > holds)
        return holds, min(failed, default=MAX_DAMAGE)

    def _told_damages(self) -> list[tuple[float, float]]:
        """Damage, as it is reckoned now, and drop."""
        damages = [self.describe(plan).damage for plan, _ in self._told]
        return [
            (min(max(damage, MIN_DAMAGE), MAX_DAMAGE), drop)
            for damage, (_, drop) in zip(damages, self._told, strict=True)
        ]

    def _next(self, holds: float, fails: float, allowed: float) -> float:
        damage = self._guess
        if self._told:
            last, drop = self._told_damages()[-1]
            step = allowed / drop if drop > 0 else LARGEST_STEP
            damage = last * min(max(step, 1 / LARGEST_STEP), LARGEST_STEP)
        return damage if holds < damage < fails else math.sqrt(holds * fails)
