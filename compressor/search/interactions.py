"""What choices do to each other: damages of pairs, measured where damages do not add.

A plan's damage is reckoned as the sum of its choices'. Before a plan is trained, its damage is
measured as a whole, which takes one pass over a small subset. Where it does more, pairs of its
choices are measured, neighbours first, and their damage beyond the sum goes into the allocation.
Only what is above the sum: terms below it, of all pairs, would outweigh the damages themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

from compressor.result import Choice, Plan
from compressor.search.strategy import DamageSearch, Proposal

MISMATCH = 1.25  # ratio of damages that is no error of measurement any more
MOST_PAIRS = 24  # of one plan
MOST_IN_ALL = 60
SATURATED = 1.0  # nats: beyond, outputs are so far off that their distance says little
WORTH = 0.1  # of the sum: what is less is left out
LEAST = 1e-3  # nats: two damages below are the same


class Interactions:
    """Damages of pairs, as far as they were asked for."""

    def __init__(
        self,
        damage_of: Callable[[Plan], float],
        is_number: Callable[[str], bool],
        has_time: Callable[[str], bool],
        say: Callable[[str], None],
    ) -> None:
        """Know nothing yet.

        Args:
            damage_of: measures choices taken together; the same each time it is asked.
            is_number: whether a technique, by name, leaves structure and weights as they are.
            has_time: whether there is time for the measurement of that name.
            say: told what was found.
        """
        self._damage_of = damage_of
        self._is_number = is_number
        self._has_time = has_time
        self._say = say
        self._beyond: dict[tuple[str, str], float] = {}

    def learn(self, strategy: DamageSearch, proposal: Proposal) -> bool:
        """Whether measuring `proposal` taught the strategy something: then ask it again."""
        new = strategy.new_choices(proposal.plan)
        choices = [choice for choice in new if not self._is_number(choice.technique)]
        if len(choices) < 2 or not self._has_time(f"damage of {proposal.plan.digest}"):
            return False
        whole = Plan(tuple(choices))
        promised, measured = strategy.damage_of(whole), self._damage_of(whole)
        if measured <= max(promised, LEAST) * MISMATCH or promised > SATURATED:
            return False
        pairs = self._measure_pairs(strategy, choices)
        if not pairs:
            return False
        strategy.learn(self._beyond)
        self._say(
            f"{len(choices)} changes of the structure together do {measured:.3g} of damage, where "
            f"they were reckoned with {promised:.3g}: {pairs} pairs of them were measured, and the "
            f"plan is made anew."
        )
        return True

    def _measure_pairs(self, strategy: DamageSearch, choices: Sequence[Choice]) -> int:
        """How many pairs, of neighbours first, were measured that were not known."""
        count = 0
        places = combinations(range(len(choices)), 2)
        for i, j in sorted(places, key=lambda pair: (pair[1] - pair[0], pair)):
            pair = Plan((choices[i], choices[j]))
            key = (choices[i].key, choices[j].key)
            if key in self._beyond:
                continue
            if (
                count == MOST_PAIRS
                or len(self._beyond) >= MOST_IN_ALL
                or not self._has_time(f"damage of {pair.digest}")
            ):
                break
            alone = [strategy.damage_of(Plan((choice,))) for choice in pair]
            beyond = self._damage_of(pair) - sum(alone)
            self._beyond[key] = beyond if beyond > WORTH * sum(alone) else 0.0
            count += 1
        return count
