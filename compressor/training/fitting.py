"""Whether saved weights fit a model, as it is or after edits that are made again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compressor.errors import CheckpointError
from compressor.structure.describe import apply_difference
from compressor.structure.trace import copy_skeleton


def check_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Do nothing if `model` has just the tensors of `weights`.

    Raises:
        CheckpointError: naming the first that is missing, or has another shape or type.
    """
    own = model.state_dict()
    for name in sorted(own.keys() ^ weights.keys()):
        where = "checkpoint" if name in weights else "model"
        raise CheckpointError(
            f"The tensor {name!r} is only in the {where}. Make the model as it was made then."
        )
    for name, value in own.items():
        if isinstance(value, Tensor) and value.shape != weights[name].shape:
            raise CheckpointError(
                f"{name!r} has shape {tuple(weights[name].shape)} in the checkpoint and "
                f"{tuple(value.shape)} in the model. Resume with the model as it was pruned then."
            )
        if isinstance(value, Tensor) and value.dtype != weights[name].dtype:
            raise CheckpointError(
                f"{name!r} is of {weights[name].dtype} in the checkpoint and of {value.dtype} in "
                "the model. Resume with the same."
            )


def check_structure(
    model: nn.Module, structure: Mapping[str, Any], weights: Mapping[str, Any]
) -> None:
    """Do nothing if `model`, edited as `structure` says, takes `weights`. It is left as it is.

    Raises:
        CheckpointError: if it does not.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    trial = copy_skeleton(model)
    try:
        apply_difference(trial, structure)
        check_weights(trial, weights)
    finally:
        for parameter, flag in flags:  # which the trial shares
            parameter.requires_grad_(flag)
