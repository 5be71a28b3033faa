"""Mean and variance of what batch norms are given."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.interfaces.inputs import ModelInputs
from compressor.structure.run_record import first_tensor
from compressor.structure.trace import eval_mode, run


class Moments(NamedTuple):
    """Of each channel, (channels,), over samples and positions; the variance is unbiased."""

    mean: Tensor
    variance: Tensor


def moments_of(value: Tensor) -> Moments | None:
    """Of (samples, channels, ...); None of a single position."""
    if value.numel() <= value.shape[1]:
        return None
    dims = [dim for dim in range(value.dim()) if dim != 1]
    variance, mean = torch.var_mean(value.float(), dims)
    return Moments(mean, variance)


def record_moments(model: nn.Module, inputs: ModelInputs) -> dict[str, Moments]:
    """Of the input of each batch norm of `model` in a run of `inputs`, by its name.

    Norms that are called several times are left out.
    """
    found: dict[str, list[Moments | None]] = {}

    def note(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        value = first_tensor((args, kwargs))
        found.setdefault(name, []).append(None if value is None else moments_of(value))

    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not norms:
        return {}
    handles = [
        norm.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name, norm in norms.items()
    ]
    with eval_mode(model), torch.no_grad():
        try:
            run(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
    return {
        name: moments
        for name, values in found.items()
        if len(values) == 1 and (moments := values[0]) is not None
    }
