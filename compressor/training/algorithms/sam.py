"""Sharpness-aware minimisation: the gradient at the worst point nearby (Foret et al., 2021)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.training.algorithm import Algorithm
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State

NORM_FLOOR = 1e-12  # below the norm of all gradients together: as in the paper's code


def sam_perturbation(gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """The step of length `rho` along the gradient: rho * g / ||g||, with one norm over all tensors.

    Args:
        gradients: of any shapes.
        rho: radius of the neighbourhood, above 0.

    Returns:
        New tensors of the shapes of `gradients`.

    >>> sam_perturbation([torch.tensor([3.0]), torch.tensor([4.0])], rho=0.5)
    [tensor([0.3000]), tensor([0.4000])]
    """
    scale = rho / nn.utils.get_total_norm(gradients).clamp_min(NORM_FLOOR)
    return [gradient * scale.to(gradient.device) for gradient in gradients]


class SAM(Algorithm):
    """Steps with the gradient taken at the weights plus `sam_perturbation`.

    The weights, and all buffers, such as the statistics of batch norms, are the same after the
    second pass as before it, to the bit. If its gradients overflow, the first are used. Weights
    that `GradualSparsity` holds at 0 are moved in the second pass like the others.

    The second pass fires BEFORE_FORWARD, AFTER_FORWARD and AFTER_LOSS again, with the same random
    numbers, so that algorithms do to it what they did to the first; what counts at these events
    counts twice. Losses and metrics of training are those of the first pass.

    Args:
        rho: radius of the neighbourhood.
        interval: batches; 1 does it at every one.

    Raises:
        ConfigError: if one of them is not above 0.
    """

    events = frozenset({Event.BEFORE_STEP})
    before = ("GradientClipping",)
    recomputes = True
    card = Card(
        summary="Takes the gradient at the worst point of a small neighbourhood of the weights.",
        source="Foret et al. (2021), Sharpness-aware minimization for efficiently improving "
        "generalization",
        functional="sam_perturbation",
        settings="`rho`, the radius of the neighbourhood; `interval`: every so many "
        "batches, which makes it cheaper.",
        use_when="A small or compressed model overfits, and there is time for twice the passes.",
        avoid_when="Training is short of time, or underfits.",
        cost="A second forward and backward pass at every `interval`-th batch, which fires the "
        "events from BEFORE_FORWARD to AFTER_LOSS again; memory for a copy of weights, buffers and "
        "gradients.",
    )

    def __init__(self, rho: float = 0.05, interval: int = 1) -> None:
        if not rho > 0 or interval < 1:
            raise ConfigError(
                f"rho={rho}, interval={interval} moves nothing. Write a rho above 0 and 1 or more "
                "batches; leave SAM out to train without it."
            )
        self.rho = rho
        self.interval = interval

    def on(self, event: Event, state: State) -> None:
        """Replace the gradients by those at the perturbed weights."""
        if state.clock.batch % self.interval:
            return
        trained = [p for p in state.model.parameters() if p.grad is not None]
        first = [p.grad for p in trained if p.grad is not None]
        if not _is_usable(first):
            return
        with _perturbed(trained, sam_perturbation(first, self.rho)), _kept_buffers(state.model):
            state.recompute_gradients()
        second = [p.grad for p in trained if p.grad is not None]
        if len(second) < len(first) or not _is_usable(second):
            for parameter, gradient in zip(trained, first, strict=True):
                parameter.grad = gradient


def _is_usable(gradients: Sequence[Tensor]) -> bool:
    """Whether they are finite; one look at the device."""
    return bool(gradients) and bool(nn.utils.get_total_norm(gradients).isfinite())


@contextmanager
def _perturbed(parameters: Sequence[nn.Parameter], change: Sequence[Tensor]) -> Iterator[None]:
    """Inside the `with` each parameter is moved; at its end it is what it was, not only nearly."""
    weights = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, move in zip(parameters, change, strict=True):
            parameter.add_(move)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """At the end of the `with` the buffers have the values, and are the objects, of before."""
    saved = [
        (module._buffers, key, buffer, buffer.clone())
        for module in model.modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for store, key, buffer, value in saved:
                buffer.copy_(value)
                store[key] = buffer
