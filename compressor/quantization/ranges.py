"""Ranges of tensors: how they are observed batch by batch, and the uint8 numbers that cover them.

Source: Jacob et al. 2018 (1712.05877), section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


class Range(NamedTuple):
    """Lowest and highest value that a tensor's eight bits must say."""

    low: float
    high: float


Ranges = Mapping[str, Range]


def affine_parameters(value_range: Range) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of uint8 such that zero is exact and the range is covered.

    A range that starts at 0 (after a ReLU) has zero point 0, and 255 steps end within it, so that a
    runtime may leave out the ReLU or the Clip before it.

    >>> scale, zero_point = affine_parameters(Range(-1.0, 4.0))
    >>> float(round(255 * scale, 5)), int(zero_point)
    (5.0, 51)
    >>> int(affine_parameters(Range(0.5, 3.0))[1])
    0
    """
    low, high = min(value_range.low, 0.0), max(value_range.high, 0.0)
    scale = np.float32((high - low) / 255)
    if scale < np.finfo(np.float32).tiny:
        return np.float32(1.0), np.uint8(0)  # nothing but zeros, or denormal: no scale says it
    if low == 0.0 and float(scale) * 255 > high:
        scale = np.nextafter(scale, np.float32(0))
    return scale, np.uint8(np.clip(round(-low / float(scale)), 0, 255))


class Observer(Protocol):
    """Sees arrays one after another, in bounded memory."""

    def update(self, values: FloatArray) -> None:
        """Take finite `values` of any shape into account."""

    def range(self) -> Range:
        """The range of what was seen."""


class MinMaxObserver:
    """The range is from the least value to the greatest."""

    def __init__(self) -> None:
        self._low, self._high = np.inf, -np.inf

    def update(self, values: FloatArray) -> None:
        """Take finite `values` of any shape into account."""
        self._low = min(self._low, float(values.min()))
        self._high = max(self._high, float(values.max()))

    def range(self) -> Range:
        """Least and greatest value seen."""
        return Range(self._low, self._high)


class PercentileObserver:
    """The range leaves out the same small share of the values at each end.

    The values are counted in bins of equal width around zero. When a value falls outside, the bins
    become twice as wide, two merging into one: so the memory is fixed and nothing is seen twice.
    """

    BINS = 4096

    def __init__(self, percentile: float = 99.999) -> None:
        self._tail = (1 - percentile / 100) / 2
        self._counts = np.zeros(self.BINS, dtype=np.int64)
        self._width = 0.0
        self._extremes = MinMaxObserver()

    def update(self, values: FloatArray) -> None:
        """Take finite `values` of any shape into account."""
        self._extremes.update(values)
        largest = float(np.abs(values).max())
        half = self.BINS // 2
        if not self._width and largest:
            self._width = 2.0 ** np.ceil(np.log2(largest)) / half
        while largest > self._width * half:
            merged = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.pad(merged, self.BINS // 4)
            self._width *= 2
        bins = np.floor(values.reshape(-1) / (self._width or 1.0)).astype(np.int64) + half
        self._counts += np.bincount(np.clip(bins, 0, self.BINS - 1), minlength=self.BINS)

    def range(self) -> Range:
        """The inner edges of the two tails, to the width of a bin."""
        extremes = self._extremes.range()
        below = np.cumsum(self._counts)
        first = int(np.searchsorted(below, self._tail * below[-1], side="right"))
        last = int(np.searchsorted(below, (1 - self._tail) * below[-1], side="left"))
        half = self.BINS // 2
        low, high = (first - half) * self._width, (last + 1 - half) * self._width
        return Range(max(low, extremes.low), min(high, extremes.high))
