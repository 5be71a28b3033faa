from __future__ import annotations

import pytest
from torch import nn

from compressor.errors import CheckpointError, ConfigError, MetricError
from compressor.progress import Progress
from compressor.training import Callback, Event, State
from compressor.training.callbacks import EarlyStopping, History, KeepBest, ProgressBar
from tests.training.helpers import are_equal, make_model, make_trainer, weights_of


class Weights(Callback):
    """The weights at every evaluation, and a metric from a list."""

    events = frozenset({Event.EVAL_START})

    def __init__(self) -> None:
        self.seen: list[dict[str, object]] = []

    def on(self, event: Event, state: State) -> None:
        self.seen.append(weights_of(state.model))


def scripted(*values: float) -> object:
    left = iter(values)
    return lambda model: {"accuracy": next(left)}


def test_the_best_weights_are_kept_and_put_back() -> None:
    best, weights = KeepBest("accuracy"), Weights()
    trainer = make_trainer(
        callbacks=[best, weights], evaluate=scripted(0.1, 0.7, 0.9, 0.9, 0.2), max_duration="4ep"
    )
    trainer.evaluate()
    trainer.fit()
    assert (best.value, best.epoch) == (0.9, 2)
    best.restore(trainer.model)
    assert are_equal(weights_of(trainer.model), weights.seen[2])  # type: ignore[arg-type]


def test_less_is_better_where_the_mode_says_so() -> None:
    best = KeepBest("accuracy", mode="min")
    make_trainer(callbacks=[best], evaluate=scripted(0.5, 0.3)).fit()
    assert (best.value, best.epoch) == (0.3, 2)


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
    with pytest.raises(CheckpointError, match="has changed its shape"):
        best.restore(other)
    assert are_equal(before, weights_of(other))


def test_a_metric_that_is_not_evaluated_names_those_that_are() -> None:
    with pytest.raises(MetricError, match=r"'acuracy'\. Did you mean 'accuracy'"):
        make_trainer(callbacks=[KeepBest("acuracy")], evaluate=scripted(0.5)).fit()


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


def test_history_has_a_row_an_epoch_with_its_metrics() -> None:
    history = History()
    trainer = make_trainer(callbacks=[history], evaluate=scripted(0.1, 0.2, 0.3))
    trainer.evaluate()
    trainer.fit()
    assert [row["epoch"] for row in history.rows] == [0, 1, 2]
    assert [row["batch"] for row in history.rows] == [0, 4, 8]
    assert [row["accuracy"] for row in history.rows] == [0.1, 0.2, 0.3]
    assert history.rows[2]["train/loss"] == trainer.state.train_metrics["train/loss"]
    assert history.rows[2]["lr"] == 0


class FakeProgress(Progress):
    """Notes what a bar is told."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.told: list[tuple[int, str]] = []
        self.total: int | None = None
        self.is_open = False

    def task(self, description, total=None):  # type: ignore[no-untyped-def]
        self.total = total
        fake = self

        class Task:
            def __enter__(self):  # type: ignore[no-untyped-def]
                fake.is_open = True
                return lambda n=1, note="": fake.told.append((n, note))

            def __exit__(self, *_: object) -> None:
                fake.is_open = False

        return Task()


@pytest.mark.parametrize(("duration", "total"), [("2ep", 8), ("6ba", 6), ("64sp", None)])
def test_a_bar_counts_batches_and_is_closed(duration: str, total: int | None) -> None:
    progress = FakeProgress()
    trainer = make_trainer(
        callbacks=[ProgressBar(progress, metric="accuracy")],
        evaluate=scripted(0.25, 0.5),
        max_duration=duration,
    )
    trainer.fit()
    assert progress.total == total
    assert sum(n for n, _ in progress.told) == trainer.state.clock.batch
    assert progress.told[-1][1].startswith("loss ")
    assert progress.told[-1][1].endswith("accuracy 0.5")
    assert not progress.is_open


def test_a_bar_is_closed_after_an_error() -> None:
    progress = FakeProgress()

    def fail(model: nn.Module, batch: object) -> None:
        assert progress.is_open
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        make_trainer(callbacks=[ProgressBar(progress)], step=fail).fit()
    assert not progress.is_open
