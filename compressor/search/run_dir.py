"""The folder of a run: who works in it, what it holds, where it goes on.

One process at a time: an operating-system lock, which dies with its process, says so.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.errors import StudyError
from compressor.files import write_text
from compressor.logs import log_to_file
from compressor.search.study import Study

if TYPE_CHECKING:
    from compressor.result import Plan, VariantRecord
    from compressor.search.budget import Spending
    from compressor.search.variants import Variants

TICK_SECONDS = 5.0
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # full or read-only


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

    @property
    def report(self) -> Path:
        """The same as a page."""
        return self.path / "report.html"

    def seconds(self, key: str) -> float:
        """What earlier attempts of run `key` took, as of their last sign of life."""
        return self._seconds().get(key, 0.0)

    def _seconds(self) -> dict[str, float]:
        """By the run's key; none where the file is not there, or damaged."""
        try:
            values: dict[str, float] = json.loads(self._clock.read_text())
        except (OSError, ValueError):
            return {}
        return values

    @contextmanager
    def ticking(self, key: str, spending: Spending) -> Iterator[None]:
        """Note every few seconds what run `key` has taken, so that a kill loses no more of it."""
        ended = threading.Event()

        def note() -> None:
            write_text(self._clock, json.dumps({**self._seconds(), key: spending.seconds}))

        def tick() -> None:
            while not ended.wait(TICK_SECONDS):
                with suppress(OSError):  # a full disk is found by what matters
                    note()

        thread = threading.Thread(target=tick, name="compressor-clock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with suppress(OSError):
                note()

    @property
    def _clock(self) -> Path:
        return self.path / "elapsed.json"

    def known(
        self, key: str, variants: Variants, is_ours: Callable[[Plan], bool]
    ) -> list[VariantRecord]:
        """The variants that other runs left when run `key` began; the same when it goes on.

        Args:
            key: of the run.
            variants: of the same recipe.
            is_ours: whether a plan is made of this run's choices.
        """
        question = f"{key} known"
        if self.study.fact(question) is None:
            self.study.set_fact(question, [record.id for record in variants.known()])
        ids = set(self.study.fact(question))
        return [r for r in variants.known() if r.id in ids and is_ours(r.plan)]

    def count_looks(self, key: str, split: str, has_judged_variants: bool) -> int:
        """How many models' evaluations on `split` led to the result of run `key`.

        The reference, the file of this run, those of other runs in this folder, and the variants of
        all of them if it was this split that they were judged on.
        """
        question = f"certified on {split}"
        keys = {*self.study.fact(question, []), key}
        self.study.set_fact(question, sorted(keys))
        if not has_judged_variants:
            return len(keys)
        return 1 + len(keys) + sum(record.looks for record in self.study.variants())

    def decide(self, key: str) -> Callable[[str, Callable[[], int]], int]:
        """Answers to questions of time that stay the same when run `key` goes on after a crash."""

        def answer(question: str, compute: Callable[[], int]) -> int:
            known = self.study.fact(f"{key} {question}")
            value = int(compute()) if known is None else int(known)
            if known is None:
                self.study.set_fact(f"{key} {question}", value)
            return value

        return answer


@contextmanager
def open_run_dir(path: Path) -> Iterator[RunDir]:
    """Make or reopen the folder, lock it, log to its `engine.log`.

    Raises:
        StudyError: if it cannot be written, also later in the block, or another process works in
            it.
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
        for part in path.rglob(".*.part"):  # of a write that was killed
            part.unlink(missing_ok=True)
        with log_to_file(path / "engine.log"), Study(path / "study.db") as study:
            try:
                yield RunDir(path, study)
            except OSError as error:
                if error.errno not in UNWRITABLE:
                    raise
                raise StudyError(
                    f"Writing to {str(path)!r} failed: {error}. What was saved before is intact; "
                    "free space and start again with the same run_dir to go on."
                ) from error
