"""The example's data and model are what its numbers rest on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = os.environ.get("COMPRESSOR_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="COMPRESSOR_DATA names no folder with CIFAR-10")


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import their neighbours by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_a_crop_is_a_window_of_the_framed_image_and_half_are_mirrored() -> None:
    from cifar_data import random_crop_and_flip

    images = torch.randint(1, 256, (64, 3, 6, 5), dtype=torch.uint8)
    mirrored = 0
    for image, crop in zip(images, random_crop_and_flip(images), strict=True):
        framed = F.pad(image, (4, 4, 4, 4))
        windows = [
            framed[:, row : row + 6, column : column + 5] for row in range(9) for column in range(9)
        ]
        if not any(crop.equal(window) for window in windows):
            assert any(crop.flip(2).equal(window) for window in windows)
            mirrored += 1
    assert 10 < mirrored < 54


def test_an_epoch_has_every_image_once_and_follows_the_global_seed() -> None:
    from cifar_data import TrainLoader

    loader = TrainLoader(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.arange(10), 4)
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        batches = [labels for _, labels in loader]
        assert [len(labels) for labels in batches] == [4, 4, 2]
        orders.append(torch.cat(batches))
    assert len(loader) == 3
    assert orders[0].sort().values.equal(torch.arange(10))
    assert orders[0].equal(orders[1])
    assert not orders[0].equal(orders[2])


def test_the_accuracy_weighs_by_sample() -> None:
    from cifar_resnet import CifarAccuracy

    class Echo(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.one_hot(x, 3).float()

    batches = [(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])), (torch.tensor([0]),) * 2]
    batches.append((torch.tensor([1]), torch.tensor([2])))
    assert CifarAccuracy().apply(Echo(1, 1), batches) == {"accuracy": 80.0}


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "right"), [("resnet20", 932), ("resnet32", 944), ("resnet56", 943)]
)
def test_the_pretrained_weights_score_what_they_should(name: str, right: int) -> None:
    from cifar_data import load_pretrained, make_loaders
    from cifar_resnet import CifarAccuracy

    folder = Path(DATA or "")
    loader: Any = make_loaders(folder)["test"]
    accuracy = CifarAccuracy().apply(load_pretrained(folder, name), loader)
    assert accuracy["accuracy"] == pytest.approx(100 * right / 1017)
