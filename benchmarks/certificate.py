"""How often the interval of a certificate holds: simulated splits, with and without selection.

python -m benchmarks.certificate --json certificate.json

Of each sample the compressed model loses the right answer, or wins it, with a given probability, so
the true drop is known. Covered: the share of splits whose interval has it inside. Certified: the
share of splits whose whole interval lies within a delta just below the true drop; once for a
variant on its own, once for the best-looking of 20 such variants, whose interval counts 20 looks.
Beside it a percentile bootstrap of the same chunks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import finish, make_parser
from compressor.search.interval import CONFIDENCE, t_ends

CHUNKS = 64
RESAMPLES = 1000
LOOKS = 20  # variants of which the best is taken
JUST_BELOW = 0.99  # of the true drop: the delta that it is outside of
SAMPLES = (1017, 10_000)
CHANGES = (  # (lost, won): shares of the samples
    (0.0101, 0.0),
    (0.012, 0.002),
    (0.03, 0.02),
    (0.03, 0.0199),
    (0.06, 0.04),
    (0.02, 0.02),
)
Floats = NDArray[np.float64]
Row = dict[str, Any]


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    started = time.monotonic()
    draws = 100 if arguments.quick else 500
    random = np.random.default_rng(arguments.seed)
    rows = [
        row(samples, lost, won, draws, random)
        for samples in SAMPLES[: 1 if arguments.quick else None]
        for lost, won in CHANGES
    ]
    summary = {
        "least_covered": min(row["covered %"] for row in rows),
        "most_certified_outside": max(row["certified outside %"] or 0.0 for row in rows),
        "most_certified_outside_best_of_20": max(
            row[f"certified outside %, best of {LOOKS}"] or 0.0 for row in rows
        ),
        "least_covered_by_bootstrap": min(row["covered % (bootstrap)"] for row in rows),
    }
    finish(rows, summary, arguments, started)


def row(samples: int, lost: float, won: float, draws: int, random: np.random.Generator) -> Row:
    """One kind of split and variant."""
    true = 100 * (lost - won)
    drops, sizes = draw(samples, lost, won, draws, random)
    alone = np.array([t_ends(each, sizes, CONFIDENCE) for each in drops])
    resampled = np.array([percentiles(each, sizes, random) for each in drops])
    best = [
        min(draw(samples, lost, won, LOOKS, random)[0], key=lambda each: float(each @ sizes))
        for _ in range(draws)
    ]
    chosen = np.array([t_ends(each, sizes, 1 - (1 - CONFIDENCE) / LOOKS) for each in best])
    is_worse = true > 0
    return {
        "samples": samples,
        "lost %": 100 * lost,
        "won %": 100 * won,
        "true drop": true,
        "covered %": covered(alone, true),
        "covered % (bootstrap)": covered(resampled, true),
        "mean width": float((alone[:, 1] - alone[:, 0]).mean()),
        "certified outside %": certified(alone, true) if is_worse else None,
        f"certified outside %, best of {LOOKS}": certified(chosen, true) if is_worse else None,
    }


def draw(
    samples: int, lost: float, won: float, draws: int, random: np.random.Generator
) -> tuple[Floats, Floats]:
    """Drops in points, (draws, chunks), and the samples of each chunk."""
    shares = random.random((draws, samples), dtype=np.float32)
    change = np.where(shares < lost, 100.0, np.where(shares < lost + won, -100.0, 0.0))
    edges = np.linspace(0, samples, CHUNKS + 1).astype(int)
    sizes = np.diff(edges).astype(float)
    return np.add.reduceat(change, edges[:-1], axis=1) / sizes, sizes


def percentiles(drops: Floats, sizes: Floats, random: np.random.Generator) -> Sequence[float]:
    """Both ends of the bootstrap over chunks."""
    taken = random.integers(0, len(drops), (RESAMPLES, len(drops)))
    means = (drops * sizes)[taken].sum(1) / sizes[taken].sum(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def covered(ends: Floats, true: float) -> float:
    return 100 * float(((ends[:, 0] <= true) & (true <= ends[:, 1])).mean())


def certified(ends: Floats, true: float) -> float:
    return 100 * float((ends[:, 1] <= JUST_BELOW * true).mean())


if __name__ == "__main__":
    main()
