"""How far training is, and how far it shall go."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TypeAlias

from compressor.errors import ConfigError, suggest

NUMBER_AND_UNIT = re.compile(r"([0-9.]+(?:e[0-9]+)?)(ep|ba|sp|dur)")
WALL_CLOCK = re.compile(r"(?:([0-9.]+)d)?(?:([0-9.]+)h)?(?:([0-9.]+)m)?(?:([0-9.]+)s)?")
SECONDS = (86_400, 3_600, 60, 1)


class Unit(Enum):
    """What a duration counts."""

    EPOCH = "ep"
    BATCH = "ba"
    SAMPLE = "sp"
    FRACTION = "dur"
    SECOND = "s"


@dataclass(frozen=True)
class Duration:
    """A length of training, or the moment when so much of it has passed.

    >>> Duration.parse("1e3ba"), str(Duration.parse(2)), str(Duration.parse("1h30m"))
    (Duration(value=1000.0, unit=<Unit.BATCH: 'ba'>), '2ep', '5400s')
    """

    value: float
    unit: Unit

    def __post_init__(self) -> None:
        """Take the unit by its letters too.

        Raises:
            ConfigError: if there is no such unit.
        """
        try:
            object.__setattr__(self, "unit", Unit(self.unit))
        except ValueError as error:
            units = [unit.value for unit in Unit]
            raise ConfigError(
                f"There is no unit {self.unit!r}. {suggest(str(self.unit), units)}"
            ) from error

    @classmethod
    def parse(cls, value: DurationLike) -> Duration:
        """`'10ep'` epochs, `'500ba'` batches, `'1e6sp'` samples, `'0.5dur'` of all; int: epochs.

        Of the clock on the wall: `'90m'`, `'1h30m'`, `'45s'`, `'2d'`.

        Raises:
            ConfigError: if `value` is none of these.
        """
        if isinstance(value, Duration):
            return value
        text = f"{value}ep" if isinstance(value, int) else str(value).strip().lower()
        seconds = _to_seconds(text)
        if seconds is not None:
            return cls(seconds, Unit.SECOND)
        match = NUMBER_AND_UNIT.fullmatch(text)
        number = _to_float(match[1]) if match else None
        if match is None or number is None:
            raise ConfigError(
                f"{value!r} is not a duration. Write a number and a unit: '10ep' for epochs, "
                "'500ba' for batches, '1e6sp' for samples, '90m' or '1h30m' on the wall, "
                "'0.5dur' for a part of the whole."
            )
        unit = Unit(match[2])
        if unit is Unit.FRACTION and number > 1:
            raise ConfigError(f"{value!r} is more than the whole. Write 0 to 1 before 'dur'.")
        if unit is not Unit.FRACTION and not number.is_integer():
            raise ConfigError(f"{value!r} is not a whole number of {unit.name.lower()}s. Round it.")
        return cls(number, unit)

    def __str__(self) -> str:
        return f"{self.value:g}{self.unit.value}"


DurationLike: TypeAlias = "Duration | str | int"


def parse_total(value: DurationLike) -> Duration:
    """A length that does not refer to another: `Duration.parse` without `'dur'`.

    Raises:
        ConfigError: if `value` is not such a length.
    """
    total = Duration.parse(value)
    if total.unit is Unit.FRACTION:
        raise ConfigError(f"{value!r} of what? Give the whole in 'ep', 'ba', 'sp' or 'm'.")
    return total


@dataclass
class Clock:
    """What has been trained so far.

    Attributes:
        epoch: finished epochs; a partial last one of a fit counts.
        batch: finished batches.
        sample: samples in them.
        batch_in_epoch: finished batches of the present epoch.
        seconds: that fits took so far, evaluations included.
        batches_per_epoch: None when the loader does not know.
    """

    epoch: int = 0
    batch: int = 0
    sample: int = 0
    batch_in_epoch: int = 0
    seconds: float = 0.0
    batches_per_epoch: int | None = None

    def advance(self, samples: int) -> None:
        """One more batch, of `samples` samples."""
        self.batch += 1
        self.batch_in_epoch += 1
        self.sample += samples

    def end_epoch(self) -> None:
        """The present epoch is over."""
        self.epoch += 1
        self.batch_in_epoch = 0

    def now(self, unit: Unit) -> float:
        """What is finished, in whole epochs, batches or samples, or in seconds."""
        if unit is Unit.EPOCH:
            return self.epoch
        if unit is Unit.BATCH:
            return self.batch
        return self.sample if unit is Unit.SAMPLE else self.seconds

    def fraction_of(self, total: Duration) -> float:
        """The part of `total` that has passed, 0 to 1; smooth within an epoch of known length."""
        if total.unit is Unit.EPOCH:
            passed: float = self.epoch
            if self.batches_per_epoch:
                passed += min(1.0, self.batch_in_epoch / self.batches_per_epoch)
        else:
            passed = self.now(total.unit)
        return min(1.0, passed / total.value) if total.value else 1.0

    def has_reached(self, moment: Duration, total: Duration) -> bool:
        """Whether `moment`, of a training that lasts `total`, has come."""
        if moment.unit is Unit.FRACTION:
            return self.fraction_of(total) >= moment.value
        return self.now(moment.unit) >= moment.value

    def state_dict(self) -> dict[str, float | None]:
        """The counts."""
        return asdict(self)

    def load_state_dict(self, saved: Mapping[str, float | None]) -> None:
        """Set the counts; the length of an epoch is the loader's, not the file's."""
        for name in ("epoch", "batch", "sample", "batch_in_epoch", "seconds"):
            setattr(self, name, saved[name])


class Every:
    """Says when an interval has passed again.

    Args:
        interval: such as '1ep'; 0 never passes.

    Raises:
        ConfigError: if it is no interval.
    """

    def __init__(self, interval: DurationLike) -> None:
        self.interval = parse_total(interval)
        self._count = 0

    @property
    def is_by_epoch(self) -> bool:
        """Whether it can only be due when an epoch ends."""
        return self.interval.unit is Unit.EPOCH

    def begin(self, clock: Clock) -> None:
        """Count from now: what was due before is done."""
        self._count = self._passed(clock)

    def is_due(self, clock: Clock) -> bool:
        """Whether the interval has passed since this was last so."""
        before, self._count = self._count, self._passed(clock)
        return self._count > before

    def _passed(self, clock: Clock) -> int:
        if not self.interval.value:
            return 0
        return int(clock.now(self.interval.unit) // self.interval.value)


class Stopwatch:
    """Writes into a clock how long fits took."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._origin = 0.0

    def start(self) -> None:
        """A fit begins."""
        self._origin = time.monotonic() - self._clock.seconds

    def elapsed(self) -> float:
        """Seconds that fits took until now, by this process's own clock."""
        return time.monotonic() - self._origin

    def note(self) -> None:
        """So long it has taken until now."""
        self._clock.seconds = self.elapsed()


@dataclass(frozen=True)
class Window:
    """A stretch of training, such as `Window.parse("0.1dur", "0.9dur")`: the end is outside."""

    start: Duration
    end: Duration

    @classmethod
    def parse(cls, start: DurationLike = "0dur", end: DurationLike = "1dur") -> Window:
        """From two moments.

        Raises:
            ConfigError: if one is not a duration, or the end comes first.
        """
        window = cls(Duration.parse(start), Duration.parse(end))
        if window.start.unit is window.end.unit and window.start.value >= window.end.value:
            raise ConfigError(f"A window from {start!r} to {end!r} never opens. Swap the two.")
        return window

    def contains(self, clock: Clock, total: Duration) -> bool:
        """Whether it is open. The end of the whole, `'1dur'`, closes no window."""
        if not clock.has_reached(self.start, total):
            return False
        is_to_the_end = self.end.unit is Unit.FRACTION and self.end.value == 1
        return is_to_the_end or not clock.has_reached(self.end, total)


def _to_seconds(text: str) -> float | None:
    """Of `'1h30m'`; None if `text` is no such time."""
    match = WALL_CLOCK.fullmatch(text)
    if match is None or not any(match.groups()):
        return None
    parts = [0.0 if part is None else _to_float(part) for part in match.groups()]
    return None if None in parts else sum(p * s for p, s in zip(parts, SECONDS, strict=True) if p)


def _to_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "1.2.3"
        return None
