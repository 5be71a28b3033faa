"""Operations that are written as others before a graph is quantized, for kernels that there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.quantization.operations import aten


def _silu(x: Tensor) -> Tensor:
    """As runtimes without the operation have it."""
    return x * torch.sigmoid(x)


def _mean(
    x: Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """Of images over height and width as a pool, for which runtimes have an integer kernel."""
    if x.dim() != 4 or dtype is not None or not dim or sorted(i % 4 for i in dim) != [2, 3]:
        return NotImplemented
    pooled = aten.adaptive_avg_pool2d(x, [1, 1])
    return pooled if keepdim else pooled.flatten(1)


DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    aten.silu.default: _silu,
    aten.mean.dim: _mean,
}
