from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.training import EventEngine, State
from compressor.training.algorithms import ColOut
from compressor.training.algorithms.colout import colout_batch, colout_image, draw_lines
from tests.training.helpers import make_model

NUMBERED = torch.arange(9 * 12).view(1, 1, 9, 12).expand(2, 3, 9, 12)
"""A pixel says where it was: row * 12 + column."""


def lines_of(image: Tensor) -> tuple[list[int], list[int]]:
    """Rows and columns that are left of a numbered image (H', W'); it has nothing else."""
    rows, columns = (image[:, 0] // 12).tolist(), (image[0] % 12).tolist()
    expected = torch.tensor(rows)[:, None] * 12 + torch.tensor(columns)
    assert torch.equal(image, expected)
    return rows, columns


def test_what_is_left_is_in_its_order_the_same_for_all_images() -> None:
    kept = set()
    for seed in range(20):
        out = colout_batch(NUMBERED, 0.25, 0.5, torch.Generator().manual_seed(seed))
        assert out.shape == (2, 3, 6, 6)
        assert torch.equal(out[0, 0].expand(2, 3, 6, 6), out)
        rows, columns = lines_of(out[0, 0])
        assert rows == sorted(set(rows))
        assert columns == sorted(set(columns))
        kept.add(tuple(rows))
    assert len(kept) > 10


def test_every_line_is_dropped_as_often_as_any() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.stack([draw_lines(10, 0.3, generator) for _ in range(4000)])
    counts = kept.flatten().bincount(minlength=10) / 4000
    # 4 standard deviations of a mean of 4,000 draws
    torch.testing.assert_close(counts, torch.full((10,), 0.7), rtol=0, atol=0.03)


def test_counts_are_rounded_down_and_one_line_is_left() -> None:
    sizes = [len(draw_lines(size, p, None)) for size, p in ((10, 0.9), (10, 0.15), (3, 0.9))]
    assert sizes == [1, 8, 1]
    assert torch.equal(colout_batch(NUMBERED, 0, 0), NUMBERED)


def test_pictures_and_tensors_lose_the_same_lines() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    picture = colout_image(Image.fromarray(pixels), generator=torch.Generator().manual_seed(0))
    smaller = colout_image(tensor, generator=torch.Generator().manual_seed(0))
    assert picture.mode == "RGB"
    assert torch.equal(torch.from_numpy(np.array(picture)).permute(2, 0, 1), smaller)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_other_modes_keep_their_colours(mode: str) -> None:
    picture = Image.new("RGB", (12, 9), (255, 0, 0)).convert(mode)
    smaller = colout_image(picture, 0.25, 0.5)
    assert smaller.size == (6, 6)
    assert smaller.convert("RGB").getpixel((0, 0)) == picture.convert("RGB").getpixel((0, 0))


def test_maps_lose_the_lines_that_their_images_lose() -> None:
    state = State(make_model(), "2ba", batch=(NUMBERED, NUMBERED[:, 0]))
    EventEngine(state, [ColOut(0.3, 0.3, resize_targets=True)]).run_event("batch_start")
    images, maps = state.batch
    assert images.shape == (2, 3, 6, 8)
    assert torch.equal(images[:, 0], maps)


def test_targets_that_are_no_maps_stay_unless_they_are_to_follow() -> None:
    labels = torch.tensor([1, 2])
    state = State(make_model(), "2ba", batch=(NUMBERED, labels))
    EventEngine(state, [ColOut()]).run_event("batch_start")
    assert state.batch[1] is labels
    state = State(make_model(), "2ba", batch=(NUMBERED, labels))
    with pytest.raises(DataError, match=r"Targets of \(2,\) are no maps"):
        EventEngine(state, [ColOut(resize_targets=True)]).run_event("batch_start")


@pytest.mark.parametrize("options", [{"p_row": 1.0}, {"p_col": -0.1}])
def test_fractions_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"={next(iter(options.values()))}"):
        ColOut(**options)
    with pytest.raises(ConfigError, match="leaves no image"):
        colout_batch(NUMBERED, **options)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(DataError, match="are no images"):
        colout_batch(torch.ones(4, 8))  # tokens, of which it would drop samples
