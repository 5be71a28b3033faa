"""The folder of a run: who works in it, what it holds, where it goes on.

One process at a time: an operating-system lock, which dies with its process, says so.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.errors import StudyError
from compressor.files import write_text
from compressor.logs import log_to_file
from compressor.search.study import Study

if TYPE_CHECKING:
    from compressor.search.budget import Spending


class RunDir:
    """Paths and the study of one run."""

    def __init__(self, path: Path, study: Study) -> None:
        """Remember both; `open_run_dir` makes them."""
        self.path = path
        self.study = study

    @property
    def variants(self) -> Path:
        """A folder for each variant."""
        return self.path / "variants"

    @property
    def damage(self) -> Path:
        """The damage map."""
        return self.path / "damage.json"

    @property
    def exports(self) -> Path:
        """What the user takes away."""
        return self.path / "exports"

    @property
    def result(self) -> Path:
        """Everything that is claimed, as JSON."""
        return self.path / "result.json"

    def seconds(self, key: str) -> float:
        """What earlier attempts of run `key` took, as of their last decision."""
        return float(self.study.fact(f"{key} seconds", 0.0))

    def decide(self, key: str, spending: Spending) -> Callable[[str, Callable[[], int]], int]:
        """Answers to questions of time that stay the same when run `key` goes on after a crash."""

        def answer(question: str, compute: Callable[[], int]) -> int:
            known = self.study.fact(f"{key} {question}")
            value = int(compute()) if known is None else int(known)
            if known is None:
                self.study.set_fact(f"{key} {question}", value)
                self.study.set_fact(f"{key} seconds", spending.seconds)
            return value

        return answer


@contextmanager
def open_run_dir(path: Path) -> Iterator[RunDir]:
    """Make or reopen the folder, lock it, log to its `engine.log`.

    Raises:
        StudyError: if it cannot be written, or another process works in it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{os.getpid()}"
        write_text(probe, "")
        probe.unlink()
        lock = (path / ".lock").open("w")
    except OSError as error:
        raise StudyError(
            f"run_dir {str(path)!r} cannot be written: {error.strerror or error}. Choose another "
            "run_dir."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudyError(
                f"Another process works in run_dir {str(path)!r}. Wait for it, or choose another "
                "run_dir."
            ) from error
        with log_to_file(path / "engine.log"), Study(path / "study.db") as study:
            yield RunDir(path, study)
