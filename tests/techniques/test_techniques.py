"""The contract of DESIGN: what holds for every technique."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from compressor.errors import SurgeryError
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.counts import count
from compressor.result import Choice, Plan
from compressor.structure.describe import diff, rebuild
from compressor.techniques import TECHNIQUES, Technique, TechniqueContext, apply_plan
from compressor.techniques.channel_pruning import candidate_widths
from compressor.testing.models import CifarResNet, TinyResNet

NAMES = TECHNIQUES.names()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return TinyResNet().eval()


def make_context() -> TechniqueContext:
    generator = torch.Generator().manual_seed(0)
    inputs = ModelInputs((torch.randn(4, 1, 8, 8, generator=generator),))
    return TechniqueContext(inputs, importance="l2", runtime_layers=lambda: ["conv1", "linear"])


def make_all() -> dict[str, Technique]:
    return {name: TECHNIQUES.get(name)() for name in NAMES}


def all_choices(model: nn.Module) -> list[Choice]:
    context = make_context()
    return [c for technique in make_all().values() for c in technique.choices(model, context)]


@pytest.mark.parametrize("name", NAMES)
def test_proposing_changes_nothing_and_is_repeatable(name: str, model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    first = list(TECHNIQUES.get(name)().choices(model, make_context()))
    second = list(TECHNIQUES.get(name)().choices(model, make_context()))
    assert first == second
    assert first
    assert len({choice.key for choice in first}) == len(first)
    assert all(model.state_dict()[key].equal(value) for key, value in before.items())
    assert not model.training


def test_an_empty_plan_is_the_identity(model: nn.Module) -> None:
    edited = copy.deepcopy(model)
    apply_plan(edited, Plan(), make_all(), make_context())
    assert diff(model, edited) == diff(model, model)


def test_every_choice_survives_json_and_builds_the_same_structure(model: nn.Module) -> None:
    context = make_context()
    for choice in all_choices(model):
        plan = Plan.from_json(json.loads(json.dumps(Plan((choice,)).to_json())))
        first, second = copy.deepcopy(model), copy.deepcopy(model)
        apply_plan(first, plan, make_all(), context)
        apply_plan(second, plan, make_all(), context)
        rebuilt = rebuild(model, json.loads(json.dumps(diff(model, first))))
        for other in (second, rebuilt):
            other.load_state_dict(first.state_dict(), strict=True)
            assert context.inputs.call(other.eval()).equal(context.inputs.call(first.eval()))


def test_every_structural_choice_saves_macs_and_runs(model: nn.Module) -> None:
    context = make_context()
    before = count(model, context.inputs).macs
    for choice in all_choices(model):
        edited = copy.deepcopy(model)
        apply_plan(edited, Plan((choice,)), make_all(), context)
        after = count(edited, context.inputs).macs
        assert context.inputs.call(edited).shape == (4, 10)
        assert (after == before) if choice.technique == "static_int8" else (after < before)


def test_width_and_depth_may_be_chosen_together(model: nn.Module) -> None:
    """A stream that runs through a removed block is narrowed first."""
    context = make_context()
    choices = all_choices(model)
    widths = {c.site: c for c in choices if c.technique == "channel_pruning"}
    removed = [c for c in choices if c.technique == "block_removal"]
    gone = {name for c in removed for name in c.modules}
    stream = next(c for c in widths.values() if set(c.modules) & gone and set(c.modules) - gone)
    edited = copy.deepcopy(model)
    apply_plan(edited, Plan((stream, *removed)), make_all(), context)
    assert context.inputs.call(edited).shape == (4, 10)


def test_a_plan_of_another_model_is_refused(model: nn.Module) -> None:
    choice = Choice("channel_pruning", "no.such.layer", {"kept": [0]})
    with pytest.raises(SurgeryError, match=r"no\.such\.layer"):
        apply_plan(copy.deepcopy(model), Plan((choice,)), make_all(), make_context())


def test_kept_channels_are_those_of_largest_norm(model: nn.Module) -> None:
    context = make_context()
    choices = list(TECHNIQUES.get("channel_pruning")().choices(model, context))
    inner = next(c for c in choices if len(c.modules) == 3)  # conv, norm, and the conv that reads
    weight = model.get_submodule(inner.site).weight
    norms = weight.detach().flatten(1).norm(dim=1)
    kept = inner.setting["kept"]
    dropped = sorted(set(range(len(norms))) - set(kept))
    assert norms[kept].min() >= norms[dropped].max()


def test_the_rest_of_a_network_is_pruned_where_one_group_cannot_be() -> None:
    """The parameter-free shortcut of the CIFAR ResNets pads channels by a fixed number."""
    net = CifarResNet(20).eval()
    context = TechniqueContext(ModelInputs((torch.randn(2, 3, 32, 32),)), importance="l1")
    sites = {c.site for c in TECHNIQUES.get("channel_pruning")().choices(net, context)}
    assert len(sites) == 9  # the inner group of each of the nine blocks
    assert context.lost
    assert all(item.reason for item in context.lost)


@pytest.mark.parametrize(
    ("size", "multiple", "minimum", "expected"),
    [(64, 16, 16, [48, 32, 16]), (16, 4, 16, []), (20, 8, 8, [16, 8]), (7, 4, 4, [4])],
)
def test_widths_lie_on_the_targets_grid(
    size: int, multiple: int, minimum: int, expected: list[int]
) -> None:
    assert candidate_widths(size, multiple, minimum) == expected
