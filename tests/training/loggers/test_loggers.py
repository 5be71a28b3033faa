from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compressor.errors import MissingDependencyError
from compressor.training import Callback, Event, State
from compressor.training.callbacks import LearningRateMonitor
from compressor.training.loggers import (
    InMemoryLogger,
    JsonLinesLogger,
    Logger,
    MLflowLogger,
    TensorBoardLogger,
    read_json_lines,
)
from tests.training.helpers import accuracy, make_trainer
from tests.training.loggers.reading import Curves, read_events, read_mlflow

# SQLAlchemy 2.1 about a line of MLflow 3.17
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

Read = Callable[[Path], Curves]
DESTINATIONS: dict[str, tuple[Callable[[Path], Logger], Read]] = {
    "json": (
        lambda folder: JsonLinesLogger(folder / "log.jsonl"),
        lambda folder: curves_of(read_json_lines(folder / "log.jsonl")),
    ),
    "tensorboard": (TensorBoardLogger, read_events),
    "mlflow": (lambda folder: MLflowLogger("digits", folder), read_mlflow),
}
each_destination = pytest.mark.parametrize(
    ("make", "read"),
    [
        pytest.param(*pair, id=name, marks=[pytest.mark.slow] * (name != "json"))
        for name, pair in DESTINATIONS.items()
    ],
)


def curves_of(logger: InMemoryLogger) -> Curves:
    return {name: list(zip(*logger.get(name), strict=True)) for name in sorted(logger.most_recent)}


class Interrupt(Callback):
    """An error after so many batches."""

    events = frozenset({Event.BATCH_END})

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch == self.batch:
            raise RuntimeError("the plug was pulled")


def make_logged(loggers: list[Logger], interrupt: int = -1, **options: Any) -> Any:
    options = {"max_duration": "3ep", "log_interval": "1ba", "evaluate": accuracy, **options}
    callbacks = [LearningRateMonitor("1ba"), Interrupt(interrupt)]
    return make_trainer(loggers=loggers, callbacks=callbacks, **options)


def reference(**options: Any) -> Curves:
    """What an uninterrupted training logs."""
    memory = InMemoryLogger()
    make_logged([memory], **options).fit()
    return curves_of(memory)


def approximate(curves: Curves) -> Any:
    """TensorBoard keeps float32."""
    return {name: [(s, pytest.approx(v, rel=1e-6)) for s, v in c] for name, c in curves.items()}


def test_losses_metrics_and_monitors_are_logged_by_finished_batches() -> None:
    memory = InMemoryLogger()
    trainer = make_logged([memory])
    trainer.fit()
    assert memory.get("train/loss")[0] == list(range(1, 13))
    assert memory.get("accuracy") == ([4, 8, 12], memory.get("accuracy")[1])
    assert memory.get("lr")[0] == list(range(1, 13))
    assert memory.most_recent["accuracy"] == trainer.state.metrics["accuracy"]
    assert memory.hyperparameters["optimizer"] == "SGD"
    assert memory.hyperparameters["max_duration"] == "3ep"


@each_destination
def test_all_that_was_logged_is_read_back(make: Any, read: Read, tmp_path: Path) -> None:
    make_logged([make(tmp_path)]).fit()
    assert read(tmp_path) == approximate(reference())


@each_destination
def test_a_second_fit_goes_on_logging(make: Any, read: Read, tmp_path: Path) -> None:
    memory = InMemoryLogger()
    trainer = make_logged([make(tmp_path), memory], max_duration="1ep")
    trainer.fit()
    trainer.fit("1ep")
    trainer.eval()
    assert [step for step, _ in read(tmp_path)["accuracy"]] == [4, 8, 8]
    assert read(tmp_path) == approximate(curves_of(memory))


@each_destination
def test_an_error_loses_nothing_and_a_fit_after_it_goes_on(
    make: Any, read: Read, tmp_path: Path
) -> None:
    memory = InMemoryLogger()
    trainer = make_logged([make(tmp_path), memory], interrupt=6)
    with pytest.raises(RuntimeError, match="plug"):
        trainer.fit()
    assert read(tmp_path) == approximate(curves_of(memory))
    trainer.fit()
    assert read(tmp_path) == approximate(curves_of(memory))


@each_destination
@pytest.mark.parametrize("interrupt", [7, 3])
def test_a_resumed_training_repeats_nothing(
    make: Any, read: Read, interrupt: int, tmp_path: Path
) -> None:
    # Interrupted after the checkpoint of batch 4, or before there is one.
    with pytest.raises(RuntimeError, match="plug"):
        make_logged([make(tmp_path / "log")], interrupt, save_dir=tmp_path).fit()
    make_logged([make(tmp_path / "log")], save_dir=tmp_path, autoresume=True).fit()
    assert read(tmp_path / "log") == approximate(reference())


@each_destination
def test_a_training_resumed_elsewhere_begins_a_log_there(
    make: Any, read: Read, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="plug"):
        make_logged([make(tmp_path / "here")], 7, save_dir=tmp_path).fit()
    make_logged([make(tmp_path / "there")], save_dir=tmp_path, autoresume=True).fit()
    late = {n: [(s, v) for s, v in points if s > 4] for n, points in reference().items()}
    assert read(tmp_path / "there") == approximate(late)


@each_destination
def test_values_that_are_no_numbers_and_names_with_slashes_are_kept(
    make: Any, read: Read, tmp_path: Path
) -> None:
    logger = make(tmp_path)
    logger.log({"val": 1.0, "val/top 5/loss": math.nan}, step=0)
    logger.log({"val/top 5/loss": math.inf, "größe": -0.5}, step=3)
    logger.close()
    read_back = read(tmp_path)
    name = next(each for each in read_back if each.startswith("val/"))
    assert name in ("val/top 5/loss", "val/top_5/loss")  # TensorBoard has no spaces
    (_, nan), (_, infinite) = read_back[name]
    assert math.isnan(nan)
    assert infinite > 1e308  # MLflow stores the largest float
    assert read_back["val"] == [(0, 1.0)]


@each_destination
def test_only_the_first_process_writes(
    make: Any, read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = SimpleNamespace(rank=1)
    monkeypatch.setattr("compressor.training.loggers.base.current_context", lambda: second)
    logger, state = make(tmp_path / "log"), State(make_trainer().model, "1ep", rank=1)
    logger.on(Event.FIT_START, state)
    logger.log_hyperparameters({"seed": 0})
    logger.log({"loss": 1.0}, step=1)
    logger.on(Event.FIT_END, state)
    logger.close()
    assert not (tmp_path / "log").exists()


def test_two_loggers_of_one_class_resume_each_with_its_own_state(tmp_path: Path) -> None:
    def make() -> list[Logger]:
        loggers = [JsonLinesLogger(tmp_path / "a.jsonl"), JsonLinesLogger(tmp_path / "b.jsonl")]
        loggers[1].key = "second"
        return [*loggers, InMemoryLogger()]

    with pytest.raises(RuntimeError, match="plug"):
        make_logged(make(), 7, save_dir=tmp_path).fit()
    loggers = make()
    make_logged(loggers, save_dir=tmp_path, autoresume=True).fit()
    for curves in (
        curves_of(read_json_lines(tmp_path / "a.jsonl")),
        curves_of(read_json_lines(tmp_path / "b.jsonl")),
        curves_of(loggers[2]),  # type: ignore[arg-type]
    ):
        assert curves == reference()


@pytest.mark.parametrize(
    ("library", "extra", "make"),
    [
        ("tensorboard", "tensorboard", lambda: TensorBoardLogger("x")),
        ("mlflow", "mlflow", lambda: MLflowLogger("x", "x")),
        ("sqlalchemy", "mlflow", lambda: MLflowLogger("x", "x")),
    ],
)
def test_a_missing_library_is_told_before_training(
    library: str, extra: str, make: Callable[[], Logger], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, package)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(MissingDependencyError, match=rf'pip install "compressor\[{extra}\]"'):
        make()


def test_making_a_logger_writes_nothing(tmp_path: Path) -> None:
    for make, _ in DESTINATIONS.values():
        make(tmp_path / "log").close()
    assert not (tmp_path / "log").exists()
