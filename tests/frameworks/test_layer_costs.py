"""Promised costs against counts on the edited model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from compressor.frameworks.layer_costs import (
    costly_layers,
    in_state,
    latency_cost,
    layer_state,
    macs_cost,
    resized,
    resized_input,
    size_cost,
    stated_change,
    stored_layers,
    structural_changes,
    weight_count,
)
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.counts import count
from compressor.result import Choice, Plan
from compressor.search.allocate import Problem
from compressor.search.space import LayerChange, LayerCost, LayerState, Space
from compressor.structure.factored import Factored
from compressor.techniques import TECHNIQUES, Technique, TechniqueContext, apply_plan
from compressor.testing.models import TiedModel, TinyResNet, TinyTransformer

TECHNIQUE_NAMES = ("channel_pruning", "block_removal", "low_rank")


@dataclass
class Job:
    model: nn.Module
    context: TechniqueContext
    techniques: dict[str, Technique]
    choices: list[Choice]
    space: Space

    def edited(self, plan: Plan) -> nn.Module:
        edited = copy.deepcopy(self.model)
        apply_plan(edited, plan, self.techniques, self.context)
        return edited

    def problem(self, cost: LayerCost) -> Problem:
        return self.space.problem(dict.fromkeys(self.space.effects, 0.0), cost)


@pytest.fixture(scope="module")
def job() -> Job:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyResNet().eval()
        inputs = ModelInputs((torch.randn(1, 1, 8, 8),))
    context = TechniqueContext(inputs, importance="l2")
    techniques = {name: TECHNIQUES.get(name)() for name in TECHNIQUE_NAMES}
    choices = [c for t in techniques.values() for c in t.choices(model, context)]
    before = {name: layer_state(layer) for name, layer in costly_layers(model).items()}
    effects = {}
    for choice in choices:
        edited = copy.deepcopy(model)
        apply_plan(edited, Plan((choice,)), techniques, context)
        effects[choice.key] = structural_changes(before, edited)
    return Job(model, context, techniques, choices, Space(choices, effects, before))


def plans_of(job: Job, count: int) -> list[Plan]:
    """Every choice alone, then `count` plans with a choice or none at each site, at random."""
    generator = torch.Generator().manual_seed(0)
    plans = [Plan((choice,)) for choice in job.choices]
    for _ in range(count):
        taken = [
            options[int(torch.randint(len(options) + 1, (), generator=generator)) - 1 :][:1]
            for options in job.space.sites.values()
        ]
        chosen = [choice for one in taken for choice in one]
        gone = {m for c in chosen if c.technique == "block_removal" for m in c.modules}
        plans.append(
            Plan(tuple(c for c in chosen if c.technique != "low_rank" or c.site not in gone))
        )
    return plans


def test_the_promised_macs_are_those_counted_on_the_edited_model(job: Job) -> None:
    """Of widths, blocks and ranks alone and together: exactly."""
    counted = count(job.model, job.context.inputs).layers
    cost = macs_cost(
        costly_layers(job.model),
        {layer.name: layer.macs for layer in counted},
        {layer.name: layer.input_shape for layer in counted},
    )
    problem = job.problem(cost)
    for plan in plans_of(job, 20):
        measured = count(job.edited(plan), job.context.inputs).macs
        assert problem.cost(job.space.options(plan)) == pytest.approx(measured, rel=1e-12)


def test_the_promised_bytes_are_those_of_the_layers_of_the_edited_model(job: Job) -> None:
    problem = job.problem(size_cost(costly_layers(job.model)))
    for plan in plans_of(job, 20):
        layers = costly_layers(job.edited(plan)).values()
        measured = sum(p.numel() for layer in layers for p in layer.parameters())
        assert problem.cost(job.space.options(plan)) == 4 * measured


def test_a_chain_is_the_layer_whose_name_it_has(job: Job) -> None:
    choice = next(choice for choice in job.choices if choice.technique == "low_rank")
    (changed,) = job.space.effects[choice.key].items()
    form, ranks = choice.setting["form"], tuple(choice.setting["ranks"])
    assert changed == (choice.site, LayerChange(form=form, ranks=ranks))
    assert stated_change(choice) == changed[1]


def test_only_settings_that_say_it_are_read_for_their_change() -> None:
    assert stated_change(Choice("channel_pruning", "a", {"kept": [0]})) is None
    assert stated_change(Choice("quantization", "a", {"format": "static_int8"})) == LayerChange(
        bits=8, format="static_int8"
    )
    sparse = Choice("sparsity", "a", {"level": 0.5, "stored_bits": 17.0})
    assert stated_change(sparse) == LayerChange(stored_bits=17.0)


def test_a_narrowed_layer_has_the_ranks_that_are_left_of_it() -> None:
    layer, state = nn.Linear(64, 64), LayerState(64, 8, form="svd", ranks=(6,))
    made = in_state(layer, state)
    assert isinstance(made, Factored)
    assert layer_state(made) == state
    assert weight_count(layer, state) == sum(part.weight.numel() for part in made.layers)
    whole = in_state(layer, replace(state, ranks=(10,)))  # 8 of 8 would be larger than whole
    assert isinstance(whole, nn.Linear)
    assert weight_count(layer, replace(state, ranks=(10,))) == 64 * 8


def test_a_chain_is_timed_as_such_at_its_widths() -> None:
    timed: list[object] = []

    def time_layer(layer: nn.Module, shape: tuple[int, ...], form: str) -> float:
        timed.append((layer_state(layer), shape, form))
        return 1.0

    layers = {"conv": nn.Conv2d(32, 32, 3, padding=1)}
    cost = latency_cost(layers, {"conv": (1, 32, 8, 8)}, time_layer)
    state = LayerState(16, 32, format="static_int8", form="tucker2", ranks=(8, 20))
    assert cost("conv", state) == 1.0
    settled = LayerState(16, 32, form="tucker2", ranks=(8, 16))
    assert timed == [(settled, (1, 16, 8, 8), "static_int8")]


def test_a_layer_that_pads_its_input_itself_is_timed_on_no_less_than_its_kernel() -> None:
    """As those of EfficientNet do on small images: plain convolutions would refuse the input."""
    shapes: list[tuple[int, ...]] = []
    layers = {
        "padded": nn.Conv2d(4, 4, 5, padding=2),
        "bare": nn.Conv2d(4, 4, (5, 1)),
        "dilated": nn.Conv1d(4, 4, 3, dilation=2),
    }
    inputs = {"padded": (1, 4, 2, 2), "bare": (1, 4, 2, 2), "dilated": (1, 4, 9)}
    cost = latency_cost(layers, inputs, lambda layer, shape, _: shapes.append(shape) or 1.0)
    for name in layers:
        cost(name, LayerState(4, 4))
    assert shapes == [(1, 4, 2, 2), (1, 4, 5, 2), (1, 4, 9)]


LAYERS = [
    nn.Conv2d(8, 16, 3, padding=1, bias=False),
    nn.Conv2d(8, 16, 3, groups=2),
    nn.Conv2d(8, 8, 3, groups=8),
    nn.ConvTranspose2d(8, 16, 2, stride=2),
    nn.Conv1d(8, 16, 5),
    nn.Linear(8, 16),
]


class Sized(nn.Conv2d):
    """As EfficientNet has it: made with one argument more."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, image: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=image % 2)


def test_a_convolution_of_a_users_own_class_is_resized_as_one_of_torchs() -> None:
    layer = Sized(4, 8, 3, image=5)
    made = resized(layer, replace(layer_state(layer), outputs=6))
    assert type(made) is nn.Conv2d
    assert made(torch.zeros(2, 4, 5, 5)).shape == (2, 6, 5, 5)


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


def test_packed_bytes_count_where_files_are_packed() -> None:
    layers = {"layer": nn.Linear(8, 16, bias=False)}
    state = LayerState(8, 16, stored_bits=4.5)
    assert size_cost(layers)("layer", state) == 8 * 16 * 4
    assert size_cost(layers, stores_compact=True)("layer", state) == 8 * 16 * 4.5 / 8
    assert size_cost(layers, stores_compact=True)("layer", LayerState(8, 16)) == 8 * 16 * 4
    chain = replace(state, form="svd", ranks=(2,))
    assert size_cost(layers, stores_compact=True)("layer", chain) == 2 * (8 + 16) * 4.5 / 8


def test_bytes_follow_the_bits() -> None:
    cost = size_cost({"layer": nn.Linear(8, 16)})
    assert cost("layer", LayerState(8, 16)) == 8 * 16 * 4 + 16 * 4
    assert cost("layer", LayerState(8, 16, bits=8)) == 8 * 16 + 16 * 4
    assert cost("layer", LayerState(8, 16, is_removed=True)) == 0


def test_the_bytes_of_a_table_are_those_of_its_rows_and_a_tied_one_counts_once() -> None:
    for model in (TinyTransformer(vocabulary=50, dim=8), TiedModel(50, 8)):
        layers = stored_layers(model)
        cost = size_cost(layers)
        total = sum(cost(name, layer_state(layer)) for name, layer in layers.items())
        others = [p for name, p in model.named_parameters() if "norm" in name or "position" in name]
        entries = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in others)
        assert total == 4 * entries
    layers = stored_layers(TinyTransformer(vocabulary=50, dim=8))
    choice = Choice("quantization", "embedding", {"format": "weight_int8"})
    change = stated_change(choice)
    assert change is not None
    state = change.applied_to(layer_state(layers["embedding"]))
    assert size_cost(layers)("embedding", state) == 50 * 8
