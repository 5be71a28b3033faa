"""A model whose gradients Horovod reduces, while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD


class HorovodReplica:
    """A model whose gradients `DistributedOptimizer` reduces, while the backward pass goes on.

    Horovod's optimizer never steps: it brings the hooks. The user's own steps, with what is in
    `grad` after `finish`. Parameters that are frozen or thawed between two batches are followed.

    A batch that may be given up and begun anew, on all processes alike, must not have a last
    micro-batch: nothing is sent before `finish` then.

    Args:
        model: is the runner.
        hvd: `horovod.torch`.
        halves: gradients travel in 16 bits.
    """

    def __init__(self, model: nn.Module, hvd: ModuleType, *, halves: bool) -> None:
        self.runner = model
        self._hvd = hvd
        self._travel = Travel(halves=halves, stays_on_gpu=bool(hvd.cuda_built()))
        self._trained: dict[str, nn.Parameter] = {}
        self._optimizer: Any = None

    @contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch; the last one's gradients are sent off."""
        self._follow()
        # A parameter is sent off with its second gradient from now on, which does not come.
        self._optimizer.set_backward_passes_per_step(1 if is_last else 2)
        yield

    def finish(self) -> None:
        """Wait until the gradients are the mean of all processes.

        Where only some have one, it counts 0 in the others; where none has, there is none.
        """
        assert self._optimizer is not None
        # Horovod makes gradients of 0, by which weight decay would move what nobody trains.
        has = [parameter.grad is not None for parameter in self._trained.values()]
        counts = torch.tensor(has, dtype=torch.int32)
        handle = self._hvd.allreduce_async_(counts, name="compressor.counts", op=self._hvd.Sum)
        self._optimizer.synchronize()
        self._hvd.synchronize(handle)
        for parameter, count in zip(self._trained.values(), counts.tolist(), strict=True):
            if not count:
                parameter.grad = None

    def close(self) -> None:
        """Take the hooks off the parameters.

        A graph that is still alive keeps its hooks: those do nothing from now on.
        """
        if self._optimizer is not None:
            self._optimizer.set_backward_passes_per_step(2**62)
            self._optimizer._grad_accs.clear()  # a cycle through C++, which nothing collects
            self._optimizer = None
        self._trained = {}

    def _follow(self) -> None:
        trained = {
            name: parameter
            for name, parameter in self.runner.named_parameters()
            if parameter.requires_grad
        }
        is_same = trained.keys() == self._trained.keys() and all(
            self._trained[name] is parameter for name, parameter in trained.items()
        )
        if is_same and self._optimizer is not None:
            return
        self.close()
        self._trained = trained
        self._optimizer = self._hvd.DistributedOptimizer(
            SGD(trained.values(), lr=0.0),
            named_parameters=list(trained.items()),
            compression=self._travel,
            sparse_as_dense=True,  # a rank without such a gradient sends zeros, which are dense
        )


@dataclass(frozen=True)
class Travel:
    """How a tensor is sent: contiguous, of a type and on a device that Horovod knows.

    Attributes:
        halves: floating tensors go in 16 bits.
        stays_on_gpu: Horovod was built with CUDA; else tensors go through the host's memory.
    """

    halves: bool
    stays_on_gpu: bool

    def compress(self, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is sent in place of `tensor`, and what it is then written into; None: itself."""
        dtype = tensor.dtype
        if self.halves and dtype.is_floating_point:
            dtype = torch.float16
        elif dtype is torch.bfloat16:  # Horovod does not know it
            dtype = torch.float32
        device = tensor.device if self.stays_on_gpu else torch.device("cpu")
        sent = tensor.to(device, dtype).contiguous()
        return sent, None if sent is tensor else tensor

    def decompress(self, tensor: Tensor, whole: Tensor | None) -> Tensor:
        """The tensor that was to be sent, with what has come."""
        return tensor if whole is None else whole.copy_(tensor)
