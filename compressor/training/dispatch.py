"""Who is called at which event: a table, built once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from itertools import combinations
from typing import Protocol, TypeVar

from compressor.errors import ConfigError
from compressor.training.algorithm import Algorithm, Callback, Listener
from compressor.training.clock import Clock, Duration, Window
from compressor.training.events import WINDOWED, Event
from compressor.training.state import State

L = TypeVar("L", bound=Listener)


class Gate(Protocol):
    """Whether a listener is called at a moment; a `Window` is one."""

    def contains(self, clock: Clock, total: Duration) -> bool:
        """Whether it is called."""


class Entrance:
    """The gate of an event that enters a pair; remembers whether it was gone through."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.is_inside = False

    def contains(self, clock: Clock, total: Duration) -> bool:
        """Whether the window is open."""
        self.is_inside = self.window.contains(clock, total)
        return self.is_inside


class Exit:
    """The gate of an event that leaves a pair: open for who has entered it."""

    def __init__(self, entrance: Entrance) -> None:
        self.entrance = entrance

    def contains(self, clock: Clock, total: Duration) -> bool:
        """Whether the pair was entered, which it then no longer is."""
        del clock, total
        is_inside, self.entrance.is_inside = self.entrance.is_inside, False
        return is_inside


Entry = tuple[Callable[[Event, State], None], Gate | None]


class Dispatch:
    """Algorithms in their order, then callbacks in theirs, then algorithms that leave a pair.

    Raises:
        ConfigError: if one is no algorithm or callback, listens to nothing, two have one key or
            conflict, the order is a circle, or an event is none.
    """

    def __init__(self, algorithms: Sequence[Algorithm], callbacks: Sequence[Callback]) -> None:
        _check_kinds("algorithms", algorithms, Algorithm)
        _check_kinds("callbacks", callbacks, Callback)
        _check_keys([*algorithms, *callbacks])
        _check_order([*algorithms, *callbacks])
        _check_conflicts(algorithms)
        self.algorithms = sort_by_order(algorithms)
        self.callbacks = sort_by_order(callbacks)
        gates = {
            (each.key, event): gate
            for each in self.algorithms
            for event, gate in _gates(each).items()
        }
        self._table: dict[Event, tuple[Entry, ...]] = {
            event: tuple((each.on, gates.get((each.key, event))) for each in self.order_at(event))
            for event in Event
        }
        self._leaving: dict[Event, tuple[Entry, ...]] = {
            event: tuple(
                (each.on, gates.get((each.key, event)))
                for each in self.order_at(event)
                if _leaves(each, event)
            )
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
        self.bind(state)(event)

    def bind(self, state: State) -> Callable[[Event], None]:
        """`fire` for one state: seven calls a batch, most of which nobody listens to."""
        table = self._table

        def fire(event: Event) -> None:
            state.event = event
            for on, gate in table[event]:
                if gate is None or gate.contains(state.clock, state.max_duration):
                    on(event, state)

        return fire

    def leave(self, event: Event, state: State) -> None:
        """Call only those who leave a pair at `event`: what it ends has failed."""
        state.event = event
        for on, gate in self._leaving[event]:
            if gate is None or gate.contains(state.clock, state.max_duration):
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
    return not _names(second).isdisjoint(first.before) or not _names(first).isdisjoint(second.after)


def _names(listener: Listener) -> set[str]:
    """By which others name it: its key, and its class or what that derives from."""
    return {listener.key, *(cls.__name__ for cls in type(listener).__mro__)}


def _leaves(listener: Listener, event: Event) -> bool:
    """Whether `event` is the exit of a pair that `listener` declares."""
    return isinstance(listener, Algorithm) and any(
        Event.of(exit) is event for _, exit in listener.pairs
    )


def _gates(algorithm: Algorithm) -> dict[Event, Gate]:
    """Who has entered a pair leaves it, also when the window has closed meanwhile."""
    events = {Event.of(event) for event in algorithm.events}
    window = algorithm.window
    gates: dict[Event, Gate] = {}
    if window is not None:
        gates = {event: window for event in events & WINDOWED}
    for names in algorithm.pairs:
        enter, exit = map(Event.of, names)
        if not {enter, exit} <= events:
            raise ConfigError(
                f"{algorithm.key!r} has the pair {enter.name}, {exit.name} and does not listen to "
                "both. Add them to its `events`."
            )
        if window is not None and enter in WINDOWED:
            entrance = gates[enter] = Entrance(window)
            gates[exit] = Exit(entrance)
    return gates


def _check_kinds(option: str, given: Sequence[object], base: type[Listener]) -> None:
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise ConfigError(f"{option}={type(given).__name__}(...) is no list. Write [...] around.")
    for each in given:
        if isinstance(each, type):
            raise ConfigError(
                f"{each.__name__} in {option} is a class. Give an instance: {each.__name__}()."
            )
        if not isinstance(each, base):
            raise ConfigError(
                f"The {type(each).__name__} in {option} is no {base.__name__}. "
                f"Derive it from {base.__name__}, or give it as what it is."
            )
        is_own = type(each).on is not Listener.on or type(each).apply is not Listener.apply
        if not each.events and not is_own:
            near = [event for event in Event if hasattr(each, event.name.lower())]
            hint = f" in place of the method {near[0].name.lower()}" if near else ""
            raise ConfigError(
                f"{type(each).__name__} listens to nothing. Write `events` and "
                f"on(event, state){hint}."
            )


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
        if isinstance(listener.before, str) or isinstance(listener.after, str):
            raise ConfigError(f"`before` and `after` of {listener.key!r} are lists of keys.")
        conflicts = listener.conflicts if isinstance(listener, Algorithm) else ()
        for name in (*listener.before, *listener.after, *conflicts):
            near = [] if name in known else get_close_matches(name, known, n=1)
            if near:
                raise ConfigError(
                    f"{listener.key!r} wants to come before or after {name!r}, or not beside it, "
                    f"and there is no such key. Did you mean {near[0]!r}?"
                )


def _check_conflicts(algorithms: Sequence[Algorithm]) -> None:
    for first, second in combinations(algorithms, 2):
        for one, other in ((first, second), (second, first)):
            for name in one.conflicts:
                if name in _names(other):
                    raise ConfigError(f"{first.key!r} and {second.key!r} {one.conflicts[name]}")


def _subclasses(cls: type[Listener]) -> Iterator[type[Listener]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
