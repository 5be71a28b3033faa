"""Log lines: silent until a script asks for them, and kept in a file for the length of a run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from compressor.errors import ConfigError, suggest

if TYPE_CHECKING:
    StreamHandler = logging.StreamHandler[TextIO]
else:
    StreamHandler = logging.StreamHandler  # cannot be subscripted before Python 3.11

ROOT = "compressor"
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

logging.getLogger(ROOT).addHandler(logging.NullHandler())


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, below "compressor"; `name` is its `__name__`.

    >>> get_logger("compressor.engine").name, get_logger("my_technique").name
    ('compressor.engine', 'compressor.my_technique')
    """
    is_ours = name == ROOT or name.startswith(f"{ROOT}.")
    return logging.getLogger(name if is_ours else f"{ROOT}.{name}")


def set_verbosity(level: str | int) -> None:
    """Show this package's log lines from `level` on, on stderr; for scripts and notebooks.

    Calling it again only changes the level. A program that sets up `logging` itself does not need
    it: the lines reach its handlers anyway.

    Args:
        level: "debug", "info", "warning", "error", or a level of `logging`.

    Raises:
        ConfigError: if there is no such level.
    """
    if isinstance(level, str):
        if level.lower() not in LEVELS:
            raise ConfigError(f"There is no log level {level!r}. {suggest(level.lower(), LEVELS)}")
        level = LEVELS[level.lower()]
    logger = logging.getLogger(ROOT)
    console = next((h for h in logger.handlers if isinstance(h, _Stderr)), None)
    if console is None:
        console = _Stderr()
        console.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(console)
    console.setLevel(level)
    logger.setLevel(level)


@contextmanager
def log_to_file(path: str | os.PathLike[str], level: int = logging.INFO) -> Iterator[None]:
    """Append this package's log lines from `level` on to the file at `path`.

    What other handlers get stays as it was: a quiet console remains quiet.

    Raises:
        OSError: if the file cannot be opened.
    """
    logger = logging.getLogger(ROOT)
    shown, own, propagates = logger.getEffectiveLevel(), logger.level, logger.propagate
    file = logging.FileHandler(path, encoding="utf-8")
    file.setLevel(level)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    outside = _Outside(shown)
    logger.addHandler(file)
    if propagates:
        logger.addHandler(outside)
    logger.propagate = False
    logger.setLevel(min(level, shown))
    try:
        yield
    finally:
        logger.setLevel(own)
        logger.propagate = propagates
        logger.removeHandler(outside)
        logger.removeHandler(file)
        file.close()


class _Stderr(StreamHandler):
    """Writes to what `sys.stderr` is now: a progress bar puts itself there to stay below."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _Outside(logging.Handler):
    """Hands records of the level that was wanted before to the handlers of the root logger.

    The root logger's own level is not asked for records that come from below, so lines wanted
    only in the file would show up on the user's console.
    """

    def emit(self, record: logging.LogRecord) -> None:
        root = logging.getLogger()
        if root.handlers:
            root.callHandlers(record)
