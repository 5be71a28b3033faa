"""Which channels stay, and at which widths."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from compressor.config import Config
from compressor.errors import ConfigError, SurgeryError
from compressor.interfaces.inputs import ModelInputs
from compressor.result import Choice
from compressor.structure.groups import ChannelGroup, Member
from compressor.structure.scores import CRITERIA
from compressor.techniques import ChannelPruning, TechniqueContext
from compressor.techniques.channel_pruning import candidate_widths, plateau_widths, widths_of
from compressor.testing.models import CifarResNet, TinyMLP, TinyTransformer

INPUTS = ModelInputs((torch.randn(4, 64, generator=torch.Generator().manual_seed(0)),))


def test_every_criterion_may_be_configured() -> None:
    assert set(get_args(get_type_hints(Config)["importance"])) == set(CRITERIA)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_ranks_and_leaves_the_model_alone(criterion: str) -> None:
    torch.manual_seed(0)
    model = TinyMLP()
    calls = []

    def add_gradients(copy: nn.Module) -> None:
        calls.append(copy)
        INPUTS.call(copy).square().sum().backward()

    context = TechniqueContext(INPUTS, importance=criterion, accumulate_gradients=add_gradients)
    choices = list(ChannelPruning().choices(model, context))
    assert {choice.site for choice in choices} == {"fc1", "fc2"}
    assert bool(calls) is (criterion in ("taylor", "hessian"))
    assert all(copy is not model for copy in calls)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
def test_kept_channels_are_those_of_the_largest_weights_that_make_and_read_them() -> None:
    torch.manual_seed(0)
    model = TinyMLP()
    context = TechniqueContext(INPUTS, importance="l2")
    choice = next(c for c in ChannelPruning().choices(model, context) if c.site == "fc2")
    made = [float(row.norm()) for row in model.fc2.weight.detach()]
    read = [float(column.norm()) for column in model.fc3.weight.detach().T]
    scores = [a / sum(made) + b / sum(read) for a, b in zip(made, read, strict=True)]
    best = sorted(range(32), key=lambda channel: -scores[channel])[:24]
    assert choice.setting["kept"] == sorted(best)


@pytest.mark.slow
def test_padded_shortcuts_are_pruned() -> None:
    net = CifarResNet(8).eval()
    inputs = ModelInputs((torch.randn(2, 3, 32, 32),))
    context = TechniqueContext(inputs, importance="l1")
    sites = {choice.site for choice in ChannelPruning().choices(net, context)}
    assert {"conv1", "layer2.0.conv2", "layer3.0.conv2"} < sites
    assert context.lost == []


def test_what_cannot_be_pruned_is_reported_with_its_reason() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2)).eval()
    context = TechniqueContext(ModelInputs((torch.randn(2, 4),)), importance="l1")
    list(ChannelPruning().choices(net, context))
    [lost] = context.lost
    assert (lost.technique, lost.site) == ("channel_pruning", "0")
    assert "aten.layer_norm in '1' normalises over them" in lost.reason


@pytest.mark.slow
def test_heads_are_kept_whole_and_named_by_modules_of_the_reference() -> None:
    model = TinyTransformer(dim=32, heads=4, depth=1).eval()
    inputs = ModelInputs((torch.arange(10).reshape(2, 5),))
    context = TechniqueContext(inputs, importance="l2", width_multiple=8, min_width=8)
    choices = list(ChannelPruning().choices(model, context))
    heads = [choice for choice in choices if "of 4 channels" in choice.label]
    assert [len(choice.setting["kept"]) for choice in heads] == [3, 2, 1]
    names = {name for name, _ in model.named_modules()}
    assert all(set(choice.modules) <= names for choice in choices)


@pytest.mark.parametrize(
    ("size", "step", "least", "expected"),
    [(64, 16, 16, [48, 32, 16]), (16, 4, 16, []), (20, 8, 8, [16, 8]), (7, 4, 4, [4])],
)
def test_widths_lie_on_the_targets_grid(
    size: int, step: int, least: int, expected: list[int]
) -> None:
    assert candidate_widths(size, step, least) == expected


def group_of(channels: int, entries: int) -> ChannelGroup:
    index = tuple(tuple(range(c * entries, (c + 1) * entries)) for c in range(channels))
    member = Member("0.weight", 0, "out", index, channels * entries)
    return ChannelGroup("0", channels, (member,))


def test_the_grid_is_of_entries_so_that_any_number_of_heads_lies_on_it() -> None:
    context = TechniqueContext(INPUTS, width_multiple=16, min_width=16)
    assert widths_of(group_of(12, 64), context) == [9, 6, 3]
    assert widths_of(group_of(4, 16), context) == [3, 2, 1]
    assert widths_of(group_of(1, 64), context) == []
    assert widths_of(group_of(32, 4), context) == [24, 16, 8]
    assert widths_of(group_of(12, 1), context) == []  # narrower than the grid


# 3×3 convolutions of so many channels on 16×16, microseconds, float32 in ONNX Runtime on x86
MEASURED = {
    **{8: 8.4, 12: 11.8, 16: 13.2, 20: 42.9, 24: 42.7, 28: 43.0, 32: 42.5},
    **{36: 91.2, 40: 91.2, 44: 91.4, 48: 91.6, 52: 163.0, 56: 164.0, 60: 165.0, 64: 188.0},
}


def test_widths_are_the_widest_of_their_plateaus() -> None:
    assert plateau_widths(MEASURED, 64) == [48, 32, 16]
    assert plateau_widths({w: c for w, c in MEASURED.items() if w <= 32}, 32) == [16, 8]


def test_a_width_that_is_not_faster_than_the_next_wider_is_not_offered() -> None:
    flat = dict.fromkeys(range(4, 65, 4), 5.0)
    assert plateau_widths(flat, 64) == []
    slower = {16: 9.0, 32: 9.0, 48: 4.0, 64: 5.0}
    assert plateau_widths(slower, 64) == [48]


def test_costs_are_asked_for_on_a_coarse_grid_only() -> None:
    asked: list[int] = []

    def cost(group: ChannelGroup, width: int) -> float:
        asked.append(width)
        return float(width)

    context = TechniqueContext(INPUTS, group_cost=cost)
    assert widths_of(group_of(512, 1), context) == [384, 256, 128]
    assert len(asked) <= 17
    assert all(width % 32 == 0 for width in asked)
    asked.clear()
    assert widths_of(group_of(12, 64), context) == [9, 6, 3]
    assert asked == list(range(1, 13))


def l1_best(model: TinyMLP, width: int) -> list[int]:
    """Of fc2, written out."""
    made = [float(row.abs().sum()) for row in model.fc2.weight.detach()]
    read = [float(column.abs().sum()) for column in model.fc3.weight.detach().T]
    scores = [a / sum(made) + b / sum(read) for a, b in zip(made, read, strict=True)]
    return sorted(sorted(range(32), key=lambda channel: -scores[channel])[:width])


@pytest.mark.slow
def test_reranked_choices_keep_as_many_channels_by_the_other_criterion() -> None:
    torch.manual_seed(0)
    model = TinyMLP()
    context = TechniqueContext(INPUTS, importance="fpgm")
    pruning = ChannelPruning()
    choices = [c for c in pruning.choices(model, context) if "16 of" in c.label]
    assert {c.site for c in choices} == {"fc1", "fc2"}
    reranked = pruning.reranked(model, choices, "l1", context)
    assert next(c for c in reranked if c.site == "fc2").setting == {"kept": l1_best(model, 16)}
    for old, new in zip(choices, reranked, strict=True):
        assert (new.site, new.label, new.modules) == (old.site, old.label, old.modules)
        assert len(new.setting["kept"]) == len(old.setting["kept"])
    assert reranked != choices
    assert reranked == ChannelPruning().reranked(model, choices, "l1", context)
    assert pruning.reranked(model, reranked, "fpgm", context) == choices
    assert pruning.reranked(model, [], "l1", context) == []


@pytest.mark.slow
def test_what_cannot_be_reranked_is_refused() -> None:
    model, context = TinyMLP(), TechniqueContext(INPUTS)
    elsewhere = Choice("channel_pruning", "fc9", {"kept": [0]})
    with pytest.raises(SurgeryError, match="'fc9', which this model does not have"):
        ChannelPruning().reranked(model, [elsewhere], "l1", context)
    with pytest.raises(ConfigError, match="importance='l9' is unknown"):
        ChannelPruning().reranked(model, [], "l9", context)
