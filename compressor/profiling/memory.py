"""The most memory that the tensors of one forward take at a time."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.interfaces.inputs import ModelInputs, device_of
from compressor.profiling.inference import inference, plain_attention


def peak_activation_memory(model: nn.Module, inputs: ModelInputs) -> int:
    """Bytes that one call needs at its worst moment, beyond the model and its inputs.

    On a CPU these are the tensors alive at a time; what a kernel takes for itself is not seen. On
    CUDA it is what torch's allocator handed out, kernels' workspaces included.

    Args:
        model: called in evaluation mode; mode, gradients and random state are restored.
        inputs: on the model's device.

    >>> model = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 1))
    >>> peak_activation_memory(model, ModelInputs((torch.zeros(1, 4),)))  # two of 100 float32
    800
    """
    device = device_of(model)
    if device.type == "cuda":
        return _cuda_peak(model, inputs, device)
    mode = _LiveBytes(known=[*model.parameters(), *model.buffers(), *inputs.tensors()])
    with inference(model), plain_attention(), mode:
        inputs.call(model)
    return mode.peak_bytes


def _cuda_peak(model: nn.Module, inputs: ModelInputs, device: torch.device) -> int:
    with inference(model):
        inputs.call(model)  # libraries take their lasting workspaces in the first call
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        inputs.call(model)
        torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage from the operation that makes it until it is freed."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        self._known.add(address)
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, address, storage.nbytes())

    def _forget(self, address: int, size_bytes: int) -> None:
        self._known.discard(address)
        self.live_bytes -= size_bytes
