"""Trials trained in full: the cheapest promising ones, by asynchronous successive halving.

A trial that is promising is trained in full; where that takes many epochs, it is trained on three
times as long first, and in full if it still is promising (Li et al. 2020, A system for massively
parallel hyperparameter tuning). As many as are made at once are in a round. Promising is what
should come within delta in the epochs that time allows: a drop falls with a power of the epochs, as
learning curves do (Hestness et al. 2017, arXiv 1712.00409), and every finalist teaches which.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from compressor.result import VariantRecord
from compressor.search.attempts import Attempts
from compressor.search.budget import Spending
from compressor.search.goal import Goal, best_fitting
from compressor.search.relaxing import Relaxing
from compressor.search.strategy import Proposal
from compressor.search.tuning import Tuning

USUAL_RATE = 0.4  # epochs to the power of -rate: what is left of a drop; first guess
RATES = (0.1, 1.0)  # that are believed
LARGEST_DROP = 8.0  # of delta: more than training is believed to win back
SETTLED = 0.8  # of what is allowed: a trial that drops so far is finished before another is tried
SAFETY = 0.9  # of the drop of a trial that was finished in vain
MOST_KEPT = 2 / 3  # a trial that is just outside delta is worth finishing, whatever others kept
HOPEFUL = 2.0  # of delta: a trial that should lose more after all training is left alone
USUAL_FULL = 10  # times a trial's epochs, for a finalist, before a trial was timed
FINISH_SHARE = 0.7  # of the time that is left goes into the finalist, and so on
PROMOTION = 3  # times a trial's epochs
WORTHY = 5  # times as long a finalist must be trained for: each fit begins with a high rate again
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


@dataclass(frozen=True)
class Final:
    """A trial that is to be trained in full, with so many epochs."""

    proposal: Proposal
    trial: VariantRecord
    epochs: int


class Finishing:
    """Finishes what one pass has tried.

    Attributes:
        trials: what may be finished, with what the allocation promised of it.
    """

    def __init__(
        self,
        goal: Goal,
        attempts: Attempts,
        spending: Spending,
        effort: Effort,
        relaxing: Relaxing,
        base: VariantRecord | None,
        name: str,
    ) -> None:
        """Finish nothing yet.

        Args:
            goal: what counts as good in the pass.
            attempts: makes the variants.
            spending: minutes of the pass.
            effort: epochs; shortened where the minutes do not suffice.
            relaxing: leaves layers in float where a finished variant is outside delta.
            base: variant that every plan of the pass goes on from; None is the reference.
            name: of the pass, for questions of time.
        """
        self.goal = goal
        self.trials: list[tuple[Proposal, VariantRecord]] = []
        self._attempts = attempts
        self._spending = spending
        self._effort = effort
        self._relaxing = relaxing
        self._name = name
        self._base = base
        self._rates: list[float] = []
        self._finished: set[str] = set()
        self._is_out_of_time = False

    def remember(self, trial: VariantRecord, record: VariantRecord) -> None:
        """Take up that an earlier run finished `trial`, and `record` came of it."""
        if trial.id not in self._finished:
            self._learn(trial, record)
        self._finished.add(trial.id)

    def allowed(self) -> float:
        """The drop of a trial that training in full should bring within delta."""
        trial = self._effort.trial_epochs
        if not trial or self._effort.final_epochs == 0:  # nothing wins it back
            return self.goal.delta
        allowed = self.goal.delta / self._left_after(trial, self._full_epochs())
        held, failed = self._outcomes()
        return min(max([allowed, *held]), *[SAFETY * drop for drop in failed], math.inf)

    def is_settled(self, allowed: float) -> bool:
        """Whether a trial is there that is worth finishing before another is tried."""
        drops = [self.goal.drop(trial) for _, trial in self._open()]
        return any(SETTLED * allowed <= drop <= allowed for drop in drops)

    def may_go_on(self) -> bool:
        """Whether another trial could be finished."""
        is_trained = self._effort.final_epochs != 0
        may = not self._is_out_of_time and len(self._finished) < self._effort.finalists
        return is_trained and may

    def finish(self) -> bool:
        """Fine-tune a round of the cheapest promising trials in full.

        One that is given up teaches as well how far a trial may drop, so trials may follow.

        Returns:
            Whether any was trained on.
        """
        if not self.may_go_on():
            return False
        chosen = self._begin_finals(iter(self._finalists()))
        pairs = zip(chosen, self._promote(chosen), strict=True)
        self._train_in_full([pair for pair in pairs if self._is_promising(*pair)])
        return bool(chosen)

    def finish_hopeful(self) -> bool:
        """Where no trial is promising and minutes are left: finish the one that lacks least.

        How far a single trial recovers is known within a factor, so minutes that nobody else wants
        are well spent on it.

        Returns:
            Whether it was trained on.
        """
        if not (self.may_go_on() and self._spending.is_timed and self._effort.trial_epochs):
            return False
        more = self._full_epochs()
        lost = {
            trial.id: self.goal.drop(trial) * self._left_after(self._own(trial), more)
            for _, trial in self._open()
            if self.goal.meets_limits(trial)
        }
        hopeful = [
            (proposal, trial)
            for proposal, trial in self._open()
            if lost.get(trial.id, math.inf) <= HOPEFUL * self.goal.delta
        ]
        hopeful.sort(key=lambda item: lost[item[1].id])
        chosen = self._begin_finals(iter(hopeful))
        for final in chosen:
            self._attempts.say(
                f"Minutes are left: variant {final.trial.id} is finished, though it should still "
                f"lose {lost[final.trial.id]:.2g} then."
            )
        self._train_in_full([(final, final.trial) for final in chosen])
        return bool(chosen)

    def _begin_finals(self, finalists: Iterator[tuple[Proposal, VariantRecord]]) -> list[Final]:
        """The next of them, as many as are made at once and time allows."""
        chosen: list[Final] = []
        while len(chosen) < self._attempts.width and self.may_go_on():
            proposal, trial = next(finalists, (None, None))
            if proposal is None or trial is None:
                break
            epochs = self._affordable_epochs(trial)
            if epochs is None:
                break
            self._finished.add(trial.id)
            chosen.append(Final(proposal, trial, epochs))
        return chosen

    def _train_in_full(self, worthy: Sequence[tuple[Final, VariantRecord]]) -> None:
        """Finish what was promoted, and leave layers in float where that is what it takes.

        What then lacks little is not trained on: with its rate high again, a second fit seldom
        comes further than the first.
        """
        wishes = [
            self._attempts.wish(
                final.proposal,
                epochs=final.epochs - (promoted.epochs - final.trial.epochs),
                start=promoted,
                is_final=True,
                tuning=Tuning.from_json(final.trial.tuning),
                wanted=self._metric_at(self.goal.delta),
            )
            for final, promoted in worthy
        ]
        records = self._attempts.make_all(wishes)
        for (_, promoted), record in zip(worthy, records, strict=True):
            if record.status != "done":
                continue
            self._learn(promoted, record)
            if not self.goal.holds(record):
                self._relaxing.relax(record)

    def _promote(self, chosen: Sequence[Final]) -> list[VariantRecord]:
        """The trials trained on for a while; a trial itself where its epochs are too few."""
        rung = PROMOTION * self._effort.trial_epochs
        promoted = {
            final.trial.id: self._attempts.wish(
                final.proposal,
                epochs=rung,
                start=final.trial,
                tuning=Tuning.from_json(final.trial.tuning),
                wanted=self._metric_at(
                    self.goal.delta / self._left_after(self._own(final.trial) + rung, final.epochs)
                ),
            )
            for final in chosen
            if rung and final.epochs >= WORTHY * rung
        }
        made = dict(zip(promoted, self._attempts.make_all([*promoted.values()]), strict=True))
        for final in chosen:
            if final.trial.id in made:
                self._learn(final.trial, made[final.trial.id])
        return [made.get(final.trial.id, final.trial) for final in chosen]

    def _is_promising(self, final: Final, promoted: VariantRecord) -> bool:
        """Whether full training is worth it; says so if it is not."""
        if promoted.status != "done":
            return False
        left_epochs = final.epochs - (promoted.epochs - final.trial.epochs)
        left = self._left_after(self._own(promoted), left_epochs)
        drop = self.goal.drop(promoted)
        if drop * left <= self.goal.delta or promoted is final.trial:
            return True
        self._attempts.say(
            f"Variant {promoted.id} is given up: it still loses {drop:.3g}, of which full training "
            f"leaves about {left:.2g}, and {self.goal.delta:g} are allowed."
        )
        return False

    def _left_after(self, epochs: int, more: int) -> float:
        """The part of a drop after `epochs` that is left after `more`."""
        left = math.pow(1 + more / max(epochs, 1), -self._rate)
        return min(max(left, 1 / LARGEST_DROP), MOST_KEPT)

    @property
    def _rate(self) -> float:
        """The power of the epochs with which drops fell here."""
        return (USUAL_RATE + sum(self._rates)) / (1 + len(self._rates))

    def _learn(self, before: VariantRecord, after: VariantRecord) -> None:
        """How much of its drop training wins back."""
        if after.status != "done" or not self._own(after) > self._own(before) > 0:
            return
        floor = self.goal.delta / LARGEST_DROP
        lost, left = (max(self.goal.drop(record), floor) for record in (before, after))
        rate = math.log(lost / left) / math.log(self._own(after) / self._own(before))
        self._rates.append(min(max(rate, RATES[0]), RATES[1]))

    def _own(self, record: VariantRecord) -> int:
        """Epochs of the pass."""
        return record.epochs - (self._base.epochs if self._base else 0)

    def _full_epochs(self) -> int:
        """That a finalist could have, beyond a trial's."""
        if self._effort.final_epochs is not None:
            return self._effort.final_epochs
        asked = f"{self._name} full after {len(self.trials)}, {len(self._finished)}"
        return self._attempts.decide(asked, self._spare_epochs)

    def _spare_epochs(self) -> int:
        timed = [trial for _, trial in self.trials if trial.status == "done"]
        if not timed:
            return USUAL_FULL * self._effort.trial_epochs
        return max(self._fitting_epochs(timed[-1]), 1)

    def _metric_at(self, drop: float) -> float:
        """The metric that is left after a drop."""
        return self.goal.reference - (drop if self.goal.is_larger_better else -drop)

    def _finalists(self) -> list[tuple[Proposal, VariantRecord]]:
        """What may hold and be the best once it is finished, cheapest first."""
        more = self._full_epochs() if self._effort.trial_epochs else 0
        promising = [
            (proposal, trial)
            for proposal, trial in self._open()
            if self.goal.drop(trial) * self._left_after(self._own(trial), more) <= self.goal.delta
        ]
        return sorted(promising, key=lambda item: self.goal.objective(item[1]))

    def _open(self) -> list[tuple[Proposal, VariantRecord]]:
        """What was not finished, and would be the best if it held."""
        best = best_fitting(self.goal, self._attempts.records)
        limit = math.inf if best is None else self.goal.objective(best)
        return [
            (proposal, trial)
            for proposal, trial in self.trials
            if trial.id not in self._finished and self.goal.objective(trial) < limit
        ]

    def _outcomes(self) -> tuple[list[float], list[float]]:
        """Drops of the trials of which, when finished, one held, and of those of which none did."""
        by_id = {trial.id: trial for _, trial in self.trials if not trial.is_final}
        held: set[str] = set()
        ended: set[str] = set()
        for record in self._attempts.records:
            if record.is_final and (first := self._first(record)) in by_id:
                (held if self.goal.holds(record) else ended).add(first)
        drops = [[self.goal.drop(by_id[each]) for each in ids] for ids in (held, ended - held)]
        return drops[0], drops[1]

    def _first(self, record: VariantRecord) -> str:
        """Id of the trial that it goes back to."""
        records = {each.id: each for each in self._attempts.records}
        while record.start in records:
            record = records[record.start]
        return record.id

    def _affordable_epochs(self, trial: VariantRecord) -> int | None:
        """To finish `trial` with; None, and never again any, if they are too few."""
        epochs = self._attempts.decide(
            f"{self._name} finish {trial.id}", partial(self._fitting_epochs, trial)
        )
        wanted = self._effort.final_epochs
        least = self._effort.trial_epochs if wanted is None else wanted
        if epochs >= max(min(self._effort.trial_epochs, least), 1):
            return epochs
        self._attempts.say(f"Variant {trial.id} could be finished, but no time is left for it.")
        self._is_out_of_time = True
        return None

    def _fitting_epochs(self, trial: VariantRecord) -> int:
        """As many epochs as the time left allows, judging by what the trial's took."""
        wanted = math.inf if self._effort.final_epochs is None else self._effort.final_epochs
        seconds = self._spending.seconds_left * FINISH_SHARE / self._attempts.turns
        parent = next((r for r in self._attempts.records if r.id == trial.start), self._base)
        epochs = trial.epochs - (parent.epochs if parent else 0)
        per_epoch = trial.seconds / max(epochs, 1)
        return int(min(wanted, seconds / max(per_epoch, MIN_EPOCH_SECONDS)))
