"""The callbacks of a recipe: any objects with hooks, in lanes, with state."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from enum import IntEnum
from typing import Any, TypeAlias

import torch
from torch import Tensor

from compressor.errors import CheckpointError, ConfigError
from compressor.training.algorithm import Algorithm, Listener
from compressor.training.events import Event
from compressor.training.state import State

Hook: TypeAlias = Callable[[dict[str, Any]], object]

HOOKS = {
    Event.EPOCH_START: "on_epoch_start",
    Event.BATCH_START: "on_batch_start",
    Event.BATCH_END: "on_batch_end",
    Event.EPOCH_END: "on_epoch_end",
}

RESERVED = frozenset({"batch", "epoch", "iters", "epoch_batch", "fraction", "metrics"})
"""Keys of a recipe's state that are not for a step to return."""


class Lane(IntEnum):
    """Where a callback runs among the others; within a lane they run as they were added.

    A class says its own as `lane`; without one it is `MAIN`. So an average may be added after the
    logger that shows it, and a checkpoint never holds half of a batch.
    """

    PROLOGUE = 0
    MAIN = 1
    TEST = 2  # other recipes, on the weights after this batch
    EPILOGUE = 3  # tells of what was measured
    SAVE = 4  # when all others are done


TRAINING = (Lane.PROLOGUE, Lane.MAIN, Lane.TEST)
WATCHING = (Lane.EPILOGUE, Lane.SAVE)


class RecipeCallbacks(Algorithm):
    """Calls the hooks of callbacks, and holds the state that they are called with.

    A callback is any object with one or more of on_epoch_start(state), on_batch_start(state),
    on_batch_end(state) and on_epoch_end(state). It may have `state_dict` and `load_state_dict`
    (saved and restored with the recipe), `close()` (called when a run ends, also by an error) and
    `to(device)` (called when the recipe is moved).

    Attributes:
        state: a dict. "batch": on the recipe's device; a callback may replace it at on_batch_start.
            "epoch", "iters", "epoch_batch": finished epochs, finished batches, and those of this
            epoch. "fraction": of the run that has passed, 0 to 1. "metrics": what is ready to be
            logged, by name. Beside these: what the step returned; of that, tensors of more than one
            element are dropped when a run ends.
        keeps_returned: they are not dropped.
    """

    events = frozenset(HOOKS)
    key = "recipe"

    def __init__(self) -> None:
        self.state: dict[str, Any] = {
            "batch": None,
            "epoch": 0,
            "iters": 0,
            "epoch_batch": 0,
            "fraction": 0.0,
            "metrics": {},
        }
        self.keeps_returned = False
        self._returned: set[str] = set()
        self._lanes: dict[Lane, list[Any]] = {lane: [] for lane in Lane}
        self._hooks: dict[Event, tuple[Hook, ...]] = dict.fromkeys(HOOKS, ())

    @property
    def all(self) -> tuple[Any, ...]:
        """The callbacks, in the order in which they run."""
        return tuple(each for lane in Lane for each in self._lanes[lane])

    def add_callback(self, callback: Any) -> None:
        """Add one callback.

        Raises:
            ConfigError: as `add_callbacks`.
        """
        self._add([callback], None)

    def add_callbacks(self, callbacks: Any) -> None:
        """Add each, or the one, to the lane that it names as `lane`, after those that are there.

        Raises:
            ConfigError: if one has no hook, or one that there is not; none is added then.
        """
        self._add(callbacks, None)

    def add_prologues(self, callbacks: Any) -> None:
        """Add callbacks that run before the others.

        Raises:
            ConfigError: as `add_callbacks`.
        """
        self._add(callbacks, Lane.PROLOGUE)

    def add_epilogues(self, callbacks: Any) -> None:
        """Add callbacks that run after the others, but for those that write checkpoints.

        Raises:
            ConfigError: as `add_callbacks`.
        """
        self._add(callbacks, Lane.EPILOGUE)

    def on(self, event: Event, state: State) -> None:
        """Call the hooks."""
        values = self.state
        self.count(state)
        if event is Event.BATCH_START:
            values["batch"] = state.batch
        for hook in self._hooks[event]:
            hook(values)
        if event is Event.BATCH_START:
            state.batch = values["batch"]

    def count(self, state: State) -> None:
        """Take the counts from the clock."""
        values, clock = self.state, state.clock
        values["epoch"] = clock.epoch
        values["iters"] = clock.batch
        values["epoch_batch"] = clock.batch_in_epoch
        values["fraction"] = state.fraction

    def note_returned(self, returned: Mapping[str, Any]) -> Mapping[str, Any]:
        """Remember what came from the step, and give it back."""
        self._returned.update(returned)
        return returned

    def to(self, device: torch.device) -> None:
        """Tell the callbacks that the recipe has moved."""
        for each in self.all:
            if callable(getattr(each, "to", None)):
                each.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Metrics that are numbers or words, and the state of every callback that has one."""
        return {
            "metrics": _plain(self.state["metrics"]),
            "callbacks": [_state_of(each) for each in self._stateful(*TRAINING)],
            "watchers": [_state_of(each) for each in self._stateful(*WATCHING)],
        }

    def check(self, saved: Mapping[str, Any]) -> None:
        """Do nothing if `saved` is of callbacks like these.

        Raises:
            CheckpointError: if it is not.
        """
        then = [name for name, _ in saved["callbacks"]]
        now = [type(each).__name__ for each in self._stateful(*TRAINING)]
        if then != now:
            raise CheckpointError(
                f"The checkpoint has the states of the callbacks {', '.join(then) or 'none'}; here "
                f"are {', '.join(now) or 'none'}. Add the same ones in the same order; only those "
                "without state, and those that log or save, may be others."
            )

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave. Of loggers and the like, those that are in both go on.

        Raises:
            CheckpointError: if the callbacks are others.
        """
        self.check(saved)
        self.state["metrics"] = dict(saved["metrics"])
        for each, (_, state) in zip(self._stateful(*TRAINING), saved["callbacks"], strict=True):
            each.load_state_dict(state)
        waiting = list(saved["watchers"])
        for each in self._stateful(*WATCHING):
            found = next((entry for entry in waiting if entry[0] == type(each).__name__), None)
            if found is not None:
                waiting.remove(found)
                each.load_state_dict(found[1])

    def close(self) -> None:
        """Close the callbacks, and let go of the batch and what was computed from it."""
        self.state["batch"] = None
        if not self.keeps_returned:
            for name in self._returned:
                if _is_large(self.state.get(name)):
                    del self.state[name]
        self._returned.clear()
        with ExitStack() as stack:  # all of them, even if one fails
            for each in self.all:
                if callable(getattr(each, "close", None)):
                    stack.callback(each.close)

    def _stateful(self, *lanes: Lane) -> list[Any]:
        return [each for lane in lanes for each in self._lanes[lane] if _has_state(each)]

    def _add(self, callbacks: Any, lane: Lane | None) -> None:
        is_one = not isinstance(callbacks, Iterable) or _has_hook(callbacks)
        added = [callbacks] if is_one else list(callbacks)
        for each in added:
            _check_hooks(each)
        lanes = [_lane_of(each) if lane is None else lane for each in added]
        for each, own in zip(added, lanes, strict=True):
            self._lanes[own].append(each)
        self._hooks = {
            event: tuple(getattr(each, name) for each in self.all if hasattr(each, name))
            for event, name in HOOKS.items()
        }


def _has_hook(value: Any) -> bool:
    return any(hasattr(value, name) for name in HOOKS.values())


def _is_large(value: Any) -> bool:
    """Whether there are tensors of more than one element in it."""
    if isinstance(value, Tensor):
        return value.numel() > 1
    inner = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, (Mapping, tuple, list)) and any(map(_is_large, inner))


def _check_hooks(callback: Any) -> None:
    known = list(HOOKS.values())
    kind = type(callback).__name__
    if isinstance(callback, type):
        raise ConfigError(
            f"The callback {callback.__name__} is a class. Give an instance: "
            f"{callback.__name__}(...)."
        )
    if isinstance(callback, Listener):
        raise ConfigError(
            f"{kind} is for a Trainer and hears other events. Give a recipe objects with one of "
            f"{', '.join(known)}."
        )
    hooks = [name for name in dir(callback) if name.startswith("on_")]
    for name in hooks:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{kind}.{name} would never be called. Did you mean {near!r}? "
                f"Known: {', '.join(known)}."
            )
    if not hooks:
        raise ConfigError(
            f"{kind} has no hook, so it would do nothing. Give it one of {', '.join(known)}."
        )


def _lane_of(callback: Any) -> Lane:
    lane = getattr(callback, "lane", Lane.MAIN)
    if not isinstance(lane, Lane):
        raise ConfigError(
            f"{type(callback).__name__}.lane is {lane!r}. Write one of Lane, such as Lane.EPILOGUE."
        )
    return lane


def _has_state(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


def _state_of(callback: Any) -> list[Any]:
    return [type(callback).__name__, callback.state_dict()]


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint can hold of them, without tensors that are more than a number."""
    kept: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            kept[str(name)] = value.item()
        elif isinstance(value, (bool, int, float, str)):
            kept[str(name)] = value
    return kept
