from __future__ import annotations

import re
import sys

import pytest

from compressor.progress import SILENT, Progress


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
