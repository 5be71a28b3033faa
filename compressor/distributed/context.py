"""What a trainer needs to know of other processes, behind one small protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Context(Protocol):
    """One of `world_size` processes; all of them call the same methods in the same order."""

    @property
    def rank(self) -> int:
        """Which one, from 0."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in one of them."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Set `tensors` to their mean over the processes, in place."""

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Set `tensors` to those of rank 0, in place."""


class SingleProcess:
    """There is only this one: nothing to do."""

    rank = 0
    world_size = 1

    def any(self, flag: bool) -> bool:
        """`flag`."""
        return flag

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Nothing."""

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Nothing."""


class TorchDistributed:
    """The default process group of `torch.distributed`, which the caller has initialised."""

    @property
    def rank(self) -> int:
        """Of this process."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Of the group."""
        return dist.get_world_size()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in one of them."""
        is_nccl = dist.get_backend() == "nccl"
        value = torch.tensor(int(flag), device="cuda" if is_nccl else "cpu")
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value.item())

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Set `tensors` to their mean over the processes, in place; one message a type."""
        for same in _by_type(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            dist.all_reduce(flat)
            flat /= self.world_size
            _scatter(flat, same)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Set `tensors` to those of rank 0, in place; one message a type."""
        for same in _by_type(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            dist.broadcast(flat, src=0)
            _scatter(flat, same)


def current_context() -> Context:
    """`torch.distributed`, where it is initialised with several processes; else this one alone."""
    is_several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return TorchDistributed() if is_several else SingleProcess()


def _by_type(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one type and device together, in an order that is the same in all processes."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())


def _scatter(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, part in zip(tensors, torch.split(flat, sizes), strict=True):
            tensor.copy_(part.view_as(tensor))
