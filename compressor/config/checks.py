"""What every part of the configuration checks: a value against the values that can be meant."""

from __future__ import annotations

import math

from compressor.errors import ConfigError


def check(name: str, value: object, is_meant: bool, meant: str) -> None:
    """Do nothing if `is_meant`.

    Raises:
        ConfigError: with the value, and what is meant: "a number above 0".
    """
    if not is_meant:
        raise ConfigError(f"{name}={value!r} is out of range. Write {meant}.")


def is_finite(value: float, low: float) -> bool:
    """Whether `value` is a finite number from `low` on."""
    return math.isfinite(value) and value >= low
