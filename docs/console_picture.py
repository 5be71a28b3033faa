"""Makes images/console.svg from a real run: `python -m docs.console_picture --run-dir runs/digits`.

It does what the command does that stands in the picture: a job on the digits of `compressor demo`,
with a budget in trials, so that what else the machine does decides less. Drawn are the last log
lines and the live view as it stood late in the search, and what is printed at the end.
"""

from __future__ import annotations

import argparse
import io
import itertools
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from compressor import engine
from compressor.cli.jobs import read_job
from compressor.cli.overrides import nest, parse
from compressor.progress import Advance, Progress
from compressor.report.console import render

PICTURE = Path(__file__).parent / "images" / "console.svg"
WIDTH = 108
JOB = "compressor.cli.demo:make_job"
SET = ("arguments.is_quick=true", "budget.minutes=null", "budget.trials=3")
SHOWN_LINES = 6  # of the log, above the view
EVERY = 12  # batches, between two frames
FONT = re.compile(r"@font-face\s*{[^}]*}")  # rich fetches it; the reader's own will do


class Watched(Progress):
    """Keeps what it showed while variants were trained, with the log lines before it."""

    lines: list[str] = []  # noqa: RUF012 - the engine makes its own instance
    frames: list[tuple[list[str], RenderableType]] = []  # noqa: RUF012

    def __init__(self, enabled: bool | None = None) -> None:
        del enabled
        super().__init__(enabled=True)

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Advance]:
        """As always, and keep a frame now and then, once something is within delta."""
        with super().task(description, total) as advance:
            calls = itertools.count()

            def watched(n: int = 1, note: str = "") -> None:
                advance(n, note)
                is_telling = description == "training" and self.standing.best is not None
                if is_telling and next(calls) % EVERY == EVERY - 1 and self._bars is not None:
                    frozen = Group(self.view(), self._bars.make_tasks_table(self._bars.tasks))
                    self.frames.append((self.lines[-SHOWN_LINES:], drawn(frozen)))

            yield watched


class Lines(logging.Handler):
    """Collects the log."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        Watched.lines.append(record.getMessage())


def drawn(renderable: RenderableType) -> Text:
    """What a terminal shows of it now."""
    out = Console(file=io.StringIO(), width=WIDTH, force_terminal=True, color_system="truecolor")
    with out.capture() as capture:
        out.print(renderable)
    return Text.from_ansi(capture.get().rstrip())


def main() -> None:
    """Run the demo and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/digits"))
    options = parser.parse_args()
    logger = logging.getLogger("compressor")
    logger.addHandler(Lines())
    logger.setLevel(logging.INFO)
    with patch.object(engine, "Progress", Watched):
        job, _ = read_job(JOB, nest(map(parse, SET))).open(options.run_dir)
        job.run()
    assert job.result is not None
    if not Watched.frames:
        raise SystemExit(f"{options.run_dir} holds a finished run: give an empty folder.")
    lines, view = Watched.frames[2 * len(Watched.frames) // 3]

    out = Console(file=io.StringIO(), record=True, width=WIDTH)
    words = ["compressor", "run", JOB, "--run-dir", str(options.run_dir)]
    command = " ".join([*words, *(f"--set {each}" for each in SET)])
    out.print(f"$ {command}", style="bold", markup=False, highlight=False)
    for line in lines:
        out.print(line, markup=False, highlight=False, style="dim")
    out.print(view)
    out.print(Rule("at the end", style="dim"))
    render(job.result, out)
    PICTURE.parent.mkdir(exist_ok=True)
    picture = out.export_svg(title="compressor run", unique_id="console")
    PICTURE.write_text(FONT.sub("", picture))


if __name__ == "__main__":
    main()
