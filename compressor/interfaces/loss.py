"""The user's loss: `(model, batch)` to a scalar, or to named scalars that are summed."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from compressor.errors import LossError
from compressor.interfaces.device import Device

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]]


class LossFunction(ABC):
    """Calls the model on a batch and says how wrong it is.

    Subclasses that forget `super().__init__()` work.

    Args:
        device: where the batch has to go.
    """

    _device: Device | None = None

    def __init__(self, device: Device = Device.CPU) -> None:
        self.to_device(device)

    def to_device(self, device: Device) -> None:
        """Note that batches go to `device` from now on; override to move what the loss holds."""
        self._device = device

    @property
    def device(self) -> Device:
        """Where the batch has to go."""
        return self._device or Device.CPU

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Any) -> Tensor | Mapping[str, Tensor]:
        """The loss of `model` on `batch`, which is what the loader yields."""


def make_loss(cls: type[Any] | Loss, kwargs: Mapping[str, Any] | None, device: Device) -> Loss:
    """An instance of the user's class on `device`; a function of (model, batch) is its own.

    Raises:
        LossError: if the class does not take `kwargs`, or is called with something else.
    """
    kwargs = dict(kwargs or {})
    if isinstance(cls, type):
        _check_takes(cls, kwargs)
        loss = cls(**kwargs)
    elif kwargs:
        raise LossError(
            f"loss_function_kwargs={kwargs} were given with a loss that is no class. "
            "Give the class, or leave the kwargs out."
        )
    else:
        loss = cls
    if not callable(loss) or isinstance(loss, nn.modules.loss._Loss):
        raise LossError(
            f"The loss {type(loss).__name__} is not called with (model, batch). Wrap it in a "
            "LossFunction whose __call__(model, batch) calls the model and then the loss."
        )
    if callable(getattr(loss, "to_device", None)):
        loss.to_device(device)
    checked: Loss = loss
    return checked


def call_loss(loss_function: Loss, model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The named terms of the loss; a single tensor is called "loss". Their sum is the loss.

    Returns:
        Tensors of shape ().

    Raises:
        LossError: if a term is not a tensor with one element.
    """
    return loss_terms(loss_function(model, batch))


def loss_terms(returned: object) -> dict[str, Tensor]:
    """What a loss returned as named terms of shape (); a single tensor is called "loss".

    Raises:
        LossError: if a term is not a tensor with one element.
    """
    if isinstance(returned, Tensor) and not returned.dim():  # on the path of every step
        return {"loss": returned}
    terms = returned if isinstance(returned, Mapping) else {"loss": returned}
    if not terms:
        raise LossError("The loss returned an empty dict. Return a tensor, or a dict of tensors.")
    return {str(name): _scalar(str(name), term) for name, term in terms.items()}


def _check_takes(cls: type[Any], kwargs: Mapping[str, Any]) -> None:
    try:
        inspect.signature(cls).bind(**kwargs)
    except TypeError as error:
        raise LossError(
            f"{cls.__name__} cannot be made with loss_function_kwargs={dict(kwargs)}: {error}. "
            "The kwargs are the arguments of its __init__."
        ) from error


def _scalar(name: str, term: object) -> Tensor:
    if not isinstance(term, Tensor):
        raise LossError(
            f"The loss {name!r} is a {type(term).__name__}. Return a tensor, or a dict of tensors; "
            "not .item()."
        )
    if term.numel() != 1:
        raise LossError(
            f"The loss {name!r} has shape {tuple(term.shape)}. Return one number per batch: its "
            ".mean(), or its .sum()."
        )
    return term.reshape(()) if term.dim() else term
