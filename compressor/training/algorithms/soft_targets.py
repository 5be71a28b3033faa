"""Targets as a distribution over classes, which can be smoothed and mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.errors import DataError, ModelError

IGNORED = -100  # `ignore_index` of torch's losses


def soft_targets(logits: Tensor, targets: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """`targets` as weights of the classes.

    Args:
        logits: (N, K, ...); only shape and precision are read.
        targets: class indices (N, ...), or weights (N, K, ...), which stay as they are.
        ignore_index: a target that counts nothing; its weights are all 0. A mean of the loss still
            divides by it, where torch's own `ignore_index` does not.

    Returns:
        (N, K, ...), float32, or float64 if `logits` is; without gradient to `logits`.

    Raises:
        DataError: if the shapes do not fit, or a class is not below K (on the CPU; a GPU would
            have to be waited for).

    >>> soft_targets(torch.zeros(2, 3), torch.tensor([2, 0]))
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if targets.shape == logits.shape:
        return targets.to(dtype)
    if logits.dim() < 2 or targets.shape != logits.shape[:1] + logits.shape[2:]:
        raise DataError(
            f"Targets of shape {tuple(targets.shape)} do not fit outputs of shape "
            f"{tuple(logits.shape)}. Give class indices (N, ...) for outputs (N, K, ...), or "
            "weights of the classes in the shape of the outputs."
        )
    if targets.is_floating_point():
        raise DataError(
            f"The targets are {targets.dtype}, and of the shape of class indices. "
            "Give indices as integers: targets.long()."
        )
    is_ignored = targets == ignore_index
    indices = targets.masked_fill(is_ignored, 0).long().unsqueeze(1)
    if indices.device.type == "cpu" and indices.numel():
        _check_classes(indices, logits.shape[1])
    soft = torch.zeros(logits.shape, dtype=dtype, device=targets.device)
    return soft.scatter_(1, indices, (~is_ignored).to(dtype).unsqueeze(1))


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
            "interpolate_loss=True."
        )
    return scores


def _check_classes(indices: Tensor, classes: int) -> None:
    low, high = (int(value) for value in indices.aminmax())
    if low < 0 or high >= classes:
        raise DataError(
            f"A target is the class {low if low < 0 else high}, and the model has {classes} "
            f"classes, 0 to {classes - 1}. Number the targets so."
        )
