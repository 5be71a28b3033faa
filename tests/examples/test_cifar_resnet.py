"""The example's data and model are what its numbers rest on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

EXAMPLES = Path(__file__).parents[2] / "examples"


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


def test_weights_and_images_are_read_from_their_files(tmp_path: Path) -> None:
    from cifar_data import load_pretrained, make_loaders
    from cifar_resnet import CifarAccuracy
    from cifar_resnet_model import CifarResNet

    torch.manual_seed(0)
    model = CifarResNet(20).eval()
    torch.save(model.state_dict(), tmp_path / "cifar10_resnet20.pt")
    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (images / 255 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    with torch.no_grad():
        labels = model(normal).argmax(1)
    labels[:10] = (labels[:10] + 1) % 10  # a quarter is wrong
    arrays = {"images": images.numpy(), "labels": labels.numpy()}
    np.savez(
        tmp_path / "cifar10_exact_subset.npz",
        **{f"{split}_{key}": array for split in ("train", "test") for key, array in arrays.items()},
    )
    loader: Any = make_loaders(tmp_path, batch_size=16)["test"]
    accuracy = CifarAccuracy().apply(load_pretrained(tmp_path, "resnet20"), loader)
    assert accuracy["accuracy"] == pytest.approx(75.0)
