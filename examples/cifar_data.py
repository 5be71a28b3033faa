"""CIFAR-10 from the files of a data folder: pretrained weights, and loaders of (images, labels).

The folder holds `cifar10_exact_subset.npz` (bit-exact images), `cifar10_resnet<depth>.pt` (state
dicts) and, for `JpegImages`, `cifar10_jpeg.npz` (all of CIFAR-10, re-compressed).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cifar_resnet_model import DEPTHS, CifarResNet
from PIL import Image
from torch import Tensor

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
PADDING = 4


def load_pretrained(folder: Path, name: str) -> CifarResNet:
    model = CifarResNet(DEPTHS[name])
    model.load_state_dict(torch.load(folder / f"cifar10_{name}.pt", weights_only=True))
    return model.eval()


def make_loaders(
    folder: Path, batch_size: int = 128, jpeg: bool = False
) -> dict[str, TrainLoader | TestLoader]:
    with np.load(folder / "cifar10_exact_subset.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file if name != "classes"}
    extra = JpegImages(folder / "cifar10_jpeg.npz") if jpeg else None
    return {
        "train": TrainLoader(arrays["train_images"], arrays["train_labels"], batch_size, extra),
        "test": TestLoader(arrays["test_images"], arrays["test_labels"], batch_size),
    }


class TestLoader:
    """The images in their order, normalised."""

    __test__ = False  # its name begins like a test's

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = zip(
            self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True
        )
        for images, labels in batches:
            yield normalize(images), labels


class TrainLoader:
    """Shuffled, cropped and flipped anew in every epoch, by torch's global random state."""

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, extra: JpegImages | None = None
    ) -> None:
        self.images, self.labels, self.batch_size, self.extra = images, labels, batch_size, extra

    def __len__(self) -> int:
        count = len(self.labels) * (2 if self.extra else 1)
        return -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.images, self.labels
        if self.extra:
            more_images, more_labels = self.extra.draw(len(labels))
            images, labels = torch.cat([images, more_images]), torch.cat([labels, more_labels])
        for batch in torch.randperm(len(labels)).split(self.batch_size):
            yield normalize(random_crop_and_flip(images[batch])), labels[batch]


class JpegImages:
    """All training images of CIFAR-10 from their JPEG files, decoded once."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            offsets, joined = file["train_offsets"], file["train_jpeg"]
            self.labels = torch.from_numpy(file["train_labels"])
        decoded = np.empty((len(self.labels), 32, 32, 3), np.uint8)
        for index, (start, end) in enumerate(pairwise(offsets)):
            decoded[index] = Image.open(io.BytesIO(joined[start:end].tobytes())).convert("RGB")
        self.images = torch.from_numpy(decoded).permute(0, 3, 1, 2)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(self.labels))[:count]
        return self.images[chosen], self.labels[chosen]


def normalize(images: Tensor) -> Tensor:
    """Pixels 0 to 255 (N, 3, H, W) to what the pretrained weights expect."""
    return (images.float() / 255 - MEAN) / STD


def random_crop_and_flip(images: Tensor) -> Tensor:
    """Move each image (N, C, H, W) by up to 4 pixels, black coming in, and mirror half of them."""
    count, channels, height, width = images.shape
    padded = F.pad(images, (PADDING,) * 4)
    rows = torch.randint(0, 2 * PADDING + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(0, 2 * PADDING + 1, (count, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    return padded[
        torch.arange(count).view(-1, 1, 1, 1),
        torch.arange(channels).view(1, -1, 1, 1),
        rows.view(count, 1, height, 1),
        columns.view(count, 1, 1, width),
    ]
