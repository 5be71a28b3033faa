"""What a trainer needs to know of other processes, behind one small protocol."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from compressor.distributed.alone import is_alone

Plain = TypeVar("Plain")  # numbers, strings, bytes, tensors, and containers of them


class Replica(Protocol):
    """One model of which every process holds a copy, and whose gradients become their mean.

    An edit of the model ends it: `close` it, and ask the context for another.
    """

    @property
    def runner(self) -> nn.Module:
        """What is called in place of the model; may be another object after a batch."""

    def accumulating(self, is_last: bool) -> AbstractContextManager[object]:
        """Holds forward and backward of a micro-batch; `is_last` of the batch may communicate."""

    def finish(self) -> None:
        """After the last backward pass of a batch: set the gradients to the mean over all."""

    def close(self) -> None:
        """Take off the model what was put on it."""


class Context(Protocol):
    """One of `world_size` processes; all of them call the same methods in the same order.

    Attributes:
        splits_batches: whether a batch of the user's loader is that of all processes together, of
            which each takes a part; else each takes whole batches of its own.
    """

    splits_batches: bool

    @property
    def rank(self) -> int:
        """Which one, from 0."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and evaluates."""

    def most(self, value: float) -> float:
        """The largest `value` of them."""

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Of each name, the sum over those that have it; in the order of rank 0's names first."""

    def gather(self, value: Plain) -> list[Plain]:
        """The plain `value` of each, by rank."""

    def share(self, value: Plain) -> Plain:
        """The plain `value` of rank 0; that of the others is not looked at."""

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Set `tensors` to those of rank 0, in place."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Set `tensors`, which are floating, to their mean over all, in place."""

    def barrier(self) -> None:
        """Wait for all."""

    def replicate(self, model: nn.Module) -> Replica:
        """A replica of `model`, whose parameters and buffers are equal in all processes."""

    def close(self) -> None:
        """Let go of what this context has opened itself."""


class SingleProcess:
    """There is only this one: nothing to do."""

    splits_batches = True
    rank = 0
    world_size = 1
    is_main = True

    def most(self, value: float) -> float:
        """`value`."""
        return value

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """`values`."""
        return dict(values)

    def gather(self, value: Plain) -> list[Plain]:
        """`value` alone."""
        return [value]

    def share(self, value: Plain) -> Plain:
        """`value`."""
        return value

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Nothing."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Nothing."""

    def barrier(self) -> None:
        """Nothing."""

    def replicate(self, model: nn.Module) -> Replica:
        """The model itself."""
        return SingleReplica(model)

    def close(self) -> None:
        """Nothing."""


class SingleReplica:
    """A model that only this process trains.

    Args:
        model: is the runner.
    """

    def __init__(self, model: nn.Module) -> None:
        self.runner = model
        self._nothing = nullcontext()

    def accumulating(self, is_last: bool) -> AbstractContextManager[object]:
        """Nothing."""
        return self._nothing

    def finish(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def current_context() -> Context:
    """Horovod or `torch.distributed`, where initialised with several processes; else this alone.

    Inside `alone` there is only this one.
    """
    if is_alone():
        return SingleProcess()
    horovod = sys.modules.get("horovod.torch")  # importing it takes seconds, and few have it
    if horovod is not None and horovod.is_initialized() and horovod.size() > 1:
        from compressor.distributed.horovod_context import HorovodContext

        return HorovodContext()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        from compressor.distributed.torch_context import TorchDistributed

        return TorchDistributed()
    return SingleProcess()
