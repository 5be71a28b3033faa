from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressor.errors import CheckpointError, ConfigError, MetricError
from compressor.progress import Progress
from compressor.structure import cutting, surgery
from compressor.training import Algorithm, Callback, Evaluator, Event, State
from compressor.training.algorithms import EMA
from compressor.training.callbacks import (
    EarlyStopping,
    History,
    KeepBest,
    ProgressBar,
    load_best,
)
from compressor.training.checkpoint import write_checkpoint
from tests.training.helpers import (
    HIDDEN,
    are_equal,
    make_model,
    make_trainer,
    weights_of,
)


class Weights(Callback):
    """The weights at every evaluation."""

    events = frozenset({Event.EVAL_START})

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on(self, event: Event, state: State) -> None:
        self.seen.append(weights_of(state.model))


def scripted(*values: float) -> Callable[[nn.Module], dict[str, float]]:
    left = iter(values)
    return lambda model: {"accuracy": next(left)}


def test_the_best_weights_are_kept_and_put_back() -> None:
    best, weights = KeepBest("accuracy"), Weights()
    trainer = make_trainer(
        callbacks=[best, weights], evaluate=scripted(0.1, 0.7, 0.9, 0.9, 0.2), max_duration="4ep"
    )
    trainer.eval()
    trainer.fit()
    assert (best.value, best.epoch) == (0.9, 2)
    best.restore(trainer.model)
    assert are_equal(weights_of(trainer.model), weights.seen[2])


def test_less_is_better_where_the_mode_says_so() -> None:
    best = KeepBest("accuracy", mode="min")
    make_trainer(callbacks=[best], evaluate=scripted(0.5, 0.3)).fit()
    assert (best.value, best.epoch) == (0.3, 2)


def test_nan_is_never_the_best() -> None:
    best = KeepBest("accuracy")
    make_trainer(callbacks=[best], evaluate=scripted(math.nan, 0.3)).fit()
    assert (best.value, best.epoch) == (0.3, 2)
    best = KeepBest("accuracy")
    make_trainer(callbacks=[best], evaluate=scripted(0.3, math.nan)).fit()
    assert (best.value, best.epoch) == (0.3, 1)


def test_without_an_evaluation_nothing_is_restored() -> None:
    model = make_model()
    before = weights_of(model)
    KeepBest("accuracy").restore(model)
    assert are_equal(before, weights_of(model))


def test_the_best_of_another_structure_is_refused_before_anything_is_loaded() -> None:
    best = KeepBest("accuracy")
    make_trainer(callbacks=[best], evaluate=scripted(0.5, 0.3)).fit()
    other = nn.Sequential(make_model()[0])
    before = weights_of(other)
    with pytest.raises(CheckpointError, match="changed its structure since"):
        best.restore(other)
    assert are_equal(before, weights_of(other))


def test_the_best_are_the_weights_as_evaluated_also_in_the_file(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(weights_of(model))
        return {"accuracy": [0.5, 0.4, 0.3][len(seen) - 1]}

    best = KeepBest("accuracy", folder=tmp_path)
    trainer = make_trainer(
        callbacks=[best], algorithms=[EMA(0.9, period=2)], evaluate=evaluate, max_duration="3ep"
    )
    trainer.fit()
    model = make_model(seed=7)
    assert load_best(tmp_path / "best.ckpt", model) == {"accuracy": 0.5}
    assert are_equal(weights_of(model), seen[0])
    best.restore(trainer.model)
    assert are_equal(weights_of(trainer.model), seen[0])


class PruneAfter(Algorithm):
    """Keeps four hidden channels, from one batch on."""

    events = frozenset({Event.BATCH_END})

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch == 5:
            state.edit(lambda model: cutting.keep_channels(model, HIDDEN, [0, 2, 3, 5]))


def test_the_best_of_an_edited_model_goes_into_one_as_it_was_at_first(tmp_path: Path) -> None:
    trainer = make_trainer(
        algorithms=[PruneAfter()],
        callbacks=[KeepBest("accuracy", folder=tmp_path)],
        evaluate=scripted(0.5, 0.9),
        save_dir=tmp_path,
    )
    trainer.fit()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = trainer.model.eval()(x)
    for model in (make_model(seed=7), trainer.model):  # as at first, and as it is now
        load_best(tmp_path / "best.ckpt", model)
        assert torch.equal(model.eval()(x), expected)


def test_an_edit_that_changes_no_shape_is_made_again_too(tmp_path: Path) -> None:
    """The weights fitted without it, so it was left out, and the model computed something else."""

    class Smooth(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 1:
                state.edit(lambda model: surgery.replace(model, "2", nn.Tanh()))

    trainer = make_trainer(
        algorithms=[Smooth()],
        callbacks=[KeepBest("accuracy", folder=tmp_path)],
        evaluate=scripted(0.5, 0.9),
        save_dir=tmp_path,
    )
    trainer.fit()
    model = make_model(seed=7)
    load_best(tmp_path / "best.ckpt", model)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.eval()(x), trainer.model.eval()(x))


def test_a_file_of_another_model_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    callbacks = [KeepBest("accuracy", folder=tmp_path)]
    make_trainer(callbacks=callbacks, evaluate=scripted(0.5, 0.3)).fit()
    model = nn.Sequential(nn.Linear(4, 8))
    before = weights_of(model)
    with pytest.raises(CheckpointError, match=r"'1.bias' is only in the"):
        load_best(tmp_path / "best.ckpt", model)
    assert are_equal(before, weights_of(model))
    write_checkpoint(tmp_path / "other.ckpt", {"weights": {}})
    with pytest.raises(CheckpointError, match="holds no weights of KeepBest"):
        load_best(tmp_path / "other.ckpt", model)
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        load_best(tmp_path / "none.ckpt", model)


def test_only_the_first_process_writes_the_best(tmp_path: Path) -> None:
    for rank in (1, 0):
        state = State(make_model(), "1ep", rank=rank)
        state.take_metrics({"accuracy": 0.5})
        KeepBest("accuracy", folder=tmp_path).on(Event.EVAL_END, state)
        assert (tmp_path / "best.ckpt").exists() == (rank == 0)


def two_evaluators(first: Any, second: Any, interval: str) -> list[Evaluator]:
    return [
        Evaluator(function=first, label="a"),
        Evaluator(function=second, label="b", interval=interval),
    ]


def test_a_metric_counts_only_when_its_own_evaluator_gave_it() -> None:
    best, history = KeepBest("b/accuracy"), History()
    stopping = EarlyStopping("b/accuracy", patience=2)
    trainer = make_trainer(
        callbacks=[best, stopping, history],
        eval_dataloader=two_evaluators(
            scripted(*range(1, 9)), scripted(0.9, 0.8, 0.7, 0.6), interval="2ep"
        ),
        max_duration="8ep",
    )
    trainer.fit()
    assert (best.value, best.epoch) == (0.9, 2)
    assert trainer.state.clock.epoch == 6  # at 2, 4 and 6, of which two in vain
    assert [row["a/accuracy"] for row in history.rows] == [1, 2, 3, 4, 5, 6]
    assert [row.get("b/accuracy") for row in history.rows] == [None, 0.9, None, 0.8, None, 0.7]


@pytest.mark.parametrize("make", [KeepBest, lambda metric: EarlyStopping(metric, patience=1)])
def test_a_metric_that_is_not_evaluated_names_those_that_are(make: Any) -> None:
    with pytest.raises(MetricError, match=r"'acuracy'\. Did you mean 'accuracy'"):
        make_trainer(callbacks=[make("acuracy")], evaluate=scripted(0.5)).fit()
    evaluators = two_evaluators(scripted(1, 1), scripted(1, 1), interval="1ep")
    trainer = make_trainer(callbacks=[make("b/acuracy")], eval_dataloader=evaluators)
    with pytest.raises(MetricError, match=r"'b/acuracy'\. Did you mean 'b/accuracy'"):
        trainer.fit()
    assert trainer.state.clock.epoch == 1


@pytest.mark.parametrize("make", [KeepBest, lambda metric: EarlyStopping(metric, patience=1)])
def test_a_label_that_no_evaluator_has_is_told_after_the_fit(make: Any, tmp_path: Path) -> None:
    evaluators = two_evaluators(scripted(1, 2), scripted(1, 2), interval="1ep")
    trainer = make_trainer(
        callbacks=[make("c/accuracy")], eval_dataloader=evaluators, save_dir=tmp_path
    )
    with pytest.raises(MetricError, match=r"No evaluation of this fit gave 'c/accuracy'"):
        trainer.fit()
    assert trainer.state.clock.epoch == 2
    assert make_trainer(
        callbacks=[make("c/accuracy")], eval_dataloader=evaluators, save_dir=tmp_path
    ).resume()


def test_the_error_of_a_fit_is_not_hidden_by_a_missing_metric() -> None:
    def fail(model: nn.Module, batch: object) -> None:
        raise RuntimeError("no")

    trainer = make_trainer(callbacks=[KeepBest("c/x")], step=fail, evaluate=scripted(1))
    trainer.eval()
    with pytest.raises(RuntimeError, match="no"):
        trainer.fit()


def test_a_fit_stops_when_patience_is_over() -> None:
    trainer = make_trainer(
        callbacks=[EarlyStopping("accuracy", patience=2)],
        evaluate=scripted(0.5, 0.6, 0.6, 0.4, 0.9),
        max_duration="9ep",
    )
    trainer.fit()
    assert trainer.state.clock.epoch == 4
    assert trainer.state.stop_reason == "accuracy has not passed 0.6 in 2 evaluations"
    with pytest.raises(ConfigError, match="patience=0"):
        EarlyStopping("accuracy", patience=0)


def test_a_fit_of_which_all_is_nan_stops_too() -> None:
    trainer = make_trainer(
        callbacks=[EarlyStopping("accuracy", patience=2)],
        evaluate=lambda model: {"accuracy": math.nan},
        max_duration="9ep",
    )
    trainer.fit()
    assert trainer.state.stop_reason == "accuracy was NaN in 2 evaluations"


def test_history_has_a_row_an_epoch_with_its_metrics() -> None:
    history = History()
    trainer = make_trainer(callbacks=[history], evaluate=scripted(0.1, 0.2, 0.3))
    trainer.eval()
    trainer.fit()
    assert [row["epoch"] for row in history.rows] == [0, 1, 2]
    assert [row["batch"] for row in history.rows] == [0, 4, 8]
    assert [row["accuracy"] for row in history.rows] == [0.1, 0.2, 0.3]
    assert history.rows[2]["train/loss"] == trainer.state.train_metrics["train/loss"]
    assert history.rows[2]["lr"] == 0


def test_evaluations_within_an_epoch_have_rows_and_its_end_has_one() -> None:
    history = History()
    make_trainer(callbacks=[history], evaluate=scripted(1, 2, 3, 4), eval_interval="2ba").fit()
    assert [row["batch"] for row in history.rows] == [2, 4, 6, 8]
    assert [row["epoch"] for row in history.rows] == [0, 1, 1, 2]
    assert ["train/loss" in row for row in history.rows] == [False, True, False, True]


def test_two_of_one_class_resume_each_with_its_own_state(tmp_path: Path) -> None:
    def make(duration: str, *values: float) -> tuple[Any, list[Any]]:
        callbacks: list[Any] = [
            KeepBest("accuracy"),
            KeepBest("accuracy", mode="min"),
            EarlyStopping("accuracy", patience=3),
            EarlyStopping("accuracy", patience=9, mode="min"),
            History(),
            History(),
        ]
        for number, callback in enumerate(callbacks):
            callback.key = f"{callback.key} {number}"
        trainer = make_trainer(
            callbacks=callbacks,
            evaluate=scripted(*values),
            save_dir=tmp_path,
            max_duration=duration,
        )
        return trainer, callbacks

    make("3ep", 0.5, 0.9, 0.1)[0].fit()
    trainer, callbacks = make("5ep", 0.2, 0.3)
    assert trainer.resume()
    assert [(each.value, each.epoch) for each in callbacks[:2]] == [(0.9, 2), (0.1, 3)]
    trainer.fit()
    assert trainer.state.stop_reason == ""  # its patience ends with the last epoch
    assert [each.state_dict() for each in callbacks[2:4]] == [
        {"best": 0.9, "waited": 3},
        {"best": 0.1, "waited": 2},
    ]
    assert [row["accuracy"] for row in callbacks[5].rows] == [0.5, 0.9, 0.1, 0.2, 0.3]
    callbacks[1].restore(trainer.model)


class FakeProgress(Progress):
    """Notes what a bar is told."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.told: list[tuple[int, str]] = []
        self.total: int | None = None
        self.is_open = False
        self.opened = 0

    def task(self, description, total=None):  # type: ignore[no-untyped-def]
        self.total = total
        fake = self

        class Task:
            def __enter__(self):  # type: ignore[no-untyped-def]
                fake.is_open = True
                fake.opened += 1
                return lambda n=1, note="": fake.told.append((n, note))

            def __exit__(self, *_: object) -> None:
                fake.is_open = False

        return Task()


@pytest.mark.parametrize(("duration", "total"), [("2ep", 8), ("6ba", 6), ("64sp", None)])
def test_a_bar_counts_batches_and_is_closed(duration: str, total: int | None) -> None:
    progress = FakeProgress()
    trainer = make_trainer(
        callbacks=[ProgressBar(progress, metric="accuracy")],
        evaluate=lambda model: {"accuracy": 0.5},
        max_duration=duration,
    )
    trainer.fit()
    assert progress.total == total
    assert sum(n for n, _ in progress.told) == trainer.state.clock.batch
    assert progress.told[-1][1].startswith("loss ")
    assert progress.told[-1][1].endswith("accuracy 0.5")
    assert not progress.is_open


def test_a_bar_is_closed_after_an_error_and_opens_again() -> None:
    progress = FakeProgress()
    is_broken = True

    def step(model: nn.Module, batch: Any) -> Any:
        assert progress.is_open
        if is_broken:
            raise RuntimeError("no")
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    trainer = make_trainer(callbacks=[ProgressBar(progress)], step=step)
    with pytest.raises(RuntimeError, match="no"):
        trainer.fit()
    assert not progress.is_open
    is_broken = False
    trainer.fit()
    assert progress.opened == 2
    assert not progress.is_open


def test_only_the_first_process_shows_a_bar() -> None:
    progress = FakeProgress()
    bar = ProgressBar(progress)
    bar.on(Event.FIT_START, State(make_model(), "1ep", rank=1))
    assert progress.opened == 0


def test_a_bar_without_a_terminal_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(callbacks=[ProgressBar()]).fit()
    assert capsys.readouterr() == ("", "")
