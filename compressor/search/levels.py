"""The search in full: numbers alone, a pass from the reference, passes from what held, deepsearch.

Level 1 is one pass. Each further level prunes what was recovered again: a choice is sensed anew on
the recovered variant, where training has healed a part of its damage. Deepsearch varies how plans
are made and trained. Several objectives have a pass each, so that the result is a frontier.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from compressor.errors import CompressorError
from compressor.result import LatencyErrors, Plan, VariantRecord
from compressor.search.attempts import Attempts
from compressor.search.budget import Spending
from compressor.search.damage_map import DamageMap
from compressor.search.deepsearch import IN_TWO_STEPS, DeepSearch, Question
from compressor.search.finishing import Effort
from compressor.search.goal import Goal
from compressor.search.interactions import Interactions
from compressor.search.relaxing import Relaxing
from compressor.search.search import Search
from compressor.search.strategy import MIN_DAMAGE, DamageSearch, Proposal
from compressor.search.tuning import Tuning
from compressor.search.variants import DEFAULT

FIRST_WEIGHT = 2.0  # of the first pass among the others, in time and trials
INTERACTION_SHARE = 0.1  # of a pass's time, for damages of plans and pairs
SENSE_SHARE = 0.3  # of a further pass's time
DEEP_TRIALS_SHARE = 0.6  # of deepsearch's time; the rest finishes the best of its trials
REPAIRED_HALF = 0.5  # of the damage, in the first of two steps


@dataclass(frozen=True)
class Depth:
    """How far the search goes.

    Attributes:
        level: 1 is one pass; each further one goes on from what held.
        study: file of the study, for deepsearch; None leaves that out.
        seed: of what deepsearch draws.
        importance: criterion by which the choices were made.
        reranked: a plan by another criterion.
        configured: how variants are trained where nothing else is said, all of it.
    """

    level: int = 1
    study: Path | None = None
    seed: int = 0
    importance: str = ""
    reranked: Callable[[Plan, str], Plan] | None = None
    configured: Tuning = DEFAULT


class Levels:
    """One run's search."""

    def __init__(
        self,
        attempts: Attempts,
        damages: DamageMap,
        spending: Spending,
        effort: Effort,
        depth: Depth,
        *,
        is_number: Callable[[str], bool],
    ) -> None:
        """Collect what the search works with.

        Args:
            attempts: makes and remembers the variants.
            damages: what choices cost in quality.
            spending: minutes and trials.
            effort: epochs.
            depth: how far it goes.
            is_number: whether a technique, by name, leaves structure and weights as they are.
        """
        self.goal = attempts.goal
        self._attempts = attempts
        self._damages = damages
        self._spending = spending
        self._effort = effort
        self._depth = depth
        self._is_number = is_number
        self._gone_on_from: set[str] = set()
        self._number = 0  # of the pass
        self._is_last = False

    def run(self) -> VariantRecord | None:
        """The best variant within delta; None if there is none."""
        self._count_known()
        self._judge_numbers()
        passes = list(self._passes())
        weights = [FIRST_WEIGHT, *[1.0] * (len(passes) - 1)]
        for self._number, one in enumerate(passes):
            left, share = len(passes) - self._number, weights[self._number]
            share /= sum(weights[self._number :])
            # At least one trial for each pass that is still to come.
            most = max(self._spending.trials_left - (left - 1), 1)
            trials = min(math.ceil(self._spending.trials_left * share), most)
            if self._number and self._spending.trials_left <= 0:
                self._attempts.say(
                    f"No trial is left for {left} further passes. Raise budget.trials."
                )
                break
            until = self._spending.seconds + self._spending.seconds_left * share
            part = self._spending.part(until, trials)
            self._is_last = left == 1
            given = part.trials_left
            one(part)
            self._spending.trials_left -= given - part.trials_left
        errors = LatencyErrors.of(self._attempts.records)
        if errors is not None:
            self._attempts.say(str(errors))
        return self._attempts.best()

    def _passes(self) -> Iterator[Callable[[Spending], None]]:
        for goal in self._goals():
            yield partial(self._pass, goal)
        for _ in range(1, self._depth.level):
            yield self._go_on
        if self._depth.study is not None:
            yield self._deepen

    def _goals(self) -> list[Goal]:
        """All objectives together; then, if there are several, each alone."""
        if not self.goal.also:
            return [self.goal]
        alone = [
            replace(self.goal, resource=resource, also=(), weights=(1.0,))
            for resource in self.goal.resources
        ]
        return [self.goal, *alone]

    def _count_known(self) -> None:
        """Trials of earlier runs in this study are trials of the budget."""
        known = [r for r in self._attempts.known if r.epochs and not (r.start or r.is_final)]
        if known:
            self._spending.trials_left = max(self._spending.trials_left - len(known), 0)
            self._attempts.say(
                f"{len(known)} trials of earlier runs in this folder are known and count."
            )

    def _judge_numbers(self) -> None:
        """Few bits alone need no fine-tuning: they are judged first."""
        strategy = self._damages.strategy(self.goal)
        plan = Plan(tuple(c for c in self._damages.choices if self._is_number(c.technique)))
        numbers = strategy.describe(plan)  # the first format of each site
        if numbers.cost < strategy.cost_of_nothing or (len(numbers.plan) and self.goal.limits):
            record = self._attempts.make(self._attempts.wish(numbers, epochs=0))
            if not self.goal.holds(record):
                Relaxing(
                    self._attempts,
                    strategy,
                    self._spending,
                    self._effort.trial_epochs,
                    self._is_number,
                ).relax(record)

    def _pass(self, goal: Goal, part: Spending) -> None:
        """From the reference."""
        strategy = self._damages.strategy(goal)
        self._search(part, goal, strategy, self._damages.damage_of).run()

    def _go_on(self, part: Spending) -> None:
        """A pass from the best variant that held."""
        record = self._base()
        if record is None or record.id in self._gone_on_from:
            self._attempts.say("No new variant within delta can be gone on from: no further pass.")
            return
        self._gone_on_from.add(record.id)
        made = self._damages.structure(record.plan)
        until = part.seconds + part.seconds_left * SENSE_SHARE
        try:
            base = self._attempts.base(record)
            strategy = self._damages.strategy_from(
                self.goal, record, base, lambda: part.seconds < until
            )
        except CompressorError as error:
            self._attempts.say(f"The search does not go on from variant {record.id}: {error}")
            return
        self._attempts.say(
            f"Variant {record.id} is pruned further: what is left of it was sensed anew."
        )

        def damage_of(plan: Plan) -> float:
            return self._damages.damage_of(plan, made, base, record.id)

        self._search(part, self.goal, strategy, damage_of, base=record).run()

    def _base(self) -> VariantRecord | None:
        """The cheapest within delta whose structure changed and whose numbers were not trained."""
        goal = self.goal
        fitting = [
            record
            for record in self._attempts.records
            if record.cost is not None
            and goal.holds(record)
            and len(self._damages.structure(record.plan))
            and not any(choice.setting.get("trained") for choice in record.plan)
        ]
        return min(fitting, key=lambda r: goal.value(r.cost) if r.cost else math.inf, default=None)

    def _search(
        self,
        part: Spending,
        goal: Goal,
        strategy: DamageSearch,
        damage_of: Callable[[Plan], float],
        base: VariantRecord | None = None,
    ) -> Search:
        until = part.seconds + part.seconds_left * INTERACTION_SHARE
        name = f"pass {self._number}"

        def has_time(question: str) -> bool:
            asked = f"{name} {question}"
            return bool(self._attempts.decide(asked, lambda: part.seconds < until))

        return Search(
            goal,
            self._attempts,
            strategy,
            part,
            self._effort,
            is_number=self._is_number,
            interactions=Interactions(damage_of, self._is_number, has_time, self._attempts.say),
            base=base,
            name=name,
            is_last=self._is_last,
        )

    def _deepen(self, part: Spending) -> None:
        """Plans of other criteria and orders, trained with other settings, chosen by Optuna."""
        depth, goal = self._depth, self.goal
        assert depth.study is not None
        assert depth.reranked is not None
        strategy = self._damages.strategy(goal)
        search = self._search(part, goal, strategy, self._damages.damage_of)
        best = self._attempts.best()
        center = strategy.first_damage if best is None else best.predicted.get("damage", 0.0)
        until = part.seconds + part.seconds_left * DEEP_TRIALS_SHARE
        allowed = search.allowed()
        with DeepSearch(
            depth.study,
            "compressor",
            goal,
            seed=depth.seed,
            center=center if center > MIN_DAMAGE else strategy.first_damage,
            importance=depth.importance,
            known=list(self._attempts.records),
            allowed=allowed,
            configured=depth.configured,
        ) as deep:
            for number in itertools.count():
                if part.trials_left <= 0 or not self._attempts.decide(
                    f"deepsearch {number}", lambda: part.seconds < until
                ):
                    break
                part.take_trial()
                question = deep.ask()
                proposal = strategy.at(question.damage)
                if proposal is None:
                    reason = "no plan of this damage meets the limits of the budget"
                    deep.tell(question, _impossible(number, reason))
                    continue
                self._attempts.say(
                    f"Deepsearch: damage {question.damage:.3g}, channels ranked by "
                    f"{question.importance!r}, {question.order.replace('_', ' ')}, trained "
                    f"with {question.tuning}."
                )
                try:
                    proposal, record = self._trial(strategy, proposal, question)
                except CompressorError as error:
                    deep.tell(question, _impossible(number, str(error)))
                    continue
                search.add(proposal, record)
                deep.tell(question, record)
        search.finish()

    def _trial(
        self, strategy: DamageSearch, proposal: Proposal, question: Question
    ) -> tuple[Proposal, VariantRecord]:
        """A variant as deepsearch wants it: cut at once, or in two steps with training between."""
        assert self._depth.reranked is not None
        reranked, importance = self._depth.reranked, question.importance
        epochs, tuning = self._effort.trial_epochs, question.tuning
        half = _harmless_half(strategy, self._damages.structure(proposal.plan))
        base = None
        if question.order == IN_TWO_STEPS and len(half):
            step = replace(strategy.describe(half), plan=reranked(half, importance))
            base = self._attempts.make(self._attempts.wish(step, epochs=epochs, tuning=tuning))
            base = base if base.status == "done" else None
        proposal = replace(proposal, plan=reranked(proposal.plan, importance))
        wish = self._attempts.wish(proposal, epochs=epochs, base=base, tuning=tuning)
        return proposal, self._attempts.make(wish)


def _harmless_half(strategy: DamageSearch, plan: Plan) -> Plan:
    """The choices that do least damage, as long as it is half of the plan's at most."""
    alone = sorted(plan, key=lambda choice: strategy.damage_of(Plan((choice,))))
    whole, taken, sum_ = strategy.damage_of(plan), [], 0.0
    for choice in alone:
        sum_ += strategy.damage_of(Plan((choice,)))
        if sum_ > whole * REPAIRED_HALF:
            break
        taken.append(choice)
    return Plan(tuple(taken))


def _impossible(number: int, reason: str) -> VariantRecord:
    return VariantRecord(f"deepsearch-{number}", Plan(), "failed", reason=reason)
