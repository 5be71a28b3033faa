"""One pass of the search: short fine-tunes of a few plans, longer ones of the most promising.

It sees plans, records and numbers; models stay behind `Attempts`. Training is by asynchronous
successive halving: a trial that is promising is trained on three times as long, and in full if it
still is (Li et al. 2020, A system for massively parallel hyperparameter tuning).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from compressor.result import Plan, VariantRecord
from compressor.search.attempts import Attempts
from compressor.search.budget import Spending
from compressor.search.goal import Goal, best_record
from compressor.search.interactions import Interactions
from compressor.search.relaxing import Relaxing, untrained
from compressor.search.strategy import DamageSearch, Proposal
from compressor.search.tuning import Tuning

KEPT_DROP = 1 / 3  # first guess: the part of a trial's drop that is left after a full fine-tune
KEPT_OF_PROMOTED = 0.6  # and of the drop of one that was promoted
LARGEST_DROP = 8.0  # of delta: no trial that lost more is finished
MOST_KEPT = 2 / 3  # a trial that is just outside delta is worth finishing, whatever others kept
WIDENING = 1.5  # of the allowed drop, when time is left and nothing promising
SEARCH_SHARE = 0.3  # of the time that is left goes into trials
FINISH_SHARE = 0.6  # of what is then left goes into the finalist, and so on
PROMOTION = 3  # times a trial's epochs
TURNS = 12  # of trials and finalists
LESSONS = 3  # how often a plan is made anew before it is tried
MILDER_ATTEMPTS = 2  # beyond the trials, where nothing held
CAUTION = 0.7  # of the damage whose drop should be just delta
MIN_EPOCH_SECONDS = 1e-3  # no division by zero where a test's epoch takes no time


@dataclass(frozen=True)
class Effort:
    """How much is spent where.

    Attributes:
        trial_epochs: of each short fine-tune.
        final_epochs: of each full one; None is as many as the minutes allow.
        finalists: full fine-tunes at most.
    """

    trial_epochs: int
    final_epochs: int | None
    finalists: int


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
        self._relaxing = Relaxing(attempts, strategy, spending, effort.trial_epochs, is_number)
        self._trials: list[tuple[Proposal, VariantRecord]] = []
        self._left_of_promoted = KEPT_OF_PROMOTED
        self._finished: set[str] = set()
        self._is_out_of_time = False

    def run(self) -> None:
        """Make variants until the question is decided, or time or trials are used up.

        How much of its drop a finalist keeps says how far a trial may drop, so trials and
        finalists take turns.
        """
        allowed = self.goal.delta / self._remember()
        for turn in range(TURNS):
            self._explore(allowed, turn)
            kept = self.finish(allowed)
            if kept is not None:
                allowed = self.goal.delta / kept
            elif self._may_widen(allowed):
                allowed *= WIDENING
            else:
                break
        for attempt in range(MILDER_ATTEMPTS):
            if not self._try_milder(attempt):
                break

    def add(self, proposal: Proposal, record: VariantRecord) -> None:
        """Take a trial that was made elsewhere among those that may be finished."""
        self._trials.append((proposal, record))

    def finish(self, allowed: float) -> float | None:
        """Fine-tune the cheapest promising trial in full.

        Args:
            allowed: drop of a trial that is promising.

        Returns:
            The part of its drop that it kept, or would have; None if nothing was promising.
        """
        kept: float | None = None
        for proposal, trial in self._finalists(allowed):
            if not self._may_finish_more():
                break
            epochs = self._affordable_epochs(trial)
            if epochs is None:
                return None
            self._finished.add(trial.id)
            promoted = self._promote(proposal, trial, epochs)
            if promoted is None:
                kept = MOST_KEPT
                continue
            if not self._is_promising(promoted):
                kept = self._kept(trial, self.goal.drop(promoted) * self._left_of_promoted)
                continue
            record = self._attempts.make(
                proposal,
                epochs=epochs - (promoted.epochs - trial.epochs),
                start=promoted,
                is_final=True,
                tuning=Tuning.from_json(trial.tuning),
                wanted=self._metric_at(self.goal.delta),
            )
            if record.status != "done":
                continue
            if promoted is not trial:
                self._left_of_promoted = self._kept(promoted, self.goal.drop(record))
            if not self.goal.holds(record):
                self._relaxing.relax(record)
            return self._kept(trial, self.goal.drop(record))
        return kept

    def _remember(self) -> float:
        """Take up what earlier runs in the same study found.

        Returns:
            The part of its drop that a trial kept when it was finished; a guess if none was.
        """
        kept = KEPT_DROP if self._effort.final_epochs != 0 else 1.0  # nothing wins it back
        by_id = {record.id: record for record in self._attempts.records}
        mine = self._base.id if self._base else ""
        epochs = self._effort.trial_epochs + (self._base.epochs if self._base else 0)
        for record in self._attempts.known:
            is_trial = not (record.start or record.is_final or record.tuning)
            is_mine = record.base == mine and record.epochs == epochs
            if is_trial and is_mine and self._changes_structure(record.plan):
                self._tell(self._strategy.describe(record.plan), record)
        for record in self._attempts.records:
            first = record
            while record.is_final and first.start in by_id:
                first = by_id[first.start]
            if first is not record and first.id in {trial.id for _, trial in self._trials}:
                if first.id not in self._finished and record.status == "done":
                    kept = self._kept(first, self.goal.drop(record))
                self._finished.add(first.id)
        return kept

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
        trial = self._attempts.make(milder, epochs=self._effort.trial_epochs)
        self._tell(milder, trial)
        if trial.status == "done" and not self.goal.holds(trial):
            self.finish(self.goal.delta * LARGEST_DROP)
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

    def _explore(self, allowed: float, turn: int) -> None:
        """Trials, until the question is decided or this turn's share of the budget is used up."""
        deadline = self._spending.seconds + self._spending.seconds_left * SEARCH_SHARE
        with self._attempts.progress.task("search", total=self._spending.trials_left) as advance:
            while self._spending.trials_left > 0:
                proposal = self._next(allowed)
                if proposal is None or not self._attempts.decide(
                    f"{self._name} turn {turn}: {proposal.plan.digest}",
                    lambda: self._spending.seconds < deadline,
                ):
                    return
                self._attempts.say(
                    f"Next: {proposal.plan.describe()}, the cheapest plan of damage "
                    f"{proposal.damage:.3g}; a trial may lose {allowed:.3g} of {self.goal.key}, "
                    f"since more training wins a part of it back."
                )
                self._spending.take_trial()
                record = self._attempts.make(
                    proposal, epochs=self._effort.trial_epochs, base=self._base
                )
                self._tell(proposal, record)
                advance(1, self._attempts.note(record))

    def _next(self, allowed: float) -> Proposal | None:
        """What to try next; made anew where its damages turn out not to add."""
        best = self._fitting()
        cost_below = math.inf if best is None else self._predicted(best)
        proposal = self._strategy.ask(allowed, cost_below=cost_below)
        for _ in range(LESSONS):
            if proposal is None or self._interactions is None:
                break
            if not self._interactions.learn(self._strategy, proposal):
                break
            proposal = self._strategy.ask(allowed, cost_below=cost_below)
        return proposal

    def _tell(self, proposal: Proposal, record: VariantRecord) -> None:
        self._strategy.tell(proposal.plan, self.goal.drop(record))
        self._trials.append((proposal, record))

    def _promote(
        self, proposal: Proposal, trial: VariantRecord, epochs: int
    ) -> VariantRecord | None:
        """`trial` trained on for a while; itself where `epochs` are too few; None if it failed."""
        rung = PROMOTION * self._effort.trial_epochs
        if epochs < 2 * rung or not rung:
            return trial
        promoted = self._attempts.make(
            proposal,
            epochs=rung,
            start=trial,
            tuning=Tuning.from_json(trial.tuning),
            wanted=self._metric_at(self.goal.delta / self._left_of_promoted),
        )
        return promoted if promoted.status == "done" else None

    def _is_promising(self, promoted: VariantRecord) -> bool:
        """Whether full training is worth it; says so if it is not."""
        drop, left = self.goal.drop(promoted), self._left_of_promoted
        if drop * left <= self.goal.delta or not promoted.start:
            return True
        self._attempts.say(
            f"Variant {promoted.id} is given up: it still loses {drop:.3g}, of which full training "
            f"leaves about {left:.2g}, and {self.goal.delta:g} are allowed."
        )
        return False

    def _kept(self, before: VariantRecord, drop: float) -> float:
        """The part that `drop` is of what was lost before it."""
        kept = drop / max(self.goal.drop(before), self.goal.delta)
        return min(max(kept, 1 / LARGEST_DROP), MOST_KEPT)

    def _metric_at(self, drop: float) -> float:
        """The metric that is left after a drop."""
        return self.goal.reference - (drop if self.goal.is_larger_better else -drop)

    def _may_widen(self, allowed: float) -> bool:
        """Time that is left is worth a long shot; a budget of trials alone is not spent on one."""
        has_time = self._spending.limit_seconds is not None and self._may_finish_more()
        return has_time and allowed < self.goal.delta * LARGEST_DROP

    def _may_finish_more(self) -> bool:
        is_trained = self._effort.final_epochs != 0
        may = not self._is_out_of_time and len(self._finished) < self._effort.finalists
        return is_trained and may

    def _finalists(self, allowed: float) -> list[tuple[Proposal, VariantRecord]]:
        """Trials that may hold and be the best once they are finished, cheapest first."""
        best = self._fitting()
        limit = math.inf if best is None else self._value(best)
        fitting = [
            (proposal, trial)
            for proposal, trial in self._trials
            if self.goal.drop(trial) <= allowed
            and self._value(trial) < limit
            and trial.id not in self._finished
        ]
        return sorted(fitting, key=lambda item: self._value(item[1]))

    def _affordable_epochs(self, trial: VariantRecord) -> int | None:
        """To finish `trial` with; None, and never again any, if they are too few."""
        epochs = self._attempts.decide(
            f"{self._name} finish {trial.id}", partial(self._fitting_epochs, trial)
        )
        wanted = self._effort.final_epochs
        least = self._effort.trial_epochs if wanted is None else wanted
        if epochs >= max(min(self._effort.trial_epochs, least), 1):
            return epochs
        self._attempts.say(f"Variant {trial.id} is promising, but no time is left to finish it.")
        self._is_out_of_time = True
        return None

    def _fitting_epochs(self, trial: VariantRecord) -> int:
        """As many epochs as the time left allows, judging by what the trial's took."""
        wanted = math.inf if self._effort.final_epochs is None else self._effort.final_epochs
        seconds = self._spending.seconds_left * FINISH_SHARE
        per_epoch = trial.seconds / max(self._effort.trial_epochs, 1)
        return int(min(wanted, seconds / max(per_epoch, MIN_EPOCH_SECONDS)))

    def _fitting(self) -> VariantRecord | None:
        """The best so far; one that breaks a limit of the budget does not count."""
        best = best_record(self.goal, self._attempts.records)
        return best if best is not None and self.goal.meets_limits(best) else None

    def _predicted(self, record: VariantRecord) -> float:
        """The objective of a variant as the allocation reckons it."""
        plan = untrained(record.plan)
        if self._strategy.knows(plan):
            return self._strategy.describe(plan).cost
        return self._value(record)

    def _value(self, record: VariantRecord) -> float:
        return math.inf if record.cost is None else self.goal.value(record.cost)
