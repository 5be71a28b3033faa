from __future__ import annotations

import pytest

from compressor.errors import ConfigError
from compressor.training.clock import Clock, Duration, Unit, Window, parse_total


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("10ep", 10, Unit.EPOCH),
        (3, 3, Unit.EPOCH),
        ("1e3ba", 1000, Unit.BATCH),
        (" 1E6SP ", 1e6, Unit.SAMPLE),
        ("0.5dur", 0.5, Unit.FRACTION),
    ],
)
def test_durations_are_read_with_their_unit(text: str | int, value: float, unit: Unit) -> None:
    assert Duration.parse(text) == Duration(value, unit)


@pytest.mark.parametrize("text", ["10", "ep", "1.5ep", "-1ep", "1.2.3ba", "10epochs", "2dur", ""])
def test_what_is_no_duration_is_refused_with_its_value(text: str) -> None:
    with pytest.raises(ConfigError, match=repr(text)):
        Duration.parse(text)


def test_a_fraction_is_no_length_of_its_own() -> None:
    with pytest.raises(ConfigError, match="of what"):
        parse_total("0.5dur")


def test_a_fraction_of_epochs_grows_within_the_epoch() -> None:
    clock, total = Clock(batches_per_epoch=4), Duration.parse("2ep")
    seen = []
    for _ in range(2):
        for _ in range(4):
            seen.append(clock.fraction_of(total))
            clock.advance(8)
        clock.end_epoch()
    assert seen == [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]
    assert clock.fraction_of(total) == 1
    assert (clock.epoch, clock.batch, clock.sample) == (2, 8, 64)


def test_an_epoch_of_unknown_length_counts_when_it_is_over() -> None:
    clock = Clock()
    clock.advance(8)
    assert clock.fraction_of(Duration.parse("2ep")) == 0
    clock.end_epoch()
    assert clock.fraction_of(Duration.parse("2ep")) == 0.5


def test_a_window_is_open_from_its_start_to_before_its_end() -> None:
    total, window = Duration.parse("10ba"), Window.parse("2ba", "0.5dur")
    is_open = [window.contains(Clock(batch=batch), total) for batch in range(10)]
    assert is_open == [False, False, True, True, True] + 5 * [False]


def test_a_window_to_the_end_is_still_open_at_the_end() -> None:
    total = Duration.parse("2ba")
    assert Window.parse("1ba").contains(Clock(batch=2), total)
