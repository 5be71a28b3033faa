"""Convolutions and linear layers as linear maps at single positions, and the map that fits best.

The least squares of He et al. 2017, Channel pruning for accelerating very deep neural networks
(1707.06168), pulled to the weights that the layer has.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LinearMap: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Positions: TypeAlias = tuple[Tensor, ...]
"""The sample, and then where in it: a tensor of numbers for each dimension but the channels'."""

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
RIDGE = 1e-3  # of the mean square of the inputs


def as_linear_map(module: nn.Module) -> LinearMap | None:
    """`module`, if it is a linear layer or convolution that runs torch's own code."""
    for kind in KINDS:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            own = module._parameters.get("weight")
            if own is not None and own.is_floating_point() and "forward" not in vars(module):
                return module
    return None


def fan_in(layer: LinearMap) -> int:
    """Entries that one output is computed from."""
    return layer.weight[0].numel()


def position_shape(layer: LinearMap, output: tuple[int, ...]) -> tuple[int, ...]:
    """`output` without the dimension of the channels."""
    if isinstance(layer, nn.Linear):
        return output[:-1]
    return (output[0], *output[2:])


def draw_positions(shape: tuple[int, ...], count: int, generator: torch.Generator) -> Positions:
    """`count` positions, or all if there are no more, in random order and each once."""
    order = torch.randperm(math.prod(shape), generator=generator)[:count]
    return torch.unravel_index(order, shape)


def outputs_at(layer: LinearMap, output: Tensor, positions: Positions) -> Tensor:
    """(positions, channels) of what `layer` gave, or of a tensor of that shape."""
    last = output if isinstance(layer, nn.Linear) else output.movedim(1, -1)
    return _real(last[positions])


def inputs_at(layer: LinearMap, value: Tensor, positions: Positions) -> Tensor:
    """(groups, positions, fan in): what the outputs there are computed from.

    Args:
        layer: one group but for convolutions.
        value: that the layer takes.
        positions: in its output.
    """
    if isinstance(layer, nn.Linear):
        return _real(value[positions]).unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(value, layer._reversed_padding_repeated_twice, mode=mode).movedim(1, -1)
    dims = len(layer.kernel_size)
    samples, *places = positions
    index = [samples.view(-1, *[1] * dims)]
    for dim, place in enumerate(places):
        steps = torch.arange(layer.kernel_size[dim], device=place.device) * layer.dilation[dim]
        shape = [len(place), *[1] * dims]
        shape[dim + 1] = -1
        entries = place[:, None] * layer.stride[dim] + steps
        index.append(entries.view(shape))
    patches = _real(padded[tuple(index)])  # (positions, *kernel, channels)
    grouped = patches.view(*patches.shape[:-1], layer.groups, patches.shape[-1] // layer.groups)
    found: Tensor = grouped.movedim(-2, 0).movedim(-1, 2).flatten(2)
    return found


def _real(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Fit(NamedTuple):
    """A linear map.

    Attributes:
        weight: (groups, outputs of a group, fan in).
        bias: (outputs,), zeros if none was asked for.
        gain: fraction of the squared error of the old weights that it takes away, on positions that
            it was not made from.
    """

    weight: Tensor
    bias: Tensor
    gain: float


def fit_linear_map(
    inputs: Tensor,
    targets: Tensor,
    weight: Tensor,
    is_held: Tensor,
    *,
    has_bias: bool,
    ridge: float = RIDGE,
) -> Fit | None:
    """The least squares map from `inputs` to `targets`, pulled to `weight`; None if none is better.

    It goes from `weight` towards the solution as far as is best for the positions that are held
    out.

    Args:
        inputs: (groups, positions, fan in).
        targets: (positions, outputs).
        weight: (groups, outputs of a group, fan in).
        is_held: (positions,) bool; those that no weights are made from.
        has_bias: whether there may be a constant; then the old weights are judged with their best
            one.
        ridge: weight of the squared change, times the mean square of the inputs.
    """
    wanted = targets.view(len(targets), *weight.shape[:2]).movedim(1, 0)
    made, held = ~is_held, is_held
    if not bool(held.any()) or int(made.sum()) < inputs.shape[2]:
        return None
    center = inputs[:, made].mean(1, keepdim=True) * has_bias
    middle = wanted[:, made].mean(1, keepdim=True) * has_bias
    inputs, wanted = inputs - center, wanted - middle
    errors = wanted - inputs @ weight.mT
    change = _solve(inputs[:, made], errors[:, made], ridge)
    if change is None:
        return None
    moved = inputs[:, held] @ change
    before = errors[:, held].double()
    along = float((before * moved).sum()) / max(float(moved.double().square().sum()), 1e-30)
    step = min(max(along, 0.0), 1.0)
    total = float(before.square().sum())
    left = float((before - step * moved).square().sum())
    if not step or not left < total:
        return None
    weight = weight + step * change.mT
    bias = (middle - center @ weight.mT).movedim(0, 1).flatten()
    return Fit(weight, bias, 1 - left / total)


def _solve(inputs: Tensor, errors: Tensor, ridge: float) -> Tensor | None:
    """(groups, fan in, outputs of a group) that added to the weights leaves the least."""
    gram = (inputs.mT @ inputs).double()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += ridge * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float64).tiny
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed.any()):
        return None
    change = torch.cholesky_solve((inputs.mT @ errors).double(), factor)
    return change.to(inputs.dtype) if bool(change.isfinite().all()) else None
