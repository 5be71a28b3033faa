from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compressor import functional as cf
from compressor.errors import ConfigError, DataError
from compressor.training import Algorithm, EventEngine, State
from compressor.training.algorithms import AugMix, ColOut, CutOut, RandAugment, SelectiveBackprop
from compressor.training.algorithms.image_transforms import transform_images
from compressor.training.events import Event
from tests.training.algorithms.settings import SETTINGS
from tests.training.helpers import make_model

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def pictures(samples: int = 4) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(256, (samples, 3, 12, 12), dtype=torch.uint8, generator=random)


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def test_floats_are_shown_to_the_transform_from_0_to_1() -> None:
    seen: list[Tensor] = []

    def invert(image: Tensor) -> Tensor:
        seen.append(image)
        return 1 - image

    images = normalised(pictures())
    before = images.clone()
    inverted = transform_images(images, invert, MEAN, STD)
    torch.testing.assert_close(torch.stack(seen), pictures().float() / 255)
    torch.testing.assert_close(inverted, normalised(255 - pictures()))
    assert torch.equal(images, before)


def test_type_and_layout_are_kept() -> None:
    images = normalised(pictures()).bfloat16().contiguous(memory_format=torch.channels_last)
    # bfloat16 has 8 bits: white becomes 1.005
    with pytest.raises(DataError, match="values from"):
        transform_images(images * 1.2, lambda image: image, MEAN, STD)
    kept = transform_images((images * 0.9), lambda image: image, MEAN, STD)
    assert kept.dtype == torch.bfloat16
    assert kept.is_contiguous(memory_format=torch.channels_last)


def test_wrong_normalisation_is_refused_with_what_was_seen() -> None:
    with pytest.raises(DataError, match=r"values from -2.* Give the mean and the std"):
        transform_images(normalised(pictures()), lambda image: image)
    with pytest.raises(DataError, match="2 means or stds"):
        transform_images(normalised(pictures()), lambda image: image, (0.5, 0.5), 1.0)
    with pytest.raises(ConfigError, match="std above 0"):
        RandAugment(std=0)


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        (torch.ones(2, 4, 8, 8), r"\(2, 4, 8, 8\)"),
        (torch.ones(3, 8, 8), r"\(3, 8, 8\)"),
        ([torch.ones(3, 8, 8)], "list"),
        (torch.ones(2, 3, 8, 8, dtype=torch.int64), "int64"),
    ],
)
def test_what_is_no_image_is_refused(batch: Any, named: str) -> None:
    with pytest.raises(DataError, match=named):
        transform_images(batch, lambda image: image)


def started(algorithm: Algorithm, images: Tensor) -> Tensor:
    """The images after BATCH_START, by the global generator seeded with 3."""
    state = State(make_model(), "2ba", batch=(images, torch.arange(len(images))))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        EventEngine(state, [algorithm]).run_event("batch_start")
    assert torch.equal(state.batch[1], torch.arange(len(images)))
    return state.batch[0]  # type: ignore[no-any-return]


@pytest.mark.slow  # imports torchvision
@pytest.mark.parametrize(
    ("make", "transform"), [(RandAugment, cf.randaugment), (AugMix, cf.augmix)]
)
def test_each_image_of_a_batch_is_augmented_as_in_a_pipeline(make: Any, transform: Any) -> None:
    function = transform()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = torch.stack([function(image) for image in pictures(8)])
    augmented = started(make(), pictures(8))
    assert torch.equal(augmented, expected)
    assert sum((a != b).any().item() for a, b in zip(augmented, pictures(8), strict=True)) > 4


@pytest.mark.slow  # imports torchvision
def test_floats_become_nearly_what_bytes_become() -> None:
    """Operations on floats round elsewhere; posterising and equalising differ most."""
    images = pictures(16)
    floats = started(RandAugment(mean=MEAN, std=STD), normalised(images))
    error = (floats - normalised(started(RandAugment(), images))).abs()
    assert float((error < 0.05).float().mean()) > 0.8


def test_samples_are_selected_first_and_erased_last() -> None:
    given: list[Algorithm] = [ColOut(), CutOut(), AugMix(), RandAugment(), SelectiveBackprop()]
    trainer = SETTINGS["CutOut"].make_trainer(given)
    order = [each.key for each in trainer.dispatch.order_at(Event.BATCH_START)]
    assert order[0] == "SelectiveBackprop"
    assert {*order[1:3]} == {"AugMix", "RandAugment"}
