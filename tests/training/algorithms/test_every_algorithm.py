"""What holds for every algorithm, by the settings table."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import compressor.functional as cf
from compressor.structure import cutting, surgery
from compressor.training import Algorithm, Evaluator, Event, State, Trainer, algorithms
from compressor.training.algorithms import (
    BatchNormReestimation,
    CutMix,
    MixUp,
    ProgressiveResizing,
)
from compressor.training.algorithms.weight_average import WeightAverage
from compressor.training.card import Card
from tests.training.algorithms.settings import INNER, SETTINGS, Case, Images, make_images
from tests.training.helpers import are_equal, weights_of
from tests.training.test_resume import Interrupt, content_of, deep_equal

OF_IMAGES = {name: case for name, case in SETTINGS.items() if case.task is Images}
IMAGES = tuple(make_images())
CASES = pytest.mark.parametrize("case", SETTINGS.values(), ids=SETTINGS)


class Probe(Algorithm):
    """Stands before or after another at every event."""

    events = frozenset(Event)

    def on(self, event: Event, state: State) -> None:
        pass


class Narrowing(Algorithm):
    """Prunes half of the inner channels after the third batch."""

    events = frozenset({Event.BATCH_END})

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch == 3:
            kept = (0, 2, 3, 5)
            state.edit(lambda model: cutting.keep_channels(model, INNER, kept))


class EMAKeyed(algorithms.EMA):
    """Beside whatever is tested."""

    key = "the other EMA"

    def __init__(self) -> None:
        super().__init__(0.9, period=2)


def beside_an_average(algorithm: Algorithm) -> list[Algorithm]:
    """With one, unless it is one."""
    return [algorithm] if isinstance(algorithm, WeightAverage) else [algorithm, EMAKeyed()]


def error(model: nn.Module) -> dict[str, float]:
    """The loss on the images, as a metric."""
    with torch.no_grad():
        losses = [model.loss(model(batch), batch) for batch in IMAGES]
    return {"error": float(torch.stack(losses).mean())}


def test_every_algorithm_is_in_the_table() -> None:
    classes = {
        name
        for name, value in vars(algorithms).items()
        if inspect.isclass(value) and issubclass(value, Algorithm)
    }
    assert classes == {type(case.make()).__name__ for case in SETTINGS.values()}


@CASES
def test_it_has_a_card_and_a_function(case: Case) -> None:
    card = case.make().card
    assert isinstance(card, Card)
    assert all((card.summary, card.source, card.use_when, card.avoid_when, card.cost))
    assert card.functional is None or callable(getattr(cf, card.functional))


@CASES
def test_it_trains_and_then_trains_on(case: Case) -> None:
    trainer = case.make_trainer(max_duration="1ep")
    before = weights_of(trainer.model)
    trainer.fit()
    between = weights_of(trainer.model)
    trainer.fit("1ep")
    after = weights_of(trainer.model)
    assert trainer.state.clock.batch == 8
    assert not are_equal(before, between)
    assert not are_equal(between, after)
    assert all(torch.isfinite(value).all() for value in after.values())


@CASES
def test_it_changes_the_result(case: Case) -> None:
    plain, changed = case.make_trainer([]), case.make_trainer()
    plain.fit()
    changed.fit()
    before, after = weights_of(plain.model), weights_of(changed.model)
    shapes = [{name: value.shape for name, value in each.items()} for each in (before, after)]
    same = shapes[0] == shapes[1] and all(
        torch.allclose(before[name], after[name], rtol=0, atol=1e-5) for name in before
    )
    assert same is not case.changes_weights


@CASES
def test_an_interrupted_fit_ends_bit_equal(case: Case, tmp_path: Path) -> None:
    def make(folder: str, interrupt: int = -1) -> Trainer:
        first, second = case.make(), case.make()
        second.key = "another"  # the state of both survives
        return case.make_trainer(
            [first] if case.is_surgery or case.is_alone else [first, second],
            callbacks=[Interrupt(interrupt)],
            eval_dataloader=case.loader(),
            save_dir=tmp_path / folder,
            save_interval="1ba",
            autoresume=True,
        )

    straight = make("a")
    straight.fit()
    for interrupt in (2, 5, 6):
        with pytest.raises(KeyboardInterrupt):
            make(str(interrupt), interrupt).fit()
        resumed = make(str(interrupt))
        resumed.fit()
        assert deep_equal(content_of(straight), content_of(resumed)), interrupt


@CASES
def test_epochs_and_the_same_number_of_batches_are_the_same(case: Case) -> None:
    epochs = case.make_trainer(max_duration="2ep")
    batches = case.make_trainer(max_duration="8ba")
    epochs.fit()
    batches.fit()
    assert are_equal(weights_of(epochs.model), weights_of(batches.model))


class FixedStatistics(nn.BatchNorm2d):
    """Normalises as in evaluation, always."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


@pytest.mark.parametrize("case", [c for c in SETTINGS.values() if c.is_per_sample])
def test_micro_batches_are_the_same_as_whole_ones(case: Case) -> None:
    def train(size: int | None) -> dict[str, torch.Tensor]:
        task = case.task()
        for name, module in list(task.named_modules()):
            if isinstance(module, nn.BatchNorm2d):  # sees the batch
                surgery.replace(task, name, FixedStatistics(module.num_features))
            elif isinstance(module, nn.Dropout):  # draws for the batch
                module.p = 0.0
        trainer = case.make_trainer(task=task, micro_batch_size=size)
        trainer.fit()
        return weights_of(trainer.model)

    whole = train(None)
    for size in (1, 2, 4):
        parts = train(size)
        for name, value in whole.items():
            # 2e-5: float32 sums in another order, over 8 steps
            torch.testing.assert_close(parts[name], value, rtol=0, atol=2e-5)


@CASES
def test_its_order_holds_at_every_event_that_it_uses(case: Case) -> None:
    for before in (True, False):
        algorithm, probe = case.make(), Probe()
        probe.before, probe.after = ((algorithm.key,), ()) if before else ((), (algorithm.key,))
        given = [algorithm, probe] if before else [probe, algorithm]
        dispatch = case.make_trainer(given).dispatch
        for event in map(Event.of, algorithm.events):
            order = dispatch.order_at(event)
            is_exit = any(exit is event for _, exit in algorithm.pairs)
            expected = before or is_exit  # who leaves a pair is last
            assert (order.index(probe) < order.index(algorithm)) is expected, event


@pytest.mark.parametrize("case", [c for c in SETTINGS.values() if c.is_surgery])
def test_surgery_twice_is_surgery_once(case: Case) -> None:
    again = case.make()
    again.key = "again"
    once, twice = case.make_trainer(), case.make_trainer([case.make(), again])
    assert str(once.model) == str(twice.model)
    assert once.model.state_dict().keys() == twice.model.state_dict().keys()
    once.fit()
    twice.fit()
    assert are_equal(weights_of(once.model), weights_of(twice.model))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize(
    "case",
    [case for case in SETTINGS.values() if case.task is Images],
    ids=[name for name, case in SETTINGS.items() if case.task is Images],
)
def test_the_model_is_pruned_inside_a_fit(case: Case, optimizer: str, precision: Any) -> None:
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    trainer = case.make_trainer(
        [*beside_an_average(case.make()), Narrowing()],
        optimizers={"name": optimizer, "lr": 0.01, **options},
        precision=precision,
        eval_dataloader=case.loader(),
        max_duration="5ba",
    )
    trainer.fit()
    net = trainer.model.model
    assert net[0].weight.shape[0] == 4
    before = weights_of(net)
    trainer.fit("2ba")
    after = weights_of(net)
    assert all(torch.isfinite(value).all() for value in after.values())
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert not frozen  # flags are put back
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == {
        id(parameter) for parameter in net.parameters()
    }


@pytest.mark.parametrize("is_reestimated", [False, True])
@pytest.mark.parametrize("case", OF_IMAGES.values(), ids=OF_IMAGES)
def test_what_is_reported_last_is_of_the_model_that_is_kept(
    case: Case, is_reestimated: bool
) -> None:
    """Also when it was pruned after the last batch."""
    chosen = [*beside_an_average(case.make()), Narrowing()]
    if is_reestimated:
        statistics = BatchNormReestimation(count=2)
        statistics.key = "statistics"
        chosen.append(statistics)
    trainer = case.make_trainer(
        chosen,
        eval_dataloader=Evaluator(function=error),
        eval_interval="1ba",
        max_duration="3ba",
    )
    trainer.fit()
    trainer.model.eval()
    assert error(trainer.model) == trainer.state.metrics


@pytest.mark.parametrize("mixing", [MixUp, CutMix])
def test_images_are_made_smaller_before_they_are_mixed(mixing: type[Algorithm]) -> None:
    trainer = SETTINGS["MixUp"].make_trainer([mixing(), ProgressiveResizing()])
    order = [each.key for each in trainer.dispatch.order_at(Event.BEFORE_FORWARD)]
    assert order[0] == "ProgressiveResizing"


@pytest.mark.slow
@CASES
def test_what_was_trained_exports_and_equals_eager(case: Case) -> None:
    trainer = case.make_trainer(max_duration="1ep")
    trainer.fit()
    inputs = next(iter(case.loader()))[0]
    model = copy.deepcopy(trainer.model.model).eval()
    with torch.no_grad():
        expected = model(inputs)
        program = torch.export.export(model, (inputs,), strict=False)
        exported = program.module()(inputs)
    expected, exported = (
        getattr(expected, "logits", expected),
        getattr(exported, "logits", exported),
    )
    torch.testing.assert_close(exported, expected, rtol=0, atol=1e-5)  # other kernels round
