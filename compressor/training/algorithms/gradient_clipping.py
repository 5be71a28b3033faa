"""Gradients that are not too long: by their norm (Pascanu et al., 2013), value or weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, suggest
from compressor.training.algorithm import Algorithm
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State

Kind: TypeAlias = Literal["norm", "value", "adaptive"]

NORM_FLOOR = 1e-3  # of a weight's norm: Brock et al. (2021), so that what is 0 can be trained


def clip_gradients(
    parameters: Iterable[nn.Parameter], threshold: float, kind: Kind = "norm"
) -> Tensor:
    """Shorten gradients, in place.

    Args:
        parameters: those without gradient are passed over.
        threshold: above 0.
        kind: "norm" scales all together, so that their 2-norm is at most `threshold`; "value" cuts
            every entry to -threshold … threshold; "adaptive" scales the gradient of each unit, so
            that its norm is at most `threshold` times the norm of the unit's weights (Brock et al.,
            2021). A unit is an output: an index of dimension 0, or the whole of a bias.

    Returns:
        The 2-norm of all gradients before, of shape ().

    Raises:
        ConfigError: if there is no such kind.

    >>> weight = nn.Parameter(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    >>> weight.grad = torch.tensor([[0.0, 2.0], [0.0, 0.1]])
    >>> norm = clip_gradients([weight], 0.5, "adaptive")
    >>> weight.grad
    tensor([[0.0000, 0.5000],
            [0.0000, 0.1000]])
    """
    _check_kind(kind)
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    if kind == "norm":
        return nn.utils.clip_grad_norm_(trained, threshold)
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if kind == "value":
        nn.utils.clip_grad_value_(trained, threshold)
    else:
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                limit = threshold * unit_norms(parameter).clamp_min(NORM_FLOOR)
                gradient.mul_((limit / unit_norms(gradient)).clamp_max(1.0).nan_to_num(nan=1.0))
    return norm


def unit_norms(tensor: Tensor) -> Tensor:
    """The 2-norm of each output of a weight (out, …) -> (out, 1, …); of a vector as a whole.

    >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    tensor([[5.],
            [2.]])
    """
    if tensor.dim() < 2:
        return torch.linalg.vector_norm(tensor)  # type: ignore[no-any-return]
    dims = list(range(1, tensor.dim()))
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)  # type: ignore[no-any-return]


class GradientClipping(Algorithm):
    """Clips the gradients of a whole batch, after they are unscaled.

    Args:
        threshold: above 0; see `clip_gradients`. The adaptive kind wants about 0.01 to 0.1.
        kind: "norm", "value" or "adaptive".
        clips_last: "adaptive" also clips the last linear layer. It is better not to, as its paper
            found.

    Raises:
        ConfigError: if the threshold leaves nothing, or there is no such kind.
    """

    events = frozenset({Event.BEFORE_STEP})
    card = Card(
        summary="Scales or cuts gradients that are too long before the optimizer steps.",
        source=(
            "Pascanu et al. (2013), On the difficulty of training recurrent neural networks; "
            "adaptive: Brock et al. (2021), High-performance large-scale image recognition "
            "without normalization"
        ),
        functional="clip_gradients",
        settings="`threshold`, somewhat above the usual norm; `kind`: 'norm', 'value' or "
        "'adaptive'.",
        use_when="Training jumps or diverges: high learning rates, transformers, fp16, surgery.",
        avoid_when="The threshold is below the usual norm: every step then is a normalised one.",
        cost="One pass over the gradients a step; the adaptive kind, one over each tensor of them.",
    )

    def __init__(
        self, threshold: float = 1.0, kind: Kind = "norm", *, clips_last: bool = False
    ) -> None:
        _check_kind(kind)
        if not threshold > 0:
            raise ConfigError(f"threshold={threshold} leaves no gradient. Write a number above 0.")
        self.threshold = threshold
        self.kind = kind
        self.clips_last = clips_last

    def on(self, event: Event, state: State) -> None:
        """Clip."""
        parameters = list(state.model.parameters())
        if self.kind == "adaptive" and not self.clips_last:
            last = {id(parameter) for parameter in _last_linear(state.model)}
            parameters = [parameter for parameter in parameters if id(parameter) not in last]
        clip_gradients(parameters, self.threshold, self.kind)


def _last_linear(model: nn.Module) -> list[nn.Parameter]:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return list(layers[-1].parameters()) if layers else []


def _check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ConfigError(f"There is no clipping {kind!r}. {suggest(kind, get_args(Kind))}")
