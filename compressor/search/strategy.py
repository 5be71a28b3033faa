"""Which plan to try next: the cheapest one of a given damage; the damage is searched for.

Drop in the metric grows with allocated damage, so the answers bracket it. Inside the bracket the
next damage is where the drop would be as large as is allowed if it were proportional to damage
(regula
falsi); where that falls outside, the bracket's middle. Scales are logarithmic: what counts is a
ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compressor.result import Plan
from compressor.search.allocate import Problem, least_cost
from compressor.search.space import Space

DAMAGE_PER_PERCENT = 0.4  # first guess: nats of divergence that a drop of 1 % of the metric allows
MIN_DAMAGE = 1e-4
MAX_DAMAGE = 5.0  # outputs that have nothing to do with the reference's any more
RESOLUTION = 1.15  # a bracket narrower than this ratio of damages is decided
LARGEST_STEP = 4.0  # proportionality is not believed further than this


@dataclass(frozen=True)
class Proposal:
    """A plan, and what the allocation promises of it."""

    plan: Plan
    cost: float
    damage: float


class DamageSearch:
    """Ask for a plan, tell its drop; each answer narrows the bracket."""

    def __init__(self, problem: Problem, space: Space, *, allowed_fraction: float) -> None:
        """Start from a guess.

        Args:
            problem: sites, damages, costs.
            space: that it was made from.
            allowed_fraction: drop that is allowed, as a fraction of the reference's metric.
        """
        self._problem = problem
        self._space = space
        self._holds, self._fails = MIN_DAMAGE, MAX_DAMAGE
        self._next = self._inside(DAMAGE_PER_PERCENT * allowed_fraction * 100)
        self._asked: set[str] = {Plan().digest}

    def ask(self) -> Proposal | None:
        """The next plan; None when the bracket is decided."""
        while self._holds * RESOLUTION < self._fails:
            proposal = self.at(self._next)
            if proposal is None:  # nothing so harmless meets the limits of the budget
                self._holds = self._next
            elif proposal.plan.digest not in self._asked:
                self._asked.add(proposal.plan.digest)
                return proposal
            else:  # plans are discrete: this one is known, and has less damage than was allowed
                self._holds = self._next
            self._next = self._middle()
        return None

    def tell(self, proposal: Proposal, drop: float, allowed: float) -> None:
        """Say how far the metric of `proposal` dropped, and how far it may."""
        damage = min(max(proposal.damage, MIN_DAMAGE), MAX_DAMAGE)
        if drop <= allowed:
            self._holds = max(self._holds, damage)
        else:
            self._fails = min(self._fails, damage)
        step = allowed / drop if 0 < drop < math.inf else LARGEST_STEP
        if drop == math.inf:  # the variant failed: how far it was off is not known
            self._next = self._middle()
        else:
            step = min(max(step, 1 / LARGEST_STEP), LARGEST_STEP)
            self._next = self._inside(damage * step)

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

    def _inside(self, damage: float) -> float:
        """`damage`, or the bracket's middle if it is outside."""
        return damage if self._holds < damage < self._fails else self._middle()

    def _middle(self) -> float:
        return math.sqrt(self._holds * self._fails)
