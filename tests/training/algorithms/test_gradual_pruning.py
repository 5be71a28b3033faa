"""Channels go along the schedule, the least important first, and everything follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressor.errors import ConfigError
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.counts import count
from compressor.structure import cutting, surgery
from compressor.structure.groups import ChannelGroup
from compressor.training import Algorithm, Event, State, Trainer
from compressor.training.algorithms import GradualPruning, GradualSparsity, cubic_sparsity
from tests.training.algorithms.resuming import assert_resumes
from tests.training.algorithms.settings import INNER, LAST, Images, make_images
from tests.training.helpers import HIDDEN, cross_entropy, make_loader, make_model, make_trainer

OF_NETWORK = replace(
    LAST, members=tuple(replace(m, tensor=m.tensor.removeprefix("model.")) for m in LAST.members)
)


class Noting(Algorithm):
    """The weight of the first layer after each batch."""

    events = frozenset({Event.BATCH_END})
    after = ("GradualPruning",)

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on(self, event: Event, state: State) -> None:
        self.weights.append(state.model[0].weight.detach().clone())


def test_widths_follow_the_schedule_down_to_the_fraction() -> None:
    noting = Noting()
    pruning = GradualPruning([HIDDEN], 0.25, "0.25dur", "0.75dur", updates=4)
    trainer = make_trainer(algorithms=[noting, pruning], max_duration="16ba")
    trainer.fit()
    for batch, weight in enumerate(noting.weights, start=1):
        passed = min(max(int((batch / 16 - 0.25) / 0.5 * 4) / 4, 0), 1)
        assert len(weight) == round(8 * (1 - 0.75 * cubic_sparsity(passed, 1.0))), batch
    net = trainer.model
    assert (net[0].out_features, net[1].num_features, net[4].in_features) == (2, 2, 2)
    assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == {
        id(parameter) for parameter in net.parameters()
    }


def importance_by_hand(net: nn.Module) -> list[float]:
    """Rows of the first layer, scales of the norm, columns of the last."""
    rows = [float(row.norm()) for row in net[0].weight.detach()]
    scales = [float(scale.abs()) for scale in net[1].weight.detach()]
    columns = [float(column.norm()) for column in net[4].weight.detach().T]
    means = [sum(part) / len(part) for part in (rows, scales, columns)]
    return [
        r / means[0] + s / means[1] + c / means[2]
        for r, s, c in zip(rows, scales, columns, strict=True)
    ]


def test_the_least_important_go() -> None:
    model = make_model(seed=3)
    scores = importance_by_hand(model)
    best = sorted(sorted(range(8), key=lambda channel: -scores[channel])[:3])
    expected = model[0].weight.detach()[best].clone()
    make_trainer(
        model,
        algorithms=[GradualPruning([HIDDEN], 3 / 8, end="1ba", updates=1)],
        optimizers={"name": "SGD", "lr": 0.0},
        max_duration="2ba",
    ).fit()
    assert model[0].weight.equal(expected)


@pytest.mark.parametrize("importance", ["taylor", "hessian"])
def test_gradients_are_those_of_the_batches_since_the_last_cut(importance: str) -> None:
    model = make_model(seed=3).train()
    batches, names = list(make_loader())[:2], ["0.weight", "1.weight", "4.weight"]
    gradients: list[dict[str, torch.Tensor]] = []
    for batch in batches:
        loss = cross_entropy(model, batch)["loss"]
        found = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
        gradients.append(dict(zip(names, found, strict=True)))
    total = torch.zeros(8)
    for name in names:
        weight = model.get_parameter(name).detach()
        own = [weight * each[name] for each in gradients]
        rows = [(each.T if name == "4.weight" else each).reshape(8, -1) for each in own]
        score = (
            sum(rows).sum(1).square()
            if importance == "taylor"
            else sum(each.square() for each in rows).sum(1)
        )
        total += score / score.mean()
    best = total.argsort(descending=True)[:4].sort().values
    expected = model[0].weight.detach()[best].clone()
    make_trainer(
        make_model(seed=3),
        algorithms=[
            pruning := GradualPruning([HIDDEN], 0.5, end="2ba", updates=1, importance=importance)
        ],
        optimizers={"name": "SGD", "lr": 0.0},
        max_duration="2ba",
    ).fit()
    assert pruning.groups.kept["0"] == tuple(best.tolist())
    assert expected.shape == (4, 4)


def test_the_multiply_accumulates_are_reached_and_not_undercut() -> None:
    inputs = ModelInputs((torch.zeros(1, 3, 8, 8),))
    task = Images()
    before = count(task.model, inputs).macs
    pruning = GradualPruning([INNER, LAST], macs_fraction=0.4, inputs=inputs, updates=3)
    Trainer(task, train_dataloader=make_images(), algorithms=[pruning], max_duration="2ep").fit()
    after = count(task.model, inputs).macs
    assert after <= 0.4 * before
    inner, last = task.model[4].in_channels, task.model[4].out_channels
    one_more = 64 * 27 * (inner + 1) + 16 * 9 * (inner + 1) * (last + 1) + (last + 1) * 4
    assert one_more * 0.9 > 0.4 * before  # the next step of both groups would be too much


def test_a_task_is_pruned_by_the_names_of_its_network() -> None:
    task = Images()
    pruning = GradualPruning([OF_NETWORK], 0.5)
    Trainer(task, train_dataloader=make_images(), algorithms=[pruning], max_duration="4ba").fit()
    assert task.model[4].out_channels == task.model[9].in_features == 8


def test_what_another_cut_counts_as_gone() -> None:
    class Narrowing(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 1:
                state.edit(lambda model: cutting.keep_channels(model, HIDDEN, (1, 2, 4, 6, 7)))

    model = make_model()
    pruning = GradualPruning([HIDDEN], 0.5, start="2ba", end="6ba", updates=2)
    make_trainer(model, algorithms=[Narrowing(), pruning], max_duration="8ba").fit()
    assert len(pruning.groups.kept["0"]) == model[0].out_features == 4
    assert set(pruning.groups.kept["0"]) < {1, 2, 4, 6, 7}


def test_a_group_whose_layer_was_replaced_is_left_alone_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Replacing(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 1:
                state.edit(lambda model: surgery.replace(model, "4", nn.Linear(8, 2)))

    model = make_model()
    pruning = GradualPruning([HIDDEN], 0.5, start="2ba")
    make_trainer(model, algorithms=[Replacing(), pruning], max_duration="8ba").fit()
    assert model[0].out_features == 8
    assert "'0' is left alone" in caplog.text


def test_a_cut_through_a_channel_ends_the_tracking() -> None:
    pairs = tuple((2 * i, 2 * i + 1) for i in range(4))
    coarse = ChannelGroup("0", 4, tuple(replace(m, index=pairs) for m in HIDDEN.members))

    class Narrowing(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 1:
                state.edit(lambda model: cutting.keep_channels(model, HIDDEN, (0, 1, 2, 4, 5)))

    model = make_model()
    pruning = GradualPruning([coarse], 0.5, start="2ba")
    make_trainer(model, algorithms=[Narrowing(), pruning], max_duration="8ba").fit()
    assert not pruning.groups.tracked()
    assert model[0].out_features == 5


@pytest.mark.parametrize("importance", ["l2", "taylor", "hessian", "lamp"])
@pytest.mark.parametrize(
    "optimizer", [{"name": "SGD", "lr": 0.1, "momentum": 0.9}, {"name": "Adam"}]
)
def test_it_resumes_bit_by_bit_before_within_and_after_the_cuts(
    importance: str, optimizer: Any, tmp_path: Path
) -> None:
    def make(callbacks: Any) -> Trainer:
        pruning = GradualPruning([HIDDEN], 0.5, updates=3, importance=importance)
        return make_trainer(
            make_model(),
            algorithms=[pruning, GradualSparsity(0.25, updates=2)],
            callbacks=callbacks,
            optimizers=optimizer,
            max_duration="8ba",
            save_dir=tmp_path,
        )

    assert_resumes(make, (1, 3, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "kept_fraction=None and macs_fraction=None"),
        ({"kept_fraction": 0.5, "macs_fraction": 0.5}, "Give one of the two"),
        ({"macs_fraction": 0.5}, "needs `inputs`"),
        ({"kept_fraction": 1.5}, r"kept_fraction=1\.5"),
        ({"kept_fraction": 0.5, "importance": "tailor"}, "Did you mean 'taylor'"),
        ({"kept_fraction": 0.5, "importance": "activation"}, "is not watched"),
        ({"kept_fraction": 0.5, "scope": "locl"}, "There is no scope 'locl'"),
        ({"kept_fraction": 0.5, "updates": 0}, "updates=0"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GradualPruning([HIDDEN], **options)


def test_groups_of_another_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="are not those of this model"):
        make_trainer(algorithms=[GradualPruning([INNER], 0.5)])
    with pytest.raises(ConfigError, match="no channel groups"):
        GradualPruning([], 0.5)
