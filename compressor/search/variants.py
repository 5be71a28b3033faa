"""Make a variant: build, recover, judge, save, record. What the study holds is not made again."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from compressor.errors import CompressorError, StudyError
from compressor.files import write_text
from compressor.logs import get_logger
from compressor.result import Cost, Plan, VariantRecord, canonical_json, digest
from compressor.search.study import Study
from compressor.search.tuning import Recovered, Tuning

logger = get_logger(__name__)

Model = TypeVar("Model")

DEFAULT = Tuning()
FIT, DEPLOYED = TEMPORARY = ("fit", "deployed")  # folders of a variant that end with its making


class Judged(Protocol):
    """Metrics and cost of a deployed model."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """The user's evaluation of it."""

    @property
    def cost(self) -> Cost:
        """Measured on the target."""


@dataclass(frozen=True)
class Base(Generic[Model]):
    """A recovered variant that larger plans start from: they hold its structure, and go further."""

    plan: Plan
    model: Model


class Bench(Protocol):
    """The part of a workbench that makes variants."""

    def build(self, plan: Plan, base: Base[Any] | None = None) -> Any:
        """A copy of the reference, or of `base`, with `plan` applied."""

    def recover(
        self,
        model: Any,
        plan: Plan,
        epochs: int,
        folder: Path,
        *,
        is_final: bool,
        tuning: Tuning,
        wanted: float | None,
    ) -> Recovered:
        """Fine-tune in place."""

    def judge(self, model: Any, plan: Plan, folder: Path) -> Judged:
        """Deploy, evaluate, measure."""

    def save(self, model: Any, folder: Path) -> None:
        """Write structure and weights."""

    def load(self, folder: Path) -> Any:
        """Read them back."""

    def looks(self) -> int:
        """How many times the judged split was evaluated in this process."""


class Variants:
    """All variants of one run, made on demand."""

    def __init__(self, bench: Bench, study: Study, folder: Path, recipe: Mapping[str, Any]) -> None:
        """Remember where things go.

        Args:
            bench: does the work.
            study: remembers what came of it.
            folder: each variant gets a folder of its own here, named by its id.
            recipe: JSON of everything besides the plan that decides the outcome (seed, trainer).
        """
        self._bench = bench
        self._study = study
        self._folder = folder
        self._recipe = recipe
        self._recipe_digest = digest(dict(recipe))

    def known(self) -> list[VariantRecord]:
        """Those of this recipe that the study holds, oldest first."""
        return [r for r in self._study.variants() if r.recipe == self._recipe_digest]

    def make(
        self,
        plan: Plan,
        *,
        epochs: int,
        predicted: Mapping[str, float],
        start: VariantRecord | None = None,
        base: VariantRecord | None = None,
        is_final: bool = False,
        tuning: Tuning = DEFAULT,
        wanted: float | None = None,
    ) -> VariantRecord:
        """The variant of `plan` after `epochs`, from the reference or from another variant.

        `start` must have the same structure: it differs in training or in numbers only. `base` has
        a part of the structure. An error that this package raises on purpose fails the variant,
        with its reason; a study that cannot be written, and anything unexpected, stops the run.
        """
        lineage = [start.id if start else "", base.id if base else ""]
        identity = [plan.digest, epochs, is_final, *lineage, tuning.to_json(), self._recipe_digest]
        variant_id = digest(identity)[:12]
        known = self._study.find(variant_id)
        if known is not None and _was_given_up(known, wanted):
            variant_id = digest([*identity, wanted])[:12]
            known = self._study.find(variant_id)
        if known is not None:
            logger.info("variant %s is known: %s", variant_id, known.status)
            return known
        record = VariantRecord(
            variant_id,
            plan,
            "failed",
            predicted=dict(predicted),
            is_final=is_final,
            start=lineage[0],
            base=lineage[1],
            tuning=tuning.to_json(),
            wanted=wanted,
            recipe=self._recipe_digest,
        )
        began, looks = time.monotonic(), self._bench.looks()
        before, earlier = start.epochs if start else base.epochs if base else 0, 0
        try:
            judged, recovered = self._make(record, epochs, start, base)
        except StudyError:
            raise
        except CompressorError as error:
            logger.warning("variant %s failed: %s", variant_id, error)
            record = replace(record, reason=str(error), epochs=before)
        else:
            earlier = recovered.earlier_looks
            record = replace(
                record,
                status="done",
                metrics=dict(judged.metrics),
                cost=judged.cost,
                epochs=before + recovered.epochs,
                reason=recovered.reason,
            )
        record = replace(
            record, seconds=time.monotonic() - began, looks=self._bench.looks() - looks + earlier
        )
        write_text(self._folder / variant_id / "metrics.json", canonical_json(record.to_json()))
        self._study.tell(record)
        for name in TEMPORARY:
            shutil.rmtree(self._folder / variant_id / name, ignore_errors=True)
        return record

    def load(self, record: VariantRecord) -> Any:
        """The variant's model."""
        return self._bench.load(self._folder / record.id)

    def base(self, record: VariantRecord) -> Base[Any]:
        """The variant as what larger plans start from."""
        return Base(record.plan, self.load(record))

    def _make(
        self,
        record: VariantRecord,
        epochs: int,
        start: VariantRecord | None,
        base: VariantRecord | None,
    ) -> tuple[Judged, Recovered]:
        folder, plan = self._folder / record.id, record.plan
        write_text(folder / "plan.json", canonical_json(plan.to_json()))
        if start is not None:
            model = self.load(start)
        elif base is not None:
            model = self._bench.build(plan, self.base(base))
        else:
            model = self._bench.build(plan)
        recovered = Recovered(0)
        if epochs:
            recovered = self._bench.recover(
                model,
                plan,
                epochs,
                folder / FIT,
                is_final=record.is_final,
                tuning=Tuning.from_json(record.tuning),
                wanted=record.wanted,
            )
        judged = self._bench.judge(model, plan, folder / DEPLOYED)
        self._bench.save(model, folder)
        return judged, recovered


def _was_given_up(record: VariantRecord, wanted: float | None) -> bool:
    """Whether its training was stopped for another aim than the one of now."""
    return record.status == "done" and bool(record.reason) and record.wanted != wanted
