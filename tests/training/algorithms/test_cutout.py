from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.training import Event, EventEngine, State
from compressor.training.algorithms import CutMix, CutOut, ProgressiveResizing
from compressor.training.algorithms.cutout import cutout_batch, draw_holes
from tests.training.algorithms.settings import SETTINGS
from tests.training.helpers import make_model


def images(samples: int = 3, height: int = 9, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 2, height, width, generator=generator)


def boxes_of(is_erased: Tensor) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of the erased pixels of each image, which must be a rectangle."""
    boxes = []
    for mask in is_erased[:, 0]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        top, left = int(rows.min()), int(columns.min())
        height, width = int(rows.max()) + 1 - top, int(columns.max()) + 1 - left
        assert mask[top : top + height, left : left + width].all()
        boxes.append((top, left, height, width))
    return boxes


@pytest.mark.slow  # imports torchvision
def test_what_is_erased_is_what_torchvision_erases() -> None:
    from torchvision.transforms.v2 import functional as tv

    x = images()
    for seed in range(10):
        made = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
        holes = draw_holes(tuple(x.shape), 1, 0.5, made[0])
        erased = cutout_batch(x, length=0.5, value=0.7, generator=made[1])
        for index, (top, left, height, width) in enumerate(boxes_of(holes)):
            expected = tv.erase(x[index], top, left, height, width, torch.tensor(0.7))
            assert torch.equal(erased[index], expected)


def test_squares_have_their_size_but_for_what_the_border_cuts_off() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, touching = set(), 0
    for _ in range(200):
        holes = draw_holes((2, 3, 9, 12), 1, 0.5, generator)
        for top, left, height, width in boxes_of(holes):
            is_cut = top == 0 or left == 0 or top + height == 9 or left + width == 12
            touching += is_cut
            if not is_cut:
                sizes.add((height, width))
            assert height <= 4
            assert width <= 6
    assert sizes == {(4, 6)}
    assert touching > 100


def test_every_pixel_is_a_centre_as_often_as_any() -> None:
    holes = draw_holes((20_000, 1, 3, 4), 1, 1, torch.Generator().manual_seed(0))
    assert torch.equal(holes.sum((1, 2, 3)), torch.ones(20_000, dtype=torch.int64))
    frequency = holes.float().mean(0)
    # 4 standard deviations of a mean of 20,000 draws with the probability 1/12
    torch.testing.assert_close(frequency, torch.full((1, 3, 4), 1 / 12), rtol=0, atol=0.008)


def test_each_image_has_holes_of_its_own_the_same_in_all_channels() -> None:
    x = torch.ones(8, 3, 16, 16)
    erased = cutout_batch(x, num_holes=3, length=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(erased[:, 0], erased[:, 2])
    assert len({tuple(image.flatten().tolist()) for image in erased}) == 8
    gone = (erased == 0).sum((1, 2, 3)) / 3
    assert 4 < float(gone.mean()) <= 12
    assert x.min() == 1


def test_layout_and_type_are_kept() -> None:
    x = images().contiguous(memory_format=torch.channels_last)
    assert cutout_batch(x).is_contiguous(memory_format=torch.channels_last)
    assert cutout_batch(torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)).dtype == torch.uint8
    video = torch.ones(2, 3, 5, 8, 8)
    erased = cutout_batch(video, generator=torch.Generator().manual_seed(0))
    assert torch.equal(erased[:, :, 0], erased[:, :, 4])


def test_it_acts_on_whole_batches_before_they_are_mixed() -> None:
    cutout = CutOut(input_key="image")
    state = State(make_model(), "2ba", batch={"image": torch.ones(4, 1, 8, 8), "label": 1})
    EventEngine(state, [cutout]).run_event("batch_start")
    assert 0 < float(state.batch["image"].mean()) < 1
    assert state.batch["label"] == 1
    trainer = SETTINGS["CutOut"].make_trainer([CutMix(), ProgressiveResizing(), CutOut()])
    assert [type(each) for each in trainer.dispatch.order_at(Event.BATCH_START)] == [CutOut]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"num_holes": 0}, "num_holes=0"), ({"length": 0}, "length=0"), ({"length": 2.5}, "2.5")],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        CutOut(**options)
    with pytest.raises(ConfigError, match=named):
        cutout_batch(images(), **options)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(DataError, match=r"\(4, 3\) are no images"):
        cutout_batch(torch.ones(4, 3))
    with pytest.raises(DataError, match="list are no images"):
        cutout_batch([images()])  # type: ignore[arg-type]
