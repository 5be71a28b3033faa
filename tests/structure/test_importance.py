"""Scores of channels against the formulas written the slow way."""

from __future__ import annotations

import math

import pytest
import torch

from compressor.structure.importance import (
    fpgm_importance,
    hessian_importance,
    l1_importance,
    l2_importance,
    lamp_importance,
    taylor_importance,
)

WEIGHT = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
GRADIENT = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def test_l1_is_the_sum_of_absolute_values() -> None:
    by_hand = [sum(abs(float(x)) for x in channel.flatten()) for channel in WEIGHT]
    assert l1_importance(WEIGHT).tolist() == pytest.approx(by_hand)


def test_l2_is_the_root_of_the_sum_of_squares() -> None:
    by_hand = [sum(float(x) ** 2 for x in channel.flatten()) ** 0.5 for channel in WEIGHT]
    assert l2_importance(WEIGHT).tolist() == pytest.approx(by_hand)


def test_fpgm_is_the_sum_of_distances_to_the_other_filters() -> None:
    rows = WEIGHT.flatten(1).tolist()
    by_hand = [sum(math.dist(row, other) for other in rows) for row in rows]
    assert fpgm_importance(WEIGHT).tolist() == pytest.approx(by_hand)


def test_fpgm_wants_the_copy_of_another_filter_least_although_it_is_large() -> None:
    rows = torch.tensor([[9.0, 9.0], [9.0, 9.0], [-5.0, 1.0], [4.0, -3.0]])
    least = fpgm_importance(rows[torch.tensor([0, 1, 2])])
    assert least[0] == least[1] < least[2]


def test_lamp_divides_by_the_squares_that_are_not_smaller() -> None:
    squares = WEIGHT.flatten(1).square().sum(1)
    by_hand = [
        float(own) / sum(float(other) for other in squares if other >= own) for own in squares
    ]
    assert lamp_importance(squares).tolist() == pytest.approx(by_hand)


def test_the_largest_channel_of_every_layer_has_the_same_lamp_score() -> None:
    """So a common threshold leaves each layer its largest one, whatever the layers' scales."""
    assert float(lamp_importance(torch.tensor([1e-6, 3e-6])).max()) == pytest.approx(1.0)
    assert float(lamp_importance(torch.tensor([1e6, 3e6])).max()) == pytest.approx(1.0)


def test_taylor_is_the_squared_change_of_a_linear_loss_when_the_channel_is_zeroed() -> None:
    # For a loss that is linear in the weight, the first-order term is the whole change.
    loss = float((WEIGHT * GRADIENT).sum())
    for channel in range(4):
        without = WEIGHT.clone()
        without[channel] = 0
        change = loss - float((without * GRADIENT).sum())
        assert float(taylor_importance(WEIGHT, GRADIENT)[channel]) == pytest.approx(
            change**2, rel=1e-4
        )


def test_hessian_is_the_change_of_a_separable_quadratic_loss_at_its_minimum() -> None:
    # Optimal Brain Damage: at a minimum, with a diagonal Hessian h, the change is h w**2 / 2.
    curvature = GRADIENT.square()

    def loss(weight: torch.Tensor) -> float:
        return float((curvature * (weight - WEIGHT).square()).sum() / 2)

    for channel in range(4):
        without = WEIGHT.clone()
        without[channel] = 0
        score = hessian_importance(WEIGHT, curvature)[channel]
        assert float(score) == pytest.approx(loss(without), rel=1e-5)


@pytest.mark.parametrize("score", [l1_importance, l2_importance, fpgm_importance, lamp_importance])
def test_dead_channels_have_finite_scores(score: object) -> None:
    dead = torch.zeros(3) if score is lamp_importance else torch.zeros(3, 2)
    assert score(dead).tolist() == [0.0, 0.0, 0.0]  # type: ignore[operator]
