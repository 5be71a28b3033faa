"""Every variant of a run: made in one place, remembered, and told of in sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from compressor.logs import get_logger
from compressor.progress import Progress
from compressor.result import VariantRecord
from compressor.search.goal import Goal, best_record
from compressor.search.making import Base
from compressor.search.strategy import Proposal
from compressor.search.tuning import Tuning
from compressor.search.variants import DEFAULT, Variants, Wish

logger = get_logger(__name__)

# Answers a question of time by name; asked again after a crash, it answers the same.
Decide = Callable[[str, Callable[[], int]], int]


class Attempts:
    """What was tried so far, by this run and by earlier ones in the same study.

    Attributes:
        goal: what counts as good.
        known: records of earlier runs.
        records: of the variants, oldest first; those of earlier runs before the others.
        decisions: why the search did what it did, in sentences.
        decide: answers questions of time.
        progress: shows how far it is.
        on_record: is told each variant.
    """

    def __init__(
        self,
        goal: Goal,
        variants: Variants,
        decide: Decide,
        progress: Progress,
        *,
        known: Sequence[VariantRecord] = (),
    ) -> None:
        """Begin with the records `known` of earlier runs."""
        self.goal = goal
        self.known = tuple(known)
        self.records = list(known)
        self.decisions: list[str] = []
        self.decide = decide
        self.progress = progress
        self.on_record: Callable[[VariantRecord], None] = lambda record: None
        self._variants = variants

    @property
    def width(self) -> int:
        """Variants that are best wanted at once."""
        return self._variants.width

    @property
    def turns(self) -> int:
        """How many of these follow each other."""
        return self._variants.turns

    def wish(
        self,
        proposal: Proposal,
        *,
        epochs: int,
        start: VariantRecord | None = None,
        base: VariantRecord | None = None,
        is_final: bool = False,
        tuning: Tuning = DEFAULT,
        wanted: float | None = None,
    ) -> Wish:
        """The variant of a proposal, to be made; see `Wish`."""
        predicted = {"cost": proposal.cost, "damage": proposal.damage}
        if self.goal.resources == ("latency_ms",):
            predicted["latency_ms"] = proposal.cost
        return Wish(proposal.plan, epochs, predicted, start, base, is_final, tuning, wanted)

    def make(self, wish: Wish) -> VariantRecord:
        """The variant that is wanted."""
        return self.make_all([wish])[0]

    def make_all(self, wishes: Sequence[Wish]) -> list[VariantRecord]:
        """All of a round, in their order; none of them starts from another of them."""
        self._show(wishes)
        records = self._variants.make(wishes)
        for record in records:
            self.records = [r for r in self.records if r.id != record.id] + [record]
            self.say(self._sentence(record))
            self.on_record(record)
        if records:
            self._show(last=records[-1])
            if not self.progress.enabled:
                logger.info("%s", self.progress.standing.line())
        return records

    def base(self, record: VariantRecord) -> Base[Any]:
        """The variant as what larger plans start from."""
        return self._variants.base(record)

    def best(self) -> VariantRecord | None:
        """The cheapest within delta; None if there is none."""
        return best_record(self.goal, self.records)

    def say(self, sentence: str) -> None:
        """Explain a decision, in the log and in the result."""
        logger.info("%s", sentence)
        self.decisions.append(sentence)

    def note(self, record: VariantRecord) -> str:
        """A few words beside a bar."""
        if record.cost is None:
            return "failed"
        where = "within" if self.goal.holds(record) else "outside"
        return f"{self.goal.key} {record.metrics[self.goal.key]:.4g}, {where}"

    def _show(self, wishes: Sequence[Wish] = (), last: VariantRecord | None = None) -> None:
        """How the run stands: before a round of `wishes`, and after it with its last variant."""
        goal, best = self.goal, self.best()
        made: list[VariantRecord | Wish] = [*self.records, *wishes]
        trials = sum(_is_trial(each) for each in made)
        facts: dict[str, Any] = {"variant": len(made), "trial": trials}
        if last is not None:
            facts["last"] = last.metrics.get(goal.key)
        if best is not None and best.cost is not None:
            facts |= {"best": best.metrics[goal.key], "gain": goal.gain(best.cost)}
        self.progress.tell(metric=goal.key, reference=goal.reference, bound=goal.bound, **facts)

    def _sentence(self, record: VariantRecord) -> str:
        if record.cost is None:
            return f"Variant {record.id} failed: {record.reason}"
        verdict = "within" if self.goal.holds(record) else "outside"
        parent = record.start or record.base
        origin = f" from variant {parent}" if parent else ""
        tuning = f", {Tuning.from_json(record.tuning)}" if record.tuning else ""
        stopped = f" Its training was {record.reason}." if record.reason else ""
        return (
            f"Variant {record.id}{origin}: {record.plan.describe()}; "
            f"{self.goal.describe(record.cost)}, {self.goal.key} "
            f"{record.metrics[self.goal.key]:.4g} after {record.epochs} epochs{tuning}: {verdict} "
            f"delta.{stopped}"
        )


def _is_trial(made: VariantRecord | Wish) -> bool:
    """Whether it is a short fine-tune of its own, as the budget counts them."""
    return bool(made.epochs) and not (made.start or made.is_final)
