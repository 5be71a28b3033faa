"""When an algorithm or a callback can act."""

from __future__ import annotations

from enum import Enum, auto

from compressor.errors import ConfigError, suggest


class Event(Enum):
    """A moment of training, in the order of the loop.

    ::

        SETUP                     surgery allowed; before device, optimizer and wrapping
        FIT_START
          EPOCH_START
            BATCH_START           the whole batch, on the device; may be replaced
              BEFORE_FORWARD      each micro-batch: `state.batch` may be replaced
              AFTER_FORWARD       `state.outputs`; these and the targets in `state.batch` may be
                                  replaced: the loss sees them
              AFTER_LOSS          named terms: add or replace, never scale in place
            BEFORE_STEP           gradients complete and unscaled
            AFTER_STEP            `state.step_skipped` is known; before clock and schedule
            BATCH_END             clock advanced; surgery allowed
          EPOCH_END               also after a partial last epoch; surgery allowed
        EVAL_START  EVAL_END      each evaluator
        CHECKPOINT                before a checkpoint is written
        FIT_END                   before the last evaluation and checkpoint

    >>> Event.of("batch_end") is Event.BATCH_END
    True
    """

    SETUP = auto()
    FIT_START = auto()
    EPOCH_START = auto()
    BATCH_START = auto()
    BEFORE_FORWARD = auto()
    AFTER_FORWARD = auto()
    AFTER_LOSS = auto()
    BEFORE_STEP = auto()
    AFTER_STEP = auto()
    BATCH_END = auto()
    EPOCH_END = auto()
    EVAL_START = auto()
    EVAL_END = auto()
    CHECKPOINT = auto()
    FIT_END = auto()

    __hash__ = object.__hash__  # Enum's own runs in Python, and every event is looked up

    @classmethod
    def of(cls, value: Event | str) -> Event:
        """The event called `value`, in any case.

        Raises:
            ConfigError: if there is none.
        """
        if isinstance(value, Event):
            return value
        names = {event.name.lower(): event for event in cls}
        event = names.get(str(value).lower())
        if event is None:
            raise ConfigError(f"There is no event {value!r}. {suggest(str(value).lower(), names)}")
        return event


SURGERY_ALLOWED = frozenset({None, Event.SETUP, Event.BATCH_END, Event.EPOCH_END})
"""Moments at which nobody holds tensors of the model, or values in place of its own."""

WINDOWED = frozenset(
    {
        Event.EPOCH_START,
        Event.BATCH_START,
        Event.BEFORE_FORWARD,
        Event.AFTER_FORWARD,
        Event.AFTER_LOSS,
        Event.BEFORE_STEP,
        Event.AFTER_STEP,
        Event.BATCH_END,
        Event.EPOCH_END,
    }
)
"""Moments that a window of activity can leave out; the others prepare and tidy up."""
