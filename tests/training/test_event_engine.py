from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compressor.errors import ConfigError
from compressor.training import Algorithm, Callback, Event, EventEngine, State
from tests.training.helpers import make_loader, make_model


class Noting(Callback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    events = ("batch_start", Event.BATCH_END)

    def on(self, event: Event, state: State) -> None:
        self.seen.append(f"{event.name.lower()} {state.clock.batch}")


class Doubling(Algorithm):
    """In the form of `match` and `apply`."""

    def match(self, event: Event, state: State) -> bool:
        return event is Event.AFTER_LOSS

    def apply(self, event: Event, state: State, logger: Any) -> None:
        state.loss = 2 * state.loss
        logger({"loss": state.loss.item()})


def test_the_events_run_in_a_loop_of_your_own() -> None:
    noting = Noting()
    model = make_model()
    state = State(model=model, max_duration="1ep", train_dataloader=make_loader())
    engine = EventEngine(state, algorithms=[Doubling()], callbacks=[noting])
    gradients = []
    for state.batch in make_loader():
        engine.run_event("batch_start")
        state.outputs = model(state.batch[0])
        loss = nn.functional.cross_entropy(state.outputs, state.batch[1])
        single = torch.autograd.grad(loss, model[4].weight, retain_graph=True)[0]
        state.loss = loss
        engine.run_event("after_loss")
        model.zero_grad()
        state.loss.backward()
        gradients.append((model[4].weight.grad.clone(), single))
        state.clock.advance(len(state.batch[1]))
        engine.run_event(Event.BATCH_END)
    assert noting.seen == [
        f"batch_{w} {n}"
        for n, w in zip([0, 1, 1, 2, 2, 3, 3, 4], 4 * ["start", "end"], strict=True)
    ]
    assert all(torch.allclose(doubled, 2 * single) for doubled, single in gradients)
    assert state.device == torch.device("cpu")


def test_an_unknown_event_names_the_nearest() -> None:
    engine = EventEngine(State(make_model(), 1))
    with pytest.raises(ConfigError, match=r"'batch_stat'.*'batch_start'"):
        engine.run_event("batch_stat")


def test_a_listener_without_on_or_apply_says_so() -> None:
    class Idle(Algorithm):
        events = frozenset({Event.FIT_START})

    with pytest.raises(ConfigError, match="Idle does nothing at FIT_START"):
        EventEngine(State(make_model(), 1), [Idle()]).run_event("fit_start")


def test_pairs_are_left_in_reverse_order_after_the_callbacks() -> None:
    seen: list[str] = []

    class Swap(Algorithm):
        events = frozenset({Event.EVAL_START, Event.EVAL_END})
        pairs = ((Event.EVAL_START, Event.EVAL_END),)

        def __init__(self, key: str) -> None:
            self.key = key

        def on(self, event: Event, state: State) -> None:
            seen.append(f"{self.key} {'in' if event is Event.EVAL_START else 'out'}")

    class Plain(Algorithm):
        events = frozenset({Event.EVAL_START, Event.EVAL_END})

        def on(self, event: Event, state: State) -> None:
            seen.append("plain")

    class Watch(Callback):
        events = frozenset({Event.EVAL_START, Event.EVAL_END})

        def on(self, event: Event, state: State) -> None:
            seen.append("watch")

    engine = EventEngine(State(make_model(), 1), [Swap("a"), Plain(), Swap("b")], [Watch()])
    engine.run_event("eval_start")
    assert seen == ["a in", "plain", "b in", "watch"]
    seen.clear()
    engine.run_event("eval_end")
    assert seen == ["plain", "watch", "b out", "a out"]
