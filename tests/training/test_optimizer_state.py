"""An optimizer that is saved and loaded goes on as if nothing had happened, also after edits."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from compressor.errors import CheckpointError
from compressor.structure import surgery
from compressor.structure.describe import apply_difference, diff, outline
from compressor.testing.models import TiedModel, TinyMLP
from compressor.training.binding import (
    load_optimizer_state,
    optimizer_state,
    parameter_names,
    rebind,
)
from tests.training.helpers import are_equal, weights_of


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def is_bias(name: str) -> bool:
    return name.endswith("bias")


def two_groups(model: nn.Module, make: Callable[..., torch.optim.Optimizer]) -> Any:
    """Decay for the weights and none for the others, as most recipes have it."""
    named = list(model.named_parameters())
    return make(
        [
            {"params": [p for name, p in named if not is_bias(name)], "weight_decay": 0.01},
            {"params": [p for name, p in named if is_bias(name)], "weight_decay": 0.0},
        ]
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        weight = next(model.parameters())
        model(x.to(weight.dtype)).square().sum().backward()
        optimizer.step()


class Tied(nn.Sequential):
    """Two layers of one weight, between others."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(6, 6) for _ in range(4)]
        layers[2].weight = layers[1].weight
        super().__init__(*layers)


def edit_often(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """So that the order in the groups is one that no model built at once has."""
    torch.manual_seed(1)
    dtype = next(model.parameters()).dtype
    pair = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6))
    for change in (
        lambda m: surgery.replace(m, "3", pair.to(dtype)),
        lambda m: surgery.replace(m, "0", nn.Sequential(nn.Linear(6, 6)).to(dtype)),
        lambda m: surgery.slice_parameter(m, "3.1.weight", 0, [0, 2]),
        lambda m: surgery.slice_parameter(m, "3.1.bias", 0, [0, 2]),
        lambda m: surgery.replace(m, "3.0", nn.Linear(6, 2).to(dtype)),
    ):
        before = parameter_names(model)
        rebind(optimizer, before, model, change(model))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.001, momentum=0.9, nesterov=True),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01, initial_accumulator_value=0.1),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.001, momentum=0.5, centered=True),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=0.01, decoupled_weight_decay=True),
}


def values_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    state = optimizer_state(optimizer, model)["state"]
    return {
        f"{name}.{key}": value for name in state for key, value in state[name]["values"].items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_after_edits_a_loaded_optimizer_goes_on_bit_by_bit(
    make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype
) -> None:
    model = Tied().to(dtype)
    before = outline(model)
    optimizer = two_groups(model, make)
    train(model, optimizer, range(3))
    edit_often(model, optimizer)
    train(model, optimizer, range(3, 6))
    saved = through_file(
        {
            "structure": diff(before, model),
            "model": model.state_dict(),
            "optimizer": optimizer_state(optimizer, model),
        }
    )

    resumed = Tied().to(dtype)
    other = two_groups(resumed, make)
    names = parameter_names(resumed)
    rebind(other, names, resumed, apply_difference(resumed, saved["structure"]))
    resumed.load_state_dict(saved["model"])
    load_optimizer_state(other, resumed, saved["optimizer"])

    order = [group["params"] for group in optimizer_state(optimizer, model)["groups"]]
    assert [g["params"] for g in optimizer_state(other, resumed)["groups"]] == order
    assert [list(map(is_bias, names)) for names in order] == [[False] * 4, [True] * 5]
    for _ in range(2):
        mine, theirs = values_of(optimizer, model), values_of(other, resumed)
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == theirs[name].dtype, name
                assert torch.equal(value, theirs[name]), name
        assert are_equal(weights_of(model), weights_of(resumed))
        train(model, optimizer, range(6, 9))
        train(resumed, other, range(6, 9))


def make_mlp(frozen: str = "") -> nn.Module:
    model = TinyMLP(6, 4, 2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name != frozen)
    return model


def sgd(model: nn.Module, names: set[str] | None = None) -> torch.optim.Optimizer:
    chosen = [p for name, p in model.named_parameters() if names is None or name in names]
    return torch.optim.SGD(chosen, lr=0.1, momentum=0.9)


def test_a_loaded_optimizer_shares_no_tensor_with_what_was_saved() -> None:
    model, other = make_mlp(), make_mlp()
    optimizer, loaded = sgd(model), sgd(other)
    train(model, optimizer, range(2))
    saved = optimizer_state(optimizer, model)
    load_optimizer_state(loaded, other, saved)
    kept = {name: value.clone() for name, value in values_of(optimizer, model).items()}
    train(other, loaded, range(5, 7))
    assert are_equal(values_of(optimizer, model), kept)


def test_a_frozen_parameter_may_be_in_one_of_the_optimizers_only() -> None:
    """Surgery keeps a frozen parameter in its group; a group made later does not take it in."""
    all_names = {name for name, _ in make_mlp().named_parameters()}
    model, other = make_mlp(), make_mlp("fc1.bias")
    whole, part = sgd(model), sgd(other, all_names - {"fc1.bias"})
    train(model, whole, range(2))
    load_optimizer_state(part, other, optimizer_state(whole, model))
    assert optimizer_state(part, other)["groups"] == optimizer_state(whole, model)["groups"]
    assert part.state[other.get_parameter("fc1.bias")].keys() == {"momentum_buffer"}

    other = make_mlp("fc1.bias")
    whole, part = sgd(other), sgd(model, all_names - {"fc1.bias"})
    load_optimizer_state(whole, other, optimizer_state(part, model))
    held = {id(parameter) for parameter in whole.param_groups[0]["params"]}
    assert id(other.get_parameter("fc1.bias")) not in held


@pytest.mark.parametrize("swap", [False, True])
def test_another_choice_of_parameters_is_refused_before_anything_is_loaded(swap: bool) -> None:
    model, other = make_mlp(), make_mlp()
    optimizers = [sgd(model), sgd(other, {"fc1.weight", "fc2.weight"})]
    source, target = optimizers[::-1] if swap else optimizers
    source.param_groups[0]["lr"] = 5.0
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(CheckpointError, match=r"do not step the same .*'fc1\.bias' is only in one"):
        load_optimizer_state(
            target, model if swap else other, optimizer_state(source, other if swap else model)
        )
    assert target.state_dict() == before


def test_a_parameter_that_the_model_lacks_is_named() -> None:
    model, other = make_mlp(), nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(
        CheckpointError, match=r"steps 'fc1\.weight', which the model does not have"
    ):
        load_optimizer_state(sgd(other), other, optimizer_state(sgd(model), model))


def test_parameters_that_are_tied_only_here_are_refused() -> None:
    """Else a group would hold the parameter twice, and step it twice."""
    tied, untied = TiedModel(), TiedModel()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    with pytest.raises(CheckpointError, match=r"'embedding\.weight' and 'head\.weight', which are"):
        load_optimizer_state(sgd(tied), tied, optimizer_state(sgd(untied), untied))


def test_steps_that_a_device_counts_come_back_as_they_were() -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_mlp().to(torch.bfloat16)
        return model, torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))

    model, optimizer = make()
    train(model, optimizer, range(3))
    optimizer.param_groups[0]["capturable"] = True  # such an optimizer does not step on a CPU
    other, loaded = make()
    load_optimizer_state(loaded, other, through_file(optimizer_state(optimizer, model)))
    assert loaded.param_groups[0]["capturable"]
    assert torch.equal(loaded.param_groups[0]["lr"], torch.tensor(0.01))
    steps = [values["step"] for values in loaded.state.values()]
    assert [(step.item(), step.dtype) for step in steps] == [(3.0, torch.float32)] * 6


def test_a_new_bias_joins_the_biases() -> None:
    model = make_mlp()
    optimizer = two_groups(model, lambda groups: torch.optim.SGD(groups, lr=0.1))
    before = parameter_names(model)
    pair = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4))
    rebind(optimizer, before, model, surgery.replace(model, "fc2", pair))
    names = [group["params"] for group in optimizer_state(optimizer, model)["groups"]]
    assert names[0][-2:] == ["fc2.0.weight", "fc2.1.weight"]
    assert names[1][-1] == "fc2.1.bias"


def test_adagrad_steps_a_parameter_that_came_later() -> None:
    """It begins all accumulators in its constructor, and a new parameter had none: KeyError."""
    model = make_mlp()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.25)
    before = parameter_names(model)
    rebind(optimizer, before, model, surgery.replace(model, "fc2", nn.Linear(4, 4)))
    weight = model.get_parameter("fc2.weight")
    assert torch.equal(optimizer.state[weight]["sum"], torch.full((4, 4), 0.25))
    old = weight.detach().clone()
    train(model, optimizer, range(1))
    assert not torch.equal(weight, old)
