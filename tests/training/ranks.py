"""Real processes over gloo and a file, each of which does the same works one after the other."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

Work: TypeAlias = Callable[[int, Path], Any]

LONGEST_SECONDS = 400  # of all works together; a test that would hang fails


class Results:
    """What works returned, by name and rank; a work that failed is an error when it is asked."""

    def __init__(self, found: dict[str, list[dict[str, Any]]]) -> None:
        self._found = found

    def of(self, work: Work) -> list[Any]:
        """What `work` returned in each process."""
        found = self._found[work.__name__]
        errors = [each["error"] for each in found if "error" in each]
        assert not errors, "\n".join(errors)
        return [each["value"] for each in found]


def run_ranks(folder: Path, *works: Work, world_size: int = 2) -> Results:
    """What each `work(rank, folder of its own)` returns in each of so many processes.

    They are new ones: autograd refuses to run in a fork of a process that has exported and trained.
    """
    for work in works:
        (folder / work.__name__).mkdir()
    processes = start_processes(
        _run_rank, (works, folder, world_size), world_size, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + LONGEST_SECONDS
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            raise AssertionError(f"no end after {LONGEST_SECONDS} s")
    return Results(
        {
            work.__name__: [
                torch.load(folder / work.__name__ / f"{rank}.pt") for rank in range(world_size)
            ]
            for work in works
        }
    )


def _run_rank(rank: int, works: tuple[Work, ...], folder: Path, world_size: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    for work in works:
        own = folder / work.__name__
        dist.init_process_group(
            "gloo",
            init_method=f"file://{own}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        try:
            result = {"value": work(rank, own)}
        except Exception as error:
            result = {"error": f"rank {rank}: " + "".join(traceback.format_exception(error))}
        torch.save(result, own / f"{rank}.pt")
        dist.destroy_process_group()
    os._exit(0)  # not through the destructors: a thread of autograd that still runs would abort
