"""Ranges of activations, observed batch by batch in memory that does not grow.

Sources: Jacob et al. (2018), section 3; Migacz (2017), 8-bit inference with TensorRT (entropy);
Choukroun et al. (2019), Low-bit quantization of neural networks for efficient inference (MSE).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError, ModelError
from compressor.quantization.affine import TINY, parameters_of_range
from compressor.quantization.scheme import Scheme

BINS = 8192
# Entries that are counted at a time: what fits a CPU's cache; more where a call costs more.
PART, PART_ON_DEVICE = 2**17, 2**24
# Candidates times bins of one evaluation of the expected error: about 10 ms.
WORK = 2**19

Costs = Callable[[Tensor, Tensor], Tensor]


class Observer(Protocol):
    """Sees the values of one tensor, batch after batch."""

    def update(self, values: Tensor) -> None:
        """Take `values` of any shape and device into account; none is no update.

        Raises:
            ModelError: if a value is not finite.
        """

    def range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """What `scheme` should cover, for `affine.parameters_of_range`.

        Returns:
            Low, at most 0, and high, at least 0, on the CPU in double; an end at 0 is exactly 0.

        Raises:
            DataError: if there was no value.
        """


class MinMaxObserver:
    """The range is from the least value to the greatest."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf

    def update(self, values: Tensor) -> None:
        """Take `values` into account."""
        low, high = finite_extremes(values)
        self._low, self._high = min(self._low, low), max(self._high, high)

    def range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Least and greatest value, or 0."""
        del scheme
        return _as_range(self._low, self._high)


class Histogram:
    """Counts of values in bins of equal width around zero.

    The width is a power of two. When a value falls outside it doubles, two bins merging into one:
    the memory is fixed, nothing is seen twice, and the counts do not depend on the batches.

    Attributes:
        counts: (BINS,) of the values that are not 0, on the CPU; bin i begins at
            `(i - BINS // 2) * width`, which belongs to it.
        zeros: how many values are exactly 0. Every scheme says them without error.
        width: of a bin; 0 while there are only zeros.
        low: least value; infinite while there is none.
        high: greatest value.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.zeros = 0
        self.width = 0.0
        self.low, self.high = math.inf, -math.inf

    def update(self, values: Tensor) -> None:
        """Count `values`, which are finite, or raise ModelError."""
        low, high = finite_extremes(values)
        if not values.numel():
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(-low, high))
        entries = values.detach().reshape(-1)
        nonzero = int(torch.count_nonzero(entries))
        self.zeros += len(entries) - nonzero
        if nonzero:
            self.counts += self._count(entries).to("cpu")
            self.counts[BINS // 2] -= len(entries) - nonzero

    def merged(self, most: int) -> tuple[Tensor, Tensor, float]:
        """At most about `most` bins that hold something: their beginnings, counts and width."""
        counts, width = self.counts, self.width
        while torch.count_nonzero(counts) > most and len(counts) > 2:
            counts, width = counts.view(-1, 2).sum(1), 2 * width
        places = counts.nonzero().squeeze(1)
        return (places - len(counts) // 2).double() * width, counts[places].double(), width

    def _widen(self, largest: float) -> None:
        # Strictly below the edge, so that the counts are the same in any order. No width is
        # narrower than what float32 can divide by.
        width = max(math.ldexp(2 / BINS, math.frexp(largest)[1]), TINY) if largest else 0.0
        while 0 < self.width < width:
            quarter = self.counts.new_zeros(BINS // 4)
            self.counts = torch.cat([quarter, self.counts.view(-1, 2).sum(1), quarter])
            self.width *= 2
        self.width = max(self.width, width)

    def _count(self, entries: Tensor) -> Tensor:
        dtype = torch.float64 if entries.dtype == torch.float64 else torch.float32
        counts = torch.zeros(BINS, dtype=torch.int64, device=entries.device)
        for part in torch.split(entries, PART if entries.is_cpu else PART_ON_DEVICE):
            bins = (part.to(dtype) * (1 / self.width)).floor_().to(torch.int32).add_(BINS // 2)
            counts += torch.bincount(bins, minlength=BINS)
        return counts


class _HistogramObserver(ABC):
    """Counts the values, and chooses a range of those counts."""

    def __init__(self) -> None:
        self.histogram = Histogram()

    def update(self, values: Tensor) -> None:
        """Take `values` into account."""
        self.histogram.update(values)

    def range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """What the counts say that `scheme` should cover."""
        low, high = _as_range(self.histogram.low, self.histogram.high)
        if not self.histogram.width or scheme.is_float:
            return low, high
        return self._choose(low, high, scheme)

    @abstractmethod
    def _choose(self, low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """A range within the one from `low` to `high` that covers everything."""


class PercentileObserver(_HistogramObserver):
    """The range leaves out the same small share of the values at each end, to a bin's width.

    Args:
        percentile: share of the values within the range, above 0 to 100.
    """

    def __init__(self, percentile: float = 99.999) -> None:
        if not 0 < percentile <= 100:
            raise ConfigError(
                f"percentile={percentile} is not above 0 and at most 100. It is the share of the "
                "values that the range covers; usual is 99.9 to 99.999."
            )
        super().__init__()
        self._tail = (1 - percentile / 100) / 2

    def _choose(self, low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        del scheme
        counts = self.histogram.counts.double()
        counts[BINS // 2] += self.histogram.zeros
        below = counts.cumsum(0)
        tails = torch.tensor([self._tail, 1 - self._tail], dtype=torch.double) * below[-1]
        first = torch.searchsorted(below, tails[0], right=True)
        last = torch.searchsorted(below, tails[1])
        edges = (torch.stack([first, last + 1]) - BINS // 2) * self.histogram.width
        return edges[0].clamp(low, high.new_zeros(())), edges[1].clamp(high.new_zeros(()), high)


class EntropyObserver(_HistogramObserver):
    """The range whose quantized histogram is nearest to the histogram (`divergences`).

    It cuts long tails, whatever their values matter: it is for convolutions, not for a softmax.
    """

    def _choose(self, low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        if scheme.qmax - scheme.qmin >= BINS:
            return low, high
        return _search(
            lambda lows, highs: divergences(self.histogram, lows, highs, scheme), low, high, scheme
        )


class MSEObserver(_HistogramObserver):
    """The range with the least squared error of what it rounds and cuts (`expected_errors`)."""

    def _choose(self, low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        return _search(
            lambda lows, highs: expected_errors(self.histogram, lows, highs, scheme),
            low,
            high,
            scheme,
        )


Method = Literal["minmax", "percentile", "entropy", "mse"]
OBSERVERS: Mapping[Method, Callable[[], Observer]] = {
    "minmax": MinMaxObserver,
    "percentile": PercentileObserver,
    "entropy": EntropyObserver,
    "mse": MSEObserver,
}


def finite_extremes(values: Tensor) -> tuple[float, float]:
    """Least and greatest of `values`; (inf, -inf) of none.

    Raises:
        ModelError: if one is not finite.
    """
    if not values.numel():
        return math.inf, -math.inf
    low, high = torch.stack(torch.aminmax(values.detach())).tolist()
    for value in (low, high):
        if not math.isfinite(value):
            raise ModelError(
                f"A value is {value}, and a range has finite ends. Look for NaN in the calibration "
                "data, or for an overflow in the layer."
            )
    return low, high


def expected_errors(histogram: Histogram, lows: Tensor, highs: Tensor, scheme: Scheme) -> Tensor:
    """Mean squared error of each candidate range, the values of a bin lying evenly in it.

    With u in steps, the error is (u - r)² for r = clamp(round(u)), whose integral is
    r / 12 + (u - r)³ / 3: exact for bins narrower and wider than a step.

    Args:
        histogram: of one value other than 0 at least.
        lows: (candidates,).
        highs: (candidates,).
        scheme: of few bits.

    Returns:
        (candidates,), in the squared unit of the values.
    """
    scale, zero_point = parameters_of_range(lows, highs, scheme)
    step = scale.double()[:, None]
    least, most = (end - zero_point.double()[:, None] for end in (scheme.qmin, scheme.qmax))
    starts, counts, width = histogram.merged(WORK // len(lows))

    def integral(edges: Tensor) -> Tensor:
        steps = edges / step
        whole = steps.round().clamp_(least, most)
        rest = steps.sub_(whole)
        return whole.div_(12).add_(rest.square().mul_(rest), alpha=1 / 3)

    squares = (integral(starts + width) - integral(starts)) @ counts
    return squares * scale.double() ** 3 / (width * (counts.sum() + histogram.zeros))


def divergences(histogram: Histogram, lows: Tensor, highs: Tensor, scheme: Scheme) -> Tensor:
    """Kullback-Leibler divergence of the histogram from each candidate's quantized form.

    The reference is the bins within the range, with the values beyond added to the outermost bins
    that hold something. In the quantized form, without those, the bins that round to one integer
    share its count, but for the empty ones. Zeros, exact in both, are left out.

    Args:
        histogram: of one value other than 0 at least.
        lows: (candidates,).
        highs: (candidates,).
        scheme: of few bits.

    Returns:
        (candidates,); infinite for a range of fewer bins than integers, which would seem exact.
    """
    counts, half = histogram.counts.double(), BINS // 2
    total = counts.sum()
    below, filled, logs = (
        torch.nn.functional.pad(numbers.cumsum(0), (1, 0))
        for numbers in (counts, (counts > 0).double(), torch.xlogy(counts, counts))
    )
    first, last = (
        (ends / histogram.width).floor().long().add(half).clamp(0, BINS - 1)
        for ends in (lows, highs)
    )
    scale, zero_point = parameters_of_range(lows, highs, scheme)
    middles = torch.arange(scheme.qmin, scheme.qmax) + 0.5 - zero_point.double()[:, None]
    inner = (middles * scale.double()[:, None] / histogram.width).round().long() + half
    inner = inner.clamp(first[:, None], last[:, None] + 1)
    edges = torch.cat([first[:, None], inner, last[:, None] + 1], dim=1)
    mass = below[edges].diff()
    mean = mass / filled[edges].diff().clamp(min=1)
    kept = below[last + 1] - below[first]
    sums = logs[last + 1] - logs[first] - torch.xlogy(mass, mean).sum(1)

    bins = torch.arange(BINS)
    upper = torch.where(counts > 0, bins, -1).cummax(0).values[last]
    lower = torch.where(counts > 0, bins, BINS).flip(0).cummin(0).values.flip(0)[first]
    is_empty = (upper < lower) | (last + 1 - first < scheme.qmax - scheme.qmin + 1)
    upper, lower = upper.clamp(min=0), lower.clamp(max=BINS - 1)
    under, over = below[first], total - below[last + 1]
    reference = counts[upper] + torch.where(upper == lower, under, 0.0)
    for place, held, added in ((lower, counts[lower], under), (upper, reference, over)):
        cell = torch.searchsorted(edges, place[:, None], right=True).sub_(1)
        share = mean.gather(1, cell.clamp(0, mean.shape[1] - 1)).squeeze(1)
        sums += torch.xlogy(held + added, (held + added) / share) - torch.xlogy(held, held / share)
    return torch.where(is_empty, math.inf, sums / total + (kept / total).log())


def _search(costs: Costs, low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The cheapest range within `low` to `high`, by ever finer grids of the logarithms of its ends.

    An end at 0 stays there; those of a symmetric scheme move together. The whole range is always
    among the candidates, so that none dearer is returned.
    """
    is_tied = scheme.symmetric or not (low and high)
    largest = torch.maximum(-low, high)

    def ends(octaves: Tensor) -> tuple[Tensor, Tensor]:
        if is_tied:
            size = largest * octaves[:, 0].exp2()
            return torch.maximum(low, -size), torch.minimum(high, size)
        return low * octaves[:, 0].exp2(), high * octaves[:, 1].exp2()

    # 2^-11: half of the bins on one side of zero
    best, step = torch.zeros(1 if is_tied else 2, dtype=torch.double), 0.5
    offsets = torch.arange(-22, 1, dtype=torch.double) * step
    for _ in range(6):
        axes = [(end + offsets).clamp(-11, 0) for end in best]
        grid = torch.cartesian_prod(*axes).view(-1, len(best))
        octaves = torch.cat([torch.zeros_like(grid[:1]), grid])
        best = octaves[costs(*ends(octaves)).argmin()]
        step /= 2
        offsets = torch.arange(-2, 3, dtype=torch.double) * step
    lows, highs = ends(best[None])
    return lows[0], highs[0]


def _as_range(low: float, high: float) -> tuple[Tensor, Tensor]:
    if low > high:
        raise _nothing_observed()
    return (
        torch.tensor(min(low, 0.0), dtype=torch.double),
        torch.tensor(max(high, 0.0), dtype=torch.double),
    )


def _nothing_observed() -> DataError:
    return DataError(
        "No calibration batch was observed, so there is no range. Give one batch with values at "
        "least, and see that the model calls the layer."
    )
