"""Mixtures of chains of image operations (Hendrycks et al., 2020, https://arxiv.org/abs/1912.02781)."""

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


def augmix(
    severity: int = 3, mixture_width: int = 3, chain_depth: int = -1, alpha: float = 1.0
) -> Any:
    """A transform for a pipeline of torchvision, before `ToTensor`: its own `v2.AugMix`.

    An image becomes m * image + (1 - m) * sum of w_k * chain_k(image), with m of
    Beta(alpha, alpha) and w of Dirichlet(alpha, …). It draws from torch's global generator, which
    each worker of a loader has for itself.

    Args:
        severity: of the operations, 1 to 10.
        mixture_width: chains.
        chain_depth: operations in a chain; below 1: 1 to 3, drawn for each.
        alpha: the nearer to 0, the more one of the chains, or the image, weighs.

    Returns:
        Takes and gives a PIL image, or a uint8 tensor (..., C, H, W).

    Raises:
        ConfigError: an option out of range.

    >>> from PIL import Image
    >>> augmix()(Image.new("RGB", (32, 32))).size
    (32, 32)
    """
    # Here, because importing torchvision takes longer than all the rest of the functional API.
    from torchvision.transforms import v2

    _check_options(severity, mixture_width, alpha)
    return v2.AugMix(severity, mixture_width, chain_depth, alpha)


def augmix_image(
    image: ImageT,
    severity: int = 3,
    mixture_width: int = 3,
    chain_depth: int = -1,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
) -> ImageT:
    """One image augmented as by `augmix`.

    Args:
        image: PIL image, or uint8 tensor (..., C, H, W); not changed.
        severity: of the operations, 1 to 10.
        mixture_width: chains.
        chain_depth: operations in a chain; below 1: 1 to 3, drawn for each.
        alpha: of the distributions of the weights.
        generator: for the draws, on the CPU; None is torch's global one.

    Returns:
        Of the same kind and size.

    Raises:
        ConfigError: an option out of range.

    >>> image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    >>> augmix_image(image, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([3, 8, 8])
    """
    transform = augmix(severity, mixture_width, chain_depth, alpha)
    return with_generator(transform, image, generator)


class AugMix(Algorithm):
    """Augments each image of a batch as `augmix` does, at BATCH_START, on the batch's device.

    Only the images are the paper's; its loss that asks for like outputs of like images is left out.

    Args:
        severity: of the operations, 1 to 10.
        mixture_width: chains.
        chain_depth: operations in a chain; below 1: 1 to 3, drawn for each.
        alpha: of the distributions of the weights.
        mean: that images of floats were normalised with; uint8 has none.
        std: likewise.
        input_key: place of the images (N, C, H, W) in a batch.

    Raises:
        ConfigError: an option out of range.
    """

    events = frozenset({Event.BATCH_START})
    before = ("CutOut", "ColOut")
    card = Card(
        summary="Mixes each image with chains of random operations on it.",
        source="Hendrycks et al. (2020), AugMix: A Simple Data Processing Method to Improve "
        "Robustness and Uncertainty",
        functional="augmix_image",
        settings="`severity`, how strong operations are; `mean` and `std` that the images "
        "were normalised with.",
        use_when="A classifier has to bear noise, blur and weather that it was not trained on.",
        avoid_when="The fit is short or the model underfits; steps are shorter than the "
        "augmentation; ranges for quantization are being learnt.",
        cost="Some six operations on each image, one image after the other. In the loader's "
        "workers, by cf.augmix() among the transforms of the dataset, steps need not wait.",
    )

    def __init__(
        self,
        severity: int = 3,
        mixture_width: int = 3,
        chain_depth: int = -1,
        alpha: float = 1.0,
        *,
        mean: PerChannel = 0.0,
        std: PerChannel = 1.0,
        input_key: int | str = 0,
    ) -> None:
        check_normalisation(mean, std)
        self.transform = augmix(severity, mixture_width, chain_depth, alpha)
        self.mean = mean
        self.std = std
        self.input_key = input_key

    def on(self, event: Event, state: State) -> None:
        """Augment."""
        images = get_item(state.batch, self.input_key)
        augmented = transform_images(images, self.transform, self.mean, self.std)
        state.batch = set_item(state.batch, self.input_key, augmented)


def _check_options(severity: int, mixture_width: int, alpha: float) -> None:
    if not 1 <= severity <= 10 or mixture_width < 1 or not alpha > 0:
        raise ConfigError(
            f"severity={severity}, mixture_width={mixture_width}, alpha={alpha} is no "
            "augmentation. Write a severity of 1 to 10, 1 or more chains, and an alpha above 0."
        )
