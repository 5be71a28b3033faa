"""One pass of the search: short fine-tunes of a few plans, longer ones of the most promising.

It sees plans, records and numbers; models stay behind `Attempts`. Where several
variants are made at once, trials and finalists come in rounds of so many: what is found depends on
the width of a round, and not on who makes its variants or how fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from compressor.result import Plan, VariantRecord
from compressor.search.attempts import Attempts
from compressor.search.budget import Spending
from compressor.search.finishing import LARGEST_DROP, Effort, Finishing
from compressor.search.goal import Goal, best_fitting
from compressor.search.interactions import Interactions
from compressor.search.relaxing import Relaxing, untrained
from compressor.search.strategy import DamageSearch, Proposal

SEARCH_SHARE = 0.3  # of the time that is left goes into trials
TURNS = 12  # of trials and finalists
LESSONS = 3  # how often a plan is made anew before it is tried
MILDER_ATTEMPTS = 2  # beyond the trials, where nothing held
CAUTION = 0.7  # of the damage whose drop should be just delta


class Search:
    """One pass, from the reference or from a recovered variant."""

    def __init__(
        self,
        goal: Goal,
        attempts: Attempts,
        strategy: DamageSearch,
        spending: Spending,
        effort: Effort,
        *,
        is_number: Callable[[str], bool],
        interactions: Interactions | None = None,
        base: VariantRecord | None = None,
        name: str = "",
        is_last: bool = True,
    ) -> None:
        """Collect what the pass works with.

        Args:
            goal: what counts as good in it.
            attempts: makes and remembers the variants.
            strategy: proposes plans.
            spending: minutes and trials of this pass.
            effort: epochs; shortened where the minutes do not suffice.
            is_number: whether a technique, by name, leaves structure and weights as they are.
            interactions: what choices do to each other; None: damages add.
            base: variant that every plan goes on from; None is the reference.
            name: of the pass, for questions of time.
            is_last: no other pass wants the time that this one leaves.
        """
        self.goal = goal
        self._attempts = attempts
        self._strategy = strategy
        self._spending = spending
        self._effort = effort
        self._interactions = interactions
        self._base = base
        self._name = name
        self._is_number = is_number
        self._is_last = is_last
        relaxing = Relaxing(attempts, strategy, spending, effort.trial_epochs, is_number)
        self._finishing = Finishing(goal, attempts, spending, effort, relaxing, base, name)

    def run(self) -> None:
        """Make variants until the question is decided, or time or trials are used up.

        How much of a drop training wins back says how far a trial may drop, so trials and
        finalists take turns.
        """
        self._remember()
        for turn in range(TURNS):
            has_tried = self._explore(turn)
            if not (self.finish() or has_tried):
                break
        for attempt in range(MILDER_ATTEMPTS):
            if not self._try_milder(attempt):
                break
        while self._is_last and self._finishing.finish_hopeful():
            pass

    def add(self, proposal: Proposal, record: VariantRecord) -> None:
        """Take a trial that was made elsewhere among those that may be finished."""
        self._finishing.trials.append((proposal, record))

    def allowed(self) -> float:
        """The drop of a trial that is worth finishing; see `Finishing`."""
        return self._finishing.allowed()

    def finish(self) -> bool:
        """Train the cheapest promising trials in full; see `Finishing`."""
        return self._finishing.finish()

    def _remember(self) -> None:
        """Take up what earlier runs in the same study found."""
        by_id = {record.id: record for record in self._attempts.records}
        mine = self._base.id if self._base else ""
        epochs = self._effort.trial_epochs + (self._base.epochs if self._base else 0)
        for record in self._attempts.known:
            is_trial = not (record.start or record.is_final or record.tuning)
            is_mine = record.base == mine and record.epochs == epochs
            if is_trial and is_mine and self._changes_structure(record.plan):
                self._tell(self._strategy.describe(record.plan), record)
        trials = self._finishing.trials
        for record in self._attempts.records:
            first = record
            while record.is_final and first.start in by_id:
                first = by_id[first.start]
            if first is not record and first.id in {trial.id for _, trial in trials}:
                self._finishing.remember(first, record)

    def _try_milder(self, attempt: int) -> bool:
        """Where no changed structure held: one more trial, at the damage that should. Whether."""
        failed = self._mildest_failure()
        if self._base is not None or failed is None:
            return False
        proposal, record = failed
        share = self.goal.delta / self.goal.drop(record) * CAUTION
        damage = proposal.damage * min(max(share, 1 / LARGEST_DROP), CAUTION)
        milder = self._strategy.at(damage)
        best = self._attempts.best()
        limit = self._strategy.cost_of_nothing if best is None else self._predicted(best)
        if (
            milder is None
            or milder.cost >= limit
            or not self._attempts.decide(
                f"{self._name} milder {attempt}", lambda: self._spending.seconds_left > 0
            )
        ):
            return False
        self._attempts.say(
            f"No changed structure held, so a milder one is tried: {milder.plan.describe()}, of "
            f"damage {milder.damage:.3g}."
        )
        trial = self._attempts.make(self._attempts.wish(milder, epochs=self._effort.trial_epochs))
        self._tell(milder, trial)
        if trial.status == "done" and not self.goal.holds(trial):
            self.finish()
        return True

    def _mildest_failure(self) -> tuple[Proposal, VariantRecord] | None:
        """Of the variants whose structure changed, if none of them held; None if one did."""
        changed = [
            record
            for record in self._attempts.records
            if record.cost is not None and self._changes_structure(record.plan)
        ]
        if not changed or any(map(self.goal.holds, changed)):
            return None
        mildest = min(changed, key=self.goal.drop)
        return self._strategy.describe(mildest.plan), mildest

    def _changes_structure(self, plan: Plan) -> bool:
        """Whether the plan is one of this pass, and not one of numbers alone."""
        is_structural = any(not self._is_number(choice.technique) for choice in plan)
        return is_structural and self._strategy.knows(plan)

    def _explore(self, turn: int) -> bool:
        """Trials, until the question is settled or this turn's share of the budget is used up.

        Returns:
            Whether there was any.
        """
        before = len(self._finishing.trials)
        deadline = self._spending.seconds + self._spending.seconds_left * SEARCH_SHARE
        with self._attempts.progress.task("search", total=self._spending.trials_left) as advance:
            while self._spending.trials_left > 0:
                allowed = self.allowed()
                if self._finishing.is_settled(allowed):
                    break
                proposals = self._next(allowed)
                if not proposals or not self._attempts.decide(
                    f"{self._name} turn {turn}: {proposals[0].plan.digest}",
                    lambda: self._spending.seconds < deadline,
                ):
                    break
                for proposal in proposals:
                    self._attempts.say(
                        f"Next: {proposal.plan.describe()}, the cheapest plan of damage "
                        f"{proposal.damage:.3g}; a trial may lose {allowed:.3g} of "
                        f"{self.goal.key}, since more training wins a part of it back."
                    )
                    self._spending.take_trial()
                epochs = self._effort.trial_epochs
                wishes = [
                    self._attempts.wish(proposal, epochs=epochs, base=self._base)
                    for proposal in proposals
                ]
                records = self._attempts.make_all(wishes)
                for proposal, record in zip(proposals, records, strict=True):
                    self._tell(proposal, record)
                    advance(1, self._attempts.note(record))
        return len(self._finishing.trials) > before

    def _next(self, allowed: float) -> list[Proposal]:
        """What to try next, a round; made anew where its damages turn out not to add."""
        best = best_fitting(self.goal, self._attempts.records)
        cost_below = math.inf if best is None else self._predicted(best)
        proposal = self._strategy.ask(allowed, cost_below=cost_below)
        for _ in range(LESSONS):
            if proposal is None or self._interactions is None:
                break
            if not self._interactions.learn(self._strategy, proposal):
                break
            proposal = self._strategy.ask(allowed, cost_below=cost_below)
        if proposal is None:
            return []
        more = min(self._attempts.width, self._spending.trials_left) - 1
        beside = self._strategy.ask_beside(proposal, more, allowed, cost_below=cost_below)
        return [proposal, *beside]

    def _tell(self, proposal: Proposal, record: VariantRecord) -> None:
        limits = self.goal.limits if record.cost is not None else ()
        limited = [float(getattr(record.cost, name)) for name, _ in limits]
        self._strategy.tell(proposal.plan, self.goal.drop(record), limited)
        self.add(proposal, record)

    def _predicted(self, record: VariantRecord) -> float:
        """The objective of a variant as the allocation reckons it."""
        plan = untrained(record.plan)
        if self._strategy.knows(plan):
            return self._strategy.describe(plan).cost
        return self.goal.objective(record)
