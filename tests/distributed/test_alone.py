"""Work of one process: nobody else is there, and all get what comes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import is_initialized

from compressor.distributed import SingleProcess, alone, current_context, run_on_main
from compressor.distributed.alone import raise_together
from compressor.distributed.failures import RankError
from compressor.errors import DataError
from tests.distributed.threads import in_threads


@pytest.fixture
def group(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_inside_there_is_no_process_group_by_any_name(group: Any) -> None:
    assert is_initialized()
    with alone():
        assert not is_initialized()
        assert not torch.distributed.is_initialized()
        with pytest.raises(ValueError, match="not been initialized"):
            dist.get_rank()
        with alone():
            assert not is_initialized()
        assert not is_initialized()
    assert dist.group.WORLD is group


def test_the_group_comes_back_after_an_error(group: Any) -> None:
    with pytest.raises(KeyError), alone():
        raise KeyError
    assert dist.group.WORLD is group


def test_without_a_group_nothing_happens() -> None:
    with alone():
        assert isinstance(current_context(), SingleProcess)
    assert not is_initialized()


def test_all_get_what_rank_0_has_found() -> None:
    calls = []

    def work(context: Any) -> Any:
        return run_on_main(context, lambda: calls.append(context.rank) or {"a": 1})

    assert in_threads(3, work) == [{"a": 1}] * 3
    assert calls == [0]


def test_all_fail_where_rank_0_fails() -> None:
    def work(error: Exception) -> Any:
        def fail() -> None:
            raise error

        return [
            f"{type(each).__name__}: {each}"
            for each in in_threads(2, lambda context: run_on_main(context, fail))
        ]

    assert work(DataError("no batch")) == [
        "DataError: no batch",
        "DataError: Rank 0 failed: no batch",
    ]
    assert work(OSError("no space")) == [
        "OSError: no space",
        "RankError: Rank 0 failed: OSError: no space",
    ]


def test_all_raise_what_one_raises() -> None:
    first, second, third = in_threads(
        3, lambda context: raise_together(context, DataError("x") if context.rank == 1 else None)
    )
    assert [str(each) for each in (first, second, third)] == [
        "Rank 1 failed: x",
        "x",
        "Rank 1 failed: x",
    ]
    assert in_threads(2, lambda context: raise_together(context, None)) == [None, None]


def test_one_process_calls_the_work_itself() -> None:
    assert run_on_main(SingleProcess(), lambda: 3) == 3
    with pytest.raises(RankError):
        raise_together(SingleProcess(), RankError("x"))
