"""Tensors as pictures on a page: any channels and range in, PNG data URIs out."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError

Normalization: TypeAlias = tuple[Sequence[float] | float, Sequence[float] | float]
"""Mean and standard deviation by which images were normalised: numbers, or one for each channel."""

LONGEST_SIDE = 256  # pixels; a page of 48 pictures stays at a few MB
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""Dark violet to pale yellow, the lightness rising evenly: five colours of matplotlib's inferno."""


def to_rgb(image: Tensor, denormalize: Normalization | None) -> Tensor:
    """An image as 8-bit colours.

    One channel is grey, two are averaged to grey, of four and more the first three are shown.
    Without `denormalize`, integers from 0 to 255 and floats from 0 to 1 are taken as they are,
    and an image of any other range is stretched: its minimum becomes black, its maximum white.

    Args:
        image: (C, H, W) or (H, W).
        denormalize: mean and standard deviation to undo; what is then outside 0 to 1 is cut off.

    Returns:
        (H, W, 3) of uint8.

    Raises:
        DataError: if the tensor is no image.
        ConfigError: if `denormalize` has another number of channels.

    >>> to_rgb(torch.tensor([[0.0, 1.0]]), None).tolist()
    [[[0, 0, 0], [255, 255, 255]]]
    """
    if image.dim() == 2:
        image = image[None]
    if image.dim() != 3 or not image.numel():
        raise DataError(
            f"A sample has shape {tuple(image.shape)}, which is no image: (C, H, W) or (H, W). "
            "Set `input_key` to where the images are in a batch."
        )
    unit = _to_unit_range(image, denormalize)
    if len(unit) == 2:
        unit = unit.mean(0, keepdim=True)
    rgb = unit[:3].expand(3, -1, -1)
    return (rgb * 255).round().to(torch.uint8).permute(1, 2, 0)


def to_heat(values: Tensor) -> Tensor:
    """A map (H, W), 0 to 1, as colours (H, W, 3) of uint8: dark is 0, pale is 1."""
    # Square root: a few pixels hold most of a gradient, and the rest would be black.
    place = values.float().clamp(0, 1).sqrt() * (len(HEAT) - 1)
    lower = place.long().clamp(max=len(HEAT) - 2)
    ramp = torch.tensor(HEAT, dtype=torch.float32)
    colours = torch.lerp(ramp[lower], ramp[lower + 1], (place - lower)[..., None])
    return colours.round().to(torch.uint8)


def png_uri(pixels: Tensor) -> str:
    """A `data:` address that holds the picture.

    Args:
        pixels: (H, W, 3) of uint8. Pictures longer than `LONGEST_SIDE` are made smaller.
    """
    from PIL import Image  # here: importing this package does not need it

    picture = Image.fromarray(pixels.contiguous().numpy())
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _to_unit_range(image: Tensor, denormalize: Normalization | None) -> Tensor:
    """`image` (C, H, W) as floats from 0 to 1."""
    values = image.float().nan_to_num(0.0, 0.0, 0.0)
    if denormalize is not None:
        mean, std = (_by_channel(part, len(image)) for part in denormalize)
        return (values * std + mean).clamp(0, 1)
    is_integer = not image.is_floating_point() and image.dtype is not torch.bool
    low, high = values.min(), values.max()
    largest = 255.0 if is_integer else 1.0
    if low >= 0 and high <= largest:
        return values / largest
    return (values - low) / (high - low) if high > low else torch.full_like(values, 0.5)


def _by_channel(values: Sequence[float] | float, channels: int) -> Tensor:
    numbers = torch.as_tensor(values, dtype=torch.float32).flatten()
    if len(numbers) not in (1, channels):
        raise ConfigError(
            f"`denormalize` has {len(numbers)} numbers for images of {channels} channels. "
            "Give one for each channel, or a single one."
        )
    return numbers.view(-1, 1, 1)
