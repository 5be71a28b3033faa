from __future__ import annotations

import math
import resource
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.training import Callback, DivergedError, Event, ManualStep, State, Trainer
from compressor.training.callbacks import (
    LearningRateMonitor,
    MemoryMonitor,
    NaNMonitor,
    ThroughputMonitor,
)
from compressor.training.callbacks.memory import peak_rss_bytes, rss_bytes
from compressor.training.callbacks.nan_monitor import first_non_finite
from compressor.training.checkpoint import LATEST, read_checkpoint
from compressor.training.loggers import InMemoryLogger
from tests.training.helpers import accuracy, make_model, make_trainer


class Rates(Callback):
    """The rate at every step."""

    events = frozenset({Event.BEFORE_STEP})

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on(self, event: Event, state: State) -> None:
        assert state.optimizer is not None
        self.seen.append(state.optimizer.param_groups[0]["lr"])


def test_the_learning_rate_is_that_of_the_step_and_not_of_the_next() -> None:
    rates, logger = Rates(), InMemoryLogger()
    make_trainer(callbacks=[rates, LearningRateMonitor("1ba")], loggers=[logger]).fit()
    assert logger.get("lr") == (list(range(1, 9)), rates.seen)
    assert len(set(rates.seen)) > 1


def test_the_learning_rate_is_logged_at_its_interval() -> None:
    logger = InMemoryLogger()
    make_trainer(callbacks=[LearningRateMonitor("3ba")], loggers=[logger]).fit()
    assert logger.get("lr")[0] == [3, 6]
    logger = InMemoryLogger()
    make_trainer(callbacks=[LearningRateMonitor()], loggers=[logger]).fit()
    assert logger.get("lr")[0] == [4, 8]


def test_each_group_has_its_learning_rate() -> None:
    model, logger = make_model(), InMemoryLogger()
    groups = [
        {"params": model[0].parameters(), "lr": 0.5, "name": "stem"},
        {"params": [*model[1].parameters(), *model[4].parameters()], "lr": 0.25},
    ]
    trainer = make_trainer(
        model,
        optimizers=torch.optim.SGD(groups),
        schedulers={"name": "ConstantLR", "factor": 1.0},
        callbacks=[LearningRateMonitor()],
        loggers=[logger],
    )
    trainer.fit()
    assert logger.most_recent["lr/stem"] == 0.5
    assert logger.most_recent["lr/1"] == 0.25


def test_without_an_optimizer_the_learning_rate_is_asked_for_in_vain() -> None:
    step = ManualStep(lambda batch: None)
    trainer = make_trainer(step=step, optimizers=None, callbacks=[LearningRateMonitor()])
    with pytest.raises(ConfigError, match="no optimizer to read"):
        trainer.fit()


def break_gradient(name: str) -> Callback:
    """A callback that breaks a rule: it makes the gradients up to `name` infinite."""

    class Break(Callback):
        events = frozenset({Event.BEFORE_STEP})

        def on(self, event: Event, state: State) -> None:
            for own, parameter in state.model.named_parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(math.inf)
                if own == name:
                    return

    return Break()


def test_of_gradients_the_one_nearest_to_the_output_is_named() -> None:
    trainer = make_trainer(callbacks=[break_gradient("1.weight"), NaNMonitor("1ba")])
    with pytest.raises(
        DivergedError, match=r"After batch 1, the gradient of '1.weight' \(BatchNorm1d '1'\)"
    ):
        trainer.fit()


def test_a_parameter_that_is_nan_is_named_with_its_layer() -> None:
    model = make_model()
    with torch.no_grad():
        model[4].weight[0, 0] = math.nan

    def blind(model: nn.Module, batch: Any) -> Tensor:
        return model[0](batch[0]).mean()  # type: ignore[index, no-any-return]

    trainer = make_trainer(model, step=blind, callbacks=[NaNMonitor("1ba")])
    with pytest.raises(DivergedError, match=r"the parameter '4.weight' \(Linear '4'\)"):
        trainer.fit()


def test_gradients_of_a_skipped_step_may_overflow() -> None:
    state = State(make_model(), "1ep", losses={"loss": torch.tensor(1.0)}, step_skipped=True)
    state.model.get_parameter("0.weight").grad = torch.full((8, 4), math.inf)
    NaNMonitor().look(state)
    state.step_skipped = False
    with pytest.raises(DivergedError, match=r"gradient of '0.weight'"):
        NaNMonitor().look(state)


def test_a_loss_term_that_is_nan_is_named() -> None:
    losses = {"loss": torch.tensor(1.0), "kd": torch.tensor(math.nan)}
    with pytest.raises(DivergedError, match="the loss term 'kd' is not finite"):
        NaNMonitor().look(State(make_model(), "1ep", losses=losses))


def test_a_ruined_model_does_not_replace_a_good_checkpoint(tmp_path: Any) -> None:
    class Ruin(Callback):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 8:
                with torch.no_grad():
                    state.model.get_parameter("4.bias").fill_(math.nan)

    trainer = make_trainer(
        callbacks=[Ruin(), NaNMonitor("1000ba")], save_dir=tmp_path, max_duration="3ep"
    )
    with pytest.raises(DivergedError, match=r"'4\.bias'"):
        trainer.fit()
    assert read_checkpoint(tmp_path / LATEST)["clock"]["batch"] == 4


def test_sparse_and_complex_tensors_are_looked_into() -> None:
    with torch.sparse.check_sparse_tensor_invariants():  # torch 2.11 asks to say so
        sparse = torch.sparse_coo_tensor([[1]], [math.inf], (3,))
        found = first_non_finite([("a", torch.ones(1, dtype=torch.cfloat)), ("b", sparse)])
    assert found == "b"
    assert first_non_finite([]) is None


class Wall:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def make_timed(wall: Wall, window: int, evaluation: float = 0.0, **options: Any) -> Trainer:
    """A step takes a second, of eight samples; an evaluation what is said."""

    def step(model: nn.Module, batch: Any) -> Tensor:
        wall.seconds += 1
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(model: nn.Module) -> dict[str, float]:
        wall.seconds += evaluation
        return accuracy(model)

    monitor = ThroughputMonitor("1ba", window=window, now=wall)
    callbacks = [monitor, *options.pop("callbacks", [])]
    return make_trainer(step=step, evaluate=evaluate, callbacks=callbacks, **options)


def test_throughput_counts_batches_and_samples_and_no_evaluation() -> None:
    logger = InMemoryLogger()
    make_timed(Wall(), 3, evaluation=50.0, loggers=[logger], eval_interval="1ba").fit()
    assert logger.get("throughput/batches_per_second") == (list(range(1, 9)), [1.0] * 8)
    assert logger.get("throughput/samples_per_second")[1] == [8.0] * 8


def test_throughput_is_of_the_last_batches_only() -> None:
    wall, logger = Wall(), InMemoryLogger()

    class Slow(Callback):
        events = frozenset({Event.BATCH_START})

        def on(self, event: Event, state: State) -> None:
            wall.seconds += 4.0 * (state.clock.batch == 3)

    make_timed(wall, 2, loggers=[logger], callbacks=[Slow()]).fit()
    rates = logger.get("throughput/batches_per_second")[1]
    assert rates == [1, 1, 1, 2 / 6, 2 / 6, 1, 1, 1]


def test_time_between_fits_does_not_count() -> None:
    wall, logger = Wall(), InMemoryLogger()
    trainer = make_timed(wall, 100, loggers=[logger])
    trainer.fit()
    wall.seconds += 1000
    trainer.fit("1ep")
    assert set(logger.get("throughput/batches_per_second")[1]) == {1.0}


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="window=0"):
        ThroughputMonitor(window=0)


def test_memory_is_in_bytes() -> None:
    logger = InMemoryLogger()
    make_trainer(callbacks=[MemoryMonitor()], loggers=[logger]).fit()
    # torch alone is more than 50 MB, and no machine of a test has a terabyte
    assert 50e6 < logger.most_recent["memory/rss_bytes"] < 1e12
    assert logger.most_recent["memory/peak_rss_bytes"] >= 50e6
    assert "memory/cuda_peak_bytes" not in logger.most_recent


def test_a_large_tensor_is_seen_in_memory() -> None:
    before = rss_bytes()
    # so large that no part of it can be memory that was freed before
    large = torch.ones(400 * 2**20, dtype=torch.uint8)
    assert rss_bytes() - before > 0.9 * large.numel()
    assert peak_rss_bytes() >= before + 0.9 * large.numel()
    assert peak_rss_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
