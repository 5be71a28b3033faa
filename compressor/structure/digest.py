"""A digest by which two models, or one model in several processes, are compared."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def parameter_digest(model: nn.Module) -> str:
    """SHA-256 of the names, shapes, dtypes and content of all parameters and buffers.

    A tensor counts under each of its names, so tied ones and equal ones are the same; the device,
    the order in memory and the order of the names do not matter.

    >>> model = torch.nn.Linear(2, 2)
    >>> before = parameter_digest(model)
    >>> _ = model.bias.data.add_(1)
    >>> parameter_digest(model) == before
    False
    """
    tensors: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        if tensor.numel():
            flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()
            found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()
