"""Small images first (Howard, 2018, https://www.fast.ai/posts/2018-04-30-dawnbench-fastai.html)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.errors import ConfigError, DataError, suggest
from compressor.training.algorithm import Algorithm
from compressor.training.batch import get_item, set_item
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State

Mode = Literal["resize", "crop"]


def resize_batch(
    inputs: Tensor,
    scale: float = 0.5,
    mode: Mode = "resize",
    targets: Tensor | None = None,
    size_increment: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Make images smaller, and the maps that belong to them.

    Args:
        inputs: (N, C, H, W), floating point for "resize"; not changed.
        scale: of each side, above 0 to 1; 1 gives `inputs` itself.
        mode: "resize" is antialiased bilinear interpolation, as torchvision's; "crop" keeps a
            rectangle in a random place, the same for the whole batch.
        targets: maps (N, H, W) or (N, K, H, W) to treat alike, with the nearest pixel's value; None
            if the targets are not maps.
        size_increment: sides are rounded to multiples of it, but not above the full size.
        generator: for the place of a crop; None is torch's global one.

    Returns:
        Images (N, C, H', W'), and maps of that size or None.

    Raises:
        ConfigError: `scale`, `mode` or `size_increment` that cannot be meant.
        DataError: if the shapes do not fit.

    >>> images, maps = resize_batch(torch.rand(2, 3, 9, 8), 0.5, targets=torch.zeros(2, 9, 8))
    >>> images.shape, maps.shape
    (torch.Size([2, 3, 4, 4]), torch.Size([2, 4, 4]))
    """
    _check_options(scale, mode, size_increment)
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor) and (value is not None or name == "inputs"):
            raise DataError(
                f"The {name} are a {type(value).__name__}, not a tensor of samples, and cannot be "
                f"resized. Name the tensor by {name[:-1]}_key, or leave ProgressiveResizing out."
            )
    if inputs.dim() != 4:
        raise DataError(f"Inputs of shape {tuple(inputs.shape)} are no images. Give (N, C, H, W).")
    if targets is not None and (targets.dim() < 3 or targets.shape[-2:] != inputs.shape[-2:]):
        raise DataError(
            f"Targets of shape {tuple(targets.shape)} are no maps for images of shape "
            f"{tuple(inputs.shape)}. Leave them out if they are classes."
        )
    full = (inputs.shape[2], inputs.shape[3])
    size = (_scaled(full[0], scale, size_increment), _scaled(full[1], scale, size_increment))
    if size == full:
        return inputs, targets
    if mode == "crop":
        rows, columns = (_draw_slice(*sides, generator) for sides in zip(full, size, strict=True))
        cropped = inputs[..., rows, columns]
        return cropped, None if targets is None else targets[..., rows, columns]
    if not inputs.is_floating_point():
        raise DataError(
            f"The inputs are {inputs.dtype}, which is not interpolated. Convert them to floats "
            "first, or write mode='crop'."
        )
    resized = F.interpolate(inputs, size, mode="bilinear", antialias=True)
    return resized, None if targets is None else _nearest(targets, size)


def resizing_scale(
    fraction: float, initial_scale: float, delay_fraction: float, finetune_fraction: float
) -> float:
    """The scale at a moment of training: first small, then growing linearly, at last 1.

    Args:
        fraction: of training, 0 to 1.
        initial_scale: during the first `delay_fraction`.
        delay_fraction: of training.
        finetune_fraction: of training, at its end and at full size.

    >>> [resizing_scale(moment, 0.5, 0.4, 0.2) for moment in (0.0, 0.4, 0.6, 0.8)]
    [0.5, 0.5, 0.75, 1.0]
    """
    growing = 1 - delay_fraction - finetune_fraction
    if fraction >= 1 - finetune_fraction:
        return 1.0
    passed = max(0.0, fraction - delay_fraction) / growing if growing > 0 else 0.0
    return round(initial_scale + min(1.0, passed) * (1 - initial_scale), 9)  # 9: 0.6 - 0.4 < 0.2


class ProgressiveResizing(Algorithm):
    """Trains on small images first, and on full size at the end.

    A further fit that makes training longer begins where the scale is for the new whole.

    Args:
        initial_scale: of each side, above 0 to 1.
        delay_fraction: of training, at the initial scale.
        finetune_fraction: of training, at full size at the end; above 0. It must be a batch long.
        size_increment: sides are multiples of it: the network's stride, or what is fast.
        mode: "resize" or "crop".
        resize_targets: whether the targets are maps that must follow.
        input_key: place of the images (N, C, H, W) in a batch.
        target_key: place of the targets.

    Raises:
        ConfigError: an option out of range.
    """

    events = frozenset({Event.BEFORE_FORWARD})
    before = ("MixUp", "CutMix")  # which then have fewer pixels to mix
    card = Card(
        summary="Trains on small images first, which is faster, and on full size at the end.",
        source="Howard (2018), Training Imagenet in 3 hours for $25; and CIFAR10 for $0.26",
        functional="resize_batch",
        settings="`initial_scale` of a side; `delay_fraction`, the part of training at "
        "that scale; `size_increment`, the stride of the network.",
        use_when="A convolutional network that takes any size is trained for long on large images.",
        avoid_when="Images are small already; the network takes one size only; ranges for "
        "quantization are being learnt.",
        cost="Saves: a step costs about the square of the scale, less where the loader is slower.",
    )

    def __init__(
        self,
        initial_scale: float = 0.5,
        delay_fraction: float = 0.5,
        finetune_fraction: float = 0.2,
        size_increment: int = 4,
        mode: Mode = "resize",
        *,
        resize_targets: bool = False,
        input_key: int | str = 0,
        target_key: int | str = 1,
    ) -> None:
        _check_options(initial_scale, mode, size_increment)
        if delay_fraction < 0 or finetune_fraction <= 0 or delay_fraction + finetune_fraction > 1:
            raise ConfigError(
                f"delay_fraction={delay_fraction} and finetune_fraction={finetune_fraction} do not "
                "divide a training that ends at full size. Write 0 or more and above 0, together "
                "at most 1."
            )
        self.initial_scale = initial_scale
        self.delay_fraction = delay_fraction
        self.finetune_fraction = finetune_fraction
        self.size_increment = size_increment
        self.mode: Mode = mode
        self.resize_targets = resize_targets
        self.input_key = input_key
        self.target_key = target_key

    def on(self, event: Event, state: State) -> None:
        """Resize."""
        scale = resizing_scale(
            state.fraction, self.initial_scale, self.delay_fraction, self.finetune_fraction
        )
        if scale == 1:
            return
        inputs = get_item(state.batch, self.input_key)
        targets = get_item(state.batch, self.target_key) if self.resize_targets else None
        inputs, targets = resize_batch(inputs, scale, self.mode, targets, self.size_increment)
        state.batch = set_item(state.batch, self.input_key, inputs)
        if self.resize_targets:
            state.batch = set_item(state.batch, self.target_key, targets)


def _check_options(scale: float, mode: str, size_increment: int) -> None:
    if not 0 < scale <= 1:
        raise ConfigError(f"A scale of {scale} is no part of a side. Write above 0, at most 1.")
    if mode not in ("resize", "crop"):
        raise ConfigError(f"There is no mode {mode!r}. {suggest(str(mode), ('resize', 'crop'))}")
    if size_increment < 1:
        raise ConfigError(f"size_increment={size_increment} is no size. Write 1 or more pixels.")


def _scaled(side: int, scale: float, increment: int) -> int:
    return min(side, max(increment, round(side * scale / increment) * increment))


def _draw_slice(whole: int, part: int, generator: torch.Generator | None) -> slice:
    start = int(torch.randint(whole - part + 1, (), generator=generator))
    return slice(start, start + part)


def _nearest(targets: Tensor, size: tuple[int, int]) -> Tensor:
    """Any dtype: by indexing, at the centres of the new pixels."""
    rows, columns = (
        ((torch.arange(part, device=targets.device) + 0.5) * (whole / part)).long()
        for whole, part in zip(targets.shape[-2:], size, strict=True)
    )
    return targets[..., rows[:, None], columns]
