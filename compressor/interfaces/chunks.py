"""A split in disjoint parts, each a loader of its own: evaluations are compared part by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from compressor.interfaces.data import leaves, sample_count, split_batch


class Chunk(list[Any]):
    """Batches that belong together: a loader, with what evaluation functions read of one."""

    @property
    def samples(self) -> int:
        """In all batches."""
        return sum(map(sample_count, self))

    @property
    def batch_size(self) -> int:
        """Samples of the largest batch."""
        return max(map(sample_count, self), default=0)

    @property
    def dataset(self) -> range:
        """Of the length that a data set of these samples would have; the samples are not in it."""
        return range(self.samples)


def chunks(loader: Iterable[Any], samples: int) -> Iterator[Chunk]:
    """The loader's batches in their order, in parts of about `samples` samples.

    Larger batches are cut, if they can be (see `split_batch`). One part at a time is in memory.

    Args:
        loader: of batches.
        samples: of each part, at least; the last one may have fewer, and one that begins with the
            rest of a batch has more.

    >>> import torch
    >>> [chunk.samples for chunk in chunks([torch.zeros(5, 2), torch.zeros(4, 2)], 3)]
    [3, 5, 1]
    """
    chunk = Chunk()
    for batch in loader:
        for part in split_batch(batch, samples) if _is_stacked(batch) else [batch]:
            chunk.append(part)
            if chunk.samples >= samples:
                yield chunk
                chunk = Chunk()
    if chunk:
        yield chunk


def _is_stacked(batch: Any) -> bool:
    """Whether all tensors have as many rows: those of a list of images differ."""
    rows = {leaf.shape[0] for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim}
    return len(rows) == 1
