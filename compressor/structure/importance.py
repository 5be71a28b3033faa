"""Which channels matter, by formulas of tensors alone: (channels, …) -> (channels,).

A larger score matters more. `structure.scores` applies them to the tensors of a channel group.

L1: Li et al. 2017 (1608.08710). FPGM: He et al. 2019 (1811.00250). LAMP: Lee et al. 2021
(2010.07611). First-order Taylor: Molchanov et al. 2019 (1906.10771). Hessian: LeCun et al. 1990,
Optimal Brain Damage, with the Fisher information in its place as in Theis et al. 2018 (1801.05787).
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-30  # of a sum that divides: channels may all be 0


def l1_importance(weight: Tensor) -> Tensor:
    """Sum of the absolute values of each channel: (channels, …) -> (channels,).

    >>> l1_importance(torch.tensor([[1.0, -2.0], [0.0, 0.5]]))
    tensor([3.0000, 0.5000])
    """
    return weight.detach().flatten(1).abs().sum(1)


def l2_importance(weight: Tensor) -> Tensor:
    """Euclidean norm of each channel: (channels, …) -> (channels,).

    >>> l2_importance(torch.tensor([[3.0, -4.0], [0.0, 0.5]]))
    tensor([5.0000, 0.5000])
    """
    norms: Tensor = torch.linalg.vector_norm(weight.detach().flatten(1), dim=1)
    return norms


def fpgm_importance(weight: Tensor) -> Tensor:
    """Sum of each channel's distances to all others: (channels, …) -> (channels,).

    A channel near the geometric median of all can be replaced by the others, whatever its norm.

    >>> fpgm_importance(torch.tensor([[0.0], [1.0], [5.0]]))
    tensor([6., 5., 9.])
    """
    rows = weight.detach().flatten(1)
    # Not by the matrix product, which leaves errors of 1e-3 between equal rows.
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def lamp_importance(squares: Tensor) -> Tensor:
    """Each square as a part of those that are not smaller: (channels,) -> (channels,) up to 1.

    Removing by it, over several layers, distorts the layers' outputs least in the worst case, and
    never takes the last channel of a layer before all others.

    Args:
        squares: squared magnitudes of the channels of one layer or group, 0 or more.

    >>> lamp_importance(torch.tensor([1.0, 4.0, 5.0]))
    tensor([0.1000, 0.4444, 1.0000])
    """
    rivals = squares.detach()
    is_not_smaller = rivals[None, :] >= rivals[:, None]
    return rivals / (is_not_smaller * rivals).sum(1).clamp_min(FLOOR)


def taylor_importance(weight: Tensor, gradient: Tensor) -> Tensor:
    """Squared first-order change of the loss when a channel goes: (channels, …) -> (channels,).

    Args:
        weight: (channels, …).
        gradient: of the loss, of the same shape.
    """
    return (weight.detach() * gradient).flatten(1).sum(1).square()


def hessian_importance(weight: Tensor, squared_gradient: Tensor) -> Tensor:
    """Second-order change of the loss when a channel goes: (channels, …) -> (channels,).

    Half the weights' squares times the curvature, of which the diagonal is taken to be the mean
    square of the gradients.

    Args:
        weight: (channels, …).
        squared_gradient: mean over samples or batches of the squared gradient, of the same shape.
    """
    return (weight.detach().square() * squared_gradient).flatten(1).sum(1) / 2
