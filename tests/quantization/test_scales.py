from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.quantization.affine import channel_range, fake_quantize, parameters_of_range
from compressor.quantization.corrections.scales import FRACTIONS, search_scales, sum_of_parts
from compressor.quantization.scheme import FLOAT, Scheme

SCHEMES = [
    Scheme(4, signed=True, symmetric=True),
    Scheme(4, signed=True, symmetric=True, axis=0),
    Scheme(3, axis=1),
    Scheme(4, signed=True, symmetric=True, axis=0, block=4),
    Scheme(2, axis=0, block=5),
]


def weight(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(6, 10), (6, 10, 3, 3)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_error_of_every_part_is_the_least_of_all_fractions(
    scheme: Scheme, shape: tuple[int, ...]
) -> None:
    x = weight(*shape)
    low, high = channel_range(x, scheme)
    errors = []
    for fraction in FRACTIONS:
        scales = parameters_of_range(low * fraction, high * fraction, scheme)
        errors.append(sum_of_parts((fake_quantize(x, *scales, scheme) - x).square(), scheme))
    found = search_scales(x, scheme)
    error = sum_of_parts((fake_quantize(x, *found, scheme) - x).square(), scheme)
    assert found[0].shape == low.shape
    assert torch.equal(error, torch.stack(errors).amin(0))
    assert error.sum() < errors[0].sum(), "the range itself is not best for a normal weight"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_sum_of_parts_is_over_entries_with_one_scale(scheme: Scheme) -> None:
    x = weight(3, 7, 2)
    shape = sum_of_parts(x, scheme).shape
    if scheme.axis is None:
        expected = x.sum()
    else:
        expected = torch.zeros(shape)
        for index in range(7 if scheme.axis == 1 else 3):
            row = x.select(scheme.axis, index)
            if scheme.block is None:
                expected[index] = row.sum()
            else:
                for entry in range(7):
                    expected[index, entry // scheme.block] += row[entry].sum()
    torch.testing.assert_close(sum_of_parts(x, scheme), expected)


def test_a_channel_of_zeros_keeps_the_scale_of_its_range() -> None:
    scheme = SCHEMES[1]
    scale, zero_point = search_scales(torch.zeros(2, 3), scheme)
    expected = parameters_of_range(torch.zeros(2), torch.zeros(2), scheme)
    assert torch.equal(scale, expected[0])
    assert torch.equal(zero_point, expected[1])


def test_bad_input_is_an_error() -> None:
    with pytest.raises(ConfigError, match="32 bits"):
        search_scales(weight(2, 2), FLOAT)
    with pytest.raises(DataError, match="not finite"):
        search_scales(torch.tensor([[1.0, float("nan")]]), SCHEMES[0])
