from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.errors import ConfigError, DataError, ModelError
from compressor.quantization.corrections.smoothing import (
    search_alpha,
    smooth,
    smoothing_scales,
)
from compressor.quantization.scheme import ACTIVATION, FLOAT, WEIGHT, Scheme


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs_with_outliers() -> Tensor:
    """Two features of sixteen are a hundred times as large as the others."""
    inputs = random(64, 16)
    inputs[:, [3, 11]] *= 100
    return inputs


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_a_smoothed_norm_and_its_layers_compute_what_they_did(alpha: float) -> None:
    x, norm, bias = inputs_with_outliers(), random(16, seed=1), random(16, seed=2)
    weights = [random(8, 16, seed=3), random(4, 16, seed=4)]
    absmax = F.layer_norm(x, [16], norm, bias).abs().amax(0)
    scales = smoothing_scales(absmax, torch.cat(weights).abs().amax(0), alpha)
    smoothed = F.layer_norm(x, [16], norm / scales, bias / scales)
    for weight in weights:
        expected = F.linear(F.layer_norm(x, [16], norm, bias), weight)
        torch.testing.assert_close(F.linear(smoothed, smooth(weight, scales)), expected)


def test_alpha_says_whose_ranges_become_alike() -> None:
    inputs, weight = random(4, seed=1).abs(), random(4, seed=2).abs()
    halfway = smoothing_scales(inputs, weight, 0.5)
    torch.testing.assert_close(inputs / halfway, weight * halfway)
    ones = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(inputs / smoothing_scales(inputs, weight, 1.0), ones)
    torch.testing.assert_close(weight * smoothing_scales(inputs, weight, 0.0), ones)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_features_and_columns_are_left_as_they_are(alpha: float) -> None:
    scales = smoothing_scales(torch.tensor([0.0, 3.0, 0.0]), torch.tensor([2.0, 0.0, 0.0]), alpha)
    assert scales.tolist() == [1.0, 1.0, 1.0]


def test_the_alpha_found_is_the_best_of_a_slow_search() -> None:
    inputs, weights = inputs_with_outliers(), [random(8, 16, seed=1), random(4, 16, seed=2)]
    alphas = [0.1, 0.4, 0.6, 0.9]

    def slow_error(alpha: float) -> float:
        columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        scales = inputs.abs().amax(0) ** alpha / columns ** (1 - alpha)
        x = inputs / scales
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        step = (high - low) / 255
        zero = (-low / step).round()
        rounded = ((x / step).round() + zero).clamp(0, 255) - zero
        total = 0.0
        for weight in weights:
            for row in weight:
                unit = (row * scales).abs().max() / 127
                integers = (row * scales / unit).round()
                outputs = (rounded * step) @ (integers * unit)
                total += float((outputs - inputs @ row).square().sum())
        return total

    found = search_alpha(weights, inputs, ACTIVATION, WEIGHT, alphas)
    assert found == min(alphas, key=slow_error)


def test_outliers_are_worth_smoothing_and_weights_alone_are_not() -> None:
    inputs, weight = inputs_with_outliers(), random(8, 16, seed=1)
    assert search_alpha([weight], inputs, ACTIVATION, WEIGHT) is not None
    # in float there is nothing to gain
    assert search_alpha([weight], inputs, FLOAT, FLOAT) is None


def test_a_gain_below_what_is_asked_for_is_none() -> None:
    inputs, weight = inputs_with_outliers(), random(8, 16, seed=1)
    found = search_alpha([weight], inputs, ACTIVATION, WEIGHT)
    assert search_alpha([weight], inputs, ACTIVATION, WEIGHT, error_fraction=0.5) == found
    assert search_alpha([weight], inputs, ACTIVATION, WEIGHT, error_fraction=1e-6) is None


def test_rows_with_scales_of_their_own_and_any_number_of_dimensions_are_taken() -> None:
    by_token = Scheme(bits=8, signed=True, symmetric=True, axis=0)
    inputs, weight = inputs_with_outliers(), random(8, 16, seed=1)
    flat = search_alpha([weight], inputs, by_token, WEIGHT)
    assert flat is not None
    assert search_alpha([weight], inputs.view(4, 16, 16), by_token, WEIGHT) == flat


def test_bad_input_is_refused() -> None:
    ones = torch.ones(3)
    with pytest.raises(ConfigError, match=r"alpha=1\.5"):
        smoothing_scales(ones, ones, 1.5)
    with pytest.raises(ModelError, match=r"\(3,\) features and of \(2,\) columns"):
        smoothing_scales(ones, ones[:2])
    with pytest.raises(ModelError, match="not finite"):
        smoothing_scales(ones * torch.inf, ones)
    with pytest.raises(DataError, match=r"\(0, 3\), is empty"):
        search_alpha([ones[None]], torch.zeros(0, 3), ACTIVATION, WEIGHT)
    with pytest.raises(DataError, match="not finite"):
        search_alpha([ones[None]], ones[None] * torch.nan, ACTIVATION, WEIGHT)
