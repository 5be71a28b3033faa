"""A tensor of the graph as the analysis sees it: its shape, and the labels of its entries."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Value:
    """What is known of one tensor.

    An entry is gone as soon as one of its labels is. The labels are kept as *factors*: arrays that
    broadcast to the shape, each with its full size in the dimensions in which its labels differ and
    size 1 in the others. The weight of a linear layer has two: (out, 1) and (1, in); the queries of
    an attention after `view(N, L, heads, size)` one: (1, 1, heads, size).

    Attributes:
        shape: of the tensor.
        factors: none means that nothing of it can be removed.
        constant: its value, where that is known and does not depend on inputs or weights.
        follows: it was made to fit another tensor (zeros of some shape), and will fit a smaller
            one as well.
    """

    shape: tuple[int, ...]
    factors: list[Tensor] = field(default_factory=list)
    constant: Tensor | None = None
    follows: bool = False

    def on(self, dim: int) -> list[Tensor]:
        """The factors whose labels differ along `dim`."""
        return [f for f in self.factors if f.shape[dim] > 1]

    def off(self, dim: int) -> list[Tensor]:
        """The others."""
        return [f for f in self.factors if f.shape[dim] == 1]


def support(factor: Tensor) -> tuple[int, ...]:
    """The dimensions in which the labels of a factor differ."""
    return tuple(dim for dim, size in enumerate(factor.shape) if size > 1)


def aligned(factor: Tensor, dims: int) -> Tensor:
    """With dimensions of size 1 in front, up to `dims`, as broadcasting does."""
    return factor.reshape((1,) * (dims - factor.dim()) + tuple(factor.shape))


def blocks(factor: Tensor, dim: int, count: int) -> Tensor:
    """(…, n, …) labels as (…, count, n / count, …)."""
    shape = factor.shape
    return factor.reshape(*shape[:dim], count, shape[dim] // count, *shape[dim + 1 :])


def vector(labels: Tensor, dim: int, dims: int) -> Tensor:
    """(n,) labels as a factor that runs along `dim` of `dims`."""
    return labels.reshape(*(len(labels) if d == dim else 1 for d in range(dims)))
