"""What a trainer needs to know of other processes, behind one small protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Context(Protocol):
    """One of `world_size` processes; all of them call the same methods in the same order."""

    @property
    def rank(self) -> int:
        """Which one, from 0."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    def most(self, value: float) -> float:
        """The largest `value` of them."""

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Of each name, the mean over those that have it."""

    def gather(self, value: Any) -> list[Any]:
        """The plain `value` of each, by rank."""

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Set `tensors` to those of rank 0, in place."""

    def average_gradients(self, model: nn.Module) -> None:
        """Set the gradients of `model` to their mean, in place; where one has none, it counts 0."""


class SingleProcess:
    """There is only this one: nothing to do."""

    rank = 0
    world_size = 1

    def most(self, value: float) -> float:
        """`value`."""
        return value

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """`values`."""
        return dict(values)

    def gather(self, value: Any) -> list[Any]:
        """`value` alone."""
        return [value]

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Nothing."""

    def average_gradients(self, model: nn.Module) -> None:
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

    def most(self, value: float) -> float:
        """The largest `value` of them."""
        tensor = torch.tensor(value, dtype=torch.float64, device=_device())
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return float(tensor.item())

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Of each name, the mean over those that have it."""
        everybody = self.gather(dict(values))
        names = dict.fromkeys(name for each in everybody for name in each)
        found = {name: [each[name] for each in everybody if name in each] for name in names}
        return {name: sum(own) / len(own) for name, own in found.items()}

    def gather(self, value: Any) -> list[Any]:
        """The plain `value` of each, by rank."""
        everybody: list[Any] = [None] * self.world_size
        dist.all_gather_object(everybody, value)
        return everybody

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Set `tensors` to those of rank 0, in place; one message a type."""
        for same in _by_type(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in same]).to(_device())
            dist.broadcast(flat, src=0)
            _scatter(flat, same)

    def average_gradients(self, model: nn.Module) -> None:
        """Set the gradients of `model` to their mean, in place; where one has none, it counts 0."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        has = torch.tensor([p.grad is not None for p in parameters], device=_device()).byte()
        dist.all_reduce(has, dist.ReduceOp.MAX)
        gradients = []
        for parameter, is_somewhere in zip(parameters, has.tolist(), strict=True):
            if is_somewhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for same in _by_type(gradients):
            flat = torch.cat([tensor.reshape(-1) for tensor in same]).to(_device())
            dist.all_reduce(flat)
            flat /= self.world_size
            _scatter(flat, same)


def current_context() -> Context:
    """`torch.distributed`, where it is initialised with several processes; else this one alone."""
    is_several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return TorchDistributed() if is_several else SingleProcess()


def _device() -> torch.device:
    """Where messages must lie."""
    return torch.device("cuda" if "nccl" in str(dist.get_backend()) else "cpu")


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
