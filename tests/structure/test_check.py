"""The masked-dense check: it lets right groups pass, and finds every kind of wrong one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.structure.channels import find_groups, verify_group
from compressor.structure.check import DOUBLE, IS_OUTPUT, SINGLE, Check, _kept, make_probe
from compressor.structure.groups import ChannelGroup, Member
from compressor.testing.models import TinyMLP, TinyResNet
from tests.structure.labels.nets import Net, named, rows


def made(tensor: str, entries: range, size: int) -> Member:
    """Outputs `entries` of a weight, one for each channel."""
    return Member(tensor, 0, "out", tuple((e,) for e in entries), size)


def read(tensor: str, entries: range, size: int) -> Member:
    """Inputs `entries` of a weight."""
    return Member(tensor, 1, "in", tuple((e,) for e in entries), size)


def layer(name: str, width: int) -> tuple[Member, ...]:
    """All outputs of a layer with a bias."""
    return tuple(made(f"{name}.{key}", range(width), width) for key in ("weight", "bias"))


def test_a_right_group_passes() -> None:
    model, inputs = TinyMLP(), rows(2, 64)
    group = ChannelGroup("fc1", 32, (*layer("fc1", 32), read("fc2.weight", range(32), 32)))
    assert verify_group(model, inputs, group) is None


def test_a_wrong_index_is_off_by_something() -> None:
    model, inputs = TinyMLP(), rows(2, 64)
    turned = read("fc2.weight", range(31, -1, -1), 32)
    reason = verify_group(model, inputs, ChannelGroup("fc1", 32, (*layer("fc1", 32), turned)))
    assert reason is not None
    assert "off by" in reason


def test_a_missing_member_does_not_run() -> None:
    reason = verify_group(TinyMLP(), rows(2, 64), ChannelGroup("fc1", 32, layer("fc1", 32)))
    assert reason is not None
    assert "does not run" in reason


def test_a_missing_bias_is_found() -> None:
    members = (made("fc1.weight", range(32), 32), read("fc2.weight", range(32), 32))
    reason = verify_group(TinyMLP(), rows(2, 64), ChannelGroup("fc1", 32, members))
    assert reason is not None
    assert "21 channels and a bias of 32" in reason


def test_a_group_of_outputs_is_called_so() -> None:
    reason = verify_group(TinyMLP(), rows(2, 64), ChannelGroup("fc3", 10, layer("fc3", 10)))
    assert reason == IS_OUTPUT


def test_a_single_channel_cannot_be_removed() -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2))
    group = ChannelGroup("0", 1, (*layer("0", 1), read("1.weight", range(1), 1)))
    reason = verify_group(model, rows(2, 3), group)
    assert reason == "It has a single channel, so none can be removed."


def test_a_channel_that_a_function_reads_by_number_is_found() -> None:
    """Nothing raises here: only the comparison of values shows that the wrong channel is read."""

    def call(net: Any, x: Tensor) -> Tensor:
        hidden = net.a(x)
        out: Tensor = net.b(F.relu(hidden)) + hidden[:, :1]
        return out

    model = Net(call, a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    group = ChannelGroup("a", 6, (*layer("a", 6), read("b.weight", range(6), 6)))
    reason = verify_group(model, rows(2, 4), group)
    assert reason is not None
    assert "off by" in reason


def test_a_check_that_shows_no_change_proves_nothing() -> None:
    model = Net(lambda m, x: m.b(m.a(x)) * 0.0 + x, a=nn.Linear(4, 6), b=nn.Linear(6, 4))
    reasons = dict(find_groups(model, rows(2, 4)).quarantined)
    assert "proves nothing" in reasons["a"]


def test_zero_initialised_layers_do_not_make_the_check_vacuous() -> None:
    model = TinyResNet()
    for parameter in (model.linear.weight, model.layer1[0].bn2.weight):
        nn.init.zeros_(parameter)
    assert len(find_groups(model, rows(2, 1, 8, 8)).groups) == 5


def test_the_probe_hides_no_channel() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.PReLU(4))
    nn.init.zeros_(model[0].weight)
    probe = make_probe(model)
    for parameter in probe.parameters():
        assert parameter.dtype == torch.float64
        assert parameter.unique().numel() == parameter.numel()
    assert not model[0].weight.any()  # the model is not changed


def test_one_wrong_group_among_many_is_found() -> None:
    model, inputs = TinyResNet(), rows(2, 1, 8, 8)
    groups = list(find_groups(model, inputs).groups)
    wrong = groups[2]
    last = replace(wrong.members[-1], index=wrong.members[-1].index[::-1])
    groups[2] = replace(wrong, members=(*wrong.members[:-1], last))
    assert list(Check(model, inputs).faults(groups)) == [wrong.name]


def test_groups_that_hold_alone_and_not_together_lose_one() -> None:
    """A width that two groups would halve, and that code asks to be even in sum."""

    def call(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x), m.b(x)
        if a.shape[1] < 6 and b.shape[1] < 6:
            raise ValueError("one of both must be whole")
        out: Tensor = m.c(torch.cat([a, b], 1))
        return out

    model = Net(call, a=nn.Linear(4, 6), b=nn.Linear(4, 6), c=nn.Linear(12, 2))
    first = ChannelGroup("a", 6, (*layer("a", 6), read("c.weight", range(6), 12)))
    second = ChannelGroup("b", 6, (*layer("b", 6), read("c.weight", range(6, 12), 12)))
    faults = Check(model, rows(2, 4)).faults([first, second])
    assert faults == {"b": "It cannot be pruned together with other groups."}


def test_groups_of_equal_size_are_cut_unequally() -> None:
    """Code that takes half of what two groups make runs as long as both lose as many."""

    def call(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([m.a(x), m.b(x)], 1)
        half = x.shape[1] // 2
        out: Tensor = m.c(x[:, :half]) + m.d(x[:, half:])
        return out

    model = Net(call, a=nn.Linear(4, 6), b=nn.Linear(4, 6), c=nn.Linear(6, 2), d=nn.Linear(6, 2))
    first = ChannelGroup("a", 6, (*layer("a", 6), read("c.weight", range(6), 6)))
    second = ChannelGroup("b", 6, (*layer("b", 6), read("d.weight", range(6), 6)))
    assert set(Check(model, rows(2, 4)).faults([first, second])) == {"a", "b"}


def test_a_check_leaves_its_probe_as_it_was() -> None:
    model, inputs = TinyMLP(), rows(2, 64)
    check = Check(model, inputs)
    before = {name: value.clone() for name, value in check.probe.state_dict().items()}
    check.faults(find_groups(model, inputs).groups)
    after = check.probe.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_cast_on_the_way_hides_no_error() -> None:
    """DeBERTa's heads, miscounted, were off by 1e-5 where float32 alone leaves 1e-6."""
    model = Net(lambda m, x: m.b(F.relu(m.a(x)).float()), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    check = Check(model, rows(2, 4))
    assert check.precision is DOUBLE
    exact = check.probe.b(F.relu(check.probe.a(check.inputs.args[0])))
    assert torch.equal(check.dense[0], exact)


class Single(nn.Linear):
    """As a kernel of one's own that knows float32 alone."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return super().forward(x)


def test_a_model_that_runs_in_float32_alone_is_compared_as_coarsely() -> None:
    model = Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(4, 6), b=Single(6, 2))
    assert Check(model, rows(2, 4)).precision is SINGLE
    assert named(find_groups(model, rows(2, 4)), "a").size == 6


def test_what_code_makes_in_float32_is_no_obstacle() -> None:
    def call(net: Net, x: Tensor) -> Tensor:
        steps = torch.arange(4) / 4 + torch.zeros(2, 4)
        return net.b(F.relu(net.a(x + steps)))

    model = Net(call, a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    assert Check(model, rows(2, 4)).precision is DOUBLE
    assert named(find_groups(model, rows(2, 4)), "a").size == 6


def test_each_channel_is_removed_in_one_of_the_two_cuts() -> None:
    """Two unrelated subsets left a fifth of the channels in both, and their errors unseen."""
    for size in (2, 3, 9, 64):
        for first in (0, 1):
            one, other = (_kept(size, first, part) for part in (0, 1))
            assert one
            assert other
            assert sorted((*one, *other)) == list(range(size))


def test_a_unit_that_is_never_on_proves_nothing_beside_others() -> None:
    def call(net: Net, x: Tensor) -> Tensor:
        dead = F.relu(net.a(x) / net.a(x).shape[1] - 100)
        return net.b(F.relu(net.c(x))) + net.d(dead)

    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 2), "c": nn.Linear(4, 6)}
    model = Net(call, **layers, d=nn.Linear(6, 2))
    found = find_groups(model, rows(2, 4))
    assert [group.name for group in found.groups] == ["c"]
    assert "proves nothing" in dict(found.quarantined)["a"]


def test_what_differs_in_training_alone_is_seen() -> None:
    def call(net: Net, x: Tensor) -> Tensor:
        hidden = F.relu(net.a(x))
        return net.b(hidden / hidden.shape[1] if net.training else hidden)

    model = Net(call, a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    [(name, reason)] = find_groups(model, rows(2, 4)).quarantined
    assert name == "a"
    assert "in training mode," in reason


def test_a_model_that_does_not_run_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"does not run on inputs of shapes \(2, 3\)"):
        Check(TinyMLP(), rows(2, 3))


def test_a_model_without_a_float_output_is_an_error() -> None:
    model = Net(lambda m, x: m.a(x).argmax(1), a=nn.Linear(4, 6))
    with pytest.raises(ModelError, match="no floating point tensor"):
        Check(model, rows(2, 4))
