"""Figures as people read them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from compressor.report.words import amount, change_text, headline, metric_text, ratio_text
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
        ("params", None, ""),
        ("latency_ms", math.nan, ""),
    ],
)
def test_costs_have_units(resource: str, value: float | None, text: str) -> None:
    assert amount(resource, value) == text


def test_no_number_is_unknown() -> None:
    assert metric_text(math.nan, 1.0) == "unknown"
    assert ratio_text(math.inf, "faster", "slower") == "unknown times faster"
