from __future__ import annotations

import io
import logging
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from compressor.logs import get_logger, set_verbosity
from compressor.progress import SILENT, Progress, Standing


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    logger = logging.getLogger("compressor")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_silence_where_stderr_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress, progress.task("search", total=1) as advance:
        advance(note="0.91")
    with SILENT.task("search") as advance:
        advance(3)
    assert capfd.readouterr() == ("", "")


def test_bars_are_not_loaded_in_silence() -> None:
    assert SILENT._bars is None


def test_nested_tasks_are_shown_on_stderr_and_vanish(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress(enabled=True) as progress:
        with progress.task("search", total=2) as outer:
            with progress.task("epoch", total=None) as inner:
                inner(note="loss 0.5")
                assert progress._bars is not None
                progress._bars.refresh()
            outer()
            assert progress._bars is not None
            assert [task.description for task in progress._bars.tasks] == ["search"]
            assert progress._bars.tasks[0].completed == 1
        assert progress._bars is None
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"search.*0/2", err)
    assert "loss 0.5" in err


def test_the_display_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(enabled=True)
    with pytest.raises(KeyboardInterrupt), progress, progress.task("search"):
        raise KeyboardInterrupt
    assert progress._bars is None


def test_the_standing_says_what_is_known_and_nothing_else() -> None:
    assert Standing().line() == ""
    early = Standing("search", variant=1, metric="accuracy", reference=90.0, bound=89.0)
    assert early.line() == "search, variant 1; accuracy: reference 90, bound 89"
    late = Standing(
        "search",
        variant=5,
        trial=3,
        most_trials=4,
        metric="accuracy",
        reference=90.0,
        bound=89.0,
        last=88.5,
        best=89.25,
        gain="2.7x faster",
    )
    assert late.line() == (
        "search, variant 5, trial 3 of 4; accuracy: reference 90, bound 89, last 88.5, "
        "best 89.25 and 2.7x faster"
    )
    failed = replace(late, last=None)
    assert failed.quality() == "accuracy: reference 90, bound 89, best 89.25 and 2.7x faster"


def test_the_time_that_is_left_runs_down(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    standing = Standing("search", ends_at=now + 600)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert standing.place() == "search, about 10 min left"
    monkeypatch.setattr(time, "monotonic", lambda: now + 570)
    assert standing.place() == "search, about 30 s left"
    monkeypatch.setattr(time, "monotonic", lambda: now + 599.8)
    assert standing.place() == "search, about 1 s left"
    monkeypatch.setattr(time, "monotonic", lambda: now + 700)
    assert standing.place() == "search, longer than was expected"
    assert Standing("search", ends_at=float("inf")).place() == "search"


def test_one_view_stays_between_the_tasks_of_a_run_and_log_lines_pass_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    set_verbosity("info")
    with Progress(enabled=True) as progress:
        progress.tell(phase="search", variant=2)
        view = progress._bars
        assert view is not None
        with progress.task("training", total=3):
            view.refresh()
            get_logger("compressor.test").info("a line of the log")
        assert progress._bars is view
        progress.tell(phase="certify", variant=0)
        view.refresh()
    assert progress._bars is None
    _, err = capsys.readouterr()
    assert re.search(r"search, variant 2\x1b.*\n.*training.*0/3", err)
    assert "a line of the log" in err
    assert "certify" in err


def test_the_view_is_two_short_lines() -> None:
    progress = Progress(enabled=False)
    progress.tell(phase="search", variant=1, metric="mAP", reference=0.5, bound=0.49)
    out = io.StringIO()
    Console(file=out, width=40).print(progress.view())
    assert out.getvalue().splitlines() == ["search, variant 1", "mAP: reference 0.5, bound 0.49"]


def test_an_unknown_fact_is_an_error() -> None:
    with pytest.raises(TypeError, match="fase"):
        Progress(enabled=False).tell(fase="search")
