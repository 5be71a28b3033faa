"""Transforms of torchvision on the images of a batch, each with draws of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.seeding import isolated_rng

T = TypeVar("T")
PerChannel: TypeAlias = float | Sequence[float]
"""A number for all channels, or one for each."""

TOLERANCE = 1e-3  # a fourth of the step between two of 256 values: rounding is less


def transform_images(
    images: Tensor,
    transform: Callable[[Tensor], Tensor],
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
) -> Tensor:
    """`transform` of each image.

    Args:
        images: (N, C, H, W) with 1 or 3 channels: uint8, or floating point that was normalised with
            `mean` and `std` from 0 to 1; not changed.
        transform: takes (C, H, W), uint8 or float32 from 0 to 1, and gives the same.
        mean: of floating point images, which is added again.
        std: by which they were divided.

    Returns:
        Of the shape, dtype and normalisation of `images`.

    Raises:
        DataError: if they are no such images.

    >>> images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    >>> transform_images(images, lambda image: 1 - image).flatten()
    tensor([1., 1., 1., 0., 0., 0.])
    """
    _check_images(images)
    changed = torch.empty_like(images)
    if images.dtype == torch.uint8:
        for index, image in enumerate(images):
            changed[index] = transform(image)
        return changed
    shift, scale = (_per_channel(value, images) for value in (mean, std))
    unit = images.float() * scale + shift
    low, high = (float(value) for value in unit.aminmax())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise DataError(
            f"The images have values from {low:.3g} to {high:.3g}, and 0 to 1 are black and white. "
            "Give the mean and the std that they were normalised with."
        )
    for index, image in enumerate(unit.clamp_(0, 1)):
        changed[index] = (transform(image) - shift) / scale
    return changed


def with_generator(transform: Callable[[T], T], value: T, generator: torch.Generator | None) -> T:
    """`transform(value)`, whose draws `generator` decides; None is the global generators."""
    if generator is None:
        return transform(value)
    with isolated_rng(int(torch.randint(2**63 - 1, (), generator=generator))):
        return transform(value)


def check_normalisation(mean: PerChannel, std: PerChannel) -> None:
    """Do nothing if images can be normalised so.

    Raises:
        ConfigError: if not.
    """
    of_channels = std if isinstance(std, Sequence) else [std]
    if any(value <= 0 for value in of_channels):
        raise ConfigError(f"mean={mean}, std={std} normalises no image. Write a std above 0.")


def _check_images(images: Any) -> None:
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] not in (1, 3):
        kind = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise DataError(
            f"Inputs of {kind} are no images. Give a tensor (N, C, H, W) of 1 or 3 channels."
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise DataError(
            f"Images of {images.dtype} have no known white. Give uint8, or floats from 0 to 1."
        )


def _per_channel(value: PerChannel, images: Tensor) -> Tensor:
    """(C, 1, 1) or (1, 1, 1), float32."""
    values = list(value) if isinstance(value, Sequence) else [value]
    if len(values) not in (1, images.shape[1]):
        raise DataError(
            f"There are {len(values)} means or stds, and the images have {images.shape[1]} "
            "channels. Give one for each, or one for all."
        )
    return torch.tensor(values, dtype=torch.float32, device=images.device).view(-1, 1, 1)
