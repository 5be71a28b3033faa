"""Scores of channels against the formulas written the slow way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor.errors import ConfigError
from compressor.structure.groups import ChannelGroup, Member
from compressor.techniques.importance import (
    group_importance,
    l1_importance,
    l2_importance,
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


@pytest.mark.parametrize(
    ("layer", "dim"),
    [(nn.Embedding(5, 4), 1), (nn.ConvTranspose2d(3, 4, 2), 1), (nn.Linear(3, 4), 0)],
)
def test_channels_are_found_in_whatever_dimension_the_layer_holds_them(
    layer: nn.Module, dim: int
) -> None:
    member = Member("0", "out", tuple((i,) for i in range(4)), 4)
    model = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight.select(dim, 2).mul_(100)
    assert group_importance(model, ChannelGroup("0", 4, (member,)), "l1").argmax() == 2


def two_layers() -> tuple[nn.Module, ChannelGroup]:
    """A convolution whose four channels a norm scales; a linear layer reads them twice each."""
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(3, 4, 2), "norm": nn.BatchNorm2d(4), "linear": nn.Linear(8, 2)}
    )
    single = tuple((i,) for i in range(4))
    pairs = tuple((2 * i, 2 * i + 1) for i in range(4))
    members = (
        Member("conv", "out", single, 4),
        Member("norm", "out", single, 4),
        Member("linear", "in", pairs, 8),
    )
    return model, ChannelGroup("conv", 4, members)


def test_a_layer_counts_relative_to_its_mean() -> None:
    model, group = two_layers()
    scores = group_importance(model, group, "l1")
    raw = l1_importance(model["conv"].weight)
    assert scores.tolist() == pytest.approx((raw / raw.mean()).tolist())
    with torch.no_grad():
        model["conv"].weight *= 100
    assert group_importance(model, group, "l1").tolist() == pytest.approx(scores.tolist())


def test_bn_scale_reads_the_norm() -> None:
    model, group = two_layers()
    with torch.no_grad():
        model["norm"].weight.copy_(torch.tensor([1.0, -4.0, 2.0, 3.0]))
    order = group_importance(model, group, "bn_scale").argsort(descending=True)
    assert order.tolist() == [1, 3, 2, 0]


def test_without_gradients_taylor_falls_back_to_l2() -> None:
    model, group = two_layers()
    assert group_importance(model, group, "taylor").equal(group_importance(model, group, "l2"))


def test_an_unknown_criterion_names_the_nearest() -> None:
    model, group = two_layers()
    with pytest.raises(ConfigError, match="Did you mean 'taylor'"):
        group_importance(model, group, "tailor")
