"""Threads in place of processes: what they tell each other goes through a list."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from compressor.distributed import SingleProcess


class Member(SingleProcess):
    """One of several threads that call the same methods in the same order."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank = rank  # type: ignore[misc]
        self.world_size = len(slots)  # type: ignore[misc]
        self.is_main = rank == 0  # type: ignore[misc]
        self._slots = slots
        self._barrier = barrier

    def gather(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait(timeout=10)
        everybody = list(self._slots)
        self._barrier.wait(timeout=10)
        return everybody

    def most(self, value: float) -> float:
        return max(self.gather(value))

    def share(self, value: Any) -> Any:
        return self.gather(value)[0]

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        everybody = self.gather(dict(values))
        names = dict.fromkeys(name for each in everybody for name in each)
        return {name: sum(each.get(name, 0.0) for each in everybody) for name in names}

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        for tensor, first in zip(tensors, self.gather(_copies(tensors))[0], strict=True):
            tensor.copy_(first)

    def average(self, tensors: Sequence[Tensor]) -> None:
        everybody = self.gather(_copies(tensors))
        for number, own in enumerate(tensors):
            own.copy_(torch.stack([each[number] for each in everybody]).sum(0) / self.world_size)


def in_threads(count: int, work: Callable[[Member], Any]) -> list[Any]:
    """What `work` returns in each of so many threads, or the error that ends it."""
    slots: list[Any] = [None] * count
    barrier = threading.Barrier(count)

    def run(rank: int) -> Any:
        try:
            return work(Member(rank, slots, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]
