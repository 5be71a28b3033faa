"""How a job is opened in several processes; what they do with it is in tests/test_engine_ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compressor.config import Config
from compressor.distributed.alone import is_alone
from compressor.distributed.failures import NoBoard
from compressor.distributed.launch import Team, Told
from compressor.errors import DataError
from compressor.frameworks.base import Job
from compressor.frameworks.leading import Leader, follow
from compressor.progress import Progress
from tests.distributed.threads import Member, in_threads


class Opened:
    """A bench that does nothing."""

    def meet(self, context: Member) -> None:
        pass


class Opens:
    """A framework that remembers whether it was alone, and the data."""

    def open(self, job: Job, run_dir: Path, progress: Progress) -> Any:
        self.was_alone = is_alone()
        self.data = job.open_data()
        return Opened()


def test_a_function_of_data_sees_all_processes_and_is_called_once_in_each(tmp_path: Path) -> None:
    """It was called alone, so that a DistributedSampler gave all ranks the shard of rank 0."""

    def work(context: Member) -> Any:
        calls: list[bool] = []

        def make_data() -> dict[str, Any]:
            calls.append(is_alone())
            return {"train": context.rank}

        framework, team = Opens(), Team(context, NoBoard())
        job = Job(make_data, None, Config.from_dict({"progress": False}))
        if context.is_main:
            leader = Leader(team)
            leader.open(framework, job, tmp_path, Progress(enabled=False))
            leader.fail(DataError("That is all."))
        else:
            with pytest.raises(Told, match="That is all"):
                follow(framework, job, team)
        return calls, framework.was_alone, framework.data

    assert in_threads(2, work) == [([False], True, {"train": rank}) for rank in range(2)]


def test_a_function_of_data_that_fails_in_one_process_ends_all(tmp_path: Path) -> None:
    def work(context: Member) -> Any:
        def make_data() -> dict[str, Any]:
            if context.rank:
                raise DataError("No such folder.")
            return {"train": 0}

        team = Team(context, NoBoard())
        job = Job(make_data, None, Config.from_dict({"progress": False}))
        if context.is_main:
            Leader(team).open(Opens(), job, tmp_path, Progress(enabled=False))
        else:
            follow(Opens(), job, team)

    first, second = in_threads(2, work)
    assert isinstance(first, Told)
    assert isinstance(second, DataError)
    assert str(first) == str(second) == "No such folder."
