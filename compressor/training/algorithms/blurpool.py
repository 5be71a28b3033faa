"""Blur before every second pixel is dropped (Zhang, 2019, https://arxiv.org/abs/1904.11486)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ConfigError, DataError, ModelError
from compressor.structure import surgery
from compressor.structure.surgery import Edit
from compressor.training.algorithm import Algorithm
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State


def blur(inputs: Tensor, stride: Sequence[int], step: Sequence[int] = (1, 1)) -> Tensor:
    """Images filtered with [1, 2, 1] / 4 along each side that is strided.

    Two means of neighbouring pixels are that filter, without weights and for any number of
    channels. The border is repeated, so that an even image stays even, and one pixel may be a side.

    Args:
        inputs: (N, C, H, W).
        stride: (2,); a side with 1 is not filtered.
        step: (2,); one pixel in so many is kept along each side.

    Returns:
        (N, C, ceil(H / step), ceil(W / step)).

    >>> import torch
    >>> blur(torch.tensor([[[[0.0, 0.0, 4.0, 0.0, 0.0]]]]), stride=(1, 2))
    tensor([[[[0., 1., 2., 1., 0.]]]])
    """
    rows, columns = (int(side > 1) for side in stride)
    size = (1 + rows, 1 + columns)
    padded = F.pad(inputs, (columns, columns, rows, rows), mode="replicate")
    return F.avg_pool2d(F.avg_pool2d(padded, size, stride=1), size, stride=tuple(step))


class BlurConv2d(nn.Conv2d):
    """A strided convolution with a blur before it, or after all of its pixels are computed.

    Args:
        blur_first: see `apply_blurpool`.
    """

    def __init__(self, *args: Any, blur_first: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self.blur_first = blur_first

    @classmethod
    def around(cls, conv: nn.Conv2d, blur_first: bool) -> BlurConv2d:
        """The convolution `conv`, blurred, with the same parameter objects."""
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device="meta",
            blur_first=blur_first,
        )
        new.weight, new.bias = conv.weight, conv.bias
        return new

    def forward(self, input: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H', W'), of the size that the strided convolution has."""
        if self.blur_first:
            return super().forward(blur(input, self.stride))
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            sides = self._reversed_padding_repeated_twice
            input, padding = F.pad(input, sides, mode=self.padding_mode), 0
        every = F.conv2d(input, self.weight, self.bias, 1, padding, self.dilation, self.groups)
        return blur(every, self.stride, step=self.stride)


class BlurMaxPool2d(nn.MaxPool2d):
    """A max pool over the window of every pixel, blurred, and only then thinned out."""

    @classmethod
    def around(cls, pool: nn.MaxPool2d) -> BlurMaxPool2d:
        """The pool `pool`, blurred."""
        return cls(pool.kernel_size, pool.stride, pool.padding, pool.dilation)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W'), of the size that the strided pool has."""
        if input.dim() != 4:
            raise DataError(
                f"An input of shape {tuple(input.shape)} cannot be blurred. Give (N, C, H, W)."
            )
        every = F.max_pool2d(input, self.kernel_size, 1, self.padding, self.dilation)
        stride = _pair(self.stride)
        return blur(every, stride, step=stride)


def apply_blurpool(
    model: nn.Module,
    replace_convs: bool = True,
    replace_maxpools: bool = True,
    blur_first: bool = True,
    min_channels: int = 16,
) -> Edit:
    """Put a blur at each strided convolution and max pool of `model`, in place.

    All parameters stay the same objects under the same names, and all shapes stay. What the model
    computes changes, as little as the method allows: a blur leaves slow gradations as they are
    and takes out what changes from pixel to pixel. Fine-tune a trained model afterwards.

    Done again, it changes nothing. Pools with `ceil_mode` or `return_indices` stay as they are.

    Args:
        model: of any architecture.
        replace_convs: whether convolutions are treated.
        replace_maxpools: whether max pools are.
        blur_first: blur the inputs of a convolution, which costs little. False is the paper's: the
            convolution is computed at every pixel, blurred, and only then thinned out; at stride 2
            four times its MACs.
        min_channels: convolutions with fewer inputs stay, such as the first, which sees the image.

    Returns:
        What happened to the parameters: nothing.

    Raises:
        ConfigError: if neither is to be replaced.
        ModelError: if there is nothing to blur.

    >>> model = nn.Sequential(nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2))
    >>> _ = apply_blurpool(model)
    >>> [type(module).__name__ for module in model]
    ['BlurConv2d', 'ReLU', 'BlurMaxPool2d']
    """
    if not (replace_convs or replace_maxpools):
        raise ConfigError("Nothing is to be replaced. Let convolutions or max pools be.")
    edit, is_blurred = Edit(), False
    for name, module in list(model.named_modules()):
        if isinstance(module, (BlurConv2d, BlurMaxPool2d)):
            is_blurred = True
            continue
        new: nn.Module
        if replace_convs and _is_blurrable_conv(module, min_channels):
            new = BlurConv2d.around(module, blur_first)
        elif replace_maxpools and _is_blurrable_pool(module):
            new = BlurMaxPool2d.around(module)
        else:
            continue
        edit, is_blurred = edit.then(surgery.replace(model, name, new)), True
    if not is_blurred:
        raise ModelError(
            f"The {type(model).__name__} has no strided nn.Conv2d of {min_channels} input channels "
            "or more, and no strided nn.MaxPool2d. Lower min_channels, or leave blurring out."
        )
    return edit


class BlurPool(Algorithm):
    """Applies `apply_blurpool` before training.

    Args:
        replace_convs: whether convolutions are treated.
        replace_maxpools: whether max pools are.
        blur_first: blur the inputs of a convolution, not its outputs.
        min_channels: convolutions with fewer inputs stay.
    """

    events = frozenset({Event.SETUP})
    card = Card(
        summary="Low-pass filters images inside a network before they are thinned out.",
        source="Zhang (2019), Making Convolutional Networks Shift-Invariant Again",
        functional="apply_blurpool",
        settings="`min_channels`: lower it for narrow networks. `blur_first` saves MACs.",
        use_when="A convolutional network is trained for long, and small shifts should not matter.",
        avoid_when="A trained model is compressed: what it computes changes, and the blurs cost "
        "latency wherever it will run.",
        cost="Two mean pools of 2×2 pixels at each strided layer, and max pools at every pixel; "
        "with blur_first=False four times the MACs of convolutions of stride 2.",
    )

    def __init__(
        self,
        replace_convs: bool = True,
        replace_maxpools: bool = True,
        blur_first: bool = True,
        min_channels: int = 16,
    ) -> None:
        self.replace_convs = replace_convs
        self.replace_maxpools = replace_maxpools
        self.blur_first = blur_first
        self.min_channels = min_channels

    def on(self, event: Event, state: State) -> None:
        """Replace."""
        state.edit(
            lambda model: apply_blurpool(
                model,
                self.replace_convs,
                self.replace_maxpools,
                self.blur_first,
                self.min_channels,
            )
        )


def _is_blurrable_conv(module: nn.Module, min_channels: int) -> bool:
    # Exactly the class: what computes its weight, or convolves otherwise, is left alone.
    return (
        type(module) is nn.Conv2d and max(module.stride) > 1 and module.in_channels >= min_channels
    )


def _is_blurrable_pool(module: nn.Module) -> bool:
    return (
        type(module) is nn.MaxPool2d
        and max(_pair(module.stride)) > 1
        and not module.ceil_mode
        and not module.return_indices
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
