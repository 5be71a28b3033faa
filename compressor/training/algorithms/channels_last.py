"""Images in memory pixel by pixel, as fast convolutions want them (PyTorch's "channels last")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor.interfaces.data import map_leaves
from compressor.training.algorithm import Algorithm
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State

if TYPE_CHECKING:
    from compressor.structure.surgery import Edit


def apply_channels_last(model: nn.Module) -> None:
    """Lay out the four-dimensional parameters and buffers of `model` channels last, in place.

    Values, shapes and the parameter objects stay as they are.

    >>> conv = nn.Conv2d(3, 8, 3)
    >>> apply_channels_last(conv)
    >>> conv.weight.is_contiguous(memory_format=torch.channels_last)
    True
    """
    model.to(memory_format=torch.channels_last)


class ChannelsLast(Algorithm):
    """Lays out model and images channels last.

    Of a batch, every floating point tensor of four dimensions is laid out so.
    """

    events = frozenset({Event.SETUP, Event.BATCH_START})
    card = Card(
        summary="Stores images and filters pixel by pixel; the numbers stay the same.",
        source="PyTorch tutorial, Channels Last Memory Format in PyTorch",
        functional="apply_channels_last",
        settings="None.",
        use_when="A convolutional network is trained, above all in bf16 or fp16 on a GPU.",
        avoid_when="The model has no convolutions, or calls `.view` across channels and pixels, "
        "which then raises: write `.reshape` or `.flatten`.",
        cost="One copy of the images of a batch; convolutions are faster or as fast.",
    )

    def on(self, event: Event, state: State) -> None:
        """Lay out the model, or a batch."""
        if event is Event.SETUP:
            apply_channels_last(state.model)
        else:
            state.batch = map_leaves(_laid_out, state.batch)

    def rebind(self, edit: Edit, state: State) -> None:
        """Lay out what is new in the model."""
        del edit
        apply_channels_last(state.model)


def _laid_out(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.is_floating_point():
        return leaf.contiguous(memory_format=torch.channels_last)
    return leaf
