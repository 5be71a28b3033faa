from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.quantization.ranges import (
    MinMaxObserver,
    PercentileObserver,
    Range,
    affine_parameters,
)

bounds = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@given(bounds, bounds)
def test_zero_is_exact_and_the_range_is_covered_to_half_a_step(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero_point = affine_parameters(Range(low, high))
    levels = (np.arange(256) - int(zero_point)) * float(scale)
    assert 0.0 in levels
    assert levels[0] <= min(low, 0) + 0.51 * scale
    assert levels[-1] >= max(high, 0) - 0.51 * scale


@given(st.floats(1e-6, 1e6))
def test_a_range_from_zero_ends_within_itself(high: float) -> None:
    # else a runtime may not leave out the Clip(0, high) before the quantizer
    scale, zero_point = affine_parameters(Range(0.0, high))
    assert zero_point == 0
    assert float(scale) * 255 <= high


def test_a_tensor_of_zeros_has_a_usable_scale() -> None:
    assert affine_parameters(Range(0.0, 0.0)) == (1.0, 0)


def test_minmax_is_over_all_batches() -> None:
    observer = MinMaxObserver()
    for values in ([1.0, 2.0], [-3.0], [0.5]):
        observer.update(np.array(values, dtype=np.float32))
    assert observer.range() == Range(-3.0, 2.0)


@pytest.mark.parametrize("order", [1, -1])
def test_percentile_in_parts_agrees_with_all_values_at_once(order: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((20, 5000)).astype(np.float32) * np.arange(1, 21)[:, None]
    observer = PercentileObserver(99.0)
    for part in values[::order].astype(np.float32):
        observer.update(part)
    width = 2 * 2.0 ** np.ceil(np.log2(np.abs(values).max())) / PercentileObserver.BINS
    expected = np.percentile(values, [0.5, 99.5])
    np.testing.assert_allclose(observer.range(), expected, atol=2 * width)


def test_percentile_leaves_out_an_outlier_and_keeps_the_zero_of_a_relu() -> None:
    rng = np.random.default_rng(0)
    values = np.maximum(rng.standard_normal(200_000), 0).astype(np.float32)
    usual = values.max()
    values[7] = 1000.0
    observer = PercentileObserver(99.99)
    observer.update(values)
    assert observer.range().low == 0.0
    assert usual / 2 < observer.range().high < usual + 1


def test_percentile_of_zeros_is_zero() -> None:
    observer = PercentileObserver()
    observer.update(np.zeros(4, dtype=np.float32))
    assert observer.range() == Range(0.0, 0.0)
