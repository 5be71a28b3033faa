"""A bar that shows how far a fit is."""

from __future__ import annotations

from contextlib import ExitStack

from compressor.progress import Advance, Progress
from compressor.training.algorithm import Callback
from compressor.training.clock import Unit
from compressor.training.events import Event
from compressor.training.state import State


class ProgressBar(Callback):
    """One bar over all batches of a fit; beside it the loss of the last epoch and the last metric.

    Of several processes, the first shows one.

    Args:
        progress: draws it, or nothing; None draws if stderr is a terminal.
        description: left of the bar.
        metric: shown after an evaluation; None shows none.
    """

    events = frozenset({Event.FIT_START, Event.BATCH_END, Event.EPOCH_END, Event.EVAL_END})

    def __init__(
        self,
        progress: Progress | None = None,
        description: str = "training",
        metric: str | None = None,
    ) -> None:
        self.progress = Progress() if progress is None else progress
        self.description = description
        self.metric = metric
        self._open = ExitStack()
        self._advance: Advance | None = None
        self._note = ""

    def on(self, event: Event, state: State) -> None:
        """Open, advance or annotate."""
        if state.rank:
            return
        if event is Event.FIT_START:
            task = self.progress.task(self.description, _total_batches(state))
            self._advance = self._open.enter_context(task)
            self._advance(state.clock.batch, self._note)
        elif self._advance is not None:
            if event is not Event.BATCH_END:
                self._note = self._describe(state)
            self._advance(int(event is Event.BATCH_END), self._note)

    def close(self) -> None:
        """Take the bar away."""
        self._advance = None
        self._open.close()

    def _describe(self, state: State) -> str:
        parts = []
        if "train/total" in state.train_metrics:
            parts.append(f"loss {state.train_metrics['train/total']:.4g}")
        if self.metric is not None and self.metric in state.metrics:
            parts.append(f"{self.metric} {state.metrics[self.metric]:.4g}")
        return ", ".join(parts)


def _total_batches(state: State) -> int | None:
    total, clock = state.max_duration, state.clock
    if total.unit is Unit.BATCH:
        return int(total.value)
    if total.unit is Unit.EPOCH and clock.batches_per_epoch:
        return int(total.value) * clock.batches_per_epoch
    return None
