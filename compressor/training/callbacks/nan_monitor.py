"""A watch for tensors that are no numbers any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from compressor.training.callbacks.monitor import Monitor
from compressor.training.clock import DurationLike
from compressor.training.errors import DivergedError
from compressor.training.events import Event
from compressor.training.state import State

Named = Sequence[tuple[str, Tensor]]


class NaNMonitor(Monitor):
    """Ends the fit when a loss term, a gradient or a parameter is infinite or NaN.

    It looks after steps, and before every checkpoint, so that no ruined one replaces a good one. Of
    gradients it names the one that the backward pass reached first: the trouble began there.
    Gradients of a step that was skipped because they overflowed (fp16) are not counted.

    Args:
        interval: between looks; each reads all parameters and waits for the GPU.
    """

    events = frozenset({*Monitor.events, Event.CHECKPOINT, Event.FIT_END})

    def __init__(self, interval: DurationLike = "100ba") -> None:
        super().__init__(interval)

    def on(self, event: Event, state: State) -> None:
        """Look, if it is time."""
        if event in (Event.CHECKPOINT, Event.FIT_END):
            self.look(state)
        else:
            super().on(event, state)

    def look(self, state: State) -> None:
        """Do nothing if all are numbers.

        Raises:
            DivergedError: naming the first that is not, and its layer.
        """
        terms = first_non_finite(list(state.losses.items()))
        if terms is not None:
            _fail(state, f"the loss term {terms!r}")
        parameters = list(state.model.named_parameters())
        gradients = [(name, p.grad) for name, p in reversed(parameters) if p.grad is not None]
        odd = None if state.step_skipped else first_non_finite(gradients)
        if odd is not None:
            _fail(state, f"the gradient of {_describe(state.model, odd)}")
        odd = first_non_finite(parameters)
        if odd is not None:
            _fail(state, f"the parameter {_describe(state.model, odd)}")


@torch.no_grad()
def first_non_finite(tensors: Named) -> str | None:
    """The name of the first of `tensors` with a value that is infinite or NaN; None if none has.

    >>> first_non_finite([("a", torch.ones(2)), ("b", torch.tensor([1.0, float("inf")]))])
    'b'
    """
    if not tensors:
        return None
    flags = [torch.isfinite(_values(tensor)).all() for _, tensor in tensors]
    # one question for all, and so one wait for the GPU
    is_finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    return next(
        (name for (name, _), good in zip(tensors, is_finite, strict=True) if not good), None
    )


def _values(tensor: Tensor) -> Tensor:
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _describe(model: nn.Module, name: str) -> str:
    layer = name.rpartition(".")[0]
    return f"{name!r} ({type(model.get_submodule(layer)).__name__} {layer!r})"


def _fail(state: State, what: str) -> NoReturn:
    raise DivergedError(
        f"After batch {state.clock.batch}, {what} is not finite. "
        "Lower the learning rate, clip gradients, or look for a division or logarithm of 0 there."
    )
