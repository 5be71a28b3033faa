"""Promised costs against counts on the edited model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compressor.frameworks.layer_costs import (
    costly_layers,
    layer_state,
    macs_cost,
    resized,
    resized_input,
    size_cost,
    structural_changes,
    weight_count,
)
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.counts import count
from compressor.result import Choice, Plan
from compressor.search.space import LayerState, Space
from compressor.techniques import TECHNIQUES, TechniqueContext, apply_plan
from compressor.testing.models import TinyResNet


def prepare() -> tuple[nn.Module, TechniqueContext, list[Choice], Space]:
    torch.manual_seed(0)
    model = TinyResNet().eval()
    context = TechniqueContext(ModelInputs((torch.randn(1, 1, 8, 8),)), importance="l2")
    techniques = {name: TECHNIQUES.get(name)() for name in ("channel_pruning", "block_removal")}
    choices = [c for t in techniques.values() for c in t.choices(model, context)]
    before = {name: layer_state(layer) for name, layer in costly_layers(model).items()}
    effects = {}
    for choice in choices:
        edited = copy.deepcopy(model)
        apply_plan(edited, Plan((choice,)), techniques, context)
        effects[choice.key] = structural_changes(before, edited)
    return model, context, choices, Space(choices, effects, before)


def test_the_promised_macs_are_those_counted_on_the_edited_model() -> None:
    model, context, choices, space = prepare()
    macs = {layer.name: layer.macs for layer in count(model, context.inputs).layers}
    cost = macs_cost(costly_layers(model), macs)
    problem = space.problem({c.key: 0.0 for c in choices}, cost)
    techniques = {name: TECHNIQUES.get(name)() for name in ("channel_pruning", "block_removal")}
    one_a_site = {c.site: c for c in choices if c.technique == "channel_pruning"}
    plans = [Plan((c,)) for c in choices] + [Plan(tuple(one_a_site.values()))]
    for plan in plans:
        edited = copy.deepcopy(model)
        apply_plan(edited, plan, techniques, context)
        assert problem.cost(space.options(plan)) == count(edited, context.inputs).macs


LAYERS = [
    nn.Conv2d(8, 16, 3, padding=1, bias=False),
    nn.Conv2d(8, 16, 3, groups=2),
    nn.Conv2d(8, 8, 3, groups=8),
    nn.ConvTranspose2d(8, 16, 2, stride=2),
    nn.Conv1d(8, 16, 5),
    nn.Linear(8, 16),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_resized_layer_has_the_weights_that_were_counted(layer: nn.Conv2d) -> None:
    is_depthwise = getattr(layer, "groups", 1) == 8
    state = LayerState(4, 4 if is_depthwise else 12)
    made = resized(layer, state)
    assert layer_state(made) == state
    assert made.weight.numel() == weight_count(layer, state)
    dims = {nn.Linear: 1, nn.Conv1d: 2}.get(type(layer), 3)
    shape = (2, 8, 9, 9)[: dims + 1]
    assert made(torch.zeros(resized_input(layer, shape, 4))).shape[0] == 2


def test_bytes_follow_the_bits() -> None:
    cost = size_cost({"layer": nn.Linear(8, 16)})
    assert cost("layer", LayerState(8, 16)) == 8 * 16 * 4 + 16 * 4
    assert cost("layer", LayerState(8, 16, bits=8)) == 8 * 16 + 16 * 4
    assert cost("layer", LayerState(8, 16, is_removed=True)) == 0
