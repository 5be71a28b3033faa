from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from compressor.errors import ConfigError
from compressor.training.algorithms.randaugment import randaugment, randaugment_image

pytestmark = pytest.mark.slow  # imports torchvision


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_it_fits_into_a_pipeline_before_the_tensor() -> None:
    from torchvision import transforms

    pipeline = transforms.Compose(
        [randaugment(), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = [pipeline(picture()) for _ in range(8)]
    assert {(tuple(t.shape), t.dtype) for t in tensors} == {((3, 16, 16), torch.float32)}
    assert len({t.sum().item() for t in tensors}) > 4


def test_no_operation_leaves_the_image() -> None:
    assert np.array_equal(np.asarray(randaugment_image(picture(), num_ops=0)), picture())


def test_a_generator_decides_and_no_global_one_is_touched() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    results = [
        np.asarray(randaugment_image(picture(), generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2, 3, 4)
    ]
    assert np.array_equal(results[0], results[1])
    assert not all(np.array_equal(results[0], other) for other in results[2:])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_without_a_generator_torchs_own_decides() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = np.asarray(randaugment_image(picture()))
        torch.manual_seed(3)
        assert np.array_equal(first, np.asarray(randaugment()(picture())))


@pytest.mark.parametrize("options", [{"num_ops": -1}, {"magnitude": 31}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"={next(iter(options.values()))}"):
        randaugment(**options)
