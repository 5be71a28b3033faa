"""What the samples about recipes share: models, and what must come out of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from tests.seeds.digits import whole


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # RAdam with decoupled weight decay is in torch itself now.
    return torch.optim.RAdam(model.parameters(), lr=0.01, decoupled_weight_decay=True)


def make_model() -> nn.Module:
    """The same weights each time; what it is in eval mode settles in ten batches, not in fifty."""
    torch.manual_seed(0)
    quick = partial(nn.BatchNorm2d, momentum=0.5)
    return torchvision.models.resnet18(num_classes=10, norm_layer=quick)


def make_small_model() -> nn.Module:
    """For samples that are about callbacks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))


def loss_of(model: nn.Module, loader: Any) -> float:
    """Of all samples at once, in eval mode."""
    images, labels = whole(loader)
    was_training = model.training
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model.eval()(images), labels).item()
    model.train(was_training)
    return loss


def accuracy_of(model: nn.Module, loader: Any) -> float:
    images, labels = whole(loader)
    with torch.no_grad():
        guesses = model.eval()(images).argmax(1).tolist()
    return sum(a == b for a, b in zip(guesses, labels.tolist(), strict=True)) / len(guesses)


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


class Noted:
    """Loss of every call, and whether the model was in training mode with gradients."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.modes: set[tuple[bool, bool]] = set()

    def __call__(self, model: nn.Module, loss: Tensor) -> None:
        self.losses.append(loss.item())
        self.modes.add((model.training, torch.is_grad_enabled()))


def train_by_hand(model: nn.Module, data_loader: Any, epochs: int) -> list[float]:
    """What blocks 4 to 10 amount to; losses of all batches."""
    opt = make_optimizer(model)
    losses = []
    for _epoch in range(epochs):
        for x, y in data_loader:
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            losses.append(loss.item())
    return losses
