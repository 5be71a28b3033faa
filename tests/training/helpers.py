"""A small job for the trainer's tests: two classes that a line separates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compressor.structure.groups import ChannelGroup, Member
from compressor.training import Evaluator, Trainer


def make_model(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2)
        )


CHANNELS = tuple((channel,) for channel in range(8))
HIDDEN = ChannelGroup(
    "0",
    8,
    (
        Member("0.weight", 0, "out", CHANNELS, 8),
        Member("0.bias", 0, "out", CHANNELS, 8),
        Member("1.weight", 0, "out", CHANNELS, 8),
        Member("1.bias", 0, "out", CHANNELS, 8),
        Member("1.running_mean", 0, "out", CHANNELS, 8),
        Member("1.running_var", 0, "out", CHANNELS, 8),
        Member("4.weight", 1, "in", CHANNELS, 8),
    ),
)
"""The hidden channels of `make_model`."""


def make_dataset(samples: int = 32) -> TensorDataset:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x.sum(1) > 0).long())


def make_loader(shuffle: bool = False, seed: int | None = None) -> DataLoader[Any]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(make_dataset(), batch_size=8, shuffle=shuffle, generator=generator)


def cross_entropy(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    return {"loss": nn.functional.cross_entropy(model(batch[0]), batch[1])}


def accuracy(model: nn.Module) -> dict[str, float]:
    x, y = make_dataset().tensors
    return {"accuracy": (model(x).argmax(1) == y).float().mean().item()}


def make_trainer(model: nn.Module | None = None, **options: Any) -> Trainer:
    loader: Iterable[Any] = options.pop("train_dataloader", None)
    loader = make_loader() if loader is None else loader
    options = {"max_duration": "2ep", "optimizers": {"name": "SGD", "lr": 0.1}, **options}
    step = options.pop("step", cross_entropy)
    if "evaluate" in options:
        options["eval_dataloader"] = Evaluator(function=options.pop("evaluate"))
    return Trainer(model or make_model(), step, train_dataloader=loader, **options)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def are_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
