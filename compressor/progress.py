"""Progress bars on stderr: shown to a person at a terminal, silent everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Progress as Bars


class Advance(Protocol):
    """Tells a task's bar that `n` more steps are done; `note` is shown beside it until the next."""

    def __call__(self, n: int = 1, note: str = "") -> None:
        """`n` more steps are done."""


class Progress:
    """Shows running tasks, one bar each; a task inside a task is shown below it.

    Log lines pass above the bars. Bars vanish when their task ends.

    Args:
        enabled: None shows bars only when stderr is a terminal.

    >>> with Progress(enabled=False) as progress, progress.task("search", total=2) as advance:
    ...     advance()
    ...     advance(note="0.91")
    """

    def __init__(self, enabled: bool | None = None) -> None:
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self._bars: Bars | None = None
        self._running = 0

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """A bar for as long as the context lasts.

        Args:
            description: what is being done.
            total: how many steps; None when nobody knows.
        """
        return self._show(description, total) if self.enabled else nullcontext(_nothing)

    def close(self) -> None:
        """Take the bars away."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _show(self, description: str, total: int | None) -> Iterator[Advance]:
        if self._bars is None:
            self._bars = _start_bars()
        bars = self._bars
        task = bars.add_task(description, total=total, note="")
        self._running += 1

        def advance(n: int = 1, note: str = "") -> None:
            bars.update(task, advance=n, note=note)

        try:
            yield advance
        finally:
            bars.remove_task(task)
            self._running -= 1
            if not self._running:
                self.close()


SILENT = Progress(enabled=False)


def _nothing(n: int = 1, note: str = "") -> None:
    pass


def _start_bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=Console(stderr=True),
        transient=True,
    )
    bars.start()
    return bars
