"""Between which ends the true drop lies: an interval from pairs of metrics on disjoint chunks.

Reference and compressed model are evaluated on the same chunks of the split, so what both find hard
cancels. The mean of the chunks' drops has a t interval with three corrections:
- Few differences are no proof of none: one sample more is counted on each side, as for pairs of
  proportions (Bonett & Price 2012).
- A drop of many samples' worth needs as many that changed: an end is no nearer than where the
  spread that it implies itself would put it (a score interval, Wilson 1927).
- A variant that was chosen by looking at the split looks better than it is: with n looks the
  confidence is 1 - 0.05 / n, so that all n intervals hold together (Bonferroni).

In simulations (`benchmarks.certificate`) this covers more than a bootstrap of the chunks, which
falls below its nominal share where few answers differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from compressor.result import Interval

CONFIDENCE = 0.95
MOST_DISAGREEMENT = 0.1  # of delta: between the metric and the mean of its chunks
LEAST_CHUNKS = 5


@dataclass(frozen=True)
class Paired:
    """A metric of two models on the same disjoint parts of a split.

    Attributes:
        samples: in each chunk.
        reference: the metric of the reference on each.
        compressed: that of the compressed model.
        whole: the metrics of both on the whole split.
    """

    samples: Sequence[int]
    reference: Sequence[float]
    compressed: Sequence[float]
    whole: tuple[float, float]


def drop_interval(
    paired: Paired, delta: float, *, is_larger_better: bool, looks: int
) -> Interval | str:
    """The interval of the drop; or, as a sentence, why there is none.

    Args:
        paired: the metrics.
        delta: drop that is tolerated; the chunks' mean must be the metric of the whole within a
            tenth of it, else the metric is none that averages (mAP, a correlation, …).
        is_larger_better: False for errors and losses.
        looks: how many evaluations of compressed models the split saw before this one was chosen,
            those after single epochs too; 1 or more.
    """
    sizes = np.array(paired.samples, dtype=float)
    if len(sizes) < LEAST_CHUNKS:
        return (
            f"The split comes in {len(sizes)} parts, too few for an interval: "
            f"{LEAST_CHUNKS} or more batches are needed."
        )
    values = np.array([paired.reference, paired.compressed], dtype=float)
    shares = sizes / sizes.sum()
    means = values @ shares
    apart = float(np.abs(means - np.array(paired.whole)).max())
    if apart > MOST_DISAGREEMENT * delta:
        return (
            f"The metric of the whole split is not the mean over its parts ({apart:.3g} apart), so "
            "there is no interval of it."
        )
    drops = (values[0] - values[1]) * (1 if is_larger_better else -1)
    low, high = t_ends(drops, sizes, 1 - (1 - CONFIDENCE) / max(looks, 1))
    return Interval(low, high, CONFIDENCE, len(sizes), looks)


def t_ends(
    drops: NDArray[np.float64], samples: NDArray[np.float64], confidence: float
) -> tuple[float, float]:
    """Both ends around the mean of `drops`, weighted by `samples`.

    >>> low, high = t_ends(np.array([0.0, 0.0, 1.0, 0.0]), np.full(4, 25.0), 0.95)
    >>> round(low, 2), round(high, 2)
    (-2.28, 3.01)
    """
    count, shares = len(drops), samples / samples.sum()
    mean = float(drops @ shares)
    variance = count / (count - 1) * np.square((drops - mean) * shares).sum()
    sums = np.abs(drops * shares)
    one_sample = sums[sums > 0].min() if sums.any() else 0.0
    quantile = student.ppf((1 + confidence) / 2, count - 1)
    reach = quantile * np.sqrt(variance + 2 * one_sample**2)

    def upper(middle: float) -> float:
        half = quantile**2 * one_sample / 2
        score = half + np.sqrt(half**2 + 2 * half * max(middle, 0.0))
        return float(middle + max(reach, score))

    return -upper(-mean), upper(mean)
