"""Sets of labels against connected components, in whatever order they are united."""

from __future__ import annotations

import random

import networkx
import pytest
import torch

from compressor.structure.labels.sets import FIXED, LabelSets

LABELS = 60


def random_pairs() -> list[tuple[int, int]]:
    """Pairs that leave several sets, large and small, and meet `FIXED` a few times."""
    numbers = random.Random(0)
    chain = [(k, k + 1) for k in range(1, 20)]
    others = [(numbers.randint(20, LABELS), numbers.randint(20, LABELS)) for _ in range(25)]
    return [*chain, *others, (FIXED, 30), (FIXED, 31)]


def orders() -> list[list[tuple[int, int]]]:
    pairs = random_pairs()
    shuffled = [random.Random(seed).sample(pairs, len(pairs)) for seed in range(5)]
    return [pairs, pairs[::-1], [(b, a) for a, b in pairs], *shuffled]


@pytest.mark.parametrize("pairs", orders())
@pytest.mark.parametrize("many", [False, True])
def test_sets_are_connected_components(pairs: list[tuple[int, int]], many: bool) -> None:
    sets = LabelSets()
    labels = sets.fresh(LABELS)
    sets.freeze(labels[9:10], "frozen by itself")
    first, second = torch.tensor(pairs).unbind(1)
    if many:
        sets.unite(first, second, "met")
    else:
        for a, b in zip(first, second, strict=True):
            sets.unite(a, b, "met")
            sets.find(labels)

    graph = networkx.Graph()
    graph.add_nodes_from(range(1, LABELS + 1))
    graph.add_edges_from((a, b) for a, b in pairs if FIXED not in (a, b))
    stuck = {b for a, b in pairs if a == FIXED} | {a for a, b in pairs if b == FIXED}
    for component in networkx.connected_components(graph):
        own = torch.tensor(sorted(component))
        assert sets.find(own).tolist() == [min(component)] * len(component)
        reason = "met" if component & stuck else "frozen by itself" if 10 in component else None
        assert {sets.reason(label) for label in component} == {reason}
        assert sets.is_frozen(own).tolist() == [reason is not None] * len(component)


def test_the_reason_of_the_smaller_label_stays() -> None:
    for pairs in ([(1, 2), (2, 3)], [(2, 3), (1, 2)], [(3, 1), (2, 1)]):
        sets = LabelSets()
        labels = sets.fresh(3)
        for label, reason in zip(labels, ("first", "second", "third"), strict=True):
            sets.freeze(label, reason)
        for a, b in pairs:
            sets.unite(torch.tensor(a), torch.tensor(b), "unused")
        assert [sets.reason(label) for label in (1, 2, 3)] == ["first"] * 3
