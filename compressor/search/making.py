"""How a variant is made: built, recovered, judged, saved.

What does so is a `Maker`; the search hands it the works of a round, and does not know which it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from compressor.errors import CompressorError, StudyError
from compressor.files import write_text
from compressor.result import Cost, Plan, VariantRecord, canonical_json
from compressor.search.tuning import Recovered, Tuning

Model = TypeVar("Model")

NOTHING = Recovered(0)
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


@dataclass(frozen=True)
class Work:
    """A variant that is to be made.

    Attributes:
        record: its id, plan, tuning, and what its metric is wanted to be; nothing came of it yet.
        epochs: of training, beyond those of what it starts from.
        start: variant of the same structure that it goes on from; None: it is built.
        base: variant that has a part of the structure; None: the reference.
    """

    record: VariantRecord
    epochs: int
    start: VariantRecord | None = None
    base: VariantRecord | None = None


@dataclass(frozen=True)
class Made:
    """What came of a work.

    Attributes:
        judged: metrics and cost; None: it failed.
        recovered: what training did.
        reason: why it failed.
        seconds: that it took.
        looks: at the judged split.
    """

    judged: Judged | None
    recovered: Recovered = NOTHING
    reason: str = ""
    seconds: float = 0.0
    looks: int = 0


class Maker(Protocol):
    """Makes variants.

    Attributes:
        width: works that it likes to have at once. The search asks for so many plans a round.
        at_once: of these it really makes side by side.
    """

    width: int
    at_once: int

    def make(self, works: Sequence[Work]) -> Iterator[Made]:
        """What came of each, in their order; a work that fails is `Made` with the reason.

        The folder of a work that did not fail then holds what `Bench.save` writes.
        """


class InlineMaker:
    """Makes one after the other, in this process.

    Args:
        bench: does the work.
        folder: has one folder a variant, named by its id.
        width: of a round.
    """

    at_once = 1

    def __init__(self, bench: Bench, folder: Path, width: int = 1) -> None:
        self._bench = bench
        self._folder = folder
        self.width = width

    def make(self, works: Sequence[Work]) -> Iterator[Made]:
        """What came of each, in their order.

        Raises:
            StudyError: if a folder cannot be written; and anything unexpected.
        """
        for work in works:
            began, looks = time.monotonic(), self._bench.looks()
            judged, recovered, reason = None, NOTHING, ""
            try:
                judged, recovered = self._make(work)
            except StudyError:
                raise
            except CompressorError as error:
                reason = str(error)
            seconds, looks = time.monotonic() - began, self._bench.looks() - looks
            yield Made(judged, recovered, reason, seconds, looks)

    def _make(self, work: Work) -> tuple[Judged, Recovered]:
        folder, plan = self._folder / work.record.id, work.record.plan
        write_text(folder / "plan.json", canonical_json(plan.to_json()))
        model, recovered = build_and_recover(
            self._bench, work, self._load(work.start), self._base(work.base), folder / FIT
        )
        judged = self._bench.judge(model, plan, folder / DEPLOYED)
        self._bench.save(model, folder)
        return judged, recovered

    def _load(self, record: VariantRecord | None) -> Any:
        return None if record is None else self._bench.load(self._folder / record.id)

    def _base(self, record: VariantRecord | None) -> Base[Any] | None:
        return None if record is None else Base(record.plan, self._load(record))


def build_and_recover(
    bench: Bench, work: Work, start: Any | None, base: Base[Any] | None, folder: Path
) -> tuple[Any, Recovered]:
    """The model of `work`, trained, and what training did.

    Args:
        bench: does it.
        work: what is to be done.
        start: the model of `work.start`, which is trained in place.
        base: that of `work.base`.
        folder: for the checkpoints of the fit.
    """
    record = work.record
    model = bench.build(record.plan, base) if start is None else start
    if not work.epochs:
        return model, NOTHING
    return model, bench.recover(
        model,
        record.plan,
        work.epochs,
        folder,
        is_final=record.is_final,
        tuning=Tuning.from_json(record.tuning),
        wanted=record.wanted,
    )
