"""The processes in which one script was started: by torchrun, by horovodrun, or this one alone."""

from __future__ import annotations

import itertools
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from compressor.distributed.context import Context, current_context
from compressor.distributed.failures import (
    Board,
    Failure,
    HorovodBoard,
    NoBoard,
    StoreBoard,
    explain_loss,
    is_lost_connection,
)
from compressor.errors import ConfigError, DeviceError
from compressor.interfaces.device import Device
from compressor.logs import get_logger

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

logger = get_logger(__name__)

# What torchrun gives each process, beside LOCAL_RANK.
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Each has keys of its own in the store, which torchrun keeps for as long as the processes live.
_MEETINGS = itertools.count(1)


@dataclass(frozen=True)
class Team:
    """The processes that do one job together.

    Attributes:
        context: how they talk.
        board: how one that fails tells the others.
    """

    context: Context
    board: Board


class Told(Exception):
    """Another process has failed and said so; here nothing has."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@contextmanager
def join(device: Device, *, use_horovod: bool = False) -> Iterator[Team]:
    """Meet the other processes in which this script was started, until the end of the block.

    A process group of the caller's own is used as it is; else one is opened, and closed again. On
    the GPU each process takes that of its number on this machine, "cuda" from then on.

    An error that leaves the block here ends it in the other processes too, with the same message
    where they can be told.

    Args:
        device: of the job.
        use_horovod: the processes are those of horovodrun.

    Raises:
        ConfigError: if the environment says that there are others, and not where; or the launcher
            is not the one that the configuration names.
        DeviceError: if there are fewer GPUs than processes that want one.
        RankError: if another process ended.
    """
    is_ours = False
    if use_horovod:
        context = _join_horovod(device)
    else:
        is_ours = _join_torchrun(device)
        context = current_context()
    board = _make_board(context)
    try:
        yield Team(context, board)
    except Told as told:
        context.close()
        _abort(is_ours)
        raise told.failure.error() from None
    except BaseException as error:
        is_lost = context.world_size > 1 and is_lost_connection(error)
        if not is_lost:
            board.tell(Failure.of(error, context.rank))
        cause = explain_loss(board, error) if is_lost else None
        context.close()
        _abort(is_ours)
        if cause is not None:
            raise cause from error
        raise
    context.close()
    if is_ours:
        dist.destroy_process_group()


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints: rank 0, or the only one.

    Also before `Engine.run` has met the others, and after.
    """
    horovod = sys.modules.get("horovod.torch")
    if horovod is not None and horovod.is_initialized():
        return bool(horovod.rank() == 0)
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK") or os.environ.get("HOROVOD_RANK") or 0) == 0


def _join_horovod(device: Device) -> Context:
    from compressor.distributed.horovod_context import require_horovod

    return require_horovod(on_gpu=device is Device.GPU)


def _join_torchrun(device: Device) -> bool:
    """Open the process group that the environment speaks of; whether there was one to open."""
    if int(os.environ.get("HOROVOD_SIZE") or 1) > 1:
        raise ConfigError(
            f"horovodrun started {os.environ['HOROVOD_SIZE']} processes, and use_horovod is False. "
            "Write use_horovod=True, or start the script with torchrun."
        )
    on_gpu = device is Device.GPU
    if dist.is_available() and dist.is_initialized():
        is_one_of_several = dist.get_world_size() > 1
        if on_gpu and is_one_of_several and torch.cuda.is_available():
            if not torch.cuda.current_device():  # the caller has taken none
                _take_gpu()
        return False
    if int(os.environ.get("WORLD_SIZE") or 1) <= 1:
        return False
    missing = [name for name in TORCHRUN if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"The environment has WORLD_SIZE={os.environ['WORLD_SIZE']} and no "
            f"{', '.join(missing)}. Start the script with torchrun, which sets all of "
            f"{', '.join(TORCHRUN)}, or unset WORLD_SIZE to run in one process."
        )
    prefix = f"compressor/{next(_MEETINGS)}"  # the same in all: they meet equally often
    if on_gpu:
        _take_gpu()
    from torch._C._distributed_c10d import PrefixStore  # which not all builds of torch have

    store = _open_store(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore(prefix, store),
        rank=rank,
        world_size=world_size,
    )
    logger.info("rank %d of %d processes", dist.get_rank(), dist.get_world_size())
    return True


@cache
def _open_store(address: str, port: str) -> Store:
    """The store of the environment, which has this address: the same one as long as this lives.

    Without torchrun rank 0 serves it, and others may want to meet again before rank 0 has parted.
    """
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(rendezvous("env://"))[0]
    return store


def _take_gpu() -> None:
    """Make "cuda" the GPU of this process."""
    device, count = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    if count == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):
        device = 0  # the launcher shows each process its own
    if device >= count:
        raise DeviceError(
            f"The process with LOCAL_RANK={device} wants a GPU of its own, and torch finds {count} "
            "here. Start one process for each: `torchrun --nproc_per_node gpu ...`."
        )
    torch.cuda.set_device(device)


def _make_board(context: Context) -> Board:
    if context.world_size == 1:
        return NoBoard()
    if not context.splits_batches or not dist.is_initialized():
        return HorovodBoard()
    from torch.distributed.distributed_c10d import _get_default_store

    name = context.share(uuid.uuid4().hex)  # several runs may follow each other in one script
    return StoreBoard(_get_default_store(), context.rank, context.world_size, name)


def _abort(is_ours: bool) -> None:
    """Close the connections without waiting for the others: theirs then fail, and they look up."""
    if not is_ours or not dist.is_initialized():
        return
    if "nccl" in str(dist.get_backend()):
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()
