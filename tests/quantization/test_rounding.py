from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.quantization.affine import channel_range, fake_quantize, parameters_of_range
from compressor.quantization.corrections.rounding import adaptive_rounding
from compressor.quantization.scheme import FLOAT, Scheme

FEW = Scheme(bits=3, signed=True, symmetric=True, axis=0)
Layer = tuple[Tensor, Tensor, Tensor, Tensor]  # weight, bias, scale, zero point


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(*shape: int, scheme: Scheme = FEW) -> Layer:
    weight = torch.randn(*shape, generator=generator())
    scales = parameters_of_range(*channel_range(weight, scheme), scheme)
    return weight, torch.randn(shape[0], generator=generator(1)), *scales


def correlated_rows(count: int, width: int) -> Tensor:
    random = generator(2)
    mixed = torch.randn(count, width, generator=random) @ torch.randn(
        width, width, generator=random
    )
    return mixed + 2.0


def linear_error(weight: Tensor, rounded: Tensor, inputs: Tensor) -> float:
    return float((F.linear(inputs, rounded) - F.linear(inputs, weight)).square().sum())


def test_it_finds_nearly_the_best_of_all_roundings() -> None:
    weight, bias, scale, zero_point = layer(1, 8)
    inputs = correlated_rows(32, 8)
    learned = adaptive_rounding(
        weight, bias, scale, zero_point, FEW, inputs, F.linear(inputs, weight, bias), F.linear,
        generator=generator(), iterations=300,
    )  # fmt: skip
    down = (weight / scale[:, None]).floor()
    errors = sorted(
        linear_error(weight, (down + torch.tensor(up)).clamp(-3, 3) * scale[:, None], inputs)
        for up in itertools.product([0.0, 1.0], repeat=8)
    )
    nearest = fake_quantize(weight, scale, zero_point, FEW)
    assert linear_error(weight, learned, inputs) <= errors[5] * 1.001
    assert linear_error(weight, learned, inputs) < linear_error(weight, nearest, inputs) / 2


@pytest.mark.parametrize(
    "scheme",
    [
        FEW,
        Scheme(bits=4, axis=0),
        Scheme(bits=3),
        Scheme(bits=3, axis=1),
        Scheme(bits=4, signed=True, symmetric=True, axis=0, block=3),
    ],
)
def test_each_weight_is_one_of_its_two_neighbours_on_the_grid(scheme: Scheme) -> None:
    weight, bias, scale, zero_point = layer(4, 5, 3, 3, scheme=scheme)
    inputs = torch.rand(16, 5, 6, 6, generator=generator())

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.relu(F.conv2d(x, weight, bias, padding=1))

    targets = forward(inputs, weight, bias)
    learned = adaptive_rounding(
        weight, bias, scale, zero_point, scheme, inputs, targets, forward,
        generator=generator(), iterations=60,
    )  # fmt: skip
    nearest = fake_quantize(weight, scale, zero_point, scheme)
    assert torch.equal(fake_quantize(learned, scale, zero_point, scheme), learned)
    moved = (learned - nearest).abs()
    assert moved.max() <= scale.max() * 1.001
    assert (learned - weight).abs().max() <= scale.max() * 1.001
    assert moved.any()
    assert (forward(inputs, learned, bias) - targets).square().sum() < (
        forward(inputs, nearest, bias) - targets
    ).square().sum()


def test_a_weight_outside_its_range_takes_the_end() -> None:
    weight = torch.tensor([[5.0, -7.0, 0.3]])
    inputs = correlated_rows(16, 3)
    learned = adaptive_rounding(
        weight, None, torch.tensor([1.0]), torch.tensor([0]), FEW, inputs,
        F.linear(inputs, weight), F.linear, generator=generator(), iterations=20,
    )  # fmt: skip
    assert learned[0, :2].tolist() == [3.0, -3.0]


def test_a_generator_gives_the_same_and_the_users_stays_where_it_was() -> None:
    weight, bias, scale, zero_point = layer(4, 12)
    inputs = correlated_rows(100, 12)
    before = torch.get_rng_state()
    with torch.no_grad():
        one, same = (
            adaptive_rounding(
                weight, bias, scale, zero_point, FEW, inputs, F.linear(inputs, weight, bias),
                F.linear, generator=generator(7), iterations=50, batch_size=16,
            )
            for _ in range(2)
        )  # fmt: skip
    assert torch.equal(one, same)
    assert torch.equal(torch.get_rng_state(), before)


def test_when_the_time_is_up_it_returns_something_no_worse_than_nearest() -> None:
    weight, bias, scale, zero_point = layer(4, 12)
    inputs = correlated_rows(50, 12)
    steps = 0

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        nonlocal steps
        steps += weight.requires_grad
        return F.linear(x, weight, bias)

    ticks = itertools.count()
    learned = adaptive_rounding(
        weight, bias, scale, zero_point, FEW, inputs, F.linear(inputs, weight, bias), forward,
        generator=generator(), iterations=10**9, seconds=5.0, clock=lambda: float(next(ticks)),
    )  # fmt: skip
    nearest = fake_quantize(weight, scale, zero_point, FEW)
    assert steps == 4
    assert linear_error(weight, learned, inputs) <= linear_error(weight, nearest, inputs)


def test_a_time_bound_that_cuts_it_short_still_leaves_most_of_the_gain() -> None:
    # the schedule follows the clock, so the weights are decided when it ends
    weight, bias, scale, zero_point = layer(8, 16)
    inputs = correlated_rows(64, 16)

    def learned(iterations: int, seconds: float) -> float:
        ticks = itertools.count()
        rounded = adaptive_rounding(
            weight, bias, scale, zero_point, FEW, inputs, F.linear(inputs, weight, bias), F.linear,
            generator=generator(), iterations=iterations, seconds=seconds,
            clock=lambda: float(next(ticks)),
        )  # fmt: skip
        return linear_error(weight, rounded, inputs)

    assert learned(10**9, 201.0) == pytest.approx(learned(200, 10.0**9), rel=0.2)


def test_a_weight_on_its_grid_stays() -> None:
    weight, bias, scale, zero_point = layer(4, 12)
    weight = fake_quantize(weight, scale, zero_point, FEW)
    inputs = correlated_rows(20, 12)
    learned = adaptive_rounding(
        weight, bias, scale, zero_point, FEW, inputs, F.linear(inputs, weight, bias), F.linear,
        generator=generator(),
    )  # fmt: skip
    assert torch.equal(learned, weight)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"scheme": FLOAT}, ConfigError, "Floats have no steps"),
        ({"iterations": 0}, ConfigError, "iterations=0"),
        ({"seconds": -1.0}, ConfigError, r"seconds=-1\.0"),
        ({"targets": torch.zeros(3, 4)}, DataError, "20 inputs and 3 targets"),
        ({"inputs": torch.zeros(0, 12), "targets": torch.zeros(0, 4)}, DataError, "0 inputs"),
        ({"inputs": torch.full((20, 12), torch.nan)}, DataError, "squared error of nan"),
    ],
)
def test_bad_input_is_refused(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    weight, bias, scale, zero_point = layer(4, 12)
    arguments: dict[str, Any] = {
        "scheme": FEW,
        "inputs": torch.ones(20, 12),
        "targets": torch.ones(20, 4),
        "iterations": 5,
        "seconds": 1.0,
        **changed,
    }
    with pytest.raises(error, match=message):
        adaptive_rounding(
            weight, bias, scale, zero_point, forward=F.linear, generator=generator(), **arguments
        )
