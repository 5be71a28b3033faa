"""A page about a classifier at the end of its training: what it takes for what, best and worst."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from compressor.errors import ConfigError
from compressor.logs import get_logger
from compressor.training.algorithm import Callback
from compressor.training.events import Event
from compressor.training.inspection.classifier import SAMPLES, check_classes, inspect_classifier
from compressor.training.inspection.images import Normalization
from compressor.training.inspection.inspection import Inspection
from compressor.training.inspection.samples import SampleCollector
from compressor.training.state import State
from compressor.training.step import recorded_calls
from compressor.training.tasks.base import TaskModel

logger = get_logger(__name__)

FILE = "inspection.html"
MOMENTS = {"fit_end": Event.FIT_END, "eval_end": Event.EVAL_END}


class VisualReport(Callback):
    """Writes `folder/inspection.html` about a classifier of images, in place of the one before.

    The page shows the confusion matrix, the scores of each class, and the best, the worst and the
    most confused samples, each beside what its prediction hangs on. Where several processes train,
    the first writes.

    Args:
        dataloader: what is looked at, in one pass of its own.
        classes: K names, by index.
        folder: of the page; made if it is missing.
        input_key: where the images (N, C, H, W) or (N, H, W) are in a batch.
        target_key: where the labels are: class indices (N,), or probabilities (N, K).
        denormalize: mean and standard deviation by which the images were normalised; None shows
            each of them stretched to its own range.
        samples: how many of the best, of the worst, and of the most confused.
        at: "fit_end": of the finished model; "eval_end": of the model at every evaluation, once
            where there are several evaluators.

    Attributes:
        inspection: the last one; None before the first.

    Raises:
        ConfigError: fewer than two classes, no samples, or an unknown `at`.
    """

    def __init__(
        self,
        dataloader: Iterable[Any],
        classes: Sequence[object],
        folder: str | Path,
        *,
        input_key: int | str = 0,
        target_key: int | str = 1,
        denormalize: Normalization | None = None,
        samples: int = SAMPLES,
        at: Literal["fit_end", "eval_end"] = "fit_end",
    ) -> None:
        if at not in MOMENTS:
            raise ConfigError(f"at={at!r} is no moment for a report. Known: {', '.join(MOMENTS)}.")
        SampleCollector(samples)  # raises now what it would after the training
        self.events = frozenset({MOMENTS[at]})
        self.dataloader = dataloader
        self.classes = check_classes(classes)
        self.path = Path(folder) / FILE
        self.input_key = input_key
        self.target_key = target_key
        self.denormalize = denormalize
        self.samples = samples
        self.inspection: Inspection | None = None
        self._written_at: tuple[int, str] | None = None

    def on(self, event: Event, state: State) -> None:
        """Inspect and write, in the first process."""
        if state.rank or (event is Event.EVAL_END and self._is_written(state)):
            return
        clock = state.clock
        self.inspection = inspect_classifier(
            lambda batch: call_model(state, batch),
            self.dataloader,
            self.classes,
            model=state.model,
            input_key=self.input_key,
            target_key=self.target_key,
            denormalize=self.denormalize,
            samples=self.samples,
            title=f"Inspection after epoch {clock.epoch}, batch {clock.batch}",
        )
        self.inspection.save(self.path)
        self._written_at = (clock.batch, state.evaluator)
        logger.info("inspection: %s", self.path)

    def _is_written(self, state: State) -> bool:
        """Whether the page is of this batch, written when another evaluator had ended."""
        if self._written_at is None:
            return False
        batch, evaluator = self._written_at
        return batch == state.clock.batch and evaluator != state.evaluator


def call_model(state: State, batch: Any) -> Any:
    """A task's outputs for evaluation; else those of the last call of the model in the step."""
    if isinstance(state.model, TaskModel):
        return state.model.eval_forward(batch)
    with recorded_calls(state.model) as calls:
        state.run_model(state.model, batch)
    return calls[-1].outputs if calls else None
