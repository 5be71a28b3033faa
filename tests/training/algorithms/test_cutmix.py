from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ConfigError, DataError
from compressor.training import Algorithm, Trainer
from compressor.training.algorithms.cutmix import CutMix, cutmix, cutmix_batch, draw_box
from compressor.training.algorithms.label_smoothing import LabelSmoothing
from compressor.training.algorithms.mixup import MixUp
from tests.training.algorithms.mixing_job import (
    CLASSES,
    SIZE,
    TellingTask,
    make_batch,
    telling_images,
    train,
)


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


def test_maps_get_the_rectangle_that_their_images_get() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 2, 5, 6, generator=generator)
    maps = torch.randint(4, (3, 5, 6), generator=generator)
    before, order = maps.clone(), torch.tensor([2, 0, 1])
    maps[2, 2, 1] = before[2, 2, 1] = -100  # in the box: is pasted too
    mixed, pasted, mixing, box = cutmix_batch(images, maps, box=(1, 2, 4, 5), indices=order)
    for y in range(5):
        for x in range(6):
            source = order if 1 <= x < 4 and 2 <= y < 5 else torch.arange(3)
            assert torch.equal(mixed[:, :, y, x], images[source, :, y, x])
            assert torch.equal(pasted[:, y, x], maps[source, y, x])
    assert (mixing, box) == (1.0, (1, 2, 4, 5))
    assert torch.equal(maps, before)


class Segmentation(TellingTask):
    """Each pixel tells its class; the loss sees maps of the classes."""

    def forward(self, batch: Any) -> Tensor:
        self.shares.append(batch[0])
        scores: Tensor = self.model(batch[0].movedim(1, -1)).movedim(-1, 1)
        return scores


def make_maps(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(CLASSES, (6, SIZE, SIZE), generator=generator)
    return F.one_hot(maps, CLASSES).movedim(-1, 1).float(), maps


def segment(*algorithms: Algorithm, maps: Any = make_maps) -> Segmentation:
    task = Segmentation()
    loader = [maps(seed) for seed in range(3)]
    Trainer(task, train_dataloader=loader, max_duration="1ep", algorithms=algorithms).fit()
    return task


@pytest.mark.parametrize("interpolate_loss", [False, True])
def test_a_segmentation_trains_on_the_pasted_maps(interpolate_loss: bool) -> None:
    # They were mixed by the share of the area, which is wrong for every pixel.
    task = segment(CutMix(interpolate_loss=interpolate_loss))
    for images, maps in zip(task.shares, task.targets, strict=True):
        assert torch.equal(images.argmax(1), maps)
    assert not torch.equal(task.shares[0], make_maps(0)[0])


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_maps_are_mixed_pasted_and_smoothed(order: list[int]) -> None:
    algorithms = [MixUp(1.0), CutMix(1.0), LabelSmoothing(0.2)]
    task = segment(*(algorithms[index] for index in order))
    for images, maps in zip(task.shares, task.targets, strict=True):
        torch.testing.assert_close(maps, 0.8 * images + 0.2 / CLASSES)


def test_ignored_pixels_survive_and_are_not_counted() -> None:
    def make(seed: int) -> tuple[Tensor, Tensor]:
        images, maps = make_maps(seed)
        maps[:, :2] = 9
        images[:, :, :2] = 0
        return images, maps

    hard = segment(CutMix(), maps=lambda seed: (make(seed)[0], make(seed)[1].clamp(max=3)))
    soft = segment(LabelSmoothing(0.0, ignore_index=9), CutMix(), maps=make)
    for images, maps, pasted in zip(soft.shares, soft.targets, hard.targets, strict=True):
        is_counted = images.sum(1) > 0
        assert pasted.shape == is_counted.shape
        assert torch.equal(maps.sum(1) > 0, is_counted)
        torch.testing.assert_close(maps.sum(), torch.tensor(float(is_counted.numel())))


def test_maps_of_another_size_are_refused() -> None:
    images, maps = make_maps(0)
    with pytest.raises(DataError, match=r"\(6, 4, 4\) are no classes, nor maps.*\(6, 4, 8, 8\)"):
        cutmix_batch(images, maps[:, ::2, ::2])
    with pytest.raises(DataError, match="are maps, which must get the same patch"):
        cutmix(images, maps)


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
