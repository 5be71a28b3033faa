"""Algorithms that hold something from batch to batch, and so have times of their own."""

from __future__ import annotations

from compressor.errors import ConfigError
from compressor.training.algorithm import Algorithm


def refuse_window(algorithm: Algorithm, options: str, reason: str) -> None:
    """Do nothing if `algorithm` has no window.

    Args:
        algorithm: is one that holds something, which nobody would hold outside a window.
        options: what says instead when it acts.
        reason: what a window would break.

    Raises:
        ConfigError: if it has one.
    """
    if algorithm.window is not None:
        raise ConfigError(
            f"{algorithm.key!r} has a window, and {reason}. Leave it out and set {options}, which "
            "say when it acts."
        )
