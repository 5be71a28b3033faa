"""What surrounds one call of the user's step: the events inside it, and what it must return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from compressor.errors import LossError
from compressor.interfaces.inputs import ModelInputs
from compressor.training.events import Event
from compressor.training.state import State


@contextmanager
def forward_events(state: State, fire: Callable[[Event], None]) -> Iterator[None]:
    """Fire at every call of the model; what listeners put into the state is what goes on."""

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        state.inputs = inputs = ModelInputs(args, kwargs)
        fire(Event.BEFORE_FORWARD)
        if state.inputs is inputs:
            return args, kwargs
        return state.inputs.args, dict(state.inputs.kwargs)

    def after(_: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
        state.outputs = outputs
        fire(Event.AFTER_FORWARD)
        return state.outputs

    handles = (
        state.model.register_forward_pre_hook(before, with_kwargs=True),
        state.model.register_forward_hook(after),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_training_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into training mode, in place; modules that remain have their own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def named_terms(losses: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The terms of a loss; a tensor is the term "loss".

    Raises:
        LossError: if one is not of shape ().
    """
    terms = {"loss": losses} if isinstance(losses, Tensor) else dict(losses)
    for name, value in terms.items():
        if value.dim():
            raise LossError(
                f"The loss term {name!r} has shape {tuple(value.shape)}. "
                "Return scalars: take the mean over the batch."
            )
    return terms


def check_differentiable(total: Tensor) -> None:
    """Do nothing if `total` has a gradient.

    Raises:
        LossError: if it has none.
    """
    if not total.requires_grad:
        raise LossError(
            "The loss does not depend on any parameter that requires grad. "
            "Leave out .item(), .detach() and no_grad, and freeze less of the model."
        )
