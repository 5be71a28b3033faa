"""How often each event comes: a table for micro-batches, evaluators and every unit of time."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from compressor.training import Callback, Evaluator, Event, State
from compressor.training import clock as clock_module
from tests.training.helpers import make_loader, make_trainer


class Count(Callback):
    events = frozenset(Event)

    def __init__(self) -> None:
        self.counts = dict.fromkeys(Event, 0)

    def on(self, event: Event, state: State) -> None:
        self.counts[event] += 1


# Of 2 epochs of 4 batches of 8 samples, a second a batch. The end has an evaluation and a
# checkpoint of its own, whatever the interval; only where that is a whole epoch they are the same.
DUE = {
    "1ep": 2,
    "2ep": 1,
    "1ba": 9,
    "3ba": 3,
    "8sp": 9,
    "20sp": 4,
    "3s": 3,
    "1m": 1,
}


@pytest.mark.parametrize("interval", DUE)
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_events_come_as_often_as_the_table_says(
    interval: str, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = count()
    monkeypatch.setattr(clock_module.time, "monotonic", lambda: next(seconds))
    counter = Count()
    make_trainer(
        callbacks=[counter],
        micro_batch_size=8 // parts,
        eval_dataloader=[
            Evaluator(make_loader(), "a"),
            Evaluator(make_loader(), "b", interval="5ba"),
        ],
        eval_interval=interval,
        save_dir=tmp_path,
        save_interval=interval,
    ).fit()
    every_batch, every_part = 8, 8 * parts
    both = DUE[interval] + 2  # the other one: after 5 batches, and at the end
    assert counter.counts == {
        Event.SETUP: 1,
        Event.FIT_START: 1,
        Event.EPOCH_START: 2,
        Event.BATCH_START: every_batch,
        Event.BEFORE_FORWARD: every_part,
        Event.AFTER_FORWARD: every_part,
        Event.AFTER_LOSS: every_part,
        Event.BEFORE_STEP: every_batch,
        Event.AFTER_STEP: every_batch,
        Event.BATCH_END: every_batch,
        Event.EPOCH_END: 2,
        Event.EVAL_START: both,
        Event.EVAL_END: both,
        Event.CHECKPOINT: DUE[interval],
        Event.FIT_END: 1,
    }
