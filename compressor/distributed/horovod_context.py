"""The processes of Horovod, as horovodrun starts them (Sergeev and Del Balso, 2018)."""

from __future__ import annotations

import importlib
import os
import pickle
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compressor.distributed.context import Context, SingleProcess
from compressor.distributed.horovod_replica import HorovodReplica, Travel
from compressor.errors import ConfigError, DeviceError, first_line
from compressor.logs import get_logger

logger = get_logger(__name__)

Plain = TypeVar("Plain")

BUILD = "python -m compressor.distributed.build_horovod"
HALVES = "HVD_FP16"  # of the environment: gradients travel in 16 bits
NO = ("", "0", "false", "no", "off")
SHORTEST_PAUSE, LONGEST_PAUSE = 5e-5, 2e-2  # seconds between two looks at whether a message came


def require_horovod(*, on_gpu: bool = False) -> Context:
    """Start Horovod in this process, unless it runs already.

    Horovod goes on until the process ends: it cannot be started twice.

    Args:
        on_gpu: this process takes the GPU of its number on this machine, "cuda" from now on.

    Returns:
        All processes that horovodrun started; under plain `python`, this one alone.

    Raises:
        ConfigError: if Horovod is missing, or does not load, or torchrun started the processes.
        DeviceError: if there are fewer GPUs here than processes that want one.
    """
    hvd = _load()
    if not hvd.is_initialized():
        # Rank 0 evaluates, times and writes while the others wait, which is no stall.
        os.environ.setdefault("HOROVOD_STALL_CHECK_DISABLE", "1")
        hvd.init()
    if hvd.size() == 1:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"use_horovod=True, and torchrun started {os.environ['WORLD_SIZE']} processes. "
                "Start them with `horovodrun -np N python ...`, or write use_horovod=False."
            )
        logger.warning(
            "use_horovod=True, and this is the only process. "
            "For N of them start it with `horovodrun -np N python ...`."
        )
        return SingleProcess()
    if on_gpu:
        _take_gpu(hvd.local_rank())
    return HorovodContext()


class HorovodContext:
    """All processes that one horovodrun has started; each trains on whole batches of its own."""

    splits_batches = False

    def __init__(self) -> None:
        self._hvd = _load()

    @property
    def rank(self) -> int:
        """Of this process."""
        return int(self._hvd.rank())

    @property
    def local_rank(self) -> int:
        """Of this process among those of this machine."""
        return int(self._hvd.local_rank())

    @property
    def world_size(self) -> int:
        """How many there are."""
        return int(self._hvd.size())

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def most(self, value: float) -> float:
        """The largest `value` of them."""
        return max(self.gather(value))

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Of each name, the sum over those that have it; in the order of rank 0's names first."""
        sums: dict[str, float] = {}
        for each in self.gather(dict(values)):
            for name, value in each.items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def gather(self, value: Plain) -> list[Plain]:
        """The plain `value` of each, by rank."""
        own = _pack(value)
        size = torch.tensor([len(own)])
        sizes = self._wait(self._hvd.allgather_async(size, name="compressor.sizes"))
        together = self._hvd.allgather(own, name="compressor.gather")
        return [_unpack(each) for each in torch.split(together, sizes.tolist())]

    def share(self, value: Plain) -> Plain:
        """The plain `value` of rank 0; that of the others is not looked at."""
        # Horovod's own `broadcast_object` goes byte by byte, which takes a second for 10 MB.
        own = _pack(value) if self.is_main else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(own)])
        self._wait(self._hvd.broadcast_async_(size, root_rank=0, name="compressor.size"))
        if self.is_main:
            self._hvd.broadcast_(own, root_rank=0, name="compressor.share")
            return value
        own = torch.empty(int(size), dtype=torch.uint8)
        self._hvd.broadcast_(own, root_rank=0, name="compressor.share")
        first: Plain = _unpack(own)
        return first

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Set `tensors` to those of rank 0, in place, bit by bit; one message of all."""
        if not any(tensor.numel() for tensor in tensors):
            return
        with torch.no_grad():
            parts = [_bytes_of(tensor) for tensor in tensors]
            flat = torch.cat(parts)  # of bytes, because Horovod does not know all types
            self._hvd.broadcast_(flat, root_rank=0, name="compressor.broadcast")
            sizes = [len(part) for part in parts]
            for tensor, part in zip(tensors, torch.split(flat, sizes), strict=True):
                same = torch.empty(tensor.shape, dtype=tensor.dtype)
                _bytes_of(same).copy_(part)
                tensor.copy_(same)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Set `tensors`, which are floating, to their mean over all, in place."""
        travel = Travel(halves=False, stays_on_gpu=bool(self._hvd.cuda_built()))
        with torch.no_grad():
            sent = [travel.compress(tensor.detach()) for tensor in tensors]
            handles = [
                self._hvd.allreduce_async_(each, name=f"compressor.{i}", op=self._hvd.Average)
                for i, (each, _) in enumerate(sent)
            ]
            for handle, (each, whole) in zip(handles, sent, strict=True):
                self._hvd.synchronize(handle)
                travel.decompress(each, whole)

    def barrier(self) -> None:
        """Wait for all."""
        self._hvd.barrier()

    def replicate(self, model: nn.Module) -> HorovodReplica:
        """A replica of `model`, whose parameters and buffers become those of rank 0."""
        self.broadcast([*model.parameters(), *model.buffers()])
        halves = os.environ.get(HALVES, "").lower() not in NO
        return HorovodReplica(model, self._hvd, halves=halves)

    def close(self) -> None:
        """Nothing: Horovod ends with the process."""

    def _wait(self, handle: int) -> Tensor:
        """What comes of a message, as long as it takes.

        Horovod's own waiting takes most of a core, on which rank 0 may be timing a model.
        """
        pause = SHORTEST_PAUSE
        while not self._hvd.poll(handle):
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        message: Tensor = self._hvd.synchronize(handle)
        return message


def _take_gpu(device: int) -> None:
    count = torch.cuda.device_count()
    if count == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):
        device = 0  # the launcher shows each process its own
    if device >= count:
        raise DeviceError(
            f"Process {device} of this machine wants a GPU of its own, and torch finds {count}. "
            "Start one process for each GPU, or write device='CPU'."
        )
    torch.cuda.set_device(device)


def _load() -> ModuleType:
    try:
        hvd = importlib.import_module("horovod.torch")
    except ModuleNotFoundError as error:
        if error.name is None or not "horovod.torch".startswith(error.name):
            raise
        raise ConfigError(
            f"use_horovod=True, and Horovod is not installed. Build it for this torch: {BUILD}"
        ) from error
    except (ImportError, OSError) as error:  # a symbol of another torch, or no native library
        raise ConfigError(
            f"Horovod does not load under torch {torch.__version__}: {first_line(error)} "
            f"Build it for this torch: {BUILD}"
        ) from error
    return hvd


def _pack(value: object) -> Tensor:
    """Bytes (n,)."""
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpack(packed: Tensor) -> Any:
    return pickle.loads(packed.numpy().data)


def _bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of `tensor` (n,), on the CPU; a view, if it lies there in one piece."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
