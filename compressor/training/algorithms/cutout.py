"""Squares of images that are erased (DeVries and Taylor, 2017, https://arxiv.org/abs/1708.04552)."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.training.algorithm import Algorithm
from compressor.training.batch import get_item, set_item
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State


def cutout_batch(
    inputs: Tensor,
    num_holes: int = 1,
    length: float = 0.5,
    value: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Erase squares of each image, around pixels that are drawn alike; the border cuts them off.

    torchvision's `RandomErasing` draws a rectangle that is wholly inside; that much of it may be
    outside is what the paper found important. What is erased is what `v2.functional.erase` erases.

    Args:
        inputs: (N, ..., H, W), of any dtype; not changed.
        num_holes: squares in each image, which may overlap.
        length: of their sides: below 1 a part of height and width, else pixels.
        value: of what is erased; 0 is the mean of normalised images.
        generator: for the draws, on the CPU; None is torch's global one.

    Returns:
        Of the shape of `inputs`.

    Raises:
        ConfigError: if there is no hole, or one without pixels.
        DataError: if the inputs are no images.

    >>> images = torch.ones(2, 3, 4, 4)
    >>> cutout_batch(images, length=1).sum(dim=(1, 2, 3))  # a pixel of each, in three channels
    tensor([45., 45.])
    """
    _check_options(num_holes, length)
    if not isinstance(inputs, Tensor) or inputs.dim() < 3:
        kind = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise DataError(f"Inputs of {kind} are no images. Give a tensor (N, C, H, W).")
    is_erased = draw_holes(tuple(inputs.shape), num_holes, length, generator)
    # A copy first: masked_fill forgets channels_last.
    return inputs.clone().masked_fill_(is_erased.to(inputs.device), value)


def draw_holes(
    shape: tuple[int, ...], num_holes: int, length: float, generator: torch.Generator | None = None
) -> Tensor:
    """Which pixels of images of `shape` (N, ..., H, W) are erased: (N, 1, ..., H, W), bool."""
    samples, (height, width) = shape[0], shape[-2:]
    is_inside = []
    for size in (height, width):
        side = max(1, round(length * size)) if length < 1 else int(length)
        centre = torch.randint(size, (samples, num_holes, 1), generator=generator)
        first = centre - side // 2
        pixels = torch.arange(size)
        is_inside.append((pixels >= first) & (pixels < first + side))
    rows, columns = is_inside  # (N, holes, H), (N, holes, W)
    is_erased = (rows.unsqueeze(-1) & columns.unsqueeze(-2)).any(dim=1)
    return is_erased.view(samples, *[1] * (len(shape) - 3), height, width)


class CutOut(Algorithm):
    """Erases squares of the images at BATCH_START, before anything mixes them.

    Args:
        num_holes: squares in each image.
        length: of their sides: below 1 a part of height and width, else pixels.
        value: of what is erased; 0 is the mean of normalised images.
        input_key: place of the images (N, ..., H, W) in a batch.

    Raises:
        ConfigError: if there is no hole, or one without pixels.
    """

    events = frozenset({Event.BATCH_START})
    card = Card(
        summary="Erases squares of the images, so that a network looks at more than one detail.",
        source="DeVries and Taylor (2017), Improved Regularization of Convolutional Neural "
        "Networks with Cutout",
        functional="cutout_batch",
        settings="`length`, the side of a square, and `num_holes`.",
        use_when="An image classifier overfits, and what is to be seen fills the image.",
        avoid_when="The fit is short or the model underfits; what is to be seen is small; ranges "
        "for quantization are being learnt, which should be those of whole images.",
        cost="One copy of the images.",
    )

    def __init__(
        self,
        num_holes: int = 1,
        length: float = 0.5,
        value: float = 0.0,
        *,
        input_key: int | str = 0,
    ) -> None:
        _check_options(num_holes, length)
        self.num_holes = num_holes
        self.length = length
        self.value = value
        self.input_key = input_key

    def on(self, event: Event, state: State) -> None:
        """Erase."""
        images = get_item(state.batch, self.input_key)
        erased = cutout_batch(images, self.num_holes, self.length, self.value)
        state.batch = set_item(state.batch, self.input_key, erased)


def _check_options(num_holes: int, length: float) -> None:
    if num_holes < 1:
        raise ConfigError(f"num_holes={num_holes} erases nothing. Write 1 or more.")
    if not length > 0 or (length > 1 and int(length) != length):
        raise ConfigError(
            f"length={length} is no side of a square. Write pixels, or a part of the image: 0.5."
        )
