"""The search: short fine-tunes of a few plans, full ones of the most promising.

It sees plans, records and numbers; models stay behind `Variants`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from compressor.errors import CompressorError
from compressor.logs import get_logger
from compressor.progress import Progress
from compressor.result import Choice, Cost, LatencyErrors, Plan, VariantRecord
from compressor.search.budget import Spending
from compressor.search.strategy import DamageSearch, Proposal
from compressor.search.variants import Variants

logger = get_logger(__name__)

KEPT_DROP = 1 / 3  # first guess: the part of a trial's drop that is left after a full fine-tune
LARGEST_DROP = 8.0  # of delta: no trial that lost more is finished
WIDENING = 1.5  # of the allowed drop, when time is left and nothing promising
SEARCH_SHARE = 0.3  # of the time that is left goes into trials
FINISH_SHARE = 0.6  # of what is then left goes into the finalist, and so on
TURNS = 12  # of trials and finalists
NUMBER_ATTEMPTS = 3  # to train numbers of few bits, with twice the epochs each time
MIN_EPOCH_SECONDS = 1e-3  # no division by zero where a test's epoch takes no time

Decide = Callable[[str, Callable[[], int]], int]


@dataclass(frozen=True)
class Goal:
    """What counts as good.

    Attributes:
        key: name of the metric.
        reference: its value for the reference.
        delta: drop that is tolerated, on the metric's scale.
        is_larger_better: False for errors and losses.
        resource: entry of `Cost` that is to be small.
        limits: further entries of `Cost` with upper bounds.
    """

    key: str
    reference: float
    delta: float
    is_larger_better: bool
    resource: str
    limits: tuple[tuple[str, float], ...] = ()

    @property
    def delta_fraction(self) -> float:
        """Delta as a fraction of the reference's metric."""
        return self.delta / max(abs(self.reference), self.delta)

    def drop(self, record: VariantRecord) -> float:
        """How much worse than the reference; negative is better; infinite for a failed variant."""
        if record.status != "done":
            return math.inf
        change = self.reference - record.metrics[self.key]
        return change if self.is_larger_better else -change

    def holds(self, record: VariantRecord) -> bool:
        """Within delta."""
        return self.drop(record) <= self.delta

    def meets_limits(self, record: VariantRecord) -> bool:
        """Within every bound of the budget."""
        return record.cost is not None and all(
            getattr(record.cost, name) <= bound for name, bound in self.limits
        )

    def value(self, cost: Cost) -> float:
        """The objective."""
        return float(getattr(cost, self.resource))


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
    """One run of the search."""

    def __init__(
        self,
        goal: Goal,
        strategy: DamageSearch,
        variants: Variants,
        spending: Spending,
        effort: Effort,
        *,
        is_number: Callable[[str], bool],
        decide: Decide,
        progress: Progress,
    ) -> None:
        """Collect what the search works with.

        Args:
            goal: what counts as good.
            strategy: proposes plans.
            variants: makes them.
            spending: minutes and trials.
            effort: epochs; shortened where the minutes do not suffice.
            is_number: whether a technique, by name, leaves structure and weights as they are.
            decide: answers a question of time by name; asked again after a crash, it answers the
                same.
            progress: shows how far it is.
        """
        self.goal = goal
        self.records: list[VariantRecord] = []
        self._strategy = strategy
        self._variants = variants
        self._spending = spending
        self._effort = effort
        self._is_number = is_number
        self._decide = decide
        self._progress = progress
        self._trials: list[tuple[Proposal, VariantRecord]] = []
        self._finished: set[str] = set()
        self._is_out_of_time = False

    def run(self, numbers_only: Plan) -> VariantRecord | None:
        """The best variant within delta; None if there is none.

        How much of its drop a finalist keeps says how far a trial may drop, so trials and
        finalists take turns until the time or the trials are used up.

        Args:
            numbers_only: the plan that changes numbers alone: no fine-tuning, judged first.
        """
        numbers = self._strategy.describe(numbers_only)
        if numbers.cost < self._strategy.describe(Plan()).cost:
            record = self._make(numbers, epochs=0)
            if not self.goal.holds(record):
                self._relax(record)
        allowed = self.goal.delta / KEPT_DROP
        for turn in range(TURNS):
            self._explore(allowed, turn)
            kept = self._finish(allowed)
            if kept is not None:
                allowed = self.goal.delta / kept
            elif self._may_widen(allowed):
                allowed *= WIDENING
            else:
                break
        errors = LatencyErrors.of(self.records)
        if errors is not None:
            logger.info("%s", errors)
        return best_record(self.goal, self.records)

    def _explore(self, allowed: float, turn: int) -> None:
        """Trials, until the question is decided or this turn's share of the budget is used up."""
        deadline = self._spending.seconds + self._spending.seconds_left * SEARCH_SHARE
        with self._progress.task("search", total=self._spending.trials_left) as advance:
            while self._spending.trials_left > 0:
                best = best_record(self.goal, self.records)
                cost_below = best.predicted["cost"] if best else math.inf
                proposal = self._strategy.ask(allowed, cost_below=cost_below)
                if proposal is None or not self._decide(
                    f"turn {turn} try {proposal.plan.digest}",
                    lambda: self._spending.seconds < deadline,
                ):
                    return
                self._spending.take_trial()
                record = self._make(proposal, epochs=self._effort.trial_epochs)
                self._strategy.tell(proposal, self.goal.drop(record))
                self._trials.append((proposal, record))
                advance(1, self._note(record))

    def _finish(self, allowed: float) -> float | None:
        """Fine-tune the cheapest promising trial in full.

        Returns:
            The part of its drop that it kept; None if nothing was finished.
        """
        if not self._may_finish_more():
            return None
        for proposal, trial in self._finalists(allowed):
            epochs = self._decide(f"finish {trial.id}", partial(self._affordable, trial))
            wanted = self._effort.final_epochs
            least = self._effort.trial_epochs if wanted is None else wanted
            if epochs < max(min(self._effort.trial_epochs, least), 1):
                logger.info("no time is left to finish variant %s", trial.id)
                self._is_out_of_time = True
                return None
            self._finished.add(trial.id)
            record = self._make(proposal, epochs=epochs, start=trial, is_final=True)
            if record.status != "done":
                continue
            if not self.goal.holds(record):
                self._relax(record)
            kept = self.goal.drop(record) / max(self.goal.drop(trial), self.goal.delta)
            return min(max(kept, 1 / LARGEST_DROP), 1.0)
        return None

    def _may_widen(self, allowed: float) -> bool:
        """Time that is left is worth a long shot; a budget of trials alone is not spent on one."""
        has_time = self._spending.limit_seconds is not None and self._may_finish_more()
        return has_time and allowed < self.goal.delta * LARGEST_DROP

    def _may_finish_more(self) -> bool:
        return not self._is_out_of_time and len(self._finished) < self._effort.finalists

    def _finalists(self, allowed: float) -> list[tuple[Proposal, VariantRecord]]:
        """Trials that may hold and be the best once they are finished, cheapest first."""
        best = best_record(self.goal, self.records)
        limit = math.inf if best is None else self._value(best)
        fitting = [
            (proposal, trial)
            for proposal, trial in self._trials
            if self.goal.drop(trial) <= allowed
            and self._value(trial) < limit
            and trial.id not in self._finished
        ]
        return sorted(fitting, key=lambda item: self._value(item[1]))

    def _relax(self, record: VariantRecord) -> VariantRecord:
        """Leave the layers that quantization hurts most in float, as few as suffice."""
        numbers = [choice for choice in record.plan if self._is_number(choice.technique)]
        if record.status != "done" or not numbers:
            return record
        by_damage = sorted(
            numbers, key=lambda c: self._strategy.describe(Plan((c,))).damage, reverse=True
        )

        def leave_out(count: int) -> VariantRecord:
            left = {choice.key for choice in by_damage[:count]}
            plan = Plan(tuple(choice for choice in record.plan if choice.key not in left))
            return self._make(
                self._strategy.describe(plan), epochs=0, start=record, is_final=record.is_final
            )

        best = leave_out(len(by_damage))
        if not self.goal.holds(best):
            return record
        trained = self._train_numbers(record)
        if trained is not None:
            return trained
        low, high = 0, len(by_damage)  # low fails, high holds
        while high - low > 1:
            middle = (low + high) // 2
            candidate = leave_out(middle)
            if self.goal.holds(candidate):
                high, best = middle, candidate
            else:
                low = middle
        return best

    def _train_numbers(self, record: VariantRecord) -> VariantRecord | None:
        """`record`, trained in its numbers until it holds; None if it does not come to that.

        Twice as many epochs each time, while that helps and there is time for it.
        """
        plan = Plan(tuple(self._as_trained(choice) for choice in record.plan))
        predicted = Proposal(
            plan, record.predicted.get("cost", 0.0), record.predicted.get("damage", 0.0)
        )
        epochs, last = self._effort.trial_epochs, record
        for attempt in range(NUMBER_ATTEMPTS if epochs else 0):
            asked = f"train the numbers of {record.id}, attempt {attempt}"
            if not self._decide(asked, lambda: self._spending.seconds_left > 0):
                return None
            trained = self._make(predicted, epochs=epochs, start=last, is_final=record.is_final)
            if trained.status == "done" and self.goal.holds(trained):
                return trained
            if trained.status != "done" or self.goal.drop(trained) >= self.goal.drop(last):
                return None
            epochs, last = 2 * epochs, trained
        return None

    def _as_trained(self, choice: Choice) -> Choice:
        if not self._is_number(choice.technique):
            return choice
        return replace(choice, setting={**choice.setting, "trained": True})

    def _make(
        self,
        proposal: Proposal,
        *,
        epochs: int,
        start: VariantRecord | None = None,
        is_final: bool = False,
    ) -> VariantRecord:
        predicted = {"cost": proposal.cost, "damage": proposal.damage}
        if self.goal.resource == "latency_ms":
            predicted["latency_ms"] = proposal.cost
        record = self._variants.make(
            proposal.plan,
            epochs=epochs,
            predicted=predicted,
            start=start,
            is_final=is_final,
        )
        self.records.append(record)
        logger.info("%s", self._sentence(record))
        return record

    def _affordable(self, trial: VariantRecord) -> int:
        """As many epochs as the time left allows, judging by what the trial's took."""
        wanted = math.inf if self._effort.final_epochs is None else self._effort.final_epochs
        seconds = self._spending.seconds_left * FINISH_SHARE
        per_epoch = trial.seconds / max(trial.epochs, 1)
        return int(min(wanted, seconds / max(per_epoch, MIN_EPOCH_SECONDS)))

    def _value(self, record: VariantRecord) -> float:
        assert record.cost is not None
        return self.goal.value(record.cost)

    def _note(self, record: VariantRecord) -> str:
        """A few words beside a bar."""
        if record.cost is None:
            return "failed"
        where = "within" if self.goal.holds(record) else "outside"
        return f"{self.goal.key} {record.metrics[self.goal.key]:.4g}, {where}"

    def _sentence(self, record: VariantRecord) -> str:
        if record.cost is None:
            return f"variant {record.id} failed: {record.reason}"
        verdict = "within delta" if self.goal.holds(record) else "outside delta"
        return (
            f"variant {record.id}: {record.plan.describe()}; {self.goal.resource} "
            f"{self._value(record):.4g}, {self.goal.key} {record.metrics[self.goal.key]:.4g} "
            f"after {record.epochs} epochs, {verdict}"
        )


def best_record(goal: Goal, records: Sequence[VariantRecord]) -> VariantRecord | None:
    """The cheapest within delta; of those that also meet the limits, if any does."""
    within = [r for r in records if r.cost is not None and goal.holds(r)]
    fitting = [r for r in within if goal.meets_limits(r)] or within
    return min(fitting, key=lambda r: goal.value(_cost(r)), default=None)


def frontier(goal: Goal, records: Sequence[VariantRecord]) -> list[VariantRecord]:
    """The records that no other beats in both cost and metric, cheapest first."""
    done = [r for r in records if r.cost is not None]
    ordered = sorted(done, key=lambda r: (goal.value(_cost(r)), goal.drop(r)))
    kept: list[VariantRecord] = []
    for record in ordered:
        if not kept or goal.drop(record) < goal.drop(kept[-1]):
            kept.append(record)
    return kept


def _cost(record: VariantRecord) -> Cost:
    if record.cost is None:
        raise CompressorError(f"Variant {record.id} has no cost: {record.reason}.")
    return record.cost
