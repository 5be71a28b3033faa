"""The proof that a training goes on after an interruption as if nothing had happened."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

from compressor.training import Callback, Event, State, Trainer
from tests.training.helpers import are_equal, weights_of


class Saving(Callback):
    """Takes the trainer's state at the end of some batches."""

    events = frozenset({Event.BATCH_END})

    def __init__(self, batches: Collection[int] = ()) -> None:
        self.batches = batches
        self.trainer: Trainer | None = None
        self.saved: dict[int, dict[str, Any]] = {}

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch in self.batches and self.trainer is not None:
            self.saved[state.clock.batch] = copy.deepcopy(self.trainer.state_dict())


def assert_resumes(make: Callable[[list[Callback]], Trainer], batches: Collection[int]) -> None:
    """Weights, and the states of all algorithms, are bit-equal at the end."""
    saving = Saving(batches)
    straight = saving.trainer = make([saving])
    straight.fit()
    for batch in batches:
        resumed = make([Saving()])
        resumed.load_state_dict(saving.saved[batch])
        resumed.fit()
        assert are_equal(weights_of(straight.model), weights_of(resumed.model)), batch
        ours, theirs = (each.state_dict()["algorithms"] for each in (straight, resumed))
        assert _flat(ours) == _flat(theirs), batch


def _flat(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _flat(item) for key, item in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value
