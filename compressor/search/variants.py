"""The variants of a run: identified, made, recorded. What the study holds is not made again."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compressor.files import write_text
from compressor.logs import get_logger
from compressor.result import Plan, VariantRecord, canonical_json, digest
from compressor.search.making import TEMPORARY, Base, Bench, InlineMaker, Made, Maker, Work
from compressor.search.study import Study
from compressor.search.tuning import Tuning

logger = get_logger(__name__)

DEFAULT = Tuning()


@dataclass(frozen=True)
class Wish:
    """A variant that somebody wants.

    Attributes:
        plan: of it.
        epochs: of training, beyond those of what it starts from.
        predicted: what it is reckoned to cost and to damage.
        start: variant of the same structure that it goes on from: it differs in training or in
            numbers only.
        base: variant that has a part of the structure; None: the reference.
        is_final: trained by the full trainer's settings.
        tuning: what is to differ from the settings.
        wanted: value of the metric; training that is clearly not coming to it is stopped.
    """

    plan: Plan
    epochs: int
    predicted: Mapping[str, float] = field(default_factory=dict)
    start: VariantRecord | None = None
    base: VariantRecord | None = None
    is_final: bool = False
    tuning: Tuning = DEFAULT
    wanted: float | None = None

    @property
    def epochs_before(self) -> int:
        """Of what it starts from."""
        parent = self.start or self.base
        return parent.epochs if parent else 0


class Variants:
    """All variants of one run, made on demand."""

    def __init__(
        self,
        bench: Bench,
        study: Study,
        folder: Path,
        recipe: Mapping[str, Any],
        maker: Maker | None = None,
    ) -> None:
        """Remember where things go.

        Args:
            bench: reads variants back.
            study: remembers what came of them.
            folder: each variant gets a folder of its own here, named by its id.
            recipe: JSON of everything besides the plan that decides the outcome (seed, trainer).
            maker: does the work; None: `bench`, one after the other.
        """
        self._bench = bench
        self._study = study
        self._folder = folder
        self._recipe = recipe
        self._recipe_digest = digest(dict(recipe))
        self._maker = maker or InlineMaker(bench, folder)

    @property
    def width(self) -> int:
        """How many are best wanted at once."""
        return self._maker.width

    @property
    def turns(self) -> int:
        """How many follow each other in a round of so many."""
        return math.ceil(self._maker.width / self._maker.at_once)

    def known(self) -> list[VariantRecord]:
        """Those of this recipe that the study holds, oldest first."""
        return [r for r in self._study.variants() if r.recipe == self._recipe_digest]

    def make(self, wishes: Sequence[Wish]) -> list[VariantRecord]:
        """The variant of each, in their order; none of them starts from another of them.

        An error that this package raises on purpose fails the variant, with its reason; a study
        that cannot be written, and anything unexpected, stops the run. What is made of a round is
        recorded as it comes, so that a crash loses no more than what was under way.
        """
        found: dict[str, VariantRecord] = {}
        works: dict[str, Work] = {}
        begun = []
        for wish in wishes:
            record = self._begin(wish)
            begun.append(record.id)
            known = self._study.find(record.id)
            if known is not None:
                logger.info("variant %s is known: %s", record.id, known.status)
                found[record.id] = known
            else:
                works.setdefault(record.id, Work(record, wish.epochs, wish.start, wish.base))
        if works:
            made = self._maker.make(list(works.values()))
            for work, one in zip(works.values(), made, strict=True):
                found[work.record.id] = self._record(work, one)
        return [found[each] for each in begun]

    def load(self, record: VariantRecord) -> Any:
        """The variant's model."""
        return self._bench.load(self._folder / record.id)

    def base(self, record: VariantRecord) -> Base[Any]:
        """The variant as what larger plans start from."""
        return Base(record.plan, self.load(record))

    def _begin(self, wish: Wish) -> VariantRecord:
        """The record of a variant of which nothing is known yet but its id."""
        lineage = [wish.start.id if wish.start else "", wish.base.id if wish.base else ""]
        plan, tuning = wish.plan, wish.tuning.to_json()
        how = [wish.epochs, wish.is_final, *lineage, tuning]
        identity = [plan.digest, *how, self._recipe_digest]
        variant_id = digest(identity)[:12]
        known = self._study.find(variant_id)
        if known is not None and _was_given_up(known, wish.wanted):
            variant_id = digest([*identity, wish.wanted])[:12]
        return VariantRecord(
            variant_id,
            plan,
            "failed",
            predicted=dict(wish.predicted),
            is_final=wish.is_final,
            epochs=wish.epochs_before,
            start=lineage[0],
            base=lineage[1],
            tuning=tuning,
            wanted=wish.wanted,
            recipe=self._recipe_digest,
        )

    def _record(self, work: Work, made: Made) -> VariantRecord:
        """Write down what came of `work`."""
        record, recovered = work.record, made.recovered
        if made.judged is None:
            logger.warning("variant %s failed: %s", record.id, made.reason)
            record = replace(record, reason=made.reason)
        else:
            record = replace(
                record,
                status="done",
                metrics=dict(made.judged.metrics),
                cost=made.judged.cost,
                epochs=record.epochs + recovered.epochs,
                reason=recovered.reason,
                curve=tuple(dict(point) for point in recovered.curve),
            )
        looks = made.looks + recovered.earlier_looks
        record = replace(record, seconds=made.seconds, looks=looks)
        write_text(self._folder / record.id / "metrics.json", canonical_json(record.to_json()))
        self._study.tell(record)
        for name in TEMPORARY:
            shutil.rmtree(self._folder / record.id / name, ignore_errors=True)
        return record


def _was_given_up(record: VariantRecord, wanted: float | None) -> bool:
    """Whether its training was stopped for another aim than the one of now."""
    return record.status == "done" and bool(record.reason) and record.wanted != wanted
