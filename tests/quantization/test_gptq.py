from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.quantization.affine import (
    channel_range,
    fake_quantize,
    parameters_of_range,
    quantize,
    spread,
)
from compressor.quantization.corrections.gptq import accumulate_hessian, gptq
from compressor.quantization.scheme import FLOAT, Scheme

FOUR = Scheme(bits=4, signed=True, symmetric=True, axis=0)
BLOCKS = Scheme(bits=4, signed=True, symmetric=True, axis=0, block=4)
SCHEMES = [
    FOUR,
    Scheme(bits=4, axis=0),
    Scheme(bits=3),
    Scheme(bits=3, axis=1),
    BLOCKS,
    Scheme(bits=4, axis=0, block=5),
]
WIDTH = 18  # no multiple of the blocks


def matrix(rows: int = 6, width: int = WIDTH) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def correlated_inputs(count: int = 60, width: int = WIDTH) -> Tensor:
    random = torch.Generator().manual_seed(1)
    mixed = torch.randn(count, width, generator=random) @ torch.randn(
        width, width, generator=random
    )
    return mixed + 1.0


def hessian_of(inputs: Tensor) -> Tensor:
    width = inputs.shape[-1]
    return accumulate_hessian(torch.zeros(width, width, dtype=torch.float64), inputs)


def nearest(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    scales = parameters_of_range(*channel_range(weight, scheme), scheme)
    return fake_quantize(weight, *scales, scheme), *scales


def row_errors(weight: Tensor, rounded: Tensor, inputs: Tensor) -> Tensor:
    return (inputs.double() @ (rounded.double() - weight.double()).T).square().sum(0)


def brain_surgeon(weight: Tensor, hessian: Tensor, scheme: Scheme, order: list[int]) -> Tensor:
    """One column after another, the inverse of what is left of the hessian updated explicitly."""
    _, scale, zero_point = nearest(weight, scheme)
    damping = 0.01 * hessian.diagonal().mean()
    inverse = torch.linalg.inv(hessian + damping * torch.eye(len(hessian)))
    left, rounded = weight.double(), weight.double()
    for column in order:
        rounded[:, column] = fake_quantize(left.clone(), scale, zero_point, scheme)[:, column]
        error = (left[:, column] - rounded[:, column]) / inverse[column, column]
        left = left - torch.outer(error, inverse[column])
        inverse = inverse - (
            torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        )
    return rounded


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block_size", [1, 7, 128])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_the_optimal_brain_surgeon_column_by_column(
    scheme: Scheme, block_size: int, act_order: bool
) -> None:
    weight, inputs = matrix(), correlated_inputs() * torch.linspace(1, 3, WIDTH)
    hessian = hessian_of(inputs)
    columns = list(range(WIDTH))
    if act_order:
        columns = sorted(columns, key=lambda column: -hessian[column, column])
    slow = brain_surgeon(weight, hessian, scheme, columns)
    simple, scale, zero_point = nearest(weight, scheme)
    is_better = row_errors(weight, slow, inputs) < row_errors(weight, simple, inputs)
    expected = torch.where(is_better[:, None], slow, simple.double())
    rounded = gptq(
        weight, hessian, scheme, scale=scale, zero_point=zero_point,
        block_size=block_size, act_order=act_order,
    )  # fmt: skip
    assert is_better.any()
    torch.testing.assert_close(rounded.weight.double(), expected)
    assert torch.equal(rounded.scale, scale)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_row_is_worse_than_nearest_and_all_together_are_a_quarter_better(
    scheme: Scheme, act_order: bool
) -> None:
    weight, inputs = matrix(), correlated_inputs()
    rounded = gptq(weight, hessian_of(inputs), scheme, act_order=act_order)
    ours = row_errors(weight, rounded.weight, inputs)
    theirs = row_errors(weight, nearest(weight, scheme)[0], inputs)
    assert (ours <= theirs * 1.0001).all()
    assert ours.sum() < 0.75 * theirs.sum()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_the_result_to_nearest_gives_it_back(scheme: Scheme) -> None:
    weight = matrix()
    rounded = gptq(weight, hessian_of(correlated_inputs()), scheme)
    again = fake_quantize(rounded.weight, rounded.scale, rounded.zero_point, scheme)
    assert torch.equal(again, rounded.weight)
    assert rounded.scale.shape == nearest(weight, scheme)[1].shape
    assert rounded.zero_point.dtype == torch.int32


def test_scales_of_blocks_follow_the_corrected_weights() -> None:
    # of the first block they are those of the float weights; a row may keep those of nearest
    weight = matrix()
    rounded = gptq(weight, hessian_of(correlated_inputs()), BLOCKS)
    _, scale, _ = nearest(weight, BLOCKS)
    assert torch.equal(rounded.scale[:, 0], scale[:, 0])
    assert not torch.equal(rounded.scale, scale)
    integers = quantize(rounded.weight, rounded.scale, rounded.zero_point, BLOCKS)
    assert integers.abs().max() == BLOCKS.qmax


def test_inputs_without_correlation_are_rounded_to_nearest() -> None:
    weight = matrix()
    hessian = torch.diag(torch.linspace(1, 5, WIDTH))
    for scheme in SCHEMES:
        assert torch.equal(gptq(weight, hessian, scheme).weight, nearest(weight, scheme)[0])


def test_weights_of_dead_inputs_are_rounded_to_nearest_and_the_rest_is_as_without_them() -> None:
    weight, inputs = matrix(), correlated_inputs()
    dead = torch.arange(WIDTH) % 5 == 2
    inputs[:, dead] = 0.0
    simple, scale, zero_point = nearest(weight, FOUR)
    given: dict[str, Any] = {"scale": scale, "zero_point": zero_point, "damping": 0.0}
    rounded = gptq(weight, hessian_of(inputs), FOUR, **given).weight
    alive = gptq(weight[:, ~dead], hessian_of(inputs[:, ~dead]), FOUR, **given).weight
    assert torch.equal(rounded[:, dead], simple[:, dead])
    assert torch.equal(rounded[:, ~dead], alive)


def test_inputs_that_are_all_dead_round_to_nearest() -> None:
    weight = matrix()
    rounded = gptq(weight, torch.zeros(WIDTH, WIDTH), FOUR)
    assert torch.equal(rounded.weight, nearest(weight, FOUR)[0])


def test_a_singular_hessian_is_damped_until_it_has_a_factor() -> None:
    weight, inputs = matrix(), correlated_inputs(count=3)
    rounded = gptq(weight, hessian_of(inputs).float(), FOUR, damping=0.0).weight
    assert row_errors(weight, rounded, inputs).sum() < 0.25 * (
        row_errors(weight, nearest(weight, FOUR)[0], inputs).sum()
    )


def test_the_hessian_in_parts_is_that_of_all_rows() -> None:
    inputs = correlated_inputs().view(5, 12, WIDTH)
    parts = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for part in inputs:
        assert accumulate_hessian(parts, part) is parts
    slow = sum(2 * torch.outer(row, row) for row in inputs.double().reshape(-1, WIDTH))
    torch.testing.assert_close(parts, slow)


def test_neither_weight_nor_hessian_is_changed() -> None:
    weight, hessian = matrix(), hessian_of(correlated_inputs())
    copies = weight.clone(), hessian.clone()
    gptq(weight, hessian, BLOCKS)
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])


def test_blocks_with_given_scales_keep_them() -> None:
    weight = matrix()
    _, scale, zero_point = nearest(weight, BLOCKS)
    rounded = gptq(
        weight, hessian_of(correlated_inputs()), BLOCKS, scale=scale * 0.8, zero_point=zero_point
    )
    assert torch.equal(rounded.scale, scale * 0.8)
    steps = rounded.weight / spread(rounded.scale, weight, BLOCKS)
    torch.testing.assert_close(steps, steps.round())


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"scheme": FLOAT}, ConfigError, "Floats have no steps"),
        ({"scale": torch.ones(6)}, ConfigError, "Give both or neither"),
        ({"damping": -0.1}, ConfigError, r"damping=-0\.1"),
        ({"block_size": 0}, ConfigError, "block_size=0"),
        ({"weight": torch.zeros(6, 2, 3)}, ConfigError, r"\(6, 2, 3\) is no matrix"),
        ({"hessian": torch.eye(5)}, DataError, r"has to be \(18, 18\)"),
        ({"hessian": torch.full((WIDTH, WIDTH), torch.nan)}, DataError, "not finite"),
        ({"hessian": torch.eye(WIDTH) - 1.0}, DataError, "no Cholesky factor"),
    ],
)
def test_bad_input_is_refused(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"weight": matrix(), "hessian": torch.eye(WIDTH), "scheme": FOUR, **changed}
    with pytest.raises(error, match=message):
        gptq(**arguments)
