from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.structure import surgery
from compressor.training import Algorithm, Callback, Event, EventEngine, State, Window
from compressor.training.algorithms.batchnorm import BatchNormReestimation
from compressor.training.algorithms.weight_average import EMA, SWA, WeightAverage, update_average
from tests.training.algorithms.resuming import assert_resumes
from tests.training.helpers import (
    accuracy,
    are_equal,
    make_dataset,
    make_loader,
    make_model,
    make_trainer,
    weights_of,
)

AVERAGES = [lambda: EMA(0.5, period=1), lambda: SWA("0.3dur", "1ep")]


class Renamed(EMA):
    """Of a user: known by another name."""

    key = "mine"


class Noting(Algorithm):
    def __init__(self, event: Event = Event.AFTER_STEP) -> None:
        self.events = frozenset({event})
        self.weights: list[dict[str, Tensor]] = []

    def on(self, event: Event, state: State) -> None:
        self.weights.append(weights_of(state.model))


class Watching(Callback):
    """What callbacks see at the end of evaluations."""

    events = frozenset({Event.EVAL_END})

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on(self, event: Event, state: State) -> None:
        self.weights.append(weights_of(state.model))


def test_integers_are_taken_over() -> None:
    average = torch.tensor([1])
    update_average(average, torch.tensor([5]), decay=0.9)
    assert average.item() == 5


def test_the_moving_average_is_the_recursion_written_out_and_is_kept() -> None:
    noting = Noting()
    trainer = make_trainer(algorithms=[noting, EMA(0.8, period=2)])
    average = weights_of(trainer.model)
    trainer.fit()
    for step, weights in enumerate(noting.weights, start=1):
        decay = 0.8 * (1 - math.exp(-step / 2))
        for name, value in weights.items():
            if value.is_floating_point():
                average[name] = decay * average[name] + (1 - decay) * value
            else:
                average[name] = value
    for name, value in weights_of(trainer.model).items():
        torch.testing.assert_close(value, average[name])


def test_swa_is_the_mean_of_the_ends_of_the_late_epochs() -> None:
    noting = Noting(Event.EPOCH_END)
    trainer = make_trainer(algorithms=[noting, SWA("0.6dur")], max_duration="5ep")
    trainer.fit()
    for name, value in trainer.model.named_parameters():
        mean = torch.stack([weights[name] for weights in noting.weights[2:]]).mean(0)
        torch.testing.assert_close(value.detach(), mean)


def test_swa_takes_batches_as_an_interval() -> None:
    noting = Noting(Event.BATCH_END)
    swa = SWA("0.5dur", "3ba", batchnorm_batches=0)
    trainer = make_trainer(algorithms=[noting, swa], max_duration="12ba")
    trainer.fit()
    taken = [noting.weights[batch - 1] for batch in (6, 9, 12)]
    for name, value in weights_of(trainer.model).items():
        if value.is_floating_point():  # statistics too
            torch.testing.assert_close(value, torch.stack([w[name] for w in taken]).mean(0))
        else:
            assert torch.equal(value, taken[-1][name])


def test_the_mean_has_its_own_batch_norm_statistics() -> None:
    trainer = make_trainer(algorithms=[SWA("0.3dur")], max_duration="4ep")
    trainer.fit()
    norm = trainer.model[1]
    with torch.no_grad():
        hidden = [trainer.model[0](x) for x, _ in make_loader()]
    torch.testing.assert_close(norm.running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([h.var(0) for h in hidden]).mean(0))


def test_statistics_are_estimated_once_for_each_mean() -> None:
    calls: list[int] = []

    def step(model: nn.Module, batch: Any) -> Tensor:
        if not torch.is_grad_enabled():
            calls.append(trainer.state.clock.epoch)
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    trainer = make_trainer(
        step=step,
        algorithms=[SWA("0.5dur", batchnorm_batches=2)],
        evaluate=accuracy,
        max_duration="4ep",
    )
    trainer.fit()
    trainer.eval()
    assert calls == [2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("make", AVERAGES)
def test_it_is_evaluated_and_training_goes_on_with_the_other_weights(make: Any) -> None:
    evaluated: list[dict[str, Tensor]] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        evaluated.append(weights_of(model))
        return accuracy(model)

    def train(*algorithms: Algorithm) -> tuple[Noting, Watching]:
        evaluated.clear()
        noting, watching = Noting(), Watching()
        make_trainer(
            algorithms=[noting, *algorithms],
            callbacks=[watching],
            evaluate=evaluate,
            max_duration="3ep",
        ).fit()
        return noting, watching

    plain, _ = train()
    averaged, watching = train(make())
    assert all(are_equal(a, b) for a, b in zip(plain.weights, averaged.weights, strict=True))
    assert not are_equal(evaluated[1], averaged.weights[7])
    assert all(are_equal(a, b) for a, b in zip(watching.weights, evaluated, strict=True))


def test_steps_that_are_skipped_do_not_count() -> None:
    model = make_model()
    ema, state = EMA(0.5, period=1), State(model, "1ep")
    ema.on(Event.FIT_START, state)
    before = {name: value.clone() for name, value in ema.state_dict()["average"].items()}
    with torch.no_grad():
        model[0].weight.add_(1.0)
    state.step_skipped = True
    ema.on(Event.AFTER_STEP, state)
    assert ema.state_dict()["steps"] == 0
    assert are_equal(before, ema.state_dict()["average"])


@pytest.mark.parametrize("make", AVERAGES)
def test_it_resumes_bit_equal(make: Any) -> None:
    def trainer(callbacks: list[Any]) -> Any:
        return make_trainer(
            make_model(dropout=0.2),
            train_dataloader=make_loader(shuffle=True),
            algorithms=[make()],
            callbacks=callbacks,
            evaluate=accuracy,
            eval_interval="3ba",
            max_duration="4ep",
        )

    assert_resumes(trainer, [2, 4, 7, 8, 13])


class Cutting(Algorithm):
    """Keeps five of the eight hidden channels, and gives the last layer new weights."""

    events = frozenset({Event.BATCH_END})
    kept = (0, 2, 3, 5, 7)

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch == 6:
            self.cut(state)

    @classmethod
    def cut(cls, state: State) -> None:
        for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
            state.edit(lambda m, name=name: surgery.slice_parameter(m, name, 0, cls.kept))
        for name in ("1.running_mean", "1.running_var"):
            state.edit(lambda m, name=name: surgery.slice_parameter(m, name, 0, cls.kept))
        state.edit(lambda m: surgery.replace(m, "4", nn.Linear(5, 2)))


def test_the_moving_average_is_cut_with_the_weights() -> None:
    ema = EMA(0.9, period=1)
    seen: dict[str, dict[str, Tensor]] = {}

    class Before(Algorithm):
        events = frozenset({Event.BATCH_END})
        before = ("Cutting",)

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 6:
                average = ema.state_dict()["average"]
                seen["before"] = {name: value.clone() for name, value in average.items()}

    class After(Before):
        before = ()
        after = ("Cutting",)

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 6:
                average = ema.state_dict()["average"]
                seen["after"] = {name: value.clone() for name, value in average.items()}
                seen["new"] = weights_of(state.model)

    make_trainer(algorithms=[Before(), Cutting(), After(), ema]).fit()
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        kept = seen["before"][name][list(Cutting.kept)]
        assert torch.equal(seen["after"][name], kept)
    for name in ("4.weight", "4.bias"):
        assert torch.equal(seen["after"][name], seen["new"][name])


@pytest.mark.parametrize("make", AVERAGES)
def test_averages_follow_surgery_to_the_end(make: Any) -> None:
    trainer = make_trainer(algorithms=[Cutting(), make()], evaluate=accuracy, max_duration="4ep")
    trainer.fit()
    assert trainer.model[0].weight.shape == (5, 4)
    (saved,) = (s for s in trainer.state_dict()["algorithms"].values() if "average" in s)
    assert are_equal(weights_of(trainer.model), saved["average"])


def test_a_layer_that_came_later_has_the_mean_of_its_own_epochs() -> None:
    noting = Noting(Event.EPOCH_END)
    swa = SWA("0.1dur", batchnorm_batches=0)
    trainer = make_trainer(algorithms=[noting, Cutting(), swa], max_duration="4ep")
    trainer.fit()
    kept = list(Cutting.kept)
    first = [noting.weights[0]["0.weight"][kept], *(w["0.weight"] for w in noting.weights[1:])]
    torch.testing.assert_close(trainer.model[0].weight.detach(), torch.stack(first).mean(0))
    last = torch.stack([weights["4.weight"] for weights in noting.weights[1:]]).mean(0)
    torch.testing.assert_close(trainer.model[4].weight.detach(), last)


def test_a_fit_after_a_complete_one_begins_a_new_mean() -> None:
    noting = Noting(Event.EPOCH_END)
    trainer = make_trainer(algorithms=[noting, SWA("0.1dur")], max_duration="2ep")
    trainer.fit()
    trainer.fit("2ep")
    mean = torch.stack([weights["4.weight"] for weights in noting.weights[2:]]).mean(0)
    torch.testing.assert_close(trainer.model[4].weight.detach(), mean)


def test_a_fit_that_ends_too_early_for_a_mean_keeps_its_weights_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    noting = Noting()
    trainer = make_trainer(algorithms=[noting, SWA("0.9dur", "20ba")])
    with caplog.at_level(logging.WARNING, logger="compressor"):
        trainer.fit()
    assert "averaged nothing" in caplog.text
    assert are_equal(weights_of(trainer.model), noting.weights[-1])


def test_in_a_loop_of_ones_own_the_average_begins_with_the_first_step() -> None:
    model, ema = nn.Linear(1, 1, bias=False), EMA(0.5, period=1)
    engine = EventEngine(State(model, "1ep"), [ema])
    values = [3.0, 5.0]
    for value in values:
        nn.init.constant_(model.weight, value)
        engine.run_event("after_step")
    decay = 0.5 * (1 - math.exp(-2))
    expected = decay * values[0] + (1 - decay) * values[1]
    engine.run_event("eval_start")
    assert model.weight.item() == pytest.approx(expected)
    engine.run_event("eval_end")
    assert model.weight.item() == values[1]


@pytest.mark.parametrize("second", AVERAGES)
def test_a_second_average_is_refused_because_one_would_be_thrown_away(second: Any) -> None:
    first = EMA(0.1, period=1)
    first.key = "fast"
    with pytest.raises(ConfigError, match=r"'fast' and '(EMA|SWA)' each want .* only one"):
        make_trainer(algorithms=[first, second()])


@pytest.mark.parametrize("make", AVERAGES)
def test_one_that_was_used_before_begins_anew_with_another_model(make: Any) -> None:
    def train(average: WeightAverage) -> dict[str, Tensor]:
        trainer = make_trainer(algorithms=[average], evaluate=accuracy, max_duration="4ep")
        trainer.fit()
        return weights_of(trainer.model)

    used = make()
    other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    make_trainer(other, algorithms=[used], max_duration="3ep").fit()
    assert are_equal(train(make()), train(used))


def test_in_a_window_the_moving_average_begins_with_the_first_step_in_it() -> None:
    evaluated: list[dict[str, Tensor]] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        evaluated.append(weights_of(model))
        return accuracy(model)

    noting, ema = Noting(), EMA(0.5, period=1)
    ema.window = Window.parse("4ba", "6ba")
    make_trainer(algorithms=[noting, ema], evaluate=evaluate, eval_interval="1ba").fit()
    assert all(map(are_equal, evaluated[:4], noting.weights[:4]))  # what was trained
    decay = 0.5 * (1 - math.exp(-2))
    expected = torch.lerp(noting.weights[5]["4.weight"], noting.weights[4]["4.weight"], decay)
    for weights in evaluated[5:]:
        torch.testing.assert_close(weights["4.weight"], expected)


def test_a_mean_has_a_start_and_no_window() -> None:
    swa = SWA("0.5dur")
    swa.window = Window.parse("0.5dur")
    with pytest.raises(ConfigError, match=r"'SWA' has a window.*set `start` and `interval`"):
        make_trainer(algorithms=[swa])


def test_a_mean_that_was_cut_is_estimated_again() -> None:
    calls: list[int] = []

    def step(model: nn.Module, batch: Any) -> Tensor:
        if not torch.is_grad_enabled():
            calls.append(trainer.state.clock.batch)
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    trainer = make_trainer(
        step=step,
        algorithms=[SWA("0dur", "5ba", batchnorm_batches=1), Cutting()],  # cuts after batch 6
        evaluate=accuracy,
        eval_interval="1ba",
        max_duration="8ba",
    )
    trainer.fit()
    assert calls == [5, 6]


@pytest.mark.parametrize("key", ["BatchNormReestimation", "statistics"])
@pytest.mark.parametrize("batch", [6, 8])
@pytest.mark.parametrize(
    "make", [*AVERAGES, lambda: SWA("0.3dur", "2ba", batchnorm_batches=0), lambda: Renamed(0.5, 1)]
)
def test_after_an_edit_the_average_has_statistics_of_its_own_in_any_order(
    make: Any, batch: int, key: str
) -> None:
    """What was reported and what was kept differed, by the order in the list."""

    class Recut(Cutting):
        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == batch:
                Cutting.cut(state)

    def train(is_first: bool) -> tuple[nn.Module, list[dict[str, Tensor]]]:
        statistics, noting = BatchNormReestimation(), Noting()
        statistics.key = key
        algorithms = [statistics, make()] if is_first else [make(), statistics]
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of the new layer
            trainer = make_trainer(
                algorithms=[*algorithms, Recut(), noting],
                evaluate=accuracy,
                eval_interval="1ba",
                max_duration="8ba",
                optimizers={"name": "SGD", "lr": 0.3},
            )
            trainer.fit()
        trainer.model.eval()
        assert accuracy(trainer.model) == trainer.state.metrics
        return trainer.model, noting.weights

    model, trained = train(True)
    other, trained_beside_other = train(False)
    assert are_equal(weights_of(model), weights_of(other))
    assert all(map(are_equal, trained, trained_beside_other))
    if batch == 8:  # nothing was trained since
        with torch.no_grad():
            hidden = [model[0](x) for x, _ in make_loader()]
        means = torch.stack([h.mean(0) for h in hidden]).mean(0)
        torch.testing.assert_close(model[1].running_mean, means)


def test_a_mean_that_was_cut_and_estimated_can_be_cut_again() -> None:
    class Again(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 7:
                state.edit(lambda m: surgery.slice_parameter(m, "0.bias", 0, range(5)))

    trainer = make_trainer(
        algorithms=[SWA("0dur", "4ba"), Cutting(), Again()], evaluate=accuracy, eval_interval="1ba"
    )
    trainer.fit()
    trainer.model.eval()
    assert accuracy(trainer.model) == trainer.state.metrics


def test_what_is_trained_is_put_back_when_the_averages_statistics_are_estimated() -> None:
    def train(*algorithms: Algorithm) -> list[dict[str, Tensor]]:
        noting = Noting()
        make_trainer(
            algorithms=[noting, Cutting(), BatchNormReestimation(), *algorithms], max_duration="3ep"
        ).fit()
        return noting.weights

    assert all(map(are_equal, train(), train(EMA(0.9, period=1))))


def test_an_evaluation_that_fails_does_not_leave_the_average_behind() -> None:
    fails = [True]

    def evaluate(model: nn.Module) -> dict[str, float]:
        if fails:
            raise KeyboardInterrupt
        return accuracy(model)

    noting = Noting()
    trainer = make_trainer(
        algorithms=[EMA(0.5, period=1), noting], evaluate=evaluate, max_duration="2ep"
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    fails.clear()
    seen = []

    class First(Algorithm):
        events = frozenset({Event.EPOCH_START})

        def on(self, event: Event, state: State) -> None:
            seen.append(weights_of(state.model))

    trainer.dispatch._table[Event.EPOCH_START] = ((First().on, None),)
    trainer.fit()
    assert are_equal(seen[0], noting.weights[3])


def test_what_is_averaged_is_a_base_and_the_accuracy_is_that_of_the_data() -> None:
    with pytest.raises(TypeError, match="abstract"):
        WeightAverage()  # type: ignore[abstract]
    trainer = make_trainer(algorithms=[SWA("0.5dur")], evaluate=accuracy, max_duration="6ep")
    trainer.fit()
    x, y = make_dataset().tensors
    trainer.model.eval()
    is_right = trainer.model(x).argmax(1) == y
    assert trainer.state.metrics["accuracy"] == is_right.float().mean().item()


def test_options_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ConfigError, match="batchnorm_batches=-1"):
        SWA(batchnorm_batches=-1)
    with pytest.raises(ConfigError, match="no interval"):
        SWA(interval="0ep")
    for options, words in (
        ((2.0,), "decay_rate=2"),
        ((1.5, 1), r"decay_rate=1\.5"),
        ((1.0,), "decay_rate=1"),
        ((-0.1,), "decay_rate=-0"),
        ((0.9, 0), "period=0"),
        ((0.9, "3ba"), "period='3ba' is no number of steps"),
    ):
        with pytest.raises(ConfigError, match=words):
            EMA(*options)  # type: ignore[arg-type]
