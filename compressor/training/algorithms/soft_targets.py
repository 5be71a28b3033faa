"""Targets as a distribution over classes, which can be smoothed and mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.errors import DataError, ModelError

if TYPE_CHECKING:
    from compressor.training.state import State

IGNORED = -100  # `ignore_index` of torch's losses
NOT_CLASSES = (
    "If they are no classes: mix with interpolate_loss=True, and leave label smoothing out."
)


def soft_targets(
    logits: Tensor, targets: Tensor, ignore_index: int = IGNORED, class_dim: int = 1
) -> Tensor:
    """`targets` as weights of the classes.

    Weights of a target sum to 1. Where some are ignored, theirs are 0 and those of the others
    larger by all / counted: then the mean cross entropy is the one over the targets that count, as
    torch's own with `ignore_index`.

    Args:
        logits: (N, K, ...); only shape and precision are read.
        targets: class indices (N, ...), or weights (N, K, ...), which stay as they are.
        ignore_index: a target that counts nothing.
        class_dim: where K is in `logits`; -1 for tokens (N, T, K).

    Returns:
        In the shape of `logits`, float32, or float64 if `logits` is; without gradient to `logits`.

    Raises:
        DataError: if the shapes do not fit, targets are no classes, or a class is not below K (on
            the CPU; a GPU would have to be waited for).

    >>> soft_targets(torch.zeros(2, 3), torch.tensor([2, 0]))
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if targets.shape == logits.shape:
        return targets.to(dtype)
    _check_indices(logits, targets, class_dim)
    is_counted = targets != ignore_index
    indices = targets.masked_fill(~is_counted, 0).long().unsqueeze(class_dim)
    if indices.device.type == "cpu" and indices.numel():
        _check_classes(indices, logits.shape[class_dim])
    weights = is_counted * (targets.numel() / is_counted.sum().clamp(min=1).to(dtype))
    soft = torch.zeros(logits.shape, dtype=dtype, device=targets.device)
    return soft.scatter_(class_dim, indices, weights.unsqueeze(class_dim))


def mix_targets(targets: Tensor, permuted: Tensor, mixing: float) -> Tensor:
    """(1 - mixing) * targets + mixing * permuted.

    Args:
        targets: (N, K, ...), weights of the classes.
        permuted: of the same shape.
        mixing: 0 to 1.

    >>> eye = torch.eye(2)
    >>> mix_targets(eye, eye.flip(0), mixing=0.25)
    tensor([[0.7500, 0.2500],
            [0.2500, 0.7500]])
    """
    return torch.lerp(targets, permuted, mixing)


def class_scores(outputs: Any) -> Tensor:
    """The class scores (N, K, ...) among a model's outputs: these themselves, or their "logits".

    Raises:
        ModelError: if there are none.

    >>> class_scores({"logits": torch.zeros(2, 3), "features": torch.zeros(2, 8)}).shape
    torch.Size([2, 3])
    """
    if isinstance(outputs, Mapping):
        scores = outputs.get("logits")
    else:
        scores = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(scores, Tensor) or scores.dim() < 2 or not scores.is_floating_point():
        shape = f" of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else ""
        raise ModelError(
            f"The model's outputs, a {type(outputs).__name__}{shape}, are no class scores. Return "
            "scores (N, K, ...), alone or as 'logits'. MixUp and CutMix can do without them, with "
            "interpolate_loss=True; label smoothing cannot, leave it out."
        )
    return scores


def class_dim_of(state: State, scores: Tensor, given: int | None) -> int:
    """The dimension of `scores` that the classes are in: as given, or as the task says.

    A task has `class_dim` where three-dimensional scores are not (N, K, ...) but (N, T, K).
    """
    if given is not None:
        return given
    return int(getattr(state.model, "class_dim", 1)) if scores.dim() == 3 else 1


def _check_indices(logits: Tensor, targets: Tensor, class_dim: int) -> None:
    shape = list(logits.shape)
    fits = -len(shape) <= class_dim < len(shape) > 1
    classes = shape.pop(class_dim) if fits else 0
    if not fits or list(targets.shape) != shape:
        is_last = targets.shape == logits.shape[:-1]
        help = (
            "If the classes come last, write class_dim=-1."
            if is_last
            else "Give class indices (N, ...) for outputs (N, K, ...), or weights of the classes "
            f"in the shape of the outputs. {NOT_CLASSES}"
        )
        raise DataError(
            f"Targets of shape {tuple(targets.shape)} do not fit outputs of shape "
            f"{tuple(logits.shape)} with the classes in dimension {class_dim}. {help}"
        )
    if targets.is_floating_point():
        raise DataError(
            f"The targets are {targets.dtype}, and of the shape of class indices. If they are "
            f"indices, give integers: targets.long(). {NOT_CLASSES}"
        )
    if classes == 1:
        raise DataError(
            f"Outputs of shape {tuple(logits.shape)} have 1 class, of which indices say nothing. "
            f"{NOT_CLASSES}"
        )


def _check_classes(indices: Tensor, classes: int) -> None:
    low, high = (int(value) for value in indices.aminmax())
    if low < 0 or high >= classes:
        raise DataError(
            f"A target is the class {low if low < 0 else high}, and the model has {classes} "
            f"classes, 0 to {classes - 1}. Number the targets so; one that does not count is named "
            "by ignore_index."
        )
