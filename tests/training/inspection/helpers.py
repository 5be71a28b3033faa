"""A classifier of tiny images, and a loader of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = ("cat", "dog", "owl")


def make_net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip


def make_tensors(samples: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(samples, 3, 4, 4, generator=generator)
    return images, torch.randint(0, 3, (samples,), generator=generator)


def make_loader(samples: int = 20, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*make_tensors(samples)), **{"batch_size": 6, **options})
