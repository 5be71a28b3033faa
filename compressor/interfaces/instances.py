"""What a user hands in is the object itself: not its class, nor something else of the same name."""

from __future__ import annotations

from typing import Any

from torch import nn

from compressor.errors import ConfigError, ModelError


def check_instance(name: str, value: object) -> None:
    """Do nothing if `value` is no class.

    Args:
        name: of the argument, for the message.
        value: as it was given.

    Raises:
        ConfigError: if it is a class.
    """
    if isinstance(value, type):
        raise ConfigError(_is_class(name, value))


def check_module(name: str, value: object) -> None:
    """Do nothing if `value` is a module.

    Args:
        name: of the argument, for the message.
        value: as it was given.

    Raises:
        ModelError: if it is a class, or of another type.
    """
    if isinstance(value, type):
        raise ModelError(_is_class(name, value))
    if not isinstance(value, nn.Module):
        raise ModelError(
            f"`{name}` is of type {type(value).__name__}, not a torch.nn.Module. Give the module "
            "itself."
        )


def _is_class(name: str, value: type[Any]) -> str:
    return (
        f"`{name}` is the class {value.__name__} itself. Give an instance: "
        f"{name}={value.__name__}(...)."
    )
