"""Who is called at which event: a table, built once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import TypeVar

from compressor.errors import ConfigError
from compressor.training.algorithm import Algorithm, Callback, Listener
from compressor.training.clock import Window
from compressor.training.events import WINDOWED, Event
from compressor.training.state import State

L = TypeVar("L", bound=Listener)
Entry = tuple[Callable[[Event, State], None], Window | None]


class Dispatch:
    """Algorithms in their order, then callbacks in theirs, then algorithms that leave a pair.

    Raises:
        ConfigError: if two have one key, the order is a circle, or an event is none.
    """

    def __init__(self, algorithms: Sequence[Algorithm], callbacks: Sequence[Callback]) -> None:
        _check_keys([*algorithms, *callbacks])
        _check_order([*algorithms, *callbacks])
        self.algorithms = sort_by_order(algorithms)
        self.callbacks = sort_by_order(callbacks)
        self._table: dict[Event, tuple[Entry, ...]] = {
            event: tuple((each.on, _window(each, event)) for each in self.order_at(event))
            for event in Event
        }

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """All: algorithms, then callbacks."""
        return (*self.algorithms, *self.callbacks)

    def order_at(self, event: Event) -> tuple[Listener, ...]:
        """Who is called at `event`, first to last."""
        listening = [each for each in self.listeners if event in map(Event.of, each.events)]
        leaving = [each for each in listening if _leaves(each, event)]
        return (*(each for each in listening if each not in leaving), *reversed(leaving))

    def fire(self, event: Event, state: State) -> None:
        """Call everybody who listens to `event`."""
        state.event = event
        for on, window in self._table[event]:
            if window is None or window.contains(state.clock, state.max_duration):
                on(event, state)

    def is_heard(self, *events: Event) -> bool:
        """Whether anybody listens to one of `events`."""
        return any(self._table[event] for event in events)

    def changes_at(self, event: Event) -> bool:
        """Whether an algorithm may change the model at `event`."""
        return any(event in map(Event.of, algorithm.events) for algorithm in self.algorithms)


def sort_by_order(listeners: Sequence[L]) -> tuple[L, ...]:
    """The order as given, but for what `before` and `after` demand.

    Raises:
        ConfigError: if they contradict each other.
    """
    earlier = {a.key: {b.key for b in listeners if _precedes(b, a)} for a in listeners}
    waiting = list(listeners)
    done: list[L] = []
    while waiting:
        free = next((a for a in waiting if earlier[a.key] <= {b.key for b in done}), None)
        if free is None:
            names = ", ".join(repr(listener.key) for listener in waiting)
            raise ConfigError(
                f"{names} each want to come before the other. Take one out of `before` or `after`."
            )
        waiting.remove(free)
        done.append(free)
    return tuple(done)


def _precedes(first: Listener, second: Listener) -> bool:
    return second.key in first.before or first.key in second.after


def _leaves(listener: Listener, event: Event) -> bool:
    """Whether `event` is the exit of a pair that `listener` declares."""
    return isinstance(listener, Algorithm) and any(exit is event for _, exit in listener.pairs)


def _window(listener: Listener, event: Event) -> Window | None:
    return listener.window if isinstance(listener, Algorithm) and event in WINDOWED else None


def _check_keys(listeners: Sequence[Listener]) -> None:
    keys = [listener.key for listener in listeners]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(
                f"{keys.count(key)} algorithms or callbacks have the key {key!r}, under which "
                "their state is saved. Set `.key` of each to a name of its own."
            )


def _check_order(listeners: Sequence[Listener]) -> None:
    """Who is named in `before` and `after` need not be there; but a misspelt name would be."""
    known = {each.key for each in listeners} | {cls.key for cls in _subclasses(Listener)}
    for listener in listeners:
        for name in (*listener.before, *listener.after):
            near = [] if name in known else get_close_matches(name, known, n=1)
            if near:
                raise ConfigError(
                    f"{listener.key!r} wants to come before or after {name!r}, and there is no "
                    f"such key. Did you mean {near[0]!r}?"
                )


def _subclasses(cls: type[Listener]) -> Iterator[type[Listener]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
