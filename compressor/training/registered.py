"""What a user hangs on a training: models, tensors and plain values, all saved and restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.errors import CheckpointError, ConfigError


class Registered:
    """Values by name.

    Models and other objects with a `state_dict` are saved by it, and keep their identity when they
    are restored, as tensors do; plain values (numbers, strings, lists and dicts of them) are put
    back as they were.
    """

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def add(self, name: str, value: Any) -> None:
        """Register `value`, or another one in its place.

        Raises:
            ConfigError: if `name` could not be an attribute.
        """
        if not name.isidentifier() or name.startswith("_"):
            raise ConfigError(f"{name!r} is no name to register. Write one like 'generator'.")
        self._values[name] = value

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Any:
        return iter(self._values)

    def to(self, device: torch.device) -> None:
        """Move models, recipes and tensors to `device`; they stay the same objects."""
        for value in self._values.values():
            if not isinstance(value, Tensor):
                move = getattr(value, "to", None)
                if callable(move):
                    move(device)
            elif value.device != device:
                value.data = value.data.to(device)  # a copy would be no leaf
                if value.is_leaf and value.grad is not None:
                    value.grad = value.grad.to(device)

    def state_dict(self) -> dict[str, Any]:
        """The values, and the state of what has one."""
        return {
            name: value.state_dict() if _has_state(value) else value
            for name, value in self._values.items()
        }

    def check(self, saved: Mapping[str, Any]) -> None:
        """Do nothing if `saved` has the same names.

        Raises:
            CheckpointError: if it has not.
        """
        odd = sorted(set(saved) ^ set(self._values))
        if odd:
            where = "checkpoint" if odd[0] in saved else "trainer"
            raise CheckpointError(
                f"{odd[0]!r} is registered only in the {where}. Register the same names as then."
            )
        for name, value in self._values.items():
            if isinstance(value, Tensor) and value.shape != saved[name].shape:
                raise CheckpointError(
                    f"The registered {name!r} has shape {tuple(saved[name].shape)} in the "
                    f"checkpoint and {tuple(value.shape)} here. Register one like it."
                )

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Put the values back.

        Raises:
            CheckpointError: if other names are registered, or a tensor has another shape.
        """
        self.check(saved)
        for name, value in self._values.items():
            if _has_state(value):
                value.load_state_dict(saved[name])
            elif isinstance(value, Tensor):
                with torch.no_grad():
                    value.copy_(saved[name])
            else:
                self._values[name] = saved[name]


def _has_state(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )
