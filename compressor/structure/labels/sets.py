"""Labels in disjoint sets, whole arrays at a time; a set may be frozen, with the reason."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FIXED = 0  # the label of entries that belong to nothing that could be removed


class LabelSets:
    """Disjoint sets of labels. A label is an integer above 0; arrays hold them in any shape.

    What is united lives and dies together. What is united with `FIXED` is frozen.
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1, dtype=np.int64)
        self._smallest = np.zeros(1, dtype=np.int64)  # of the set, by its root
        self._size = np.ones(1, dtype=np.int64)  # of the set, by its root
        self._count = 1
        self._reasons: dict[int, str] = {}  # of frozen sets, by their roots

    def __len__(self) -> int:
        """One more than the largest label."""
        return self._count

    def fresh(self, count: int) -> Tensor:
        """New labels, each in a set of its own: (count,) int64."""
        start, self._count = self._count, self._count + count
        while self._count > len(self._parent):
            more = np.arange(len(self._parent), 2 * len(self._parent) + count, dtype=np.int64)
            self._parent = np.concatenate([self._parent, more])
            self._smallest = np.concatenate([self._smallest, more])
            self._size = np.concatenate([self._size, np.ones_like(more)])
        return torch.arange(start, self._count)

    def find(self, labels: Tensor) -> Tensor:
        """The name of each label's set, in the same shape: its smallest label."""
        return torch.from_numpy(self._smallest[self._roots(labels.numpy())])

    def unite(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Put labels at the same place into one set; the arrays are broadcast.

        Args:
            first: labels.
            second: labels.
            reason: why a label that meets `FIXED` is frozen.
        """
        shape = np.broadcast_shapes(first.shape, second.shape)
        a = self._roots(first.numpy())
        b = self._roots(second.numpy())
        a, b = (x if x.shape == shape else np.broadcast_to(x, shape) for x in (a, b))
        differ = a != b
        if not differ.any():
            return
        pairs = np.unique(np.stack([a[differ], b[differ]], axis=1), axis=0)
        for low, high in pairs.tolist():
            self._join(low, high, reason)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Say of the sets of these labels that nothing of them can be removed."""
        for root in np.unique(self._roots(labels.numpy())).tolist():
            if root != FIXED:
                self._reasons.setdefault(root, reason)

    def reason(self, label: int) -> str | None:
        """Why the set of `label` is frozen; None if it is not."""
        if label == FIXED:
            return "fixed"
        return self._reasons.get(self._root(label))

    def is_frozen(self, labels: Tensor) -> Tensor:
        """Where the label's set is frozen, in the same shape."""
        roots = self._roots(labels.numpy())
        frozen = np.fromiter(self._reasons, dtype=np.int64, count=len(self._reasons))
        return torch.from_numpy(np.isin(roots, frozen) | (roots == FIXED))

    def _roots(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        above = self._parent[labels]
        while True:
            higher = self._parent[above]
            if np.array_equal(higher, above):
                break
            above = higher
        self._parent[labels] = above  # the next way is short
        return above

    def _root(self, label: int) -> int:
        parent = self._parent
        root = label
        while (above := int(parent[root])) != root:
            root = above
        while label != root:
            parent[label], label = root, int(parent[label])
        return root

    def _join(self, a: int, b: int, reason: str) -> None:
        a, b = self._root(a), self._root(b)
        if a == b:
            return
        if FIXED in (a, b):  # the sets stay apart, so that each keeps its reason
            self._reasons.setdefault(max(a, b), reason)
            return
        first, second = sorted((a, b), key=lambda root: int(self._smallest[root]))
        why = self._reasons.pop(second, None)
        why = self._reasons.pop(first, why)
        # The smaller set goes below the larger: no way to a root is long, in whatever order.
        root, below = (a, b) if self._size[a] >= self._size[b] else (b, a)
        self._parent[below] = root
        self._size[root] += self._size[below]
        self._smallest[root] = self._smallest[first]
        if why is not None:
            self._reasons[root] = why
