from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from compressor.errors import ConfigError, DataError, ModelError
from compressor.quantization.affine import fake_quantize, parameters_of_range
from compressor.quantization.observers import (
    BINS,
    OBSERVERS,
    EntropyObserver,
    Histogram,
    Method,
    MinMaxObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
    divergences,
    expected_errors,
)
from compressor.quantization.scheme import Scheme

AFFINE, SYMMETRIC = Scheme(8), Scheme(8, signed=True, symmetric=True)
every_method = pytest.mark.parametrize("method", OBSERVERS)
every_scheme = pytest.mark.parametrize(
    "scheme",
    [AFFINE, SYMMETRIC, Scheme(4), Scheme(8, symmetric=True), Scheme(8, reduced=True)],
    ids=str,
)


def drawn(size: int, kind: str = "normal") -> Tensor:
    """Values like those of a layer, with the extremes of `kind`."""
    normal = torch.randn(size, generator=torch.Generator().manual_seed(size))
    kinds = {
        "normal": normal,
        "relu": normal.relu(),
        "hardswish": torch.nn.functional.hardswish(3 * normal),
        "tail": normal.sign() * normal.mul(2).exp(),
        "negative": -normal.abs() - 0.1,
    }
    return kinds[kind]


every_kind = pytest.mark.parametrize("kind", ["normal", "relu", "hardswish", "tail", "negative"])


def observed(observer: Observer, *batches: Tensor) -> Observer:
    for batch in batches:
        observer.update(batch)
    return observer


def ends(observer: Observer, scheme: Scheme = AFFINE) -> tuple[float, float]:
    low, high = observer.range(scheme)
    assert low.dtype == high.dtype == torch.double
    assert low.shape == high.shape == ()
    return low.item(), high.item()


def squared_error(values: Tensor, low: Tensor, high: Tensor, scheme: Scheme) -> float:
    parameters = parameters_of_range(low, high, scheme)
    return float((fake_quantize(values, *parameters, scheme) - values).double().square().mean())


def test_minmax_is_over_all_batches() -> None:
    batches = [torch.tensor(values) for values in ([1.0, 2.0], [-3.0], [0.5])]
    assert ends(observed(MinMaxObserver(), *batches)) == (-3.0, 2.0)


@every_method
@given(st.integers(0, 2**32), st.lists(st.integers(-20, 20), min_size=1, max_size=6))
@settings(derandomize=True, deadline=None, max_examples=5)
def test_batches_in_any_split_and_order_give_one_range(
    method: Method, seed: int, exponents: list[int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(50, generator=generator) * 2.0**exponent for exponent in exponents]
    parts.append(torch.zeros(3))
    at_once = observed(OBSERVERS[method](), torch.cat(parts))
    assert ends(observed(OBSERVERS[method](), *parts)) == ends(at_once)
    assert ends(observed(OBSERVERS[method](), *reversed(parts))) == ends(at_once)


def test_memory_does_not_grow_with_the_batches_nor_with_the_values() -> None:
    histogram = Histogram()
    for exponent in range(-30, 30):
        histogram.update(drawn(100) * 2.0**exponent)
        tensors = [value for value in vars(histogram).values() if isinstance(value, Tensor)]
        assert [tensor.shape for tensor in tensors] == [(BINS,)]
    assert int(histogram.counts.sum()) + histogram.zeros == 60 * 100


def test_counts_are_those_of_numpy() -> None:
    values = drawn(100_000, "hardswish")
    histogram = Histogram()
    for part in values.split(30_000):
        histogram.update(part)
    edges = (np.arange(BINS + 1) - BINS // 2) * histogram.width
    expected, _ = np.histogram(values[values != 0].double().numpy(), edges)
    assert histogram.zeros == int((values == 0).sum()) > 0
    assert histogram.counts.tolist() == expected.tolist()
    assert histogram.width * BINS / 4 <= values.abs().max() < histogram.width * BINS / 2


@every_kind
@pytest.mark.parametrize("percentile", [90.0, 99.9, 99.999])
def test_percentile_is_that_of_numpy_to_the_width_of_a_bin(kind: str, percentile: float) -> None:
    values = drawn(100_003, kind)
    observer = PercentileObserver(percentile)
    observer.update(values)
    tail = (1 - percentile / 100) / 2
    low, high = np.quantile(values.double().numpy(), [tail, 1 - tail], method="inverted_cdf")
    np.testing.assert_allclose(
        ends(observer), (min(low, 0), max(high, 0)), rtol=0, atol=observer.histogram.width
    )


def test_percentile_of_everything_is_minmax() -> None:
    values = drawn(1000)
    assert ends(observed(PercentileObserver(100), values)) == ends(
        observed(MinMaxObserver(), values)
    )


@pytest.mark.parametrize("percentile", [0.0, 100.1, math.nan])
def test_percentile_out_of_range_is_refused(percentile: float) -> None:
    with pytest.raises(ConfigError, match=f"percentile={percentile}"):
        PercentileObserver(percentile)


@pytest.mark.parametrize("bits", [3, 8, 16])
def test_expected_error_is_the_integral_over_the_bins(bits: int) -> None:
    histogram = Histogram()
    histogram.update(torch.tensor([0.0, 0.3, 0.3, -0.7, 1.9]))
    low, high = torch.tensor([-0.25]).double(), torch.tensor([1.1]).double()
    scheme = Scheme(bits)
    # Midpoints of 20,000 slices of each bin, which is narrower and wider than a step
    starts, counts, width = histogram.merged(BINS)
    slices = starts[:, None] + (torch.arange(20_000).double() + 0.5) / 20_000 * width
    scale, zero_point = (number.double() for number in parameters_of_range(low, high, scheme))
    integers = (slices / scale).round().add(zero_point).clamp(scheme.qmin, scheme.qmax)
    errors = ((integers - zero_point) * scale - slices).square().mean(1)
    expected = float(errors @ counts) / 5
    measured = expected_errors(histogram, low, high, scheme)
    assert measured.item() == pytest.approx(expected, rel=1e-6)


@every_kind
@every_scheme
def test_mse_range_is_the_best_of_those_tried_on_the_raw_values(kind: str, scheme: Scheme) -> None:
    values = drawn(3000, kind)
    fractions = torch.logspace(-4, 0, 25, base=2, dtype=torch.double)
    low, high = observed(MinMaxObserver(), values).range(scheme)
    tried = [
        squared_error(values, low * first, high * last, scheme)
        for last in fractions
        for first in (fractions if low < 0 < high else fractions[-1:])
    ]
    chosen = squared_error(values, *observed(MSEObserver(), values).range(scheme), scheme)
    # 2 %: the values do not lie evenly in their bins, and the grids are not the same
    assert chosen <= 1.02 * min(tried)


@every_kind
@pytest.mark.parametrize("bits", [2, 4, 8, 12])
def test_mse_range_is_no_worse_than_minmax(kind: str, bits: int) -> None:
    values, scheme = drawn(2000, kind), Scheme(bits)
    whole = squared_error(values, *observed(MinMaxObserver(), values).range(scheme), scheme)
    chosen = squared_error(values, *observed(MSEObserver(), values).range(scheme), scheme)
    assert chosen <= 1.01 * whole


def slow_divergence(histogram: Histogram, low: float, high: float, scheme: Scheme) -> float:
    """The published loop over bins, with the integer of a bin's middle in place of equal parts."""
    half, counts = BINS // 2, histogram.counts.double().numpy()
    first = math.floor(low / histogram.width) + half
    last = math.floor(high / histogram.width) + half
    inside = [place for place in range(first, last + 1) if counts[place]]
    reference = {place: counts[place] for place in inside}
    reference[inside[0]] += counts[:first].sum()
    reference[inside[-1]] += counts[last + 1 :].sum()
    ends = torch.tensor(low).double(), torch.tensor(high).double()
    scale, zero_point = (float(number) for number in parameters_of_range(*ends, scheme))
    cells: dict[int, list[int]] = {}
    for place in inside:
        middle = (place - half + 0.5) * histogram.width
        integer = min(max(round(middle / scale) + zero_point, scheme.qmin), scheme.qmax)
        cells.setdefault(int(integer), []).append(place)
    quantized = {place: counts[places].mean() for places in cells.values() for place in places}
    return float(stats.entropy([reference[i] for i in inside], [quantized[i] for i in inside]))


@every_kind
@every_scheme
def test_divergence_is_that_of_the_published_loop(kind: str, scheme: Scheme) -> None:
    histogram = Histogram()
    histogram.update(drawn(4000, kind))
    fractions = torch.tensor([1.0, 0.83, 0.41, 0.77]).double()
    lows = min(histogram.low, 0.0) * fractions
    highs = max(histogram.high, 0.0) * fractions.flip(0)
    expected = [
        slow_divergence(histogram, low, high, scheme)
        for low, high in zip(lows.tolist(), highs.tolist(), strict=True)
    ]
    np.testing.assert_allclose(divergences(histogram, lows, highs, scheme), expected, atol=1e-12)


@every_kind
@every_scheme
def test_entropy_range_is_the_best_of_a_grid(kind: str, scheme: Scheme) -> None:
    observer = EntropyObserver()
    observer.update(drawn(20_000, kind))
    low, high = observer.range(scheme)
    fractions = torch.logspace(-4, 0, 25, base=2, dtype=torch.double)
    whole = observer.histogram.low, observer.histogram.high
    pairs = torch.cartesian_prod(fractions, fractions)
    if scheme.symmetric or whole[0] >= 0 or whole[1] <= 0:
        pairs = fractions[:, None].expand(-1, 2)
    largest = max(map(abs, whole))
    lows, highs = (pairs * torch.tensor(whole).double()).T
    if scheme.symmetric:
        lows, highs = -pairs[:, 0] * largest, pairs[:, 1] * largest
    tried = divergences(
        observer.histogram, lows.clamp(whole[0], 0), highs.clamp(0, max(whole[1], 0)), scheme
    )
    chosen = divergences(observer.histogram, low[None], high[None], scheme).item()
    # The divergence of counts is not smooth: other candidates, a few percent of luck
    assert chosen <= 1.05 * tried.min().item()


def test_entropy_leaves_out_an_outlier_and_keeps_the_end_of_a_relu6() -> None:
    values = drawn(50_000)
    outlier = torch.cat([values, torch.tensor([40.0])])
    low, high = ends(observed(EntropyObserver(), outlier))
    assert low >= values.min()
    assert high < 10
    assert ends(observed(EntropyObserver(), (6 * values).clamp(0, 6))) == (0.0, 6.0)


def test_more_integers_than_bins_leave_nothing_to_choose_by_entropy() -> None:
    values = drawn(1000)
    expected = ends(observed(MinMaxObserver(), values))
    assert ends(observed(EntropyObserver(), values), Scheme(16)) == expected


@every_method
@every_kind
@every_scheme
def test_a_range_is_within_the_values_and_zero(method: Method, kind: str, scheme: Scheme) -> None:
    values = drawn(2000, kind)
    low, high = ends(observed(OBSERVERS[method](), values), scheme)
    assert min(values.min().item(), 0) <= low <= 0 <= high <= max(values.max().item(), 0)
    assert low < high
    if kind == "relu":
        assert low == 0.0
    if kind == "negative":
        assert high == 0.0


@every_method
@every_scheme
def test_zeros_alone_are_a_range_of_zero(method: Method, scheme: Scheme) -> None:
    assert ends(observed(OBSERVERS[method](), torch.zeros(4)), scheme) == (0.0, 0.0)


@every_method
@every_scheme
@pytest.mark.parametrize("value", [3.0, -3.0, 1.0, 1e-30, 3e38])
def test_a_constant_is_kept(method: Method, scheme: Scheme, value: float) -> None:
    values = torch.full((100,), value)
    parameters = parameters_of_range(*observed(OBSERVERS[method](), values).range(scheme), scheme)
    assert fake_quantize(values, *parameters, scheme).tolist() == pytest.approx([value] * 100, 1e-3)


@every_method
@pytest.mark.parametrize("value", [1e-40, 2.0**-149])
def test_denormal_values_are_a_range(method: Method, value: float) -> None:
    values = torch.tensor([0.0, value])
    low, high = ends(observed(OBSERVERS[method](), values))
    assert 0.0 == low <= high <= values.max().item()


@every_method
def test_a_float_scheme_covers_everything(method: Method) -> None:
    values = drawn(200_000)
    expected = values.min().item(), values.max().item()
    assert ends(observed(OBSERVERS[method](), values), Scheme(32)) == expected


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_observed_as_their_values(method: Method, dtype: torch.dtype) -> None:
    values = drawn(3000).to(dtype)
    expected = ends(observed(OBSERVERS[method](), values.float()))
    assert ends(observed(OBSERVERS[method](), values)) == expected


@every_method
def test_shape_layout_and_gradient_do_not_matter(method: Method) -> None:
    images = drawn(2 * 3 * 8 * 8).view(2, 3, 8, 8)
    expected = ends(observed(OBSERVERS[method](), images.flatten()))
    strided = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    assert ends(observed(OBSERVERS[method](), strided)) == expected
    assert ends(observed(OBSERVERS[method](), *images.flatten()[:, None].split(50))) == expected


@every_method
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(method: Method, value: float) -> None:
    with pytest.raises(ModelError, match=f"A value is {value}"):
        OBSERVERS[method]().update(torch.tensor([1.0, value, 2.0]))


@every_method
def test_no_values_are_no_range(method: Method) -> None:
    observer = OBSERVERS[method]()
    observer.update(torch.empty(0, 3))
    with pytest.raises(DataError, match="No calibration batch"):
        observer.range(AFFINE)
