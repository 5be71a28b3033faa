"""Weights that share few values, their palette, while they train (Han et al. 2016, 1510.00149)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.training.algorithms.holding import Holding
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State

MOST_BITS = 8
MOST_ROUNDS = 100  # of Lloyd's; it mostly ends after 20 to 60


def kmeans(values: Tensor, count: int) -> Tensor:
    """Centroids of `values` by Lloyd's algorithm in one dimension; the same in every run.

    It begins once at quantiles, which serve the many small weights, and once at equal distances,
    which serve the few large ones (Han et al. 2016 found those to matter more), and keeps the
    better end. In one dimension a cluster is an interval, so that sorted values and their
    cumulative sums do: a round costs O(count log n).

    Args:
        values: of any shape, floating point, not empty.
        count: of centroids, 1 or more; fewer come back if `values` has fewer different ones.

    Returns:
        (count,) ascending, in float64.

    Raises:
        ConfigError: if a value is not finite.

    >>> kmeans(torch.tensor([0.0, 1.0, 1.0, 1.0, 4.0, 6.0]), 2)
    tensor([0.7500, 5.0000], dtype=torch.float64)
    """
    if not values.isfinite().all():
        raise ConfigError("A weight is not finite, so it has no nearest value. Train it again.")
    ordered = values.detach().flatten().double().sort().values
    distinct: Tensor = torch.unique_consecutive(ordered)
    if len(distinct) <= count:
        return distinct
    fractions = (torch.arange(count, dtype=torch.float64, device=ordered.device) + 0.5) / count
    quantiles = ordered[(fractions * len(ordered)).long()]
    linear = ordered[0] + (ordered[-1] - ordered[0]) * fractions
    ends = [_lloyd(ordered, start) for start in (linear, quantiles)]
    best: Tensor = torch.unique_consecutive(min(ends, key=partial(_squared_error, ordered)))
    return best


def assign(values: Tensor, centroids: Tensor) -> Tensor:
    """Number of the nearest of the ascending `centroids` for each of `values`, of their shape.

    >>> assign(torch.tensor([0.2, 0.9, 5.0]), torch.tensor([0.0, 1.0, 4.0]))
    tensor([0, 1, 2])
    """
    middles = (centroids[1:] + centroids[:-1]) / 2
    return torch.bucketize(values.detach().to(middles.dtype), middles)


def cluster_weights(weight: Tensor, bits: int) -> Tensor:
    """`weight` with every value replaced by the nearest of 2**bits centroids.

    Zeros, which pruning made, stay: then 0 is one of the values, and the others share the rest.

    Args:
        weight: of any shape, floating point.
        bits: 1 to 8.

    Returns:
        Of the shape and dtype of `weight`, with at most 2**bits values.

    Raises:
        ConfigError: if `bits` is out of range, or a value is not finite.
    """
    if not 1 <= bits <= MOST_BITS:
        raise ConfigError(f"bits={bits} makes no palette. Write 1 to {MOST_BITS}.")
    is_set = weight.detach() != 0
    count = 2**bits - int(not bool(is_set.all()))
    values = weight.detach()[is_set]
    result = torch.zeros_like(weight, requires_grad=False)
    if len(values):
        centroids = kmeans(values, count)
        result[is_set] = centroids[assign(values, centroids)].to(weight.dtype)
    return result


def cluster_means(values: Tensor, clusters: Tensor) -> Tensor:
    """`values` with each replaced by the mean of its cluster; means of equal values are exact.

    Args:
        values: of any shape, floating point.
        clusters: of the same shape, numbers from 0.

    >>> cluster_means(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([0, 0, 1]))
    tensor([2., 2., 8.])
    """
    flat, index = values.detach().flatten(), clusters.flatten().long()
    count = int(index.max()) + 1 if len(index) else 0
    # From the lowest value up: a plain mean would round equal values to others.
    low = flat.new_full((count,), float("inf")).scatter_reduce(0, index, flat, "amin")
    above = (flat - low[index]).double()
    sums = above.new_zeros(count).index_add(0, index, above)
    sizes = torch.bincount(index, minlength=count).clamp_min(1)
    means = low + (sums / sizes).to(flat.dtype)
    return means[index].reshape(values.shape)


class WeightClustering(Holding):
    """Puts weights on palettes when training begins, and then trains the palettes.

    Which weights are equal is decided once, by k-means; from then on each cluster moves as one, by
    the mean of its weights' gradients. Han et al. take the sum; the mean is the same direction for
    a cluster, and the projection of the step that the weights would take on their own, so the
    learning rate that suits those suits the palette.

    Args:
        bits: of an index into the palette, 1 to 8: 2**bits values a layer. A mapping from names of
            layers holds those alone: of modules with a `weight`, or with layers inside.

    Raises:
        ConfigError: if `bits` is out of range.
    """

    participle = "clustered"
    card = Card(
        summary="Lets the weights of a layer share few values, and trains those values.",
        source="Han et al. (2016), Deep compression: Compressing deep neural networks with "
        "pruning, trained quantization and Huffman coding",
        functional=None,
        settings="`bits` of an index: 2 ** bits values a layer.",
        use_when="The file must be small, and the target computes in float.",
        avoid_when="The target should be faster: it computes with the values as before. Use int8.",
        cost="A byte a weight; at every step a scatter and a gather over weights and gradients.",
    )

    def __init__(self, bits: int | Mapping[str, int] = 4) -> None:
        self.bits = dict(bits) if isinstance(bits, Mapping) else bits
        for value in self.bits.values() if isinstance(self.bits, dict) else [self.bits]:
            if not 1 <= value <= MOST_BITS:
                raise ConfigError(f"bits={value} makes no palette. Write 1 to {MOST_BITS}.")
        super().__init__(tuple(self.bits) if isinstance(self.bits, dict) else None)

    def project(self, values: Tensor, held: Tensor) -> None:
        """Cluster by cluster, the mean."""
        values.copy_(cluster_means(values, held))

    def on(self, event: Event, state: State) -> None:
        """Project gradients or weights; at the beginning of the first fit, make the palettes."""
        if event is Event.FIT_START and not self._held:
            self.begin_to_hold(self._cluster(state.model))
        super().on(event, state)

    def _cluster(self, model: nn.Module) -> dict[str, Tensor]:
        """The clusters of each weight, which is put on its palette."""
        clusters = {}
        for name, weight in self.targets(model).items():
            with torch.no_grad():
                weight.copy_(cluster_weights(weight, self._bits_of(model, weight)))
            numbers = torch.unique(weight.detach(), return_inverse=True)[1]
            clusters[name] = numbers.to(torch.uint8)
        return clusters

    def _bits_of(self, model: nn.Module, weight: nn.Parameter) -> int:
        if not isinstance(self.bits, dict):
            return self.bits
        return next(bits for name, bits in self.bits.items() if self.holds(model, name, weight))


def _lloyd(ordered: Tensor, centroids: Tensor) -> Tensor:
    """The end of Lloyd's algorithm on ascending values; a cluster that runs empty stays put."""
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    ends = None
    for _ in range(MOST_ROUNDS):
        before, ends = ends, _ends(ordered, centroids)
        if before is not None and ends.equal(before):
            break
        sizes = ends.diff()
        means = sums[ends].diff() / sizes.clamp_min(1)
        centroids = torch.where(sizes > 0, means, centroids).sort().values
    return centroids


def _ends(ordered: Tensor, centroids: Tensor) -> Tensor:
    """Where each cluster begins in `ordered`, and where the last ends."""
    middles = (centroids[1:] + centroids[:-1]) / 2
    inner = torch.searchsorted(ordered, middles, right=True)  # as `assign`: a tie goes down
    edges = inner.new_tensor([0]), inner.new_tensor([len(ordered)])
    return torch.cat([edges[0], inner, edges[1]])


def _squared_error(ordered: Tensor, centroids: Tensor) -> float:
    return float((ordered - centroids[assign(ordered, centroids)]).square().sum())
