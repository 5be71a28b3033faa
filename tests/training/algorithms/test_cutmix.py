from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compressor.errors import ConfigError, DataError
from compressor.training.algorithms.cutmix import CutMix, cutmix, cutmix_batch, draw_box
from tests.training.algorithms.mixing_job import CLASSES, SIZE, make_batch, telling_images, train


def test_pixels_in_the_box_are_the_others_and_no_others() -> None:
    images = torch.randn(3, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    order = torch.tensor([2, 0, 1])
    mixed, permuted, mixing, box = cutmix_batch(
        images, torch.arange(3), box=(1, 2, 4, 5), indices=order
    )
    for y in range(5):
        for x in range(6):
            source = order if 1 <= x < 4 and 2 <= y < 5 else torch.arange(3)
            assert torch.equal(mixed[:, :, y, x], images[source, :, y, x])
    assert (mixing, box) == (9 / 30, (1, 2, 4, 5))
    assert torch.equal(permuted, order)
    assert torch.equal(images, before)


@pytest.mark.slow
def test_box_and_arithmetic_are_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.transforms import v2

    images, _ = make_batch()
    theirs = v2.CutMix(num_classes=CLASSES)
    for seed in range(20):
        kept = torch.tensor(seed / 20, dtype=torch.float64)
        monkeypatch.setattr(theirs, "_dist", SimpleNamespace(sample=lambda _, kept=kept: kept))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            parameters = theirs.make_params([images])
            torch.manual_seed(seed)
            box = draw_box(SIZE, SIZE, 1 - kept.item())
        assert box == parameters["box"]
        assert_equal_to_theirs(theirs, parameters)


def assert_equal_to_theirs(theirs: Any, parameters: dict[str, Any]) -> None:
    images, labels = make_batch()
    images = images + torch.arange(SIZE)
    order = torch.arange(len(labels)).roll(1)
    parameters = {**parameters, "labels": labels, "batch_size": len(labels)}
    mixed, permuted, mixing, _ = cutmix_batch(images, labels, box=parameters["box"], indices=order)
    assert torch.equal(mixed, theirs.transform(images, parameters))
    targets = (1 - mixing) * F.one_hot(labels, CLASSES) + mixing * F.one_hot(permuted, CLASSES)
    torch.testing.assert_close(targets, theirs.transform(labels, parameters))


def test_the_share_is_the_area_that_the_border_leaves() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2)
    shares = []
    for _ in range(100):
        mixed, _, mixing, _ = cutmix_batch(telling_images(labels), labels, generator=generator)
        own = mixed.mean((2, 3))[0, 0].item()
        assert own in (1.0, pytest.approx(1 - mixing))
        shares.append(mixing)
    assert min(shares) < 0.05
    assert max(shares) > 0.5


def test_a_wanted_share_is_kept_where_the_border_is_far() -> None:
    images = torch.zeros(2, 1, 100, 100)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        _, _, mixing, box = cutmix_batch(images, torch.arange(2), mixing=0.04, generator=generator)
        if 0 not in box and 100 not in box:
            assert mixing == pytest.approx(0.04)


def test_the_loop_that_keeps_its_targets_runs() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(CLASSES * SIZE * SIZE, CLASSES))
    data, target = make_batch()
    data = cutmix(data, target, alpha=1, num_classes=CLASSES)
    F.cross_entropy(model(data), target).backward()
    assert model[1].weight.grad is not None


def test_without_its_targets_mixed_most_of_an_image_stays() -> None:
    images, labels = make_batch()
    generator = torch.Generator().manual_seed(0)
    own = [
        cutmix(images, labels, generator=generator).mean((2, 3)).gather(1, labels[:, None]).min()
        for _ in range(50)
    ]
    assert min(own) >= 0.5
    assert min(own) < 0.8


def test_what_cannot_be_mixed_is_refused() -> None:
    images, labels = make_batch()
    with pytest.raises(DataError, match=r"\(8, 4\) are no images"):
        cutmix_batch(images[:, :, 0, 0], labels)
    with pytest.raises(ConfigError, match="not within images of 8×8"):
        cutmix_batch(images, labels, box=(0, 0, 9, 8))
    with pytest.raises(DataError, match="A target is the class 9"):
        cutmix(images, labels.clone().fill_(9), num_classes=CLASSES)
    with pytest.raises(ConfigError, match="alpha=-1"):
        CutMix(alpha=-1)


def test_a_layout_with_channels_last_is_kept() -> None:
    images, labels = make_batch()
    images = images.contiguous(memory_format=torch.channels_last)
    mixed = cutmix_batch(images, labels)[0]
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_integer_images_may_be_cut() -> None:
    images, labels = make_batch()
    assert cutmix_batch((images * 255).byte(), labels)[0].dtype == torch.uint8


def test_two_fits_with_one_seed_are_equal() -> None:
    first, second = (train(CutMix())[1].model.weight for _ in range(2))
    assert torch.equal(first, second)
