"""What a person reads at the end of a run."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from compressor.report.console import render, rows, variant_row, verdict
from compressor.result import Agreement, Cost, Interval, Plan, Result, VariantRecord
from tests.test_result import CERTIFICATE, NARROW, REMOVE, predicted


def printed(result: Result) -> str:
    out = io.StringIO()
    render(result, Console(file=out, width=120))
    return out.getvalue()


def test_the_table_says_before_after_and_change() -> None:
    assert rows(CERTIFICATE) == [
        ("accuracy", "91.00", "90.50", "-0.50"),
        ("latency in ONNX Runtime", "1.00 ms", "0.500 ms", "2.0x faster"),
        ("size on disk", "1.00 kB", "250 B", "4.0x smaller"),
        ("MACs", "150 MACs", "100 MACs", "1.5x fewer"),
        ("parameters", "60", "50", "1.2x fewer"),
    ]


def test_what_became_worse_is_called_so() -> None:
    worse = replace(
        CERTIFICATE, metric=91.5, latency_ratio=0.5, size_ratio=0.8, target={"runtime": "eager"}
    )
    assert rows(worse)[0][3] == "+0.50"
    assert rows(worse)[1][3] == "2.0x slower"
    assert rows(worse)[2][3] == "1.2x larger"


def test_the_row_of_the_latency_says_how_the_model_was_called() -> None:
    target = {"runtime": "onnxruntime", "threads": 1, "batch_size": 32}
    row = rows(replace(CERTIFICATE, target=target))[1]
    assert row[0] == "latency in ONNX Runtime (1 thread, 32 samples)"


def test_the_first_line_is_the_certificate_in_short() -> None:
    sure = replace(CERTIFICATE, interval=Interval(0.1, 0.9, 0.95, 64, 5))
    first = printed(Result(None, sure, [], [], {}, Plan())).splitlines()[0]
    assert first == (
        "91.00 → 90.50, drop 0.50 ± 0.40, within 1.0, 2.0x faster in ONNX Runtime, 4.0x smaller"
    )
    lower = Result(None, CERTIFICATE, [], [], {}, Plan(), info={"config": {"metric_mode": "min"}})
    assert "fall 0.50" in printed(lower).splitlines()[0]


def test_the_frontier_is_shown_where_there_is_a_choice() -> None:
    cheap = VariantRecord(
        "cheap", Plan((NARROW,)), "done", {"accuracy": 90.0}, Cost(10, 20, 2000, 0.25), epochs=3
    )
    dear = replace(cheap, id="dear", metrics={"accuracy": 90.9})
    assert variant_row(cheap, CERTIFICATE) == (
        "cheap",
        "90.00",
        "0.250 ms",
        "2.00 kB",
        "20 MACs",
        "3",
    )
    text = printed(Result(None, CERTIFICATE, [cheap, dear], [cheap, dear], {}, Plan()))
    assert "no variant beats these" in text
    assert "90.90" in text
    assert "beats" not in printed(Result(None, CERTIFICATE, [cheap], [cheap], {}, Plan()))


def test_what_was_done_is_said_in_words() -> None:
    text = printed(Result(None, CERTIFICATE, [], [], {}, Plan((NARROW, REMOVE))))
    assert "Done to it: 1 block removal, 1 channel pruning." in text


def test_files_are_printed_with_their_sizes(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"x" * 1500)
    artifacts = {"model_dir": tmp_path / "model", "onnx": tmp_path / "gone.onnx"}
    text = printed(Result(None, CERTIFICATE, [], [], artifacts, Plan()))
    assert "1.50 kB" in text


def test_a_result_outside_delta_is_not_called_within() -> None:
    assert "within delta 1. Metric, latency and size were measured on the exported file" in verdict(
        CERTIFICATE
    )
    assert "measured as deployed, in PyTorch" in verdict(
        replace(CERTIFICATE, target={"runtime": "eager"})
    )
    assert "NOT within" not in verdict(CERTIFICATE)
    assert "NOT within delta 1" in verdict(replace(CERTIFICATE, within_delta=False))


def test_the_interval_counts_evaluations_and_not_variants() -> None:
    """A variant is evaluated after each epoch: 11 evaluations are not 11 variants."""
    sure = replace(CERTIFICATE, interval=Interval(0.1, 0.9, 0.95, 64, 11))
    assert "widened for 11 evaluations of compressed models there" in verdict(sure)
    assert "variants" not in verdict(sure)
    assert "lies between 0.1 and 0.9, all of it within delta" in verdict(sure)
    wide = replace(CERTIFICATE, interval=Interval(0.1, 1.9, 0.95, 64, 11))
    assert "not all of it within delta" in verdict(wide)


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
