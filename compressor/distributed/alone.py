"""Work of one process, while the others wait for what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from compressor.distributed.failures import Failure

if TYPE_CHECKING:
    from compressor.distributed.context import Context

Value = TypeVar("Value")

_IS_ALONE: ContextVar[bool] = ContextVar("is_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside the `with` this process is the only one, for this package and for `torch.distributed`.

    So what a user's function calls (torchmetrics, samplers) does not wait for processes that do not
    take part. Connections stay open.
    """
    token = _IS_ALONE.set(True)
    has_group = dist.is_available() and dist.is_initialized()
    group = dist.GroupMember.WORLD if has_group else None
    if has_group:
        dist.GroupMember.WORLD = None  # what `is_initialized` looks at, by whatever name it goes
    try:
        yield
    finally:
        if has_group:
            dist.GroupMember.WORLD = group
        _IS_ALONE.reset(token)


def is_alone() -> bool:
    """Whether the caller is inside `alone`."""
    return _IS_ALONE.get()


def run_on_main(context: Context, work: Callable[[], Value]) -> Value:
    """What `work` returns on rank 0, alone; all processes get it.

    Args:
        context: the processes, all of which call this.
        work: returns a plain value; is called on rank 0 only.

    Raises:
        Exception: that of `work`, in all processes: of the same class elsewhere if it is one of
            this package, else a `RankError`.
    """
    if context.world_size == 1:
        return work()
    error: Exception | None = None
    message: dict[str, Any] = {}
    if context.is_main:
        try:
            with alone():
                message = {"value": work()}
        except Exception as failure:
            error, message = failure, {"failure": asdict(Failure.of(failure, context.rank))}
    message = context.share(message)
    if error is not None:
        raise error
    if "failure" in message:
        raise Failure(**message["failure"]).error()
    value: Value = message["value"]
    return value


def raise_together(context: Context, error: Exception | None) -> None:
    """Raise `error`; without one, that of another process which has one.

    Args:
        context: the processes, all of which call this.
        error: of this process; None: all is well here.

    Raises:
        Exception: in all processes, as `run_on_main` does.
    """
    if context.world_size > 1 and context.most(float(error is not None)):
        own = None if error is None else asdict(Failure.of(error, context.rank))
        told = context.gather(own)
        if error is None:
            raise next(Failure(**each).error() for each in told if each is not None)
    if error is not None:
        raise error
