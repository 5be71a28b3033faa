"""Rates that were multiplied are reached by a rise, and the schedule knows nothing of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from compressor.errors import CheckpointError
from compressor.training import Callback, Event, State
from compressor.training.large_batch import LargeBatchWarmup, linear_warmup
from compressor.training.schedules import warmup_cosine
from tests.training.helpers import make_dataset, make_loader, make_model, make_trainer

BATCHES = 80  # of 20 epochs: the rise takes 4


class RecordingSGD(SGD):
    """Remembers the rate of every step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rates: list[float] = []

    def step(self, closure: Any = None) -> Any:
        self.rates.append(float(self.param_groups[0]["lr"]))
        return super().step(closure)


class RatesBetweenSteps(Callback):
    events = frozenset({Event.BATCH_START, Event.BATCH_END})

    def __init__(self) -> None:
        self.seen: set[float] = set()

    def on(self, event: Event, state: State) -> None:
        assert state.optimizer is not None
        self.seen.add(float(state.optimizer.param_groups[0]["lr"]))


def fitted_rates(factor: float, **options: Any) -> list[float]:
    model = make_model()
    optimizer = RecordingSGD(model.parameters(), lr=0.2)
    trainer = make_trainer(
        model,
        optimizers=optimizer,
        algorithms=[LargeBatchWarmup(factor)],
        max_duration="20ep",
        **options,
    )
    trainer.fit()
    assert len(optimizer.rates) == BATCHES
    return optimizer.rates


def test_the_rise_begins_at_the_rate_of_one_process() -> None:
    rises = [linear_warmup(fraction, 4, warmup=0.1) for fraction in (0, 0.05, 0.1, 0.5)]
    assert rises == pytest.approx([0.25, 0.625, 1.0, 1.0])
    assert linear_warmup(0.0, 1) == 1.0


def test_a_rate_that_would_stay_rises_linearly() -> None:
    between = RatesBetweenSteps()
    rates = fitted_rates(2, callbacks=[between])
    assert rates[:5] == pytest.approx([0.1, 0.125, 0.15, 0.175, 0.2])
    assert set(rates[5:]) == {0.2}
    assert between.seen == {0.2}


def test_a_schedule_that_rises_by_itself_is_not_held_back_further() -> None:
    rates = fitted_rates(2, schedulers="cosine")
    expected = [0.2 * warmup_cosine(batch / BATCHES) for batch in range(BATCHES)]
    assert rates == pytest.approx(expected)


def test_a_schedule_that_begins_too_high_for_many_processes_is_held_back() -> None:
    rates = fitted_rates(64, schedulers="cosine")
    assert rates[0] == pytest.approx(0.2 / 64)
    assert rates[4:] == pytest.approx(
        [0.2 * warmup_cosine(batch / BATCHES) for batch in range(4, BATCHES)]
    )


def test_one_process_trains_as_without_it() -> None:
    assert set(fitted_rates(1)) == {0.2}


def test_a_fit_that_fails_in_a_step_leaves_the_rate_as_it_was() -> None:
    class Fails(RecordingSGD):
        def step(self, closure: Any = None) -> Any:
            raise OSError("no step")

    model = make_model()
    optimizer = Fails(model.parameters(), lr=0.2)
    trainer = make_trainer(model, optimizers=optimizer, algorithms=[LargeBatchWarmup(2)])
    with pytest.raises(OSError, match="no step"):
        trainer.fit()
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_a_rate_that_is_a_tensor_remains_one() -> None:
    model = nn.Linear(4, 2)
    rate = torch.tensor(0.2)
    seen: list[Tensor] = []

    class Watch(Callback):
        events = frozenset({Event.AFTER_STEP})

        def on(self, event: Event, state: State) -> None:
            assert state.optimizer is not None
            seen.append(state.optimizer.param_groups[0]["lr"])

    trainer = make_trainer(
        model,
        train_dataloader=[make_dataset().tensors],
        optimizers=SGD(model.parameters(), lr=rate),
        algorithms=[LargeBatchWarmup(2)],
        callbacks=[Watch()],
        max_duration="1ba",
    )
    trainer.fit()
    assert seen[0].item() == pytest.approx(0.1)
    assert trainer.optimizer is not None
    assert trainer.optimizer.param_groups[0]["lr"] is rate


def test_a_checkpoint_of_another_number_of_processes_is_refused() -> None:
    saved = make_trainer(algorithms=[LargeBatchWarmup(2)]).state_dict()
    other = make_trainer(algorithms=[LargeBatchWarmup(4)], train_dataloader=make_loader())
    with pytest.raises(CheckpointError, match="LargeBatchWarmup"):
        other.load_state_dict(saved)
