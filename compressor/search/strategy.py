"""Which plan to try next: the cheapest one of a given damage; the damage is searched for.

Drop in the metric grows with allocated damage, so what is known brackets the damage whose drop is
as large as is allowed. The next damage is where the drop would be that large if it grew with a
power of the damage: that of the two tried plans whose drops are nearest. Where that falls outside
the bracket, it is the bracket's middle. Scales are logarithmic: what counts is a ratio.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from compressor.result import Choice, Plan
from compressor.search.allocate import Problem, least_cost, total_cost
from compressor.search.space import Space

DAMAGE_PER_PERCENT = 0.15  # first guess: nats of divergence, repaired, that a drop of 1 % allows
MIN_DAMAGE = 1e-4
MAX_DAMAGE = 5.0  # outputs that have nothing to do with the reference's any more
RESOLUTION = 1.2  # a bracket narrower than this ratio of damages is decided
LARGEST_STEP = 4.0  # no power is believed further than this
NEXT_STEP = 1.5  # of the damage, where nothing failed and no plan of it is new
USUAL_POWER = 1.5  # of the damage, with which the drop grows
POWERS = (0.7, 4.0)  # that are believed; 2.3 on ResNet-56 after two epochs
LEAST_DROP = 0.05  # of what is allowed: less is noise
MARGIN = 0.1  # of the bracket, at each end: it must become narrower


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
        self._bounds = [bound for _, bound in problem.limits]
        self._told: list[tuple[Plan, float]] = []  # with its drop
        self._measured: list[tuple[list[float], list[float]]] = []  # limited costs, beside promised
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
            damage = _middle(holds, fails)
        return None

    def ask_beside(
        self, first: Proposal, count: int, allowed: float, *, cost_below: float = math.inf
    ) -> list[Proposal]:
        """Up to `count` more plans to try at once with `first`: where it leaves most open.

        They halve the widest gap of the bracket, again and again, near `first`: nothing is known
        of it yet, and how drop grows with damage is believed for a few steps only.
        """
        holds, fails = self._bracket(allowed)
        asked = first.damage
        ends = [max(holds, asked / LARGEST_STEP), asked, min(fails, asked * LARGEST_STEP)]
        ends = sorted(min(max(end, holds), fails) for end in ends)
        proposals: list[Proposal] = []
        plans = {first.plan.digest}
        while len(proposals) < count:
            low, high = max(itertools.pairwise(ends), key=lambda gap: (gap[1] / gap[0], gap[0]))
            if high < low * RESOLUTION:
                break
            damage = math.sqrt(low * high)
            ends = sorted([*ends, damage])
            proposal = self.at(damage)
            if (
                proposal is not None
                and proposal.plan.digest not in plans
                and self._is_new(proposal, cost_below)
            ):
                plans.add(proposal.plan.digest)
                proposals.append(proposal)
        return proposals

    def tell(self, plan: Plan, drop: float, limited: Sequence[float] = ()) -> None:
        """Say what came of `plan`.

        Args:
            plan: that was asked for.
            drop: of the metric; infinite, if it failed.
            limited: what was measured of each limited resource, in the order of the limits; a sum
                over layers promises less or more, and the limits are corrected by what is known
                nearest to them.
        """
        self._known.add(plan.digest)
        self._told.append((plan, drop))
        if limited:
            options = self._space.options(plan)
            promised = [total_cost(factors, options) for factors, _ in self._problem.limits]
            self._measured.append((list(limited), promised))
            self._correct_limits()

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

    def _correct_limits(self) -> None:
        limits = []
        for i, (bound, (factors, _)) in enumerate(
            zip(self._bounds, self._problem.limits, strict=True)
        ):
            known = [(m[i], p[i]) for m, p in self._measured if m[i] > 0 and p[i] > 0]
            nearest = min(
                known, key=lambda pair: abs(math.log(pair[0] / bound)), default=(1.0, 1.0)
            )
            limits.append((factors, bound * nearest[1] / nearest[0]))
        self._problem = replace(self._problem, limits=tuple(limits))

    def _proposal(self, options: list[int]) -> Proposal:
        return Proposal(
            self._space.plan(options), self._problem.cost(options), self._problem.damage(options)
        )

    def _is_new(self, proposal: Proposal, cost_below: float) -> bool:
        return proposal.plan.digest not in self._known and proposal.cost < cost_below

    def _bracket(self, allowed: float) -> tuple[float, float]:
        """The largest damage that held, and the smallest above it that did not."""
        told = self._told_points()
        holds = max((p.damage for p in told if p.drop <= allowed), default=MIN_DAMAGE)
        failed = (p.damage for p in told if p.drop > allowed and p.damage > holds)
        return holds, min(failed, default=MAX_DAMAGE)

    def _told_points(self) -> list[_Point]:
        """Damage, as it is reckoned now, and drop."""
        return [
            _Point(min(max(self.describe(plan).damage, MIN_DAMAGE), MAX_DAMAGE), drop)
            for plan, drop in self._told
        ]

    def _next(self, holds: float, fails: float, allowed: float) -> float:
        """Where the drop should be as large as is allowed, well within the bracket."""
        least = LEAST_DROP * allowed  # no logarithm of a drop that is none
        points = [_Point(p.damage, max(p.drop, least)) for p in self._told_points()]
        nearest = sorted(
            (point for point in points if math.isfinite(point.drop)),
            key=lambda point: abs(math.log(point.drop / allowed)),
        )
        if not nearest:
            damage = self._guess
        else:
            step = (allowed / nearest[0].drop) ** (1 / _power(nearest))
            damage = nearest[0].damage * min(max(step, 1 / LARGEST_STEP), LARGEST_STEP)
        if not holds < damage < fails:
            return _middle(holds, fails)
        is_bracketed = {holds, fails} <= {point.damage for point in points}
        margin = (fails / holds) ** MARGIN if is_bracketed else 1.0
        return min(max(damage, holds * margin), fails / margin)


def _middle(holds: float, fails: float) -> float:
    """Of a bracket; a step beyond what holds where nothing is known to fail."""
    middle = math.sqrt(holds * fails)
    is_open = fails >= MAX_DAMAGE and holds > MIN_DAMAGE
    return min(middle, holds * NEXT_STEP) if is_open else middle


class _Point(NamedTuple):
    """A plan that was tried."""

    damage: float
    drop: float


def _power(nearest: Sequence[_Point]) -> float:
    """Of the damage, with which the drop grows between the first point and another of them."""
    first = nearest[0]
    for other in nearest[1:]:
        ratio = math.log(other.damage / first.damage)
        if abs(ratio) > math.log(RESOLUTION):
            power = math.log(other.drop / first.drop) / ratio
            return min(max(power, POWERS[0]), POWERS[1])
    return USUAL_POWER
