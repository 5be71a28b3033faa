"""Which channels of a group matter: one score a channel, from plain functions of tensors.

A channel of a group lives in several layers. Its score is the sum, over the layers that produce it,
of the layer's own score divided by the layer's mean: so that no layer drowns the others.

L1: Li et al. 2017 (1608.08710). BN scale: Liu et al. 2017 (1708.06519). First-order Taylor:
Molchanov et al. 2019 (1906.10771).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.errors import ConfigError, suggest
from compressor.structure.groups import ChannelGroup
from compressor.structure.layers import layer_axis

MEAN_FLOOR = 1e-12  # a dead layer has mean score 0


def l1_importance(weight: Tensor) -> Tensor:
    """Sum of absolute values of each output channel: (out, …) -> (out,)."""
    return weight.detach().abs().flatten(1).sum(1)


def l2_importance(weight: Tensor) -> Tensor:
    """Euclidean norm of each output channel: (out, …) -> (out,)."""
    norms: Tensor = torch.linalg.vector_norm(weight.detach().flatten(1), dim=1)
    return norms


def taylor_importance(weight: Tensor, gradient: Tensor) -> Tensor:
    """Squared first-order change of the loss when a channel goes: (out, …) -> (out,)."""
    return (weight.detach() * gradient).flatten(1).sum(1).square()


def group_importance(model: nn.Module, group: ChannelGroup, criterion: str) -> Tensor:
    """Score of every channel of `group`: (group.size,), larger matters more.

    A group without a layer that the criterion can score (no batch norm, no gradient) is scored by
    L2.

    Args:
        model: with gradients in place, if `criterion` needs them.
        group: whose producing layers ("out" side) are scored.
        criterion: one of `CRITERIA`.

    Raises:
        ConfigError: if `criterion` is unknown.
    """
    if criterion not in CRITERIA:
        raise ConfigError(f"importance={criterion!r} is unknown. {suggest(criterion, CRITERIA)}")
    total, scored = _sum_scores(model, group, CRITERIA[criterion])
    return total if scored else _sum_scores(model, group, _l2)[0]


def _sum_scores(
    model: nn.Module, group: ChannelGroup, score_layer: Callable[[nn.Module], Tensor | None]
) -> tuple[Tensor, bool]:
    total, scored = torch.zeros(group.size), False
    for member in group.producers:
        entries = score_layer(model.get_submodule(member.module))
        if entries is not None:
            entries = entries.float().cpu()
            scores = torch.stack([entries[list(index)].sum() for index in member.index])
            total += scores / scores.mean().clamp_min(MEAN_FLOOR)
            scored = True
    return total, scored


def _l1(layer: nn.Module) -> Tensor | None:
    weight = _weight(layer)
    return None if weight is None else l1_importance(weight)


def _l2(layer: nn.Module) -> Tensor | None:
    weight = _weight(layer)
    return None if weight is None else l2_importance(weight)


def _bn_scale(layer: nn.Module) -> Tensor | None:
    if isinstance(layer, _BatchNorm) and layer.affine:
        return layer.weight.detach().abs()
    return None


def _taylor(layer: nn.Module) -> Tensor | None:
    weight, gradient = _weight(layer), _weight(layer, of_gradient=True)
    if weight is None or gradient is None:
        return None
    return taylor_importance(weight, gradient)


def _weight(layer: nn.Module, *, of_gradient: bool = False) -> Tensor | None:
    """The weight of a layer that makes channels, or its gradient, with the channels first."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() < 2:
        return None
    dims = dict(layer_axis(layer, "out").tensors)
    tensor = weight.grad if of_gradient else weight.detach()
    return None if tensor is None or "weight" not in dims else tensor.movedim(dims["weight"], 0)


CRITERIA: dict[str, Callable[[nn.Module], Tensor | None]] = {
    "l1": _l1,
    "l2": _l2,
    "bn_scale": _bn_scale,
    "taylor": _taylor,
}
