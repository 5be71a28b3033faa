"""Random chains of image operations (Cubuk et al., 2020, https://arxiv.org/abs/1909.13719)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from compressor.errors import ConfigError
from compressor.seeding import isolated_rng

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
    transform = randaugment(num_ops, magnitude)
    if generator is None:
        augmented: ImageT = transform(image)
        return augmented
    with isolated_rng(int(torch.randint(2**63 - 1, (), generator=generator))):
        augmented = transform(image)
    return augmented
