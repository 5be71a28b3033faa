"""Make a variant: build, recover, judge, save, record. What the study holds is not made again."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from compressor.errors import CompressorError, StudyError
from compressor.files import write_text
from compressor.logs import get_logger
from compressor.result import Cost, Plan, VariantRecord, canonical_json, digest
from compressor.search.study import Study

logger = get_logger(__name__)

FIT, DEPLOYED = TEMPORARY = ("fit", "deployed")  # folders of a variant that end with its making


class Judged(Protocol):
    """Metrics and cost of a deployed model."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """The user's evaluation of it."""

    @property
    def cost(self) -> Cost:
        """Measured on the target."""


class Bench(Protocol):
    """The part of a workbench that makes variants."""

    def build(self, plan: Plan) -> Any:
        """A copy of the reference with `plan` applied."""

    def recover(self, model: Any, plan: Plan, epochs: int, folder: Path, *, is_final: bool) -> None:
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

    def make(
        self,
        plan: Plan,
        *,
        epochs: int,
        predicted: Mapping[str, float],
        start: VariantRecord | None = None,
        is_final: bool = False,
    ) -> VariantRecord:
        """The variant of `plan` after `epochs`, from the reference or from variant `start`.

        `start` must have the same structure: it differs in training or in numbers only. An error
        that this package raises on purpose fails the variant, with its reason; a study that cannot
        be written, and anything unexpected, stops the run.
        """
        identity = [plan.digest, epochs, is_final, start.id if start else None, dict(self._recipe)]
        variant_id = digest(identity)[:12]
        known = self._study.find(variant_id)
        if known is not None:
            logger.info("variant %s is known: %s", variant_id, known.status)
            return known
        began, looks = time.monotonic(), self._bench.looks()
        try:
            record = self._make(variant_id, plan, epochs, start, is_final)
        except StudyError:
            raise
        except CompressorError as error:
            logger.warning("variant %s failed: %s", variant_id, error)
            record = VariantRecord(variant_id, plan, "failed", reason=str(error))
        record = replace(
            record,
            predicted=dict(predicted),
            epochs=epochs + (start.epochs if start else 0),
            is_final=is_final,
            seconds=time.monotonic() - began,
            looks=self._bench.looks() - looks,
        )
        write_text(self._folder / variant_id / "metrics.json", canonical_json(record.to_json()))
        self._study.tell(record)
        for name in TEMPORARY:
            shutil.rmtree(self._folder / variant_id / name, ignore_errors=True)
        return record

    def load(self, record: VariantRecord) -> Any:
        """The variant's model."""
        return self._bench.load(self._folder / record.id)

    def _make(
        self, variant_id: str, plan: Plan, epochs: int, start: VariantRecord | None, is_final: bool
    ) -> VariantRecord:
        folder = self._folder / variant_id
        write_text(folder / "plan.json", canonical_json(plan.to_json()))
        model = self.load(start) if start else self._bench.build(plan)
        if epochs:
            self._bench.recover(model, plan, epochs, folder / FIT, is_final=is_final)
        judged = self._bench.judge(model, plan, folder / DEPLOYED)
        self._bench.save(model, folder)
        return VariantRecord(variant_id, plan, "done", dict(judged.metrics), judged.cost)
