from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import ConfigError, MetricError
from compressor.training.loggers.memory import InMemoryLogger
from compressor.training.recipes import (
    AccAvg,
    CallRecipe,
    Checkpoint,
    EpochMetricAvg,
    Log,
    Optimizer,
    Recipe,
    StdoutLogger,
    ToLogger,
    recipe,
)
from tests.training.helpers import are_equal, make_loader, make_model, weights_of
from tests.training.recipes.helpers import After, make_recipe, make_step, make_test

BATCHES = [torch.full((1,), float(number)) for number in range(4)]


def make(*callbacks: Any) -> Recipe:
    loop = recipe(lambda batch: {"number": batch}, BATCHES)
    loop.callbacks.add_callbacks([Log("number"), *callbacks])
    return loop


def test_lines_are_written_every_so_many_batches_and_when_an_epoch_ends() -> None:
    stream = io.StringIO()
    make(StdoutLogger(3, prefix="Train", to=stream)).run(2)
    assert stream.getvalue().splitlines() == [
        "Train epoch 0, batch 3: number 2",
        "Train epoch 1, batch 4: number 3",
        "Train epoch 1, batch 6: number 1",
        "Train epoch 2, batch 8: number 3",
    ]


def test_nothing_is_told_twice_at_one_batch() -> None:
    stream = io.StringIO()
    make(StdoutLogger(2, to=stream)).run(1)
    assert len(stream.getvalue().splitlines()) == 2


def test_minus_one_writes_when_an_epoch_ends() -> None:
    stream = io.StringIO()
    make(StdoutLogger(-1, to=stream)).run(2)
    assert stream.getvalue().splitlines() == [
        "epoch 1, batch 4: number 3",
        "epoch 2, batch 8: number 3",
    ]


def test_who_adds_a_stdout_logger_gets_lines_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    make(StdoutLogger(-1)).run(1)
    assert capsys.readouterr().out == "epoch 1, batch 4: number 3\n"


def test_lines_may_go_to_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mine"):
        make(StdoutLogger(-1, to=logging.getLogger("mine"))).run(1)
    assert caplog.messages == ["epoch 1, batch 4: number 3"]


def test_what_is_no_number_is_left_out_of_the_lines() -> None:
    stream = io.StringIO()
    loop = make(StdoutLogger(-1, to=stream))
    loop.callbacks.add_callbacks(
        [After(lambda state: state["metrics"].update(name="a", table=torch.ones(3)))]
    )
    loop.run(1)
    assert stream.getvalue() == "epoch 1, batch 4: number 3\n"


def test_a_logger_gets_the_metrics_under_the_prefix() -> None:
    logger = InMemoryLogger()
    make(ToLogger(logger, 2, prefix="train")).run(1)
    assert logger.get("train/number") == ([2, 4], [1.0, 3.0])


@pytest.mark.parametrize("interval", [0, -2])
def test_an_interval_that_is_none_is_refused(interval: int) -> None:
    with pytest.raises(ConfigError, match="is no interval"):
        StdoutLogger(interval)
    with pytest.raises(ConfigError, match="is no interval"):
        CallRecipe(make(), interval)


@pytest.mark.parametrize(
    ("run_every", "at"), [(3, [3, 4, 6, 8]), (2, [2, 4, 6, 8]), (-1, [4, 8]), (100, [4, 8])]
)
def test_a_recipe_is_called_every_so_many_batches_and_when_an_epoch_ends(
    run_every: int, at: list[int]
) -> None:
    called: list[int] = []
    outer = make()
    inner = recipe(lambda batch: {"x": 7}, [0, 0])
    inner.callbacks.add_callbacks([Log("x")])
    noting = recipe(lambda batch: called.append(outer.state["iters"]), [0])
    outer.callbacks.add_callbacks([CallRecipe(inner, run_every), CallRecipe(noting, run_every)])
    state = outer.run(2)
    assert called == at
    assert state["metrics"] == {"number": 3.0, "test/x": 7.0}
    assert inner.state["epoch"] == len(at)
    assert state["test_seconds"] > 0


def test_calling_a_recipe_does_not_change_the_training() -> None:
    alone, tested = make_model(dropout=0.5), make_model(dropout=0.5)
    make_recipe(alone, loader=make_loader(shuffle=True)).run(2)
    test = recipe(lambda batch: torch.rand(3) is None or {}, make_loader(shuffle=True))
    make_recipe(tested, CallRecipe(test, 1), loader=make_loader(shuffle=True)).run(2)
    assert are_equal(weights_of(alone), weights_of(tested))


def test_a_called_recipe_sees_the_weights_after_the_step() -> None:
    model = make_model()
    test = recipe(make_test(model.eval()), make_loader())
    test.callbacks.add_callbacks([EpochMetricAvg("loss"), AccAvg()])
    loop = make_recipe(model)
    loop.callbacks.add_callbacks([CallRecipe(test, -1)])
    metrics = loop.run(1)["metrics"]
    data = make_loader().dataset.tensors  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = make_test(model)(data)
    assert metrics["test/loss"] == pytest.approx(expected["loss"].item())
    right = (expected["pred"].argmax(1) == data[1]).float().mean().item()
    assert metrics["test/accuracy"] == pytest.approx(right)


def test_a_called_recipe_runs_after_this_batchs_step_wherever_it_was_added() -> None:
    model = make_model()
    called: list[Any] = []
    test = recipe(lambda batch: called.append(weights_of(model)), [0])
    loop = recipe(make_step(model), make_loader())
    stepped: list[Any] = []
    opt = Optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    loop.callbacks.add_callbacks(
        [CallRecipe(test, 1), opt, After(lambda _: stepped.append(weights_of(model)))]
    )
    loop.run(1)
    assert len(called) == len(stepped) == 4
    assert all(are_equal(*pair) for pair in zip(called, stepped, strict=True))
    assert not are_equal(called[0], called[1])


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    loop = make()
    loop.callbacks.add_callbacks([Checkpoint(loop, tmp_path, 3, keep=2)])
    loop.run(3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["epoch0002-batch0000009.ckpt", "epoch0002-batch0000012.ckpt"]


def test_a_checkpoint_is_written_by_epochs_and_read_by_resume(tmp_path: Path) -> None:
    model = make_model()
    loop = make_recipe(model)
    loop.callbacks.add_callbacks([Checkpoint(loop, tmp_path, keep=None)])
    loop.run(2)
    other = make_model(1)
    resumed = make_recipe(other)
    assert resumed.resume(tmp_path / "epoch0001-batch0000004.ckpt")
    assert resumed.state["epoch"] == 1
    resumed.run(2)
    assert are_equal(weights_of(other), weights_of(model))


@pytest.mark.parametrize(("mode", "batch"), [("max", 4), ("min", 1)])
def test_the_best_checkpoint_is_kept_beside(tmp_path: Path, mode: Any, batch: int) -> None:
    loop = make()
    loop.callbacks.add_callbacks([Checkpoint(loop, tmp_path, 1, best="number", mode=mode)])
    loop.run(2)
    best = make()
    best.callbacks.add_callbacks([Checkpoint(best, tmp_path, 1, best="number", mode=mode)])
    assert best.resume(tmp_path / "best.ckpt")
    assert best.state["iters"] == batch


def test_a_best_metric_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    loop = make()
    loop.callbacks.add_callbacks([Checkpoint(loop, tmp_path, 1, best="numbr")])
    with pytest.raises(MetricError, match="Did you mean 'number'"):
        loop.run(1)


@pytest.mark.parametrize("options", [{"keep": 0}, {"mode": "most"}])
def test_checkpoints_that_cannot_be_meant_are_refused(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"keep=0|mode='most'"):
        Checkpoint(make(), tmp_path, **options)


def test_a_logger_may_be_added_to_a_run_that_is_resumed(tmp_path: Path) -> None:
    first = make(StdoutLogger(-1, to=io.StringIO()))
    first.run(1)
    logger = InMemoryLogger()
    second = make(ToLogger(logger, -1))
    second.load_state_dict(first.state_dict())
    second.run(2)
    assert logger.get("number") == ([8], [3.0])


def test_a_loggers_rows_are_saved_with_the_recipe() -> None:
    first = make(ToLogger(InMemoryLogger(), -1))
    first.run(1)
    logger = InMemoryLogger()
    second = make(ToLogger(logger, -1))
    second.load_state_dict(first.state_dict())
    second.run(2)
    assert logger.get("number") == ([4, 8], [3.0, 3.0])
