"""An order of input channels in which the pattern 2:4 keeps more (Pool and Yu, 2021).

Which two of four neighbours stay depends on who is neighbour to whom. As in Pool and Yu, Channel
permutations for N:M sparsity, every way to deal the eight columns of two stripes out is tried.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

STRIPE = 4
MOST_ROWS = 256  # that the search looks at; more hardly change what is best
MOST_PAIRS = 2048  # of stripes that are tried: about half a second of one core

# Two of eight columns, by number, and for every four of eight: its two pairs, and which four it is.
_PAIRS = list(combinations(range(2 * STRIPE), 2))
_FOURS = list(combinations(range(2 * STRIPE), STRIPE))
_HALVES = len(_FOURS) // 2  # the first half holds column 0; the complement of i is -1 - i


def kept_score(scores: Tensor) -> Tensor:
    """The sum of scores that 2:4 keeps, as a tensor of one value.

    Args:
        scores: (rows, columns), 0 or more, columns a multiple of 4.
    """
    groups = scores.reshape(len(scores), -1, STRIPE)
    return groups.topk(2, dim=-1).values.sum()


def permutation_for_2_4(scores: Tensor) -> Tensor:
    """An order of columns in which 2:4 keeps as much of `scores` or more; the same in every run.

    Pairs of stripes take turns, as in a tournament; each takes the best of the 35 ways to deal its
    eight columns out, until a whole tournament gains nothing or `MOST_PAIRS` were tried.

    Args:
        scores: (rows, columns), 0 or more, columns a multiple of 4.

    Returns:
        (columns,) numbers of columns; 0, 1, 2, … if nothing is gained.
    """
    columns = scores.shape[1]
    identity = torch.arange(columns, device=scores.device)
    stripes = columns // STRIPE
    if stripes < 2:
        return identity
    sample = scores[:: -(-len(scores) // MOST_ROWS)].float().T.contiguous()
    order, idle = identity.clone(), 0
    for number in range(MOST_PAIRS // (stripes // 2)):
        pairs = torch.tensor(_round(stripes, number), device=scores.device)
        idle = 0 if _deal(sample, order, pairs) else idle + 1
        if idle >= stripes:  # a whole tournament
            break
    gains = kept_score(scores[:, order].double()) > kept_score(scores.double())
    return order if gains else identity


def _round(stripes: int, number: int) -> list[tuple[int, int]]:
    """Disjoint pairs of stripes; in `stripes` rounds every pair once (the circle method)."""
    seats = stripes + stripes % 2
    ring = [0, *((i + number) % (seats - 1) + 1 for i in range(seats - 1))]
    pairs = zip(ring[: seats // 2], reversed(ring[seats // 2 :]), strict=True)
    return [pair for pair in pairs if max(pair) < stripes]


def _deal(scores: Tensor, order: Tensor, pairs: Tensor) -> bool:
    """Deal the columns of each pair of stripes out in the best way, in place; whether it gained.

    Args:
        scores: (columns, rows).
        order: of the columns.
        pairs: (pairs, 2) disjoint stripes.
    """
    columns = order.view(-1, STRIPE)[pairs].flatten(1)  # (pairs, 8)
    kept = _kept_by_four(scores[columns])
    totals = kept[:, :_HALVES] + kept[:, _HALVES:].flip(1)
    best = totals.argmax(1)
    gained = totals.gather(1, best[:, None])[:, 0] > totals[:, 0] * (1 + 1e-6)  # not rounding
    fours = torch.tensor(_FOURS, device=order.device)
    best = torch.where(gained, best, 0)
    dealt = torch.cat([fours[best], fours[len(_FOURS) - 1 - best]], dim=1)
    order.view(-1, STRIPE)[pairs] = columns.gather(1, dealt).view(-1, 2, STRIPE)
    return bool(gained.any())


def _kept_by_four(values: Tensor) -> Tensor:
    """(pairs, 8, rows) -> (pairs, 70): what 2:4 keeps of every four columns.

    The two largest of a, b, c, d are a and b, or c and d, or the larger of each pair.
    """
    first, second = torch.tensor(_PAIRS, device=values.device).unbind(1)
    ones, others = values.index_select(1, first), values.index_select(1, second)
    sums, larger = ones + others, torch.maximum(ones, others)
    number = {pair: i for i, pair in enumerate(_PAIRS)}
    left = first.new_tensor([number[four[0], four[1]] for four in _FOURS])
    right = first.new_tensor([number[four[2], four[3]] for four in _FOURS])
    kept = larger.index_select(1, left) + larger.index_select(1, right)
    both = torch.maximum(sums.index_select(1, left), sums.index_select(1, right))
    return torch.maximum(kept, both).sum(2)
