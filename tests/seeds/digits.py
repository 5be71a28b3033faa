"""Handwritten digits in colour, so that what is written for photographs takes them."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

CLASSES = [str(digit) for digit in range(10)]


def make_dataset(samples: int = 16, first: int = 0) -> TensorDataset:
    """Images (3, 8, 8) of 0 to 1, and what they show; `first` is that of another part."""
    bunch = load_digits()
    part = slice(first, first + samples)
    grey = torch.from_numpy(bunch.images[part]).float() / 16
    return TensorDataset(
        grey.unsqueeze(1).repeat(1, 3, 1, 1), torch.from_numpy(bunch.target[part]).long()
    )


def make_loader(samples: int = 16, batch_size: int = 8, first: int = 0) -> DataLoader[Any]:
    return DataLoader(make_dataset(samples, first), batch_size=batch_size)


def make_test_loader() -> DataLoader[Any]:
    """Other images: two batches of unequal size, so that a mean of means is no mean."""
    return make_loader(12, first=100)


def whole(loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    """All images and labels of a loader."""
    images, labels = loader.dataset.tensors
    return images, labels
