from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compressor import functional as cf
from compressor.training import Algorithm, algorithms
from compressor.training.card import Card


def all_algorithms() -> list[type[Algorithm]]:
    """Every algorithm that the package has."""
    found = []
    for info in pkgutil.iter_modules(algorithms.__path__):
        module = importlib.import_module(f"{algorithms.__name__}.{info.name}")
        for value in vars(module).values():
            is_class = isinstance(value, type) and issubclass(value, Algorithm)
            if is_class and value.__module__ == module.__name__ and value.__subclasses__() == []:
                found.append(value)
    return found


def test_names_are_sorted_and_resolve() -> None:
    assert cf.__all__ == sorted(cf.__all__)
    assert all(callable(getattr(cf, name)) for name in cf.__all__)


@pytest.mark.parametrize("algorithm", all_algorithms(), ids=lambda each: each.__name__)
def test_every_card_is_filled_and_names_a_function_of_the_api(algorithm: type[Algorithm]) -> None:
    card = algorithm.card
    assert isinstance(card, Card)
    texts = (card.summary, card.source, card.use_when, card.avoid_when, card.cost)
    assert all(text.strip() for text in texts)
    assert card.functional is None or card.functional in cf.__all__


def test_a_loop_of_ones_own_mixes_images() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    dataloader = [(images, torch.tensor([1, 2, 3, 9]))] * 2
    for data, target in dataloader:
        data = cf.cutmix(data, target, alpha=1, num_classes=10)
        data, permuted, mixing = cf.mixup_batch(data, target, alpha=0.2)
        optimizer.zero_grad()
        output = model(data)
        loss = (1 - mixing) * F.cross_entropy(output, target)
        (loss + mixing * F.cross_entropy(output, permuted)).backward()
        optimizer.step()
