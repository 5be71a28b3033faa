from __future__ import annotations

import pytest

from compressor.errors import ConfigError
from compressor.training import Clock, Duration
from compressor.training.ramp import progress


def way(clock: Clock, total: str, start: str, end: str) -> float:
    return progress(clock, *(Duration.parse(text) for text in (total, start, end)))


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        ("0dur", "1dur", 0.35),
        ("0.3dur", "0.5dur", 0.25),
        ("0.5dur", "1dur", 0.0),
        ("0.1dur", "0.2dur", 1.0),
        ("0.35dur", "0.35dur", 1.0),
        ("0.4dur", "0.4dur", 0.0),
        ("10ba", "18ba", 0.5),
        ("3ep", "4ep", 0.5),
        ("0ep", "28ba", 0.5),
        ("0dur", "7ep", 0.5),
        ("0.1dur", "6ep", 0.5),
        ("4ba", "1dur", 10 / 36),
    ],
)
def test_the_part_between_two_moments(start: str, end: str, expected: float) -> None:
    clock = Clock(epoch=3, batch=14, sample=140, batch_in_epoch=2, batches_per_epoch=4)
    assert way(clock, "10ep", start, end) == pytest.approx(expected)


def test_epochs_are_parts_of_a_training_that_counts_batches() -> None:
    clock = Clock(epoch=1, batch=6, batch_in_epoch=2, batches_per_epoch=4)
    assert way(clock, "8ba", "1ep", "1dur") == pytest.approx(0.5)


def test_moments_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ConfigError, match="'100sp' cannot be compared with a training of '2ep'"):
        way(Clock(), "2ep", "100sp", "1dur")
    with pytest.raises(ConfigError, match="'5ba'"):
        way(Clock(), "2ep", "5ba", "1dur")  # a loader without a length
