from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.errors import ModelError
from compressor.quantization.corrections.equalization import (
    equalize_pair,
    equalizing_scales,
    input_absmax,
    output_absmax,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def uneven(*shape: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes."""
    sizes = torch.logspace(-2, 2, shape[0], dtype=torch.float64)
    return random(*shape, seed=seed) * sizes.view(-1, *[1] * (len(shape) - 1))


CONVOLUTIONS = [
    # second weight, its groups: ordinary, grouped, depthwise, depthwise with two outputs each
    ((5, 8, 3, 3), 1),
    ((6, 4, 3, 3), 2),
    ((8, 1, 3, 3), 8),
    ((16, 1, 3, 3), 8),
]


@pytest.mark.parametrize("activation", [F.relu, F.leaky_relu, torch.nn.Identity()])
@pytest.mark.parametrize(("shape", "groups"), CONVOLUTIONS)
def test_two_convolutions_compute_what_they_did(
    shape: tuple[int, ...], groups: int, activation: torch.nn.Module
) -> None:
    first, bias, second = uneven(8, 3, 3, 3), random(8, seed=1), random(*shape, seed=2)
    x = random(2, 3, 6, 6, seed=3)
    scales = equalizing_scales(output_absmax(first), input_absmax(second, groups))
    pair = equalize_pair(first, bias, second, scales, groups=groups)
    assert pair.first_bias is not None
    torch.testing.assert_close(
        F.conv2d(activation(F.conv2d(x, *pair[:2])), pair.second_weight, groups=groups),
        F.conv2d(activation(F.conv2d(x, first, bias)), second, groups=groups),
    )
    ranges = output_absmax(pair.first_weight), input_absmax(pair.second_weight, groups)
    torch.testing.assert_close(*ranges)
    expected = (output_absmax(first) * input_absmax(second, groups)).sqrt()
    torch.testing.assert_close(ranges[0], expected)


def test_a_depthwise_first_layer_and_one_without_bias_work_too() -> None:
    first, second = uneven(8, 1, 3, 3), random(5, 8, 1, 1, seed=1)
    x = random(2, 8, 6, 6, seed=2)
    scales = equalizing_scales(output_absmax(first), input_absmax(second))
    pair = equalize_pair(first, None, second, scales)
    assert pair.first_bias is None
    torch.testing.assert_close(
        F.conv2d(F.relu(F.conv2d(x, pair.first_weight, groups=8)), pair.second_weight),
        F.conv2d(F.relu(F.conv2d(x, first, groups=8)), second),
    )


def test_two_linear_layers_compute_what_they_did() -> None:
    first, bias, second = uneven(8, 4), random(8, seed=1), random(3, 8, seed=2)
    x = random(5, 4, seed=3)
    scales = equalizing_scales(output_absmax(first), input_absmax(second))
    pair = equalize_pair(first, bias, second, scales)
    torch.testing.assert_close(
        F.linear(F.relu(F.linear(x, *pair[:2])), pair.second_weight),
        F.linear(F.relu(F.linear(x, first, bias)), second),
    )


def test_relu6_between_them_does_not_keep_the_function() -> None:
    first, second, x = uneven(8, 4), random(3, 8, seed=2), random(5, 4, seed=3)
    scales = equalizing_scales(output_absmax(first), input_absmax(second))
    pair = equalize_pair(first, None, second, scales)
    equalized = F.linear(F.relu6(F.linear(x, pair.first_weight)), pair.second_weight)
    assert not torch.allclose(equalized, F.linear(F.relu6(F.linear(x, first)), second), rtol=0.01)


@pytest.mark.parametrize(("shape", "groups"), CONVOLUTIONS)
def test_the_range_of_an_input_is_that_of_the_weights_it_meets(
    shape: tuple[int, ...], groups: int
) -> None:
    # a weight meets an input if the output's derivative by it is not zero
    weight = random(*shape).abs()
    for channel in range(8):
        x = torch.zeros(1, 8, 3, 3, dtype=torch.float64)
        x[0, channel] = 1.0
        met = torch.zeros_like(weight).requires_grad_()
        (gradient,) = torch.autograd.grad(F.conv2d(x, met, groups=groups).sum(), [met])
        assert input_absmax(weight, groups)[channel] == weight[gradient != 0].max()


def test_a_channel_that_one_layer_does_not_use_is_left_as_it_is() -> None:
    scales = equalizing_scales(torch.tensor([0.0, 4.0, 0.0, 9.0]), torch.tensor([1.0, 0.0, 0.0, 1]))
    assert scales.tolist() == [1.0, 1.0, 1.0, 3.0]


def test_equal_layers_are_equalized_once_and_for_all() -> None:
    first, second = uneven(8, 4).float(), random(3, 8, seed=2).float()
    pair = equalize_pair(
        first, None, second, equalizing_scales(output_absmax(first), input_absmax(second))
    )
    again = equalizing_scales(output_absmax(pair.first_weight), input_absmax(pair.second_weight))
    torch.testing.assert_close(again, torch.ones(8))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ModelError, match=r"outputs \(8,\), the second inputs \(392,\)"):
        equalizing_scales(torch.ones(8), torch.ones(392))
    with pytest.raises(ModelError, match="not finite"):
        equalizing_scales(torch.tensor([torch.nan]), torch.ones(1))
    with pytest.raises(ModelError, match="8 scales for a first layer of 8 outputs and a second of"):
        equalize_pair(torch.ones(8, 2), None, torch.ones(3, 7), torch.ones(8))
