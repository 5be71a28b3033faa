"""The events in a loop of your own: the same algorithms without the trainer."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.training.algorithm import Algorithm, Callback
from compressor.training.dispatch import Dispatch
from compressor.training.events import Event
from compressor.training.state import State


class EventEngine:
    """Calls algorithms and callbacks when your loop says where it is.

    Args:
        state: what they see and change; your loop puts `batch`, `outputs` and `loss` into it.
        algorithms: in the order in which they act, but for their `before` and `after`.
        callbacks: act after them.

    Raises:
        ConfigError: if two have one key, or the order is a circle.

    Example::

        state = State(model=task, max_duration="10ep", train_dataloader=loader)
        engine = EventEngine(state, algorithms=[MixUp(alpha=0.2)])
        engine.run_event("setup")
        for state.batch in loader:
            engine.run_event("before_forward")
            state.outputs = state.model(state.batch)
            engine.run_event("after_forward")
            state.loss = state.model.loss(state.outputs, state.batch)
            engine.run_event("after_loss")
            state.loss.backward()
            ...
            state.clock.advance(len(state.batch[0]))  # windows and schedules go by the clock
    """

    def __init__(
        self,
        state: State,
        algorithms: Sequence[Algorithm] = (),
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.state = state
        self.dispatch = Dispatch(algorithms, callbacks)
        state.algorithms = self.dispatch.algorithms

    def run_event(self, event: Event | str) -> None:
        """Call everybody who listens to `event`.

        Raises:
            ConfigError: if there is no such event.
        """
        self.dispatch.fire(Event.of(event), self.state)

    def close(self) -> None:
        """Let everybody go of what they hold; the engine can be used again."""
        for listener in self.dispatch.listeners:
            listener.close()
