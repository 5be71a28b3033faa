"""The order of columns in which 2:4 keeps most, against trying all."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from compressor.techniques.permutation import _round, kept_score, permutation_for_2_4
from compressor.training.algorithms import nm_mask


def scores(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) ** 3


def test_what_is_kept_is_what_the_mask_keeps() -> None:
    x = scores(7, 16)
    torch.testing.assert_close(kept_score(x), (x * nm_mask(x, 2, 4)).sum())


@pytest.mark.parametrize("seed", range(4))
def test_eight_columns_are_dealt_out_in_the_best_way(seed: int) -> None:
    x = scores(5, 8, seed)
    splits = ([*four, *(set(range(8)) - set(four))] for four in combinations(range(8), 4))
    best = max(kept_score(x[:, split]).item() for split in splits)
    assert kept_score(x[:, permutation_for_2_4(x)]).item() == pytest.approx(best)


@pytest.mark.parametrize("columns", [8, 12, 20, 64])
def test_an_order_names_each_column_once_and_never_keeps_less(columns: int) -> None:
    x = scores(40, columns)
    order = permutation_for_2_4(x)
    assert sorted(order.tolist()) == list(range(columns))
    assert kept_score(x[:, order]) > kept_score(x)
    assert order.equal(permutation_for_2_4(x))


def test_large_columns_that_lie_together_are_spread() -> None:
    x = torch.ones(4, 16)
    x[:, :8] = 10  # in two stripes of four: half of them would go
    assert kept_score(x).item() == 4 * (4 * 10 + 4 * 1)
    assert kept_score(x[:, permutation_for_2_4(x)]).item() == 4 * 8 * 10


def test_nothing_to_gain_leaves_the_order() -> None:
    for x in (torch.ones(4, 16), scores(4, 4)):
        assert permutation_for_2_4(x).tolist() == list(range(x.shape[1]))


@pytest.mark.parametrize("stripes", [2, 3, 4, 7, 8])
def test_in_a_tournament_every_pair_meets(stripes: int) -> None:
    met = set()
    for number in range(stripes):
        pairs = _round(stripes, number)
        assert len({s for pair in pairs for s in pair}) == 2 * len(pairs)  # disjoint
        met |= {frozenset(pair) for pair in pairs}
    assert len(met) == stripes * (stripes - 1) // 2
