"""Images without some of their rows and columns, as in ColOut of MosaicML's composer.

https://docs.mosaicml.com/projects/composer/en/stable/method_cards/colout.html
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.training.algorithm import Algorithm
from compressor.training.batch import get_item, set_item
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State

if TYPE_CHECKING:
    from PIL.Image import Image

ImageT = TypeVar("ImageT", "Image", "Tensor")


def colout_batch(
    inputs: Tensor,
    p_row: float = 0.15,
    p_col: float = 0.15,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop random rows and columns of images, the same ones for the whole batch.

    Maps that belong to the images lose the same ones if `draw_lines` and `keep_lines`, of which
    this is made, are called for both.

    Args:
        inputs: (N, ..., H, W), of any dtype; not changed.
        p_row: fraction of the rows that is dropped, 0 to below 1.
        p_col: fraction of the columns.
        generator: for the draws, on the CPU; None is torch's global one.

    Returns:
        (N, ..., H', W') with H' = int((1 - p_row) * H), W' likewise, at least 1.

    Raises:
        ConfigError: a fraction out of range.
        DataError: if the inputs are no images.

    >>> colout_batch(torch.rand(2, 3, 8, 10), p_row=0.25, p_col=0.5).shape
    torch.Size([2, 3, 6, 5])
    """
    _check_options(p_row, p_col)
    _check_images(inputs)
    height, width = inputs.shape[-2:]
    rows = draw_lines(height, p_row, generator)
    return keep_lines(inputs, rows, draw_lines(width, p_col, generator))


def colout_image(
    image: ImageT,
    p_row: float = 0.15,
    p_col: float = 0.15,
    generator: torch.Generator | None = None,
) -> ImageT:
    """One image without some of its rows and columns, for a pipeline of torchvision.

    Args:
        image: PIL image, or tensor (..., H, W); not changed.
        p_row: fraction of the rows that is dropped, 0 to below 1.
        p_col: fraction of the columns.
        generator: for the draws, on the CPU; None is torch's global one.

    Returns:
        Of the same kind.

    Raises:
        ConfigError: a fraction out of range.
        DataError: if it is no image.

    >>> from PIL import Image
    >>> colout_image(Image.new("RGB", (10, 8)), p_row=0.25, p_col=0.5).size  # width first
    (5, 6)
    """
    if isinstance(image, Tensor):
        return colout_batch(image.unsqueeze(0), p_row, p_col, generator).squeeze(0)
    from PIL.Image import fromarray

    _check_options(p_row, p_col)
    if image.mode == "P":  # numbers of colours in a table, which arrays do not have
        image = image.convert("RGB")
    rows = draw_lines(image.height, p_row, generator)
    columns = draw_lines(image.width, p_col, generator)
    return fromarray(np.asarray(image)[rows.numpy()][:, columns.numpy()])


def draw_lines(count: int, dropped_fraction: float, generator: torch.Generator | None) -> Tensor:
    """The lines of `count` that are kept, ascending: (max(1, int((1 - fraction) * count)),) int64.

    >>> draw_lines(4, 0.0, None)
    tensor([0, 1, 2, 3])
    """
    kept = max(1, int((1 - dropped_fraction) * count + 1e-9))  # 1e-9: (1 - 0.9) * 10 is below 1
    return torch.randperm(count, generator=generator)[:kept].sort().values


def keep_lines(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`images` (..., H, W) with nothing but these rows and columns, a copy."""
    kept = images.index_select(-2, rows.to(images.device))
    return kept.index_select(-1, columns.to(images.device))


class ColOut(Algorithm):
    """Drops rows and columns of the images at BATCH_START, before anything mixes them.

    Args:
        p_row: fraction of the rows that is dropped, 0 to below 1.
        p_col: fraction of the columns.
        resize_targets: whether the targets are maps (N, ..., H, W) that must follow.
        input_key: place of the images (N, ..., H, W) in a batch.
        target_key: place of the targets.

    Raises:
        ConfigError: a fraction out of range.
    """

    events = frozenset({Event.BATCH_START})
    card = Card(
        summary="Drops random rows and columns of the images of a batch.",
        source="MosaicML (2021), ColOut, a method card of composer",
        functional="colout_batch",
        settings="`p_row` and `p_col`, the fractions of rows and columns that are dropped.",
        use_when="A convolutional network that takes any size is trained for long: steps get "
        "cheaper, and it sees another image each time.",
        avoid_when="Images are small already; the network takes one size only; ranges for "
        "quantization are being learnt.",
        cost="Two copies of the images. Saves in proportion to the pixels that are dropped, less "
        "where the loader is slower.",
    )

    def __init__(
        self,
        p_row: float = 0.15,
        p_col: float = 0.15,
        *,
        resize_targets: bool = False,
        input_key: int | str = 0,
        target_key: int | str = 1,
    ) -> None:
        _check_options(p_row, p_col)
        self.p_row = p_row
        self.p_col = p_col
        self.resize_targets = resize_targets
        self.input_key = input_key
        self.target_key = target_key

    def on(self, event: Event, state: State) -> None:
        """Drop."""
        images = get_item(state.batch, self.input_key)
        _check_images(images)
        height, width = images.shape[-2:]
        lines = draw_lines(height, self.p_row, None), draw_lines(width, self.p_col, None)
        batch = set_item(state.batch, self.input_key, keep_lines(images, *lines))
        if self.resize_targets:
            maps = get_item(batch, self.target_key)
            if not isinstance(maps, Tensor) or maps.dim() < 3 or maps.shape[-2:] != (height, width):
                kind = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
                raise DataError(
                    f"Targets of {kind} are no maps for images of {height}×{width} pixels. "
                    "Give maps of their size, or leave resize_targets out."
                )
            batch = set_item(batch, self.target_key, keep_lines(maps, *lines))
        state.batch = batch


def _check_options(p_row: float, p_col: float) -> None:
    if not (0 <= p_row < 1 and 0 <= p_col < 1):
        raise ConfigError(
            f"p_row={p_row}, p_col={p_col} leaves no image. Write 0 to below 1 for each."
        )


def _check_images(images: object) -> None:
    if not isinstance(images, Tensor) or images.dim() < 3:
        kind = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise DataError(f"Inputs of {kind} are no images. Give a tensor (N, C, H, W).")
