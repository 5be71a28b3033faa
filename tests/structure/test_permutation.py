"""Channels in another order: the same numbers come out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor.errors import SurgeryError
from compressor.interfaces.inputs import ModelInputs
from compressor.structure.channels import find_groups
from compressor.structure.groups import ChannelGroup, Member
from compressor.structure.permutation import permute_channels
from compressor.structure.trace import copy_model
from compressor.testing.models import TinyResNet
from tests.training.helpers import HIDDEN, make_model

CHANNELS = tuple((channel,) for channel in range(4))


def shuffled(size: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size)).tolist()


@pytest.mark.slow
def test_every_group_of_a_network_can_be_put_in_another_order() -> None:
    torch.manual_seed(0)
    model = TinyResNet().double().eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.running_mean)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    groups = find_groups(model, ModelInputs((x,))).groups
    assert len(groups) > 3
    permuted = copy_model(model)
    for group in groups:
        edit = permute_channels(permuted, group, shuffled(group.size))
        assert edit.added == edit.removed
        assert edit.added
        assert not permuted.conv1.weight.equal(model.conv1.weight) or group.name != "conv1"
        # 1e-12: float64 sums in another order
        torch.testing.assert_close(permuted(x), model(x), rtol=0, atol=1e-12)


def test_channels_go_where_the_order_says() -> None:
    model = make_model()
    before = copy_model(model)
    order = shuffled(8)
    permute_channels(model, HIDDEN, order)
    for new, old in enumerate(order):
        assert model[0].weight[new].equal(before[0].weight[old])
        assert model[1].running_mean[new].equal(before[1].running_mean[old])
        assert model[4].weight[:, new].equal(before[4].weight[:, old])
    assert isinstance(model[0].weight, nn.Parameter)


def test_a_channel_of_several_entries_moves_as_a_whole() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(8, 1))
    index = tuple((channel, channel + 4) for channel in range(4))
    group = ChannelGroup(
        "0", 4, (Member("0.weight", 0, "out", CHANNELS, 4), Member("1.weight", 1, "in", index, 8))
    )
    before = copy_model(model)
    permute_channels(model, group, [2, 0, 1, 3])
    assert model[1].weight[0].equal(before[1].weight[0, [2, 0, 1, 3, 6, 4, 5, 7]])


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    group = ChannelGroup("0", 4, (Member("0.weight", 0, "out", CHANNELS, 4),))
    permute_channels(model, group, [3, 2, 1, 0])
    assert model[1].weight is model[0].weight


def test_what_is_no_order_is_refused() -> None:
    for order in ([0] * 8, [0, 1], [*range(7), 8]):
        with pytest.raises(SurgeryError, match="no order of the 8 channels"):
            permute_channels(make_model(), HIDDEN, order)


def test_channels_of_unequal_sizes_are_refused() -> None:
    uneven = Member("4.weight", 1, "in", ((0, 1), (2,), (3,)), 8)
    with pytest.raises(SurgeryError, match="have 2 and 1 entries"):
        permute_channels(make_model(), ChannelGroup("0", 3, (uneven,)), [1, 0, 2])


def test_a_buffer_that_is_not_saved_is_refused() -> None:
    """Loaded again, the model would have it in the old order."""
    model = make_model()
    model.register_buffer("scale", torch.ones(4), persistent=False)
    group = ChannelGroup("scale", 4, (Member("scale", 0, "out", CHANNELS, 4),))
    with pytest.raises(SurgeryError, match="in no state dict"):
        permute_channels(model, group, [1, 0, 2, 3])
