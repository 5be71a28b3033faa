"""Figures as people read them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from compressor.report.words import change_text, headline, metric_text
from compressor.units import amount, change_of, gain_text, ratio_text, significant, with_unit
from tests.report.results import CERTIFICATE


def test_the_headline_says_before_after_drop_limit_speed_and_size() -> None:
    assert headline(CERTIFICATE) == (
        "91.64 → 90.90, drop 0.74 ± 0.40, within 1.0, 3.1x faster in ONNX Runtime, 6.8x smaller"
    )


def test_a_fraction_is_written_with_its_own_decimals() -> None:
    fraction = replace(
        CERTIFICATE, metric=0.909, reference_metric=0.9164, delta=0.01, interval=None
    )
    text = headline(fraction)
    assert text.startswith("0.9164 → 0.9090, drop 0.0074, within 0.01, ")


def test_what_did_not_come_out_is_said_as_loudly() -> None:
    poor = replace(
        CERTIFICATE,
        metric=90.0,
        within_delta=False,
        latency_ratio=0.5,
        size_ratio=0.8,
        interval=None,
        target={"runtime": "eager"},
    )
    assert headline(poor) == (
        "91.64 → 90.00, drop 1.64, NOT within 1.0, 2.0x slower in PyTorch, 1.2x larger"
    )


def test_a_metric_that_got_better_is_a_gain_and_an_error_rises() -> None:
    gained = replace(CERTIFICATE, metric=92.0, interval=None)
    assert change_text(gained) == "gain 0.36"
    assert change_text(gained, is_larger_better=False) == "rise 0.36"
    assert change_text(replace(CERTIFICATE, interval=None), is_larger_better=False) == "fall 0.74"


def test_the_interval_lies_within_what_is_written_after_the_sign() -> None:
    assert CERTIFICATE.interval is not None
    lopsided = replace(CERTIFICATE, interval=replace(CERTIFICATE.interval, low=-1.0, high=0.9))
    assert change_text(lopsided) == "drop 0.74 ± 1.7"


@pytest.mark.parametrize(
    ("resource", "value", "text"),
    [
        ("latency_ms", 0.017629, "0.0176 ms"),
        ("latency_ms", 1234.5, "1234 ms"),
        ("size_bytes", 2_892_218, "2.89 MB"),
        ("macs", 7_560_128, "7.56 MMACs"),
        ("params", 999, "999"),
        ("params", 999_950, "1.00 M"),  # and not 1000 k
        ("params", 999_400, "999 k"),
        ("size_bytes", 1_500_000_000_000, "1.50 TB"),
        ("params", None, ""),
        ("latency_ms", math.nan, ""),
    ],
)
def test_costs_have_units(resource: str, value: float | None, text: str) -> None:
    assert amount(resource, value) == text


@pytest.mark.parametrize(
    ("delta", "text"),
    [(0.05, "0.9164"), (0.2, "0.916"), (0.02, "0.9164"), (0.01, "0.9164"), (0.001, "0.91637")],
)
def test_a_hundredth_of_delta_shows_in_the_metric(delta: float, text: str) -> None:
    """For a delta that is no power of ten it did not: 0.05 had three decimals."""
    assert metric_text(0.91637, delta) == text
    hundredth = metric_text(0.5 + delta / 100, delta)
    assert hundredth != metric_text(0.5, delta)


def test_a_ratio_has_the_words_of_its_cost() -> None:
    assert change_of("latency_ms", 2.71) == "2.7x faster"
    assert gain_text("size_bytes", 0.91) == "1.1x larger"
    assert gain_text("macs", 0.5) == "2.0x more MACs"
    assert change_of("params", 1.02) == "1.02x fewer"


def test_a_number_that_rounds_to_another_power_has_as_many_digits() -> None:
    assert significant(9.996, 3) == "10.0"
    assert significant(0.09996, 3) == "0.100"
    assert with_unit(999.96, "B") == "1.00 kB"


def test_no_number_is_unknown() -> None:
    assert metric_text(math.nan, 1.0) == "unknown"
    assert ratio_text(math.inf, "faster", "slower") == "unknown times faster"
