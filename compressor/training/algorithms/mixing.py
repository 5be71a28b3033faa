"""What MixUp and CutMix share: the draws, and what becomes of the targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.training.algorithms.soft_targets import (
    class_dim_of,
    class_scores,
    mix_targets,
    soft_targets,
)
from compressor.training.batch import get_item, set_item
from compressor.training.events import Event
from compressor.training.state import State


def draw_mixing(alpha: float, generator: torch.Generator | None = None) -> float:
    """A share from the distribution Beta(alpha, alpha); 0 if `alpha` is 0.

    torch's own Beta takes no generator, so a seed is drawn and numpy draws with it.

    Raises:
        ConfigError: if `alpha` is below 0.

    >>> 0 <= draw_mixing(0.2, torch.Generator().manual_seed(0)) <= 1
    True
    """
    if not alpha >= 0:
        raise ConfigError(f"alpha={alpha} is no Beta distribution. Write 0 or more; 1 is uniform.")
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha)) if alpha else 0.0


def draw_permutation(size: int, generator: torch.Generator | None = None) -> Tensor:
    """An order of `size` samples, (size,) int64."""
    return torch.randperm(size, generator=generator)


def check_mixable(inputs: Any, targets: Any) -> None:
    """Do nothing if both are tensors of the same number of samples.

    Raises:
        DataError: if not.
    """
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor) or not value.dim():
            raise DataError(
                f"The {name} are a {type(value).__name__}, not a tensor of samples, and cannot be "
                f"mixed. Name the tensor by {name[:-1]}_key, or leave mixing out."
            )
    if len(inputs) != len(targets):
        raise DataError(
            f"There are {len(inputs)} inputs and {len(targets)} targets. Give one for each."
        )


def check_share(mixing: float) -> None:
    """Do nothing if `mixing` is a share.

    Raises:
        ConfigError: if not.
    """
    if not 0 <= mixing <= 1:
        raise ConfigError(f"mixing={mixing} is no share. Write 0 to 1.")


INTERPOLATES = (
    "both mix inputs, and one of them has interpolate_loss=True, which knows nothing of what the "
    "other did. Let both have interpolate_loss=False."
)


class MixedTargets:
    """Lets the loss see the targets of mixed inputs: once mixed themselves, or twice.

    Args:
        input_key: place of the inputs in a batch.
        target_key: place of the targets.
        interpolate_loss: mix two losses, of the targets and of the permuted ones, which may be of
            any kind. Else the loss is computed once, with weights of the classes.
        ignore_index: a target that does not count.
        class_dim: where the classes are in the outputs; None: where the task says, or 1.
    """

    def __init__(
        self,
        input_key: int | str,
        target_key: int | str,
        interpolate_loss: bool,
        ignore_index: int,
        class_dim: int | None,
    ) -> None:
        self.input_key = input_key
        self.target_key = target_key
        self.interpolate_loss = interpolate_loss
        self.ignore_index = ignore_index
        self.class_dim = class_dim
        self._mixed: tuple[Tensor, float] | None = None
        self._paste: Callable[[Tensor], Tensor] | None = None

    @property
    def conflicts(self) -> dict[str, str]:
        """Beside whom it cannot mix: none that acts in turn, where losses are mixed."""
        return dict.fromkeys(("MixUp", "CutMix"), INTERPOLATES) if self.interpolate_loss else {}

    def items(self, state: State) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the batch.

        Raises:
            DataError: if they cannot be mixed.
        """
        inputs = get_item(state.batch, self.input_key)
        targets = get_item(state.batch, self.target_key)
        check_mixable(inputs, targets)
        return inputs, targets

    def begin(self, state: State, inputs: Tensor, indices: Tensor, mixing: float) -> None:
        """Put mixed inputs into the batch; their targets follow at the next events."""
        state.batch = set_item(state.batch, self.input_key, inputs)
        self._mixed, self._paste = (indices, mixing), None

    def begin_maps(self, state: State, inputs: Tensor, paste: Callable[[Tensor], Tensor]) -> None:
        """Put mixed inputs into the batch; `paste` does with their maps at AFTER_FORWARD the same.

        Maps may have become weights of the classes until then; height and width are last.
        """
        state.batch = set_item(state.batch, self.input_key, inputs)
        self._mixed, self._paste = None, paste

    def follow(self, event: Event, state: State) -> None:
        """Mix the targets at AFTER_FORWARD, or the losses at AFTER_LOSS."""
        if self._paste is not None:
            if event is Event.AFTER_FORWARD:
                maps = self._paste(get_item(state.batch, self.target_key))
                state.batch = set_item(state.batch, self.target_key, maps)
                self._paste = None
        elif self._mixed is None:  # nothing was mixed in this batch
            return
        elif event is Event.AFTER_FORWARD and not self.interpolate_loss:
            self._mix_targets(state, *self._mixed)
        elif event is Event.AFTER_LOSS:
            if self.interpolate_loss:
                self._mix_losses(state, *self._mixed)
            self._mixed = None

    def _mix_targets(self, state: State, indices: Tensor, mixing: float) -> None:
        scores = class_scores(state.outputs)
        class_dim = class_dim_of(state, scores, self.class_dim)
        targets = get_item(state.batch, self.target_key)
        soft = soft_targets(scores, targets, self.ignore_index, class_dim)
        mixed = mix_targets(soft, soft[indices.to(soft.device)], mixing)
        state.batch = set_item(state.batch, self.target_key, mixed)

    def _mix_losses(self, state: State, indices: Tensor, mixing: float) -> None:
        targets = get_item(state.batch, self.target_key)
        permuted = set_item(state.batch, self.target_key, targets[indices.to(targets.device)])
        other = state.recompute_loss(state.outputs, permuted)
        for name in state.task_terms:
            state.losses[name] = torch.lerp(state.losses[name], other[name], mixing)
