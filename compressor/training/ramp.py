"""How far training is between two moments."""

from __future__ import annotations

from compressor.errors import ConfigError
from compressor.training.clock import Clock, Duration, Unit


def progress(clock: Clock, total: Duration, start: Duration, end: Duration) -> float:
    """The part of the way from `start` to `end` that is behind us, 0 to 1; a function of the clock.

    Args:
        clock: where training is.
        total: of which `'0.5dur'` is a half.
        start: is 0 up to here.
        end: is 1 from here on.

    Raises:
        ConfigError: if the two cannot be compared.

    >>> whole = Duration.parse("10ep")
    >>> progress(Clock(epoch=6), whole, Duration.parse("5ep"), Duration.parse("9ep"))
    0.25
    """
    if start.unit is end.unit or not start.value:
        now, first, last = _position(clock, total, end.unit), start.value, end.value
    else:
        now = clock.fraction_of(total)
        first, last = (_fraction(moment, clock, total) for moment in (start, end))
    if now >= last:
        return 1.0
    return max(0.0, (now - first) / (last - first)) if last > first else 0.0


def _position(clock: Clock, total: Duration, unit: Unit) -> float:
    if unit is Unit.FRACTION:
        return clock.fraction_of(total)
    if unit is Unit.EPOCH and clock.batches_per_epoch:
        return clock.epoch + min(1.0, clock.batch_in_epoch / clock.batches_per_epoch)
    return clock.now(unit)


def _fraction(moment: Duration, clock: Clock, total: Duration) -> float:
    """`moment` as a part of `total`."""
    if moment.unit is Unit.FRACTION or not moment.value:
        return moment.value
    if moment.unit is total.unit:
        return moment.value / total.value
    per_epoch = clock.batches_per_epoch
    if per_epoch and (moment.unit, total.unit) == (Unit.BATCH, Unit.EPOCH):
        return moment.value / (per_epoch * total.value)
    if per_epoch and (moment.unit, total.unit) == (Unit.EPOCH, Unit.BATCH):
        return moment.value * per_epoch / total.value
    raise ConfigError(
        f"'{moment}' cannot be compared with a training of '{total}'. "
        "Write it as a part of the whole, such as '0.5dur'."
    )
