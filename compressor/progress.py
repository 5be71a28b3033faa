"""One live view on stderr: how far the run is and its bars, for a person at a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import RenderableType
    from rich.progress import Progress as Bars

LEAST_SECONDS = 1.0  # that are said to be left; an estimate knows no less


class Advance(Protocol):
    """Tells a task's bar that `n` more steps are done; `note` is shown beside it until the next."""

    def __call__(self, n: int = 1, note: str = "") -> None:
        """`n` more steps are done."""


@dataclass(frozen=True)
class Standing:
    """How far a run is. What is not known yet is not shown.

    Attributes:
        phase: what the run is at: "sense".
        variant: number of the one that is made now, or was last.
        trial: how many of the budget's trials were taken.
        most_trials: that the budget has; None where the minutes decide.
        metric: its name.
        reference: its value for the reference.
        bound: the worst value that is within delta.
        last: its value for the last variant; None also if that one failed.
        best: its value for the best variant within delta.
        gain: what that one saves: "2.7x faster".
        ends_at: when the run should be done, on the clock of `time.monotonic`.
    """

    phase: str = ""
    variant: int = 0
    trial: int = 0
    most_trials: int | None = None
    metric: str = ""
    reference: float | None = None
    bound: float | None = None
    last: float | None = None
    best: float | None = None
    gain: str = ""
    ends_at: float | None = None

    def place(self) -> str:
        """Where the run is and how long it still takes.

        >>> Standing("search", variant=5, trial=3, most_trials=4).place()
        'search, variant 5, trial 3 of 4'
        """
        variant = f"variant {self.variant}" if self.variant else ""
        is_counted = self.trial and self.most_trials
        trial = f"trial {self.trial} of {self.most_trials}" if is_counted else ""
        return _join(self.phase, variant, trial, self._left())

    def quality(self) -> str:
        """The metric against its budget.

        >>> Standing(metric="accuracy", reference=91.6, bound=90.6, last=90.1).quality()
        'accuracy: reference 91.6, bound 90.6, last 90.1, none within delta yet'
        """
        if not self.metric or self.reference is None or self.bound is None:
            return ""
        parts = [f"reference {self.reference:.4g}", f"bound {self.bound:.4g}"]
        if self.last is not None:
            parts.append(f"last {self.last:.4g}")
        if self.best is not None:
            parts.append(f"best {self.best:.4g}{f' and {self.gain}' if self.gain else ''}")
        elif self.last is not None:
            parts.append("none within delta yet")
        return f"{self.metric}: {_join(*parts)}"

    def line(self) -> str:
        """All of it, for a log."""
        return "; ".join(filter(None, [self.place(), self.quality()]))

    def _left(self) -> str:
        if self.ends_at is None or not math.isfinite(self.ends_at):
            return ""
        seconds = self.ends_at - time.monotonic()
        if seconds < 0:
            return "longer than was expected"
        return f"about {roughly(max(seconds, LEAST_SECONDS))} left"


class Progress:
    """Shows how a run stands and its running tasks, one bar each, a task inside another below it.

    Log lines pass above. Bars vanish when their task ends; how the run stands stays until `close`.

    Args:
        enabled: None shows them only when stderr is a terminal.

    Attributes:
        standing: of the run, as it was told last.

    >>> with Progress(enabled=False) as progress, progress.task("search", total=2) as advance:
    ...     advance()
    ...     progress.tell(phase="search", variant=2)
    ...     advance(note="0.91")
    >>> progress.standing.line()
    'search, variant 2'
    """

    def __init__(self, enabled: bool | None = None) -> None:
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self.standing = Standing()
        self._bars: Bars | None = None
        self._running = 0

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """A bar for as long as the context lasts.

        Args:
            description: what is being done.
            total: how many steps; None when nobody knows.
        """
        return self._show(description, total) if self.enabled else nullcontext(_nothing)

    def tell(self, **facts: Any) -> None:
        """Say how the run stands.

        Args:
            facts: the attributes of `Standing` that have changed.
        """
        self.standing = replace(self.standing, **facts)
        if self.enabled:
            self._open()

    def view(self) -> RenderableType:
        """What is shown above the bars, for rich."""
        from rich.text import Text

        lines = [
            Text(self.standing.place(), style="bold", no_wrap=True, overflow="ellipsis"),
            Text(self.standing.quality(), style="cyan", no_wrap=True, overflow="ellipsis"),
        ]
        return Text("\n", no_wrap=True, overflow="ellipsis").join(line for line in lines if line)

    def close(self) -> None:
        """Take the view away."""
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

    def _open(self) -> Bars:
        if self._bars is None:
            self._bars = _start_bars(self)
        return self._bars

    @contextmanager
    def _show(self, description: str, total: int | None) -> Iterator[Advance]:
        bars = self._open()
        task = bars.add_task(description, total=total, note="")
        self._running += 1

        def advance(n: int = 1, note: str = "") -> None:
            bars.update(task, advance=n, note=note)

        try:
            yield advance
        finally:
            bars.remove_task(task)
            self._running -= 1
            if not self._running and not self.standing.phase:
                self.close()


SILENT = Progress(enabled=False)


def roughly(seconds: float) -> str:
    """A time of which two digits are known.

    >>> roughly(42), roughly(90), roughly(600), roughly(9000)
    ('42 s', '1.5 min', '10 min', '2.5 h')
    """
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.0f} s"


def _join(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _nothing(n: int = 1, note: str = "") -> None:
    pass


def _start_bars(progress: Progress) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    class View(Bars):
        """The bars, below how the run stands."""

        def get_renderables(self) -> Iterable[RenderableType]:
            if progress.standing.phase:
                yield progress.view()
            yield self.make_tasks_table(self.tasks)

    bars = View(
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
