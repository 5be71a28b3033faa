"""A model held still while it is looked at: evaluation mode, no gradients, random state kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from compressor.interfaces.inputs import device_of


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode without gradients; modes, gradients and random state come back.

    >>> model = nn.Dropout()
    >>> with inference(model):
    ...     print(model.training, torch.is_grad_enabled())
    False False
    >>> model.training, torch.is_grad_enabled()
    (True, True)
    """
    modes = {module: module.training for module in model.modules()}
    cuda = [device_of(model)] if device_of(model).type == "cuda" else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(cuda):
            yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training


@contextmanager
def plain_attention() -> Iterator[None]:
    """Transformer layers run operation by operation: their fused path hides what is computed."""
    is_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_enabled)
