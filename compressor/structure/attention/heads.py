"""Pieces that the attention modules are made of: copies of weights, and heads in and out."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn


def make_linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A layer that holds these very parameters.

    Args:
        weight: (out, in).
        bias: (out,).
    """
    out_features, in_features = weight.shape
    # "meta": no time and no random numbers for values that nobody sees
    layer = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


@overload
def copy_part(tensor: Tensor, part: int = 0, parts: int = 1) -> nn.Parameter: ...
@overload
def copy_part(tensor: Tensor | None, part: int = 0, parts: int = 1) -> nn.Parameter | None: ...
def copy_part(tensor: Tensor | None, part: int = 0, parts: int = 1) -> nn.Parameter | None:
    """A copy of one of `parts` equal runs of a parameter's rows, with the same `requires_grad`."""
    if tensor is None:
        return None
    values = tensor.detach().chunk(parts)[part].clone()
    return nn.Parameter(values, requires_grad=tensor.requires_grad)


def copy_linear(layer: nn.Linear, part: int = 0, parts: int = 1) -> nn.Linear:
    """A copy of one of `parts` equal runs of a layer's outputs."""
    return make_linear(copy_part(layer.weight, part, parts), copy_part(layer.bias, part, parts))


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(N, length, heads * head_dim) -> (N, heads, length, head_dim)."""
    return torch.unflatten(x, -1, (-1, head_dim)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(N, heads, length, head_dim) -> (N, length, heads * head_dim)."""
    # Each kernel of scaled_dot_product_attention lays its output out in its own way. Without the
    # copy, a traced graph has a view that fits only the kernel which ran while it was traced.
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2)
