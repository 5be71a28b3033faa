"""Two models evaluated side by side on the chunks of a split; see `search.interval`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from compressor.errors import MetricError, first_line
from compressor.interfaces.chunks import chunks
from compressor.interfaces.data import DataLoaderView, kept_generators, sample_count
from compressor.search.interval import Paired
from compressor.structure.trace import FORWARD_FAILURES

CHUNKS = 64
LEAST_SAMPLES = 8  # of a chunk; more than the channels that a list of images could be mistaken by

Evaluate = Callable[[nn.Module, Iterable[Any]], Mapping[str, float]]


def evaluate_pairs(
    evaluate: Evaluate,
    reference: nn.Module,
    compressed: nn.Module,
    loader: Iterable[Any],
    key: str,
    whole: tuple[float, float],
) -> Paired | str:
    """The metric `key` of both models on each chunk; or, as a sentence, why there is none.

    Args:
        evaluate: the user's evaluation, of a model on a loader.
        reference: uncompressed.
        compressed: as it is deployed.
        loader: of the split; read once more where it does not say how many samples it has. Its own
            generators are put back.
        key: of the metric.
        whole: the metrics of both on all of it.
    """
    view = loader if isinstance(loader, DataLoaderView) else DataLoaderView(loader)
    with kept_generators(loader):
        total = view.dataset_size or sum(map(sample_count, loader))
    samples: list[int] = []
    found: tuple[list[float], list[float]] = ([], [])
    try:
        with kept_generators(loader):
            for chunk in chunks(loader, max(total // CHUNKS, LEAST_SAMPLES)):
                samples.append(chunk.samples)
                for model, metrics in zip((reference, compressed), found, strict=True):
                    metrics.append(evaluate(model, chunk)[key])
    except (MetricError, *FORWARD_FAILURES) as error:
        return (
            f"The evaluation does not take a part of the split ({first_line(error)}), so there is "
            "no interval of the drop."
        )
    return Paired(samples, *found, whole)
