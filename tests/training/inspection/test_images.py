"""Tensors as pictures."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.training.inspection.images import HEAT, LONGEST_SIDE, png_uri, to_heat, to_rgb


def decode(uri: str) -> np.ndarray:
    head, data = uri.split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_png_holds_the_pixels() -> None:
    pixels = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8)
    assert np.array_equal(decode(png_uri(pixels)), pixels)


def test_a_large_picture_is_made_smaller_in_its_proportions() -> None:
    assert decode(png_uri(torch.zeros(300, 600, 3, dtype=torch.uint8))).shape == (
        LONGEST_SIDE // 2, LONGEST_SIDE, 3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (torch.tensor([[[0.0, 0.2]]]), [0, 51]),  # 0 to 1: as it is
        (torch.tensor([[[-1.0, 3.0]]]), [0, 255]),  # another range: stretched
        (torch.tensor([[[5.0, 5.0]]]), [128, 128]),  # of one value: grey
        (torch.tensor([[[0, 51]]], dtype=torch.uint8), [0, 51]),
        (torch.tensor([[[0, 51]]]), [0, 51]),
        (torch.tensor([[[False, True]]]), [0, 255]),
        (torch.tensor([[[float("nan"), 1.0]]]), [0, 255]),
        (torch.tensor([[0.0, 1.0]]), [0, 255]),  # without channels
        (torch.tensor([[[0.0, 1.0]]], dtype=torch.bfloat16), [0, 255]),
    ],
)
def test_range_of_one_channel(image: Tensor, expected: list[int]) -> None:
    assert to_rgb(image, None).tolist() == [[[value] * 3 for value in expected]]


@pytest.mark.parametrize(
    ("channels", "expected"), [(1, [0, 0, 0]), (2, [26, 26, 26]), (3, [0, 51, 102])]
)
def test_channels(channels: int, expected: list[int]) -> None:
    image = torch.arange(channels).view(-1, 1, 1) * 0.2
    assert to_rgb(image, None).tolist() == [[expected]]


def test_of_many_channels_the_first_three_are_shown() -> None:
    image = torch.rand(5, 2, 2)
    assert torch.equal(to_rgb(image, None), to_rgb(image[:3], None))


def test_normalisation_is_undone() -> None:
    pixels = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    columns = (torch.tensor(part).view(3, 1, 1) for part in (mean, std))
    normalised = (pixels / 255 - next(columns)) / next(columns)
    assert torch.equal(to_rgb(normalised, (mean, std)), pixels.permute(1, 2, 0))
    assert torch.equal(to_rgb(pixels / 255 * 2 - 1, (0.5, 0.5)), pixels.permute(1, 2, 0))


def test_a_normalisation_of_other_channels_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 numbers for images of 3 channels"):
        to_rgb(torch.rand(3, 2, 2), ((0.5, 0.5), (1.0, 1.0)))


@pytest.mark.parametrize("shape", [(4,), (1, 3, 4, 4), (3, 0, 4)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="no image"):
        to_rgb(torch.zeros(shape), None)


def test_heat_grows_brighter() -> None:
    colours = to_heat(torch.linspace(0, 1, 50)[None])[0]
    assert tuple(colours[0].tolist()) == HEAT[0]
    assert tuple(colours[-1].tolist()) == HEAT[-1]
    brightness = colours.float() @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (brightness.diff() > 0).all()
