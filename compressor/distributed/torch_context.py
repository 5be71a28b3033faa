"""The processes of `torch.distributed`, as torchrun starts them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compressor.distributed.context import Replica
from compressor.distributed.replicas import TorchReplica

Plain = TypeVar("Plain")

PATIENCE = timedelta(days=365)  # an evaluation of rank 0 may take hours, while the others wait
_ROUNDED = (torch.float16, torch.bfloat16)  # sums of many of them are taken in float32

# By the default group that they belong to: making one is a matter of all processes.
_CONTROL_GROUPS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class TorchDistributed:
    """The default process group, which the caller has initialised.

    Tensors go through that group, and plain values through one of its own over gloo, which waits
    as long as it takes: a process that dies closes its connections, and so ends the wait.

    Attributes:
        rank: of this process.
        world_size: of the group.
        is_main: whether this is rank 0.
        has_told_of_branches: a replica has logged that its model cannot be wrapped.
    """

    splits_batches = True

    def __init__(self) -> None:
        # `alone` hides it from those who ask for it; it ends, with its connections, when destroyed.
        self._default = weakref.ref(dist.group.WORLD)
        self.rank: int = dist.get_rank()
        self.world_size: int = dist.get_world_size()
        self.is_main = self.rank == 0
        self.has_told_of_branches = False
        self._is_on_gpu = "nccl" in str(dist.get_backend())

    def most(self, value: float) -> float:
        """The largest `value` of them."""
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control())
        return float(tensor.item())

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Of each name, the sum over those that have it."""
        everybody = self.gather(dict(values))
        names = dict.fromkeys(name for each in everybody for name in each)
        return {name: sum(each.get(name, 0.0) for each in everybody) for name in names}

    def gather(self, value: Plain) -> list[Plain]:
        """The plain `value` of each, by rank."""
        everybody: list[Any] = [None] * self.world_size
        dist.all_gather_object(everybody, value, group=self._control())
        return everybody

    def share(self, value: Plain) -> Plain:
        """The plain `value` of rank 0."""
        box: list[Any] = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, group=self._control())
        shared: Plain = box[0]
        return shared

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Set `tensors` to those of rank 0, in place; one message a type."""
        for same in _by_type(tensors):
            flat = self._placed(_flat(same))
            if not flat.numel():
                continue
            # As bytes: gloo does not know all types.
            dist.broadcast(flat.view(torch.uint8), src=0, group=self._default())
            _scatter(flat, same)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Set `tensors` to their mean over all, in place; one message a type."""
        for same in _by_type(tensors):
            if same[0].is_sparse:
                self._average_sparse(same)
                continue
            flat = self._placed(_flat(same))
            if flat.dtype in _ROUNDED:
                flat = flat.float()
            dist.all_reduce(flat, group=self._default())
            flat /= self.world_size
            _scatter(flat, same)

    def barrier(self) -> None:
        """Wait for all."""
        self.most(0.0)

    def replicate(self, model: nn.Module) -> Replica:
        """A `TorchReplica`."""
        return TorchReplica(self, model)

    def close(self) -> None:
        """Nothing: the groups end with the default one, which is the caller's."""

    def counts(self, flags: Sequence[bool]) -> list[int]:
        """Of each flag, in how many processes it is set."""
        tensor = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(tensor, group=self._control())
        counts: list[int] = tensor.tolist()
        return counts

    def _average_sparse(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            whole = self._placed(tensor.coalesce())
            dist.all_reduce(whole, group=self._default())
            with torch.no_grad():
                tensor.copy_((whole / self.world_size).to(tensor.device))

    def _placed(self, tensor: Tensor) -> Tensor:
        """Where messages must lie: NCCL's on a GPU, those of gloo on the CPU."""
        if not self._is_on_gpu:
            return tensor.cpu()
        return tensor if tensor.is_cuda else tensor.cuda()

    def _control(self) -> Any:
        """The group of plain values; all processes make it at the first of them."""
        default = self._default()
        control = _CONTROL_GROUPS.get(default)
        if control is None:
            control = dist.new_group(backend="gloo", timeout=PATIENCE)
            _CONTROL_GROUPS[default] = control
        return control


def _by_type(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one type and device together, in an order that is the same in all processes."""
    groups: dict[tuple[torch.dtype, torch.device, bool], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device, tensor.is_sparse), []).append(tensor)
    return list(groups.values())


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _scatter(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, part in zip(tensors, torch.split(flat, sizes), strict=True):
            tensor.copy_(part.view_as(tensor))
