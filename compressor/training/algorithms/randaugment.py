"""Random chains of image operations (Cubuk et al., 2020, https://arxiv.org/abs/1909.13719)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from compressor.errors import ConfigError
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.image_transforms import (
    PerChannel,
    check_normalisation,
    transform_images,
    with_generator,
)
from compressor.training.batch import get_item, set_item
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

ImageT = TypeVar("ImageT", "Image", "Tensor")


def randaugment(num_ops: int = 2, magnitude: int = 9) -> Any:
    """A transform for a pipeline of torchvision, before `ToTensor`: its own `v2.RandAugment`.

    It draws from torch's global generator, which each worker of a loader has for itself.

    Args:
        num_ops: operations in a row, each drawn from fourteen.
        magnitude: of the operations, 0 to 30.

    Returns:
        Takes and gives a PIL image, or a uint8 tensor (..., C, H, W).

    Raises:
        ConfigError: an option out of range.

    >>> from PIL import Image
    >>> randaugment()(Image.new("RGB", (32, 32))).size
    (32, 32)
    """
    # Here, because importing torchvision takes longer than all the rest of the functional API.
    from torchvision.transforms import v2

    if num_ops < 0 or not 0 <= magnitude <= 30:
        raise ConfigError(
            f"num_ops={num_ops}, magnitude={magnitude} is no augmentation. "
            "Write 0 or more operations, and a magnitude of 0 to 30."
        )
    return v2.RandAugment(num_ops, magnitude)


def randaugment_image(
    image: ImageT,
    num_ops: int = 2,
    magnitude: int = 9,
    generator: torch.Generator | None = None,
) -> ImageT:
    """One image augmented as by `randaugment`.

    Args:
        image: PIL image, or uint8 tensor (..., C, H, W); not changed.
        num_ops: operations in a row.
        magnitude: 0 to 30.
        generator: for the draws, on the CPU; None is torch's global one.

    Returns:
        Of the same kind and size.

    Raises:
        ConfigError: an option out of range.

    >>> image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    >>> randaugment_image(image, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([3, 8, 8])
    """
    return with_generator(randaugment(num_ops, magnitude), image, generator)


class RandAugment(Algorithm):
    """Augments each image of a batch as `randaugment` does, at BATCH_START, on the batch's device.

    Args:
        num_ops: operations in a row.
        magnitude: of the operations, 0 to 30.
        mean: that images of floats were normalised with; uint8 has none.
        std: likewise.
        input_key: place of the images (N, C, H, W) in a batch.

    Raises:
        ConfigError: an option out of range.
    """

    events = frozenset({Event.BATCH_START})
    before = ("CutOut", "ColOut")
    card = Card(
        summary="Puts each image through random operations: rotations, shears, colours, contrasts.",
        source="Cubuk et al. (2020), RandAugment: Practical Automated Data Augmentation with a "
        "Reduced Search Space",
        functional="randaugment_image",
        settings="`magnitude`, how strong operations are, and `num_ops`; `mean` and `std` "
        "that the images were normalised with.",
        use_when="An image classifier overfits, and training is long.",
        avoid_when="The fit is short or the model underfits; steps are shorter than the "
        "augmentation; ranges for quantization are being learnt.",
        cost="num_ops operations on each image, one image after the other. In the loader's "
        "workers, by cf.randaugment() among the transforms of the dataset, steps need not wait.",
    )

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: int = 9,
        *,
        mean: PerChannel = 0.0,
        std: PerChannel = 1.0,
        input_key: int | str = 0,
    ) -> None:
        check_normalisation(mean, std)
        self.transform = randaugment(num_ops, magnitude)
        self.mean = mean
        self.std = std
        self.input_key = input_key

    def on(self, event: Event, state: State) -> None:
        """Augment."""
        images = get_item(state.batch, self.input_key)
        augmented = transform_images(images, self.transform, self.mean, self.std)
        state.batch = set_item(state.batch, self.input_key, augmented)
