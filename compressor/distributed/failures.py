"""What fails in one of several processes is told to the others, which would wait for it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
import torch.distributed as dist

from compressor.errors import CompressorError, StudyError, first_line

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

Value = TypeVar("Value")

PATIENCE_SECONDS = 30.0  # for the others to fail as well; all must have ended within a minute
NEWS_SECONDS = 2.0  # from when a process has written why it ends to when all can read it
POLL_SECONDS = 0.05
# What torch and Horovod say when a process at the other end is gone.
LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Horovod")


class RankError(StudyError):
    """One of several processes has failed or ended, and so the run has."""


@dataclass(frozen=True)
class Failure:
    """Why a process ends.

    Attributes:
        rank: of the process.
        kind: class of its error.
        message: of its error.
    """

    rank: int
    kind: str
    message: str

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        """The failure of this process."""
        return cls(rank, type(error).__qualname__, str(error))

    def error(self) -> BaseException:
        """What the other processes raise: of the same class if it is ours, else a `RankError`."""
        if self.kind == KeyboardInterrupt.__qualname__:
            return KeyboardInterrupt(f"Rank {self.rank} was interrupted. {self.message}".strip())
        known = _descendants(CompressorError).get(self.kind)
        if known is not None:
            return known(f"Rank {self.rank} failed: {self.message}")
        return RankError(f"Rank {self.rank} failed: {self.kind}: {self.message}")


class Board(Protocol):
    """Where processes read of each other while they cannot speak: in the middle of their work."""

    def tell(self, failure: Failure) -> None:
        """Say why this process ends."""

    def told(self) -> Failure | None:
        """Why another ends, where it has said so."""

    def all_failed(self, number: int) -> bool:
        """Whether work `number`, which has failed here, fails in all; else they wait for this."""


class NoBoard:
    """There is nobody else."""

    def tell(self, failure: Failure) -> None:
        """Nothing."""

    def told(self) -> Failure | None:
        """None."""
        return None

    def all_failed(self, number: int) -> bool:
        """Yes."""
        return True


class StoreBoard:
    """In the store through which the processes of `torch.distributed` have met.

    Args:
        store: which may be used for other things too.
        rank: of this process.
        world_size: how many there are.
        name: of the run, that no other has.
    """

    def __init__(self, store: Store, rank: int, world_size: int, name: str = "") -> None:
        self._store = store
        self._place = f"compressor/{name}"
        self._rank = rank
        self._world_size = world_size

    def tell(self, failure: Failure) -> None:
        """Say why this process ends; nothing where the store has gone with its process."""
        try:
            self._store.set(f"{self._place}/failure/{self._rank}", json.dumps(asdict(failure)))
        except RuntimeError:
            return

    def told(self) -> Failure | None:
        """Why another ends: the lowest rank that has said so."""
        try:
            for rank in range(self._world_size):
                key = f"{self._place}/failure/{rank}"
                if rank != self._rank and self._store.check([key]):
                    return Failure(**json.loads(self._store.get(key)))
        except RuntimeError:
            return None
        return None

    def all_failed(self, number: int) -> bool:
        """Whether the others soon say that work `number` fails there too."""
        keys = [f"{self._place}/{number}/{rank}" for rank in range(self._world_size)]
        try:
            self._store.set(keys[self._rank], "")
            self._store.wait(keys, timedelta(seconds=PATIENCE_SECONDS))
        except RuntimeError:
            return False
        return True


class HorovodBoard:
    """Horovod has no store; an operation that all must join says that all are there."""

    def tell(self, failure: Failure) -> None:
        """Nothing: the end of a process ends the others."""

    def told(self) -> Failure | None:
        """None."""
        return None

    def all_failed(self, number: int) -> bool:
        """Whether the others soon come to where work `number` has failed."""
        hvd = sys.modules["horovod.torch"]
        handle = hvd.allreduce_async(torch.zeros(1), name=f"compressor.failed.{number}")
        if not _is_soon(lambda: hvd.poll(handle), PATIENCE_SECONDS):
            return False
        hvd.synchronize(handle)
        return True


def in_common(board: Board, number: int, work: Callable[[], Value]) -> Value:
    """What `work` returns, which all processes do together.

    Args:
        board: of the processes.
        number: of the work, the same in all of them.
        work: of this process; where an error on purpose ends it, all can go on together if it ends
            in all.

    Raises:
        CompressorError: that of `work`, if it fails in all processes.
        RankError: if it fails here alone: the others wait for this one, somewhere. Like any other
            `StudyError` it ends the run.
    """
    try:
        return work()
    except StudyError:  # ends the run in any case
        raise
    except CompressorError as error:
        if board.all_failed(number):
            raise
        raise RankError(f"{type(error).__name__} in this process alone: {error}") from error


def is_lost_connection(error: BaseException) -> bool:
    """Whether `error` only says that another process has gone."""
    if isinstance(error, (CompressorError, OSError)) or not isinstance(error, RuntimeError):
        return False
    is_known = isinstance(error, dist.DistError) or type(error).__name__.startswith("Horovod")
    return is_known or any(word in str(error) for word in LOST)


def explain_loss(board: Board, error: BaseException) -> BaseException:
    """The error of the process that has gone, if it said why; else that it did not."""
    found: list[Failure] = []

    def look() -> bool:
        failure = board.told()
        found.extend([failure] if failure is not None else [])
        return bool(found)

    if not _is_soon(look, NEWS_SECONDS):
        where = "Look at what it printed last"
        if isinstance(board, HorovodBoard):
            where = (
                "Horovod does not pass on why: the reason is in that process's own output. Read it"
            )
        return RankError(
            f"Another process has ended without a word: {first_line(error)} {where}, and start all "
            "again with the same run_dir to go on."
        )
    return found[0].error()


def _is_soon(has_come: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not has_come():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _descendants(cls: type[CompressorError]) -> dict[str, type[CompressorError]]:
    """`cls` and what is derived from it, by name."""
    found = {cls.__qualname__: cls}
    for child in cls.__subclasses__():
        found |= _descendants(child)
    return found
