"""scikit-learn's digits and a residual CNN for them: what `compressor demo` compresses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

TRAIN_COUNT = 1200  # of 1,797; the other 597 are the test split
BATCH_SIZE = 64


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions added to a shortcut: the identity, or a 1×1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual CNN for 8×8 grey images, with blocks to remove and channels to prune."""

    def __init__(self, widths: Sequence[int] = (32, 64, 96), blocks: Sequence[int] = (2, 3, 3)):
        super().__init__()
        self.conv = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        layers: list[nn.Module] = []
        channels = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(ResidualBlock(channels, width, stride))
                channels = width
        self.blocks = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) to logits (N, 10)."""
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def digit_loaders() -> dict[str, DataLoader[tuple[Tensor, ...]]]:
    """The real digits as loaders of (images (N, 1, 8, 8) about -1 to 1, labels (N,)).

    The split is the same for every seed: 1,200 images to train on and 597 to test.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))  # files are sorted by writer
    images = torch.from_numpy(bunch.images[order]).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(bunch.target[order]).long()
    train = TensorDataset(images[:TRAIN_COUNT], labels[:TRAIN_COUNT])
    test = TensorDataset(images[TRAIN_COUNT:], labels[TRAIN_COUNT:])
    return {
        "train": DataLoader(train, BATCH_SIZE, shuffle=True, collate_fn=_collate_shifted),
        "test": DataLoader(test, 2 * BATCH_SIZE),
    }


def shift(images: Tensor, offsets: Tensor) -> Tensor:
    """Move each image by up to one pixel; what enters is background.

    Args:
        images: (N, C, H, W), background -1.
        offsets: (N, 2) integers 0 to 2: rows and columns; 1 is no move.

    >>> image = torch.eye(3).reshape(1, 1, 3, 3)
    >>> shift(image, torch.tensor([[1, 1]])).equal(image)
    True
    """
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    height, width = images.shape[2:]
    rows = offsets[:, :1] + torch.arange(height)
    columns = offsets[:, 1:] + torch.arange(width)
    samples = torch.arange(len(images))[:, None, None]
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _collate_shifted(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images = torch.stack([image for image, _ in samples])
    labels = torch.stack([label for _, label in samples])
    return shift(images, torch.randint(0, 3, (len(images), 2))), labels
