"""What a person reads at the end of a run."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from compressor.report.console import dress, render, rows, verdict
from compressor.result import Agreement, Plan, Result
from tests.test_result import CERTIFICATE, NARROW, predicted


def printed(result: Result) -> str:
    out = io.StringIO()
    render(result, Console(file=out, width=120))
    return out.getvalue()


def test_the_table_says_before_after_and_ratio() -> None:
    assert rows(CERTIFICATE)[0] == ("accuracy", "91", "90.5", "-0.5")
    assert rows(CERTIFICATE)[1] == (
        "latency (onnxruntime)",
        "1.000 ms",
        "0.500 ms",
        "2.00x faster",
    )
    assert rows(CERTIFICATE)[2][1:] == ("1 kB", "250 B", "4.00x smaller")


def test_a_result_outside_delta_is_not_called_within() -> None:
    assert "within delta 1, measured on the exported file" in verdict(CERTIFICATE)
    assert "measured in eager" in verdict(replace(CERTIFICATE, target={"runtime": "eager"}))
    assert "NOT within" not in verdict(CERTIFICATE)
    assert "NOT within delta 1" in verdict(replace(CERTIFICATE, within_delta=False))


def test_files_notes_and_losses_are_printed_as_they_are() -> None:
    artifacts = {"onnx": Path("/some/[bold]folder/model.onnx")}
    result = Result(None, CERTIFICATE, [], [], artifacts, Plan(), lost=("[red]a loss",))
    text = printed(result)
    for part in ("/some/[bold]folder/model.onnx", "a note", "[red]a loss"):
        assert part in text


def test_the_error_of_the_predicted_latencies_is_said_where_there_are_some() -> None:
    variants = [predicted(1.5, 1.0, NARROW)]
    assert "median error of 50 %" in printed(Result(None, CERTIFICATE, variants, [], {}, Plan()))
    assert "median error" not in printed(Result(None, CERTIFICATE, [], [], {}, Plan()))


def test_how_often_the_quantized_file_answers_otherwise_is_said() -> None:
    some = replace(CERTIFICATE, agreement=Agreement(0.005, 0.025, 200))
    text = " ".join(printed(Result(None, some, [], [], {}, Plan())).split())
    assert "Of 200 samples the quantized file names 0.5 % otherwise than its simulation" in text
    assert "2.5 % otherwise than the reference" in text
    none = replace(CERTIFICATE, agreement=None)
    assert "otherwise" not in printed(Result(None, none, [], [], {}, Plan()))


def test_why_nothing_was_compressed_is_said() -> None:
    result = Result(None, CERTIFICATE, [], [], {}, Plan(), reason="no time was left")
    assert "The reference itself is the answer: no time was left." in printed(result)


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0 "), (999, "999 "), (1000, "1 k"), (2_500_000, "2.5 M")]
)
def test_numbers_are_dressed(value: float, expected: str) -> None:
    assert dress(value) == expected
