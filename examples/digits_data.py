"""scikit-learn's digits, 1,797 real images of 8×8 pixels: loaders, a small network, its training.

Nothing is downloaded. Three of the examples share this file.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Batch = tuple[Tensor, Tensor]  # images (N, 1, 8, 8) of -1 to 1, labels (N,)
TRAIN_COUNT = 1200


def make_loaders() -> dict[str, DataLoader[tuple[Tensor, ...]]]:
    """1,200 images to train on and 597 to test; the same for every seed."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN_COUNT], order[TRAIN_COUNT:]
    return {
        "train": DataLoader(TensorDataset(images[train], labels[train]), 64, shuffle=True),
        "test": DataLoader(TensorDataset(images[test], labels[test]), 256),
    }


class DigitsNet(nn.Module):
    """Convolutions with a residual block; larger than the task needs."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = make_layer(1, width)
        self.branch = nn.Sequential(make_layer(width, width), nn.ReLU(), make_layer(width, width))
        self.down = make_layer(width, 2 * width, stride=2)
        self.linear = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.branch(x))
        x = F.relu(self.down(x))
        return self.linear(x.mean(dim=(2, 3)))


def make_layer(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def train(model: nn.Module, loader: Iterable[Batch], epochs: int, lr: float = 3e-3) -> nn.Module:
    """Train `model` in place; it is returned in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        schedule.step()
    return model.eval()
