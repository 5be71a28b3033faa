"""What can be plugged into training: algorithms change the state, callbacks read it."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from compressor.errors import ConfigError
from compressor.training.card import Card
from compressor.training.clock import Window
from compressor.training.events import Event

if TYPE_CHECKING:
    from compressor.structure.surgery import Edit
    from compressor.training.state import State


class Listener:
    """The half that algorithms and callbacks share. Subclass `Algorithm` or `Callback`.

    Write `events` and `on`; or `match` and `apply`, where asking at every event is cheap enough.
    Everything has a default on the class, so a subclass may leave `super().__init__()` out.

    Attributes:
        events: when `on` is called.
        key: unique among the listeners of a trainer; names the state in a checkpoint. The class's
            name unless set.
        before: keys of listeners that come later at every event; unknown ones do not matter.
        after: keys of listeners that come earlier.
    """

    events: Collection[Event | str] = frozenset()
    key: str = ""
    before: Collection[str] = ()
    after: Collection[str] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "key" not in vars(cls):
            cls.key = cls.__name__
        if "apply" in vars(cls) and "events" not in vars(cls):
            cls.events = frozenset(Event)

    def on(self, event: Event, state: State) -> None:
        """Act at `event`, one of `events`; unless overridden: `apply` if `match`."""
        if self.match(event, state):
            takes_logger = len(inspect.signature(self.apply).parameters) > 2
            self.apply(event, state, *([state.log] if takes_logger else []))

    def match(self, event: Event, state: State) -> bool:
        """Whether `apply` is to be called; for those who do not override `on`."""
        del event, state
        return True

    def apply(self, event: Event, state: State, *logger: Any) -> None:
        """Act; may take `state.log` as a third argument. For those who do not override `on`."""
        raise ConfigError(
            f"{type(self).__name__} does nothing at {event.name}. Override on(event, state)."
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs: tensors, numbers, strings, None in lists and dicts."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        del saved

    def close(self) -> None:
        """Let go of what FIT_START took. Called after every fit, also after a failed one."""
        return


class Algorithm(Listener):
    """Changes how a model is trained.

    Attributes:
        window: when it acts; None is always. SETUP, FIT_START, FIT_END, CHECKPOINT and the
            evaluation's events come to it in any case.
        pairs: (enter, exit) events. At the exit such algorithms run last, after the callbacks, and
            in reverse order, as nested `with` statements are left.
        recomputes: calls `state.recompute_gradients`.
        conflicts: keys, or classes, of algorithms that cannot act beside it. The value completes
            the sentence "'this' and 'that' …": why, and what to do.
        card: what is told of it in the documentation; None for a user's own.
    """

    window: Window | None = None
    pairs: Collection[tuple[Event, Event]] = ()
    recomputes: bool = False
    conflicts: Mapping[str, str] = MappingProxyType({})
    card: ClassVar[Card | None] = None

    def rebind(self, edit: Edit, state: State) -> None:
        """Follow a change of the parameters, for those who hold averages or masks of them."""
        del edit, state


class Callback(Listener):
    """Watches training. It may end it (`state.stop`) and changes nothing else."""
