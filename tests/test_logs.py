from __future__ import annotations

import logging
from pathlib import Path

import pytest

from compressor.errors import ConfigError
from compressor.logs import get_logger, log_to_file, set_verbosity

LOGGER = logging.getLogger("compressor")


def test_nothing_is_shown_unless_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    get_logger("compressor.engine").warning("trial 1")
    assert capfd.readouterr().err == ""


def test_asking_twice_shows_a_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    set_verbosity("info")
    set_verbosity("INFO")
    get_logger("compressor.engine").info("trial 1")
    get_logger("compressor.engine").debug("detail")
    assert capsys.readouterr().err == "trial 1\n"


def test_lines_go_to_the_stderr_of_now(capsys: pytest.CaptureFixture[str]) -> None:
    set_verbosity("info")
    capsys.readouterr()
    import io
    import sys

    sys.stderr, before = io.StringIO(), sys.stderr
    try:
        get_logger("x").info("below a bar")
        assert sys.stderr.getvalue() == "below a bar\n"
    finally:
        sys.stderr = before


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'debug'"):
        set_verbosity("debg")


def test_the_file_gets_what_the_console_does_not_want(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with log_to_file(tmp_path / "engine.log"):
        get_logger("compressor.engine").info("trial 1")
        get_logger("compressor.engine").error("disk full")
    get_logger("compressor.engine").info("after")
    text = (tmp_path / "engine.log").read_text()
    assert "INFO compressor.engine: trial 1" in text
    assert "after" not in text
    assert caplog.messages == ["disk full"]  # what the user's own handlers see is as before


def test_a_second_run_appends(tmp_path: Path) -> None:
    for line in ("first", "second"):
        with log_to_file(tmp_path / "engine.log"):
            get_logger("x").info(line)
    assert (tmp_path / "engine.log").read_text().count("\n") == 2


def test_the_file_is_closed_after_an_error(tmp_path: Path) -> None:
    before = list(LOGGER.handlers)
    with pytest.raises(KeyboardInterrupt), log_to_file(tmp_path / "engine.log"):
        raise KeyboardInterrupt
    assert LOGGER.handlers == before
