"""Gradients no longer than a given norm (Pascanu et al., 2013)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.training.algorithm import Algorithm
from compressor.training.events import Event
from compressor.training.state import State


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients together, in place, so that their 2-norm is at most `max_norm`.

    Returns:
        The norm before, of shape ().
    """
    return nn.utils.clip_grad_norm_(parameters, max_norm)


class GradientClipping(Algorithm):
    """Clips the norm of all gradients together, after they are unscaled.

    Args:
        max_norm: above 0.

    Raises:
        ConfigError: if it is not.
    """

    events = frozenset({Event.BEFORE_STEP})

    def __init__(self, max_norm: float = 1.0) -> None:
        if not max_norm > 0:
            raise ConfigError(f"max_norm={max_norm} leaves no gradient. Write a number above 0.")
        self.max_norm = max_norm

    def on(self, event: Event, state: State) -> None:
        """Clip."""
        clip_gradients(state.model.parameters(), self.max_norm)
