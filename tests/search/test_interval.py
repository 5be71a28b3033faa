"""The interval of a drop, against simulated splits and another library."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from compressor.result import Interval
from compressor.search.interval import Paired, drop_interval, t_ends

DELTA = 1.0


def answers(
    lost: float, won: float, *, samples: int = 1017, chunks: int = 64, draws: int = 300
) -> tuple[np.ndarray, np.ndarray]:
    """Drops of accuracy in points, (draws, chunks), and the samples of each chunk.

    Of each sample the right answer is lost and won with these probabilities.
    """
    random = np.random.default_rng(0).random((draws, samples))
    change = np.where(random < lost, 100.0, np.where(random < lost + won, -100.0, 0.0))
    edges = np.linspace(0, samples, chunks + 1).astype(int)
    sizes = np.diff(edges).astype(float)
    return np.add.reduceat(change, edges[:-1], axis=1) / sizes, sizes


@pytest.mark.parametrize(("lost", "won"), [(0.03, 0.02), (0.008, 0.003), (0.003, 0.0), (0.0, 0.0)])
def test_a_95_percent_interval_covers_the_true_drop_in_93_of_100_draws(
    lost: float, won: float
) -> None:
    drops, sizes = answers(lost, won)
    ends = np.array([t_ends(draw, sizes, 0.95) for draw in drops])
    true = 100 * (lost - won)
    assert ((ends[:, 0] <= true) & (true <= ends[:, 1])).mean() >= 0.93


@pytest.mark.parametrize("won", [0.0, 0.002, 0.02])
def test_a_drop_outside_delta_is_seldom_certain_to_be_within(won: float) -> None:
    drops, sizes = answers(0.0101 + won, won)  # just outside
    assert np.mean([t_ends(draw, sizes, 0.95)[1] <= DELTA for draw in drops]) < 0.05


def test_the_best_of_many_looks_is_not_believed_more_than_one() -> None:
    # 20 variants, all just outside delta; the one that looks best is taken
    drops, sizes = answers(0.03, 0.0199, draws=20 * 400)
    best = [drops[i + np.argmin(drops[i : i + 20] @ sizes)] for i in range(0, len(drops), 20)]
    alone = np.mean([t_ends(draw, sizes, 0.95)[1] <= DELTA for draw in best])
    counted = np.mean([t_ends(draw, sizes, 1 - 0.05 / 20)[1] <= DELTA for draw in best])
    assert alone > 0.15
    assert counted < 0.05


def test_equal_chunks_of_a_continuous_metric_have_the_usual_t_interval() -> None:
    half = np.random.default_rng(0).normal(0.3, 0.1, 1000)
    drops = np.concatenate([half, 0.6 - half])  # without skewness
    expected = stats.ttest_1samp(drops, 0).confidence_interval(0.95)
    assert t_ends(drops, np.full(2000, 1e6), 0.95) == pytest.approx(tuple(expected), rel=1e-4)


def paired(drops: np.ndarray, sizes: np.ndarray, off: float = 0.0) -> Paired:
    reference = np.full(len(drops), 90.0)
    whole = 90.0, 90.0 - float(drops @ sizes / sizes.sum()) + off
    return Paired(sizes.tolist(), reference.tolist(), (reference - drops).tolist(), whole)


def test_of_an_error_a_rise_is_the_drop() -> None:
    drops, sizes = answers(0.03, 0.01, draws=1)
    falls = drop_interval(paired(drops[0], sizes), DELTA, is_larger_better=True, looks=3)
    rises = drop_interval(paired(-drops[0], sizes), DELTA, is_larger_better=False, looks=3)
    assert isinstance(falls, Interval)
    assert falls == rises
    assert falls.low < falls.high
    assert (falls.chunks, falls.looks, falls.confidence) == (64, 3, 0.95)


def test_more_looks_make_it_wider() -> None:
    drops, sizes = answers(0.03, 0.01, draws=1)
    one, many = (
        drop_interval(paired(drops[0], sizes), DELTA, is_larger_better=True, looks=looks)
        for looks in (1, 40)
    )
    assert isinstance(one, Interval)
    assert isinstance(many, Interval)
    assert many.low < one.low < one.high < many.high


@pytest.mark.parametrize(
    ("chunks", "off", "words"),
    [(64, 0.5, "is not the mean over its parts"), (4, 0.0, "4 parts, too few")],
)
def test_a_metric_without_an_interval_says_why(chunks: int, off: float, words: str) -> None:
    drops, sizes = answers(0.03, 0.01, draws=1, chunks=chunks)
    found = drop_interval(paired(drops[0], sizes, off), DELTA, is_larger_better=True, looks=1)
    assert isinstance(found, str)
    assert words in found
