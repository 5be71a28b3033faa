"""Layer and group norms in the precision that autocast computes in (as MosaicML's Composer does).

https://docs.mosaicml.com/projects/composer/en/latest/method_cards/low_precision_layernorm.html.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.structure import surgery
from compressor.structure.surgery import Edit
from compressor.training.algorithm import Algorithm
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State

SOURCE = "MosaicML Composer, Low Precision LayerNorm and Low Precision GroupNorm"
USE_WHEN = (
    "Training is in bf16 on a GPU, where autocast computes norms in float32 and reads and writes "
    "twice the bytes."
)
AVOID_WHEN = "Training is in fp32; the model is to be scripted by TorchScript."
COST = (
    "Saves memory traffic in training; nothing at inference. What is rounded are inputs, weights "
    "and outputs."
)


def autocast_dtype(inputs: Tensor) -> torch.dtype | None:
    """In what matrices are multiplied where `inputs` are; None: as they come.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     autocast_dtype(torch.zeros(1)), autocast_dtype(torch.zeros(1, dtype=torch.float64))
    (torch.bfloat16, None)
    """
    kind = inputs.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return None if inputs.dtype == torch.float64 else torch.get_autocast_dtype(kind)


class AutocastLayerNorm(nn.LayerNorm):
    """A layer norm that autocast does not lift to float32."""

    @classmethod
    def around(cls, norm: nn.LayerNorm) -> AutocastLayerNorm:
        """The norm `norm`, with the same parameter objects."""
        new = cls(norm.normalized_shape, norm.eps, norm.elementwise_affine, device="meta")
        new._parameters.update(norm._parameters)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """(..., *normalized_shape) -> the same."""
        dtype = autocast_dtype(input)
        if dtype is None:
            return super().forward(input)
        weight, bias = _in(dtype, self.weight), _in(dtype, self.bias)
        with torch.autocast(input.device.type, enabled=False):
            return F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps)


class AutocastGroupNorm(nn.GroupNorm):
    """A group norm that autocast does not lift to float32."""

    @classmethod
    def around(cls, norm: nn.GroupNorm) -> AutocastGroupNorm:
        """The norm `norm`, with the same parameter objects."""
        new = cls(norm.num_groups, norm.num_channels, norm.eps, norm.affine, device="meta")
        new._parameters.update(norm._parameters)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same."""
        dtype = autocast_dtype(input)
        if dtype is None:
            return super().forward(input)
        weight, bias = _in(dtype, self.weight), _in(dtype, self.bias)
        with torch.autocast(input.device.type, enabled=False):
            return F.group_norm(input.to(dtype), self.num_groups, weight, bias, self.eps)


def apply_low_precision_layernorm(model: nn.Module) -> Edit:
    """Let the layer norms of `model` compute in the precision of autocast, in place.

    Without autocast they compute what they did. Parameters stay the same objects under the same
    names, and float32. Done again, it changes nothing.

    Args:
        model: with layer norms of torch's own class; others stay.

    Returns:
        What happened to the parameters: nothing.

    Raises:
        ModelError: if there is none.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    >>> _ = apply_low_precision_layernorm(model)
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     model(torch.zeros(1, 4)).dtype
    torch.bfloat16
    """
    return _replace_all(model, nn.LayerNorm, AutocastLayerNorm, AutocastLayerNorm.around)


def apply_low_precision_groupnorm(model: nn.Module) -> Edit:
    """Let the group norms of `model` compute in the precision of autocast, in place.

    As `apply_low_precision_layernorm`, of `nn.GroupNorm`.

    Args:
        model: with group norms of torch's own class; others stay.

    Returns:
        What happened to the parameters: nothing.

    Raises:
        ModelError: if there is none.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    >>> _ = apply_low_precision_groupnorm(model)
    >>> type(model[1]).__name__
    'AutocastGroupNorm'
    """
    return _replace_all(model, nn.GroupNorm, AutocastGroupNorm, AutocastGroupNorm.around)


class LowPrecisionLayerNorm(Algorithm):
    """Applies `apply_low_precision_layernorm` before training; in "fp32" that changes nothing."""

    events = frozenset({Event.SETUP})
    card = Card(
        summary="Computes layer norms in bf16 or fp16, as the layers around them.",
        source=SOURCE,
        functional="apply_low_precision_layernorm",
        settings="None: the trainer's `precision` decides.",
        use_when=USE_WHEN,
        avoid_when=AVOID_WHEN,
        cost=COST,
    )

    def on(self, event: Event, state: State) -> None:
        """Replace."""
        state.edit(apply_low_precision_layernorm)


class LowPrecisionGroupNorm(Algorithm):
    """Applies `apply_low_precision_groupnorm` before training; in "fp32" that changes nothing."""

    events = frozenset({Event.SETUP})
    card = Card(
        summary="Computes group norms in bf16 or fp16, as the layers around them.",
        source=SOURCE,
        functional="apply_low_precision_groupnorm",
        settings="None: the trainer's `precision` decides.",
        use_when=USE_WHEN,
        avoid_when=AVOID_WHEN,
        cost=COST,
    )

    def on(self, event: Event, state: State) -> None:
        """Replace."""
        state.edit(apply_low_precision_groupnorm)


def _replace_all(
    model: nn.Module,
    old: type[nn.Module],
    new: type[nn.Module],
    around: Callable[..., nn.Module],
) -> Edit:
    edit, is_replaced = Edit(), any(isinstance(module, new) for module in model.modules())
    for name, module in list(model.named_modules()):
        if type(module) is old:
            edit, is_replaced = edit.then(surgery.replace(model, name, around(module))), True
    if not is_replaced:
        raise ModelError(
            f"The {type(model).__name__} has no nn.{old.__name__}. Leave the algorithm out."
        )
    return edit


def _in(dtype: torch.dtype, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)
