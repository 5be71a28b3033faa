"""When the search will be done, from what its first variant took."""

from __future__ import annotations

import math
import time

from compressor.logs import get_logger
from compressor.progress import Progress
from compressor.result import VariantRecord
from compressor.search.budget import Spending
from compressor.search.finishing import Effort

logger = get_logger(__name__)

USUAL_TRIALS = 4  # of a pass, after its first
USUAL_FINALISTS = 0.5  # for each of these trials
TIMED_FINALISTS = 2.5  # of a pass, where minutes that are left are used
USED_SHARE = 0.85  # of the minutes; the rest is too short for another finalist


def usual_epochs(
    effort: Effort, trials: int, passes: int, deep_trials: int = 0, *, is_timed: bool = False
) -> float:
    """That a search trains after its first trial, as searches go; infinity where minutes decide.

    Args:
        effort: epochs of a trial and of a finalist.
        trials: of the budget.
        passes: of the search, without deepsearch.
        deep_trials: of deepsearch.
        is_timed: the budget has minutes.

    >>> usual_epochs(Effort(trial_epochs=2, final_epochs=10, finalists=3), trials=4, passes=1)
    21.0
    """
    final = math.inf if effort.final_epochs is None else effort.final_epochs
    usual = min(USUAL_TRIALS * passes + deep_trials, trials - 1)
    of_pass = TIMED_FINALISTS if is_timed else USUAL_FINALISTS * min(USUAL_TRIALS, trials - 1)
    finalists = of_pass * passes + (1 if deep_trials else 0)
    return usual * effort.trial_epochs + finalists * final


class Eta:
    """Says it once, after the first variant that was fine-tuned."""

    def __init__(self, spending: Spending, epochs: float, progress: Progress | None = None) -> None:
        """Remember what there is to spend.

        Args:
            spending: minutes of the run.
            epochs: that the search will train after its first variant; see `usual_epochs`.
            progress: shows it; None shows nothing.
        """
        self._spending = spending
        self._epochs = epochs
        self._progress = progress or Progress(enabled=False)
        self.seconds: float | None = None

    def tell(self, record: VariantRecord) -> None:
        """Take in how long a variant took."""
        if self.seconds is not None or not record.epochs:
            return
        left = record.seconds / record.epochs * self._epochs
        limit = self._spending.seconds_left * USED_SHARE
        left = min(left, limit)
        self.seconds = self._spending.seconds + left
        if math.isfinite(left):
            self._progress.tell(ends_at=time.monotonic() + left)
            logger.info("about %.2g minutes are left, judging by the first variant", left / 60)

    def end(self) -> None:
        """The search has ended: what follows was not estimated, so nothing is shown of it."""
        self._progress.tell(ends_at=None)
