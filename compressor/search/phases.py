"""How long each phase of a run took."""

from __future__ import annotations

from compressor.logs import get_logger
from compressor.progress import Progress
from compressor.search.budget import Spending

logger = get_logger(__name__)


class Phases:
    """Seconds of each phase, of this attempt at the run.

    Attributes:
        seconds: by the phase's name.
    """

    def __init__(self, spending: Spending, progress: Progress | None = None) -> None:
        """Begin with none.

        Args:
            spending: the clock of the run.
            progress: shows which phase it is; None shows nothing.
        """
        self.seconds: dict[str, float] = {}
        self._spending = spending
        self._progress = progress or Progress(enabled=False)
        self._name = ""
        self._began = 0.0

    def begin(self, name: str, why: str) -> None:
        """End the phase before, and begin one; `why` is said in the log."""
        self.end()
        self._name, self._began = name, self._spending.seconds
        self._progress.tell(phase=name)
        logger.info("%s after %.0f s: %s", why, self._began, name)

    def end(self) -> None:
        """End the phase that was begun."""
        if self._name:
            spent = self._spending.seconds - self._began
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + spent
        self._name = ""
