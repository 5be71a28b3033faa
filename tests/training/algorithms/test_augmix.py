from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from compressor.errors import ConfigError
from compressor.training.algorithms.augmix import augmix, augmix_image

pytestmark = pytest.mark.slow  # imports torchvision


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_it_fits_into_a_pipeline_before_the_tensor() -> None:
    from torchvision import transforms

    pipeline = transforms.Compose(
        [augmix(), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = [pipeline(picture()) for _ in range(8)]
    assert {(tuple(t.shape), t.dtype) for t in tensors} == {((3, 16, 16), torch.float32)}
    assert len({t.sum().item() for t in tensors}) == 8


def test_the_options_are_torchvisions() -> None:
    transform = augmix(severity=5, mixture_width=2, chain_depth=4, alpha=0.5)
    made = (transform.severity, transform.mixture_width, transform.chain_depth, transform.alpha)
    assert made == (5, 2, 4, 0.5)


def test_a_generator_decides_and_no_global_one_is_touched() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    results = [
        np.asarray(augmix_image(picture(), generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    ]
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


@pytest.mark.parametrize("options", [{"severity": 11}, {"mixture_width": 0}, {"alpha": 0}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"={next(iter(options.values()))}"):
        augmix(**options)
