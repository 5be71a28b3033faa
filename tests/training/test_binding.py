from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compressor.errors import CheckpointError, SurgeryError
from compressor.structure import cutting, surgery
from compressor.structure.groups import ChannelGroup, Member
from compressor.structure.surgery import Edit
from compressor.testing.models import TiedModel
from compressor.training import Algorithm, Event, State
from compressor.training.algorithms import EMA
from compressor.training.binding import (
    load_optimizer_state,
    optimizer_state,
    parameter_names,
    rebind,
)
from tests.training.helpers import are_equal, make_trainer, weights_of

KEPT = (0, 2, 3, 5)


CHANNELS = tuple((channel,) for channel in range(8))
HIDDEN = ChannelGroup(
    "0",
    8,
    (
        Member("0.weight", 0, "out", CHANNELS, 8),
        Member("0.bias", 0, "out", CHANNELS, 8),
        Member("1.weight", 0, "out", CHANNELS, 8),
        Member("1.bias", 0, "out", CHANNELS, 8),
        Member("1.running_mean", 0, "out", CHANNELS, 8),
        Member("1.running_var", 0, "out", CHANNELS, 8),
        Member("4.weight", 1, "in", CHANNELS, 8),
    ),
)


def narrow(model: nn.Module) -> Edit:
    """Keep four of the eight hidden channels of `make_model`."""
    return cutting.keep_channels(model, HIDDEN, KEPT)


class Narrowing(Algorithm):
    events = frozenset({Event.BATCH_END})

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch == self.batch:
            state.edit(narrow)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "SGD", "lr": 0.1, "momentum": 0.9},
        {"name": "Adam", "lr": 0.01, "amsgrad": True},
        {"name": "RMSprop", "lr": 0.01},
    ],
    ids=lambda spec: spec["name"],
)
def test_moments_are_sliced_like_their_parameters(optimizer: dict[str, Any]) -> None:
    trainer = make_trainer(optimizers=optimizer)
    trainer.fit("3ba")
    before = optimizer_state(trainer.optimizer, trainer.model)
    trainer.state.edit(narrow)
    after = optimizer_state(trainer.optimizer, trainer.model)
    assert after["groups"] == before["groups"]
    cuts = {"0.weight": 0, "0.bias": 0, "1.weight": 0, "1.bias": 0, "4.weight": 1}
    for name, entry in before["state"].items():
        for key, value in entry["values"].items():
            if isinstance(value, torch.Tensor) and value.dim() and name in cuts:
                value = value.index_select(cuts[name], torch.tensor(KEPT))
            torch.testing.assert_close(after["state"][name]["values"][key], value, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_training_goes_on_after_surgery_and_reaches_every_parameter(precision: str) -> None:
    trainer = make_trainer(
        optimizers={"name": "Adam", "lr": 0.01},
        algorithms=[Narrowing(3), EMA()],
        precision=precision,
    )
    trainer.fit("4ba")
    assert trainer.model[0].weight.shape == (4, 4)  # type: ignore[union-attr,index]
    before = weights_of(trainer.model)
    trainer.fit("2ba")
    after = weights_of(trainer.model)
    assert not [name for name in before if torch.equal(before[name], after[name])]
    assert trainer.optimizer.state_dict()["state"].keys() == set(range(6))


def test_a_pruned_channel_that_never_mattered_does_not_change_the_training() -> None:
    """With the dead channels gone, the kept ones take the very same steps."""

    def kill(model: nn.Module) -> None:
        with torch.no_grad():
            for name in ("1.weight", "1.bias"):
                parameter = model.get_parameter(name)
                parameter[[i for i in range(8) if i not in KEPT]] = 0
            model.get_parameter("4.weight")[:, [i for i in range(8) if i not in KEPT]] = 0

    def train(batch: int) -> nn.Module:
        trainer = make_trainer(
            optimizers={"name": "SGD", "lr": 0.1, "momentum": 0.9},
            schedulers={"name": "StepLR", "step_size": 9},
            algorithms=[Narrowing(batch)],
        )
        kill(trainer.model)
        trainer.fit("4ba")
        return trainer.model

    late, early = train(4), train(2)
    for name, value in weights_of(late).items():
        # 1e-6: sums over four numbers instead of eight round differently
        torch.testing.assert_close(weights_of(early)[name], value, rtol=0, atol=1e-6)


def test_an_exchanged_parameter_begins_without_moments_in_the_group_of_its_likeness() -> None:
    trainer = make_trainer()
    model = trainer.model
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[4].parameters()}]  # type: ignore
    optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = parameter_names(model)
    edit = surgery.replace(model, "4", nn.Linear(8, 2, bias=False))
    rebind(optimizer, before, model, edit)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(p) for p in model[0].parameters()],  # type: ignore[index,operator]
        [id(model[4].weight)],  # type: ignore[index,union-attr]
    ]
    assert len(optimizer.state) == 2
    assert optimizer_state(optimizer, model)["groups"][1]["lr"] == 0.2


def test_removed_parameters_leave_no_state_behind() -> None:
    trainer = make_trainer(optimizers={"name": "Adam", "lr": 0.01})
    trainer.fit("2ba")
    trainer.state.edit(lambda model: surgery.replace(model, "1", surgery.Skip()))
    assert trainer.optimizer.state_dict()["state"].keys() == set(range(4))
    trainer.fit("1ba")


def test_a_tied_parameter_stays_one() -> None:
    model = TiedModel()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step()
    before = parameter_names(model)
    edit = surgery.slice_parameter(model, "embedding.weight", 0, range(8))
    rebind(optimizer, before, model, edit)
    assert model.head.weight is model.embedding.weight
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert held.count(id(model.head.weight)) == 1
    assert optimizer.state[model.head.weight]["exp_avg"].shape == (8, 16)


def test_a_frozen_new_parameter_is_not_stepped() -> None:
    trainer = make_trainer()
    trainer.state.edit(
        lambda model: surgery.replace(model, "4", nn.Linear(8, 2).requires_grad_(False))
    )
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in trainer.model[4].parameters()}  # type: ignore


def test_surgery_in_the_middle_of_a_batch_is_refused() -> None:
    class Rash(Algorithm):
        events = frozenset({Event.BEFORE_STEP})

        def on(self, event: Event, state: State) -> None:
            state.edit(narrow)

    trainer = make_trainer(algorithms=[Rash()])
    with pytest.raises(SurgeryError, match="BEFORE_STEP"):
        trainer.fit()
    trainer.state.edit(narrow)  # between fits it may


def test_state_goes_by_name_whatever_the_order() -> None:
    def make(is_reversed: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 3)
        parameters = list(model.parameters())
        optimizer = torch.optim.Adam(parameters[::-1] if is_reversed else parameters)
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, float(parameter.dim()))
        return model, optimizer

    model, optimizer = make(False)
    optimizer.step()
    other, reversed_optimizer = make(True)
    load_optimizer_state(reversed_optimizer, other, optimizer_state(optimizer, model))
    moments = reversed_optimizer.state[other.weight]["exp_avg"]
    assert torch.equal(moments, optimizer.state[model.weight]["exp_avg"])


def test_state_of_another_shape_is_refused_where_torch_would_take_it() -> None:
    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(4, width)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        return model, optimizer

    (wide, wide_optimizer), (slim, slim_optimizer) = make(4), make(3)
    slim_optimizer.load_state_dict(wide_optimizer.state_dict())  # torch: no word
    with pytest.raises(CheckpointError, match=r"'(weight|bias)' is for shape \[4"):
        load_optimizer_state(slim_optimizer, slim, optimizer_state(wide_optimizer, wide))


def test_an_average_is_cut_like_the_weights() -> None:
    average = EMA(decay_rate=0.5, period=1)
    trainer = make_trainer(algorithms=[average])
    trainer.fit("3ba")
    before = {name: value.clone() for name, value in average.state_dict()["average"].items()}
    trainer.state.edit(narrow)
    after = average.state_dict()["average"]
    assert are_equal(
        {"w": after["0.weight"], "b": after["4.bias"]},
        {"w": before["0.weight"][list(KEPT)], "b": before["4.bias"]},
    )
