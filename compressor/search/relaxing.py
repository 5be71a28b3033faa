"""A variant whose numbers of few bits cost too much: train them, or leave some layers in float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from compressor.result import Choice, Plan, VariantRecord
from compressor.search.attempts import Attempts
from compressor.search.budget import Spending
from compressor.search.strategy import DamageSearch, Proposal

TRAINED = "trained"  # in the setting of a choice whose numbers are learned
NUMBER_ATTEMPTS = 3  # to train numbers of few bits, with twice the epochs each time


def untrained(plan: Plan) -> Plan:
    """`plan` as it was proposed, before its numbers were trained."""
    return Plan(
        tuple(
            replace(c, setting={key: v for key, v in c.setting.items() if key != TRAINED})
            for c in plan
        )
    )


class Relaxing:
    """Brings a variant within delta without touching its structure."""

    def __init__(
        self,
        attempts: Attempts,
        strategy: DamageSearch,
        spending: Spending,
        trial_epochs: int,
        is_number: Callable[[str], bool],
    ) -> None:
        """Collect what it works with.

        Args:
            attempts: makes the variants.
            strategy: knows costs and damages.
            spending: minutes.
            trial_epochs: of the first attempt to train numbers; none are trained where it is 0.
            is_number: whether a technique, by name, leaves structure and weights as they are.
        """
        self._attempts = attempts
        self._strategy = strategy
        self._spending = spending
        self._trial_epochs = trial_epochs
        self._is_number = is_number

    def relax(self, record: VariantRecord) -> VariantRecord:
        """`record` with its numbers trained; else with as few layers in float as suffice.

        `record` itself where nothing of that comes within delta.
        """
        goal = self._attempts.goal
        numbers = [choice for choice in record.plan if self._is_number(choice.technique)]
        if record.status != "done" or not numbers:
            return record
        by_damage = sorted(
            numbers, key=lambda c: self._strategy.describe(Plan((c,))).damage, reverse=True
        )

        def leave_out(count: int) -> VariantRecord:
            left = {choice.key for choice in by_damage[:count]}
            plan = Plan(tuple(choice for choice in record.plan if choice.key not in left))
            proposal = replace(self._strategy.describe(plan), plan=plan)
            return self._attempts.make(
                self._attempts.wish(proposal, epochs=0, start=record, is_final=record.is_final)
            )

        best = leave_out(len(by_damage))
        if not goal.holds(best):
            return record
        trained = self._train(record)
        if trained is not None:
            return trained
        low, high = 0, len(by_damage)  # low fails, high holds
        while high - low > 1:
            middle = (low + high) // 2
            candidate = leave_out(middle)
            if goal.holds(candidate):
                high, best = middle, candidate
            else:
                low = middle
        self._attempts.say(
            f"{high} of {len(by_damage)} layers of variant {record.id} are left in float: with "
            f"fewer it is outside delta."
        )
        return best

    def _train(self, record: VariantRecord) -> VariantRecord | None:
        """`record`, trained in its numbers until it holds; None if it does not come to that.

        Twice as many epochs each time, while that helps and there is time for it.
        """
        goal = self._attempts.goal
        plan = Plan(tuple(self._as_trained(choice) for choice in record.plan))
        predicted = Proposal(
            plan, record.predicted.get("cost", 0.0), record.predicted.get("damage", 0.0)
        )
        epochs, last = self._trial_epochs, record
        for attempt in range(NUMBER_ATTEMPTS if epochs else 0):
            asked = f"train the numbers of {record.id}, attempt {attempt}"
            if not self._attempts.decide(asked, lambda: self._spending.seconds_left > 0):
                return None
            trained = self._attempts.make(
                self._attempts.wish(predicted, epochs=epochs, start=last, is_final=record.is_final)
            )
            if trained.status == "done" and goal.holds(trained):
                return trained
            if trained.status != "done" or goal.drop(trained) >= goal.drop(last):
                return None
            epochs, last = 2 * epochs, trained
        return None

    def _as_trained(self, choice: Choice) -> Choice:
        if not self._is_number(choice.technique):
            return choice
        return replace(choice, setting={**choice.setting, TRAINED: True})
