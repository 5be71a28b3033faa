from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, DataError
from compressor.training import Event, State
from compressor.training.algorithms.progressive_resizing import (
    ProgressiveResizing,
    resize_batch,
    resizing_scale,
)
from tests.training.helpers import make_trainer


def images(height: int = 12, width: int = 8) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_resizing_is_torchvisions() -> None:
    from torchvision.transforms.v2 import functional as reference

    resized, _ = resize_batch(images(), 0.5)
    torch.testing.assert_close(resized, reference.resize(images(), [6, 4], antialias=True))


def test_a_crop_is_one_window_of_images_and_maps() -> None:
    places = torch.arange(96).view(1, 1, 12, 8).expand(2, -1, -1, -1)
    corners = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        cropped, maps = resize_batch(
            places.float(), 0.5, "crop", targets=places[:, 0], generator=generator
        )
        assert maps is not None
        top, left = divmod(int(maps[0, 0, 0]), 8)
        assert torch.equal(maps, places[:, 0, top : top + 6, left : left + 4])
        assert torch.equal(cropped[:, 0].long(), maps)
        corners.add((top, left))
    assert len(corners) > 10


def test_maps_keep_their_classes_and_follow_the_image() -> None:
    halves = torch.zeros(1, 8, 8, dtype=torch.long)
    halves[:, :, 4:] = 7
    _, maps = resize_batch(halves[:, None].float(), 0.5, targets=halves)
    assert maps is not None
    assert maps.dtype == torch.long
    assert torch.equal(maps, halves[:, ::2, ::2])


@pytest.mark.parametrize(
    ("scale", "increment", "size"),
    [(0.5, 1, (6, 4)), (0.4, 4, (4, 4)), (0.01, 4, (4, 4)), (0.9, 8, (8, 8)), (0.95, 5, (10, 8))],
)
def test_sides_are_multiples_and_never_above_the_full_size(
    scale: float, increment: int, size: tuple[int, int]
) -> None:
    assert resize_batch(images(), scale, size_increment=increment)[0].shape[2:] == size


def test_full_size_is_the_batch_itself() -> None:
    full = images()
    assert resize_batch(full, 1.0)[0] is full


def test_the_scale_grows_linearly_between_delay_and_finetuning() -> None:
    scales = [resizing_scale(moment / 10, 0.5, 0.5, 0.2) for moment in range(11)]
    thirds = [0.5 + 0.5 / 3, 0.5 + 1 / 3]
    expected = [0.5] * 6 + thirds + [1.0] * 3
    assert scales == pytest.approx(expected)
    assert resizing_scale(0.5, 0.25, 0.5, 0.5) == 1
    assert resizing_scale(0.49, 0.25, 0.5, 0.5) == 0.25


@pytest.mark.parametrize("mode", ["resize", "crop"])
def test_a_training_grows_to_full_size_and_ends_there(mode: Any) -> None:
    sizes: list[tuple[int, ...]] = []

    def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        assert batch["image"].shape[2:] == batch["mask"].shape[1:]
        sizes.append(tuple(batch["image"].shape[2:]))
        loss: Tensor = model(batch["image"].mean((2, 3))).square().mean()
        return loss

    batch = {"image": torch.randn(4, 4, 16, 16), "mask": torch.zeros(4, 16, 16)}
    resizing = ProgressiveResizing(
        delay_fraction=0.2,
        finetune_fraction=0.2,
        mode=mode,
        resize_targets=True,
        input_key="image",
        target_key="mask",
    )
    make_trainer(
        step=step, train_dataloader=[batch] * 5, max_duration="2ep", algorithms=[resizing]
    ).fit()
    assert sizes == [(8, 8)] * 4 + [(12, 12)] * 3 + [(16, 16)] * 3
    assert batch["image"].shape[2:] == (16, 16)


def test_a_list_of_images_is_refused_by_name() -> None:
    batch = ([torch.rand(3, 8, 8), torch.rand(3, 6, 8)], [{"boxes": torch.zeros(1, 4)}] * 2)
    state = State(nn.Linear(1, 1), "1ep", batch=batch)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"inputs are a list.*leave ProgressiveResizing out"):
        ProgressiveResizing().on(Event.BEFORE_FORWARD, state)
    with pytest.raises(DataError, match="targets are a list"):
        resize_batch(images(), targets=batch[1])  # type: ignore[arg-type]


def test_what_cannot_be_resized_is_refused() -> None:
    with pytest.raises(DataError, match=r"shape \(2, 3, 12\) are no images"):
        resize_batch(images()[..., 0])
    with pytest.raises(DataError, match=r"\(2,\) are no maps"):
        resize_batch(images(), targets=torch.zeros(2))
    with pytest.raises(DataError, match=r"torch\.uint8.*mode='crop'"):
        resize_batch(images().byte())
    with pytest.raises(ConfigError, match=r"scale of 1\.5"):
        resize_batch(images(), 1.5)
    with pytest.raises(ConfigError, match="Did you mean 'resize'"):
        ProgressiveResizing(mode="resise")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="size_increment=0"):
        ProgressiveResizing(size_increment=0)
    with pytest.raises(ConfigError, match=r"finetune_fraction=0\.0"):
        ProgressiveResizing(finetune_fraction=0.0)
    with pytest.raises(ConfigError, match=r"delay_fraction=0\.9"):
        ProgressiveResizing(delay_fraction=0.9)
