"""What the numbers in the documentation pass through."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.common import ROOT, finish, interleave, make_parser, markdown_table


def test_the_table_keeps_two_decimals_of_a_percentage() -> None:
    rows = [{"row": "a", "%": 91.642, "ms": 0.42345}, {"row": "b", "%": 100.0, "ms": 12345.678}]
    assert markdown_table(rows).splitlines() == [
        "| row | % | ms |",
        "|---|---|---|",
        "| a | 91.64 | 0.423 |",
        "| b | 100.00 | 12345.68 |",
    ]


def test_a_call_that_takes_longer_measures_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def lasting(seconds: float) -> Callable[[], None]:
        def call() -> None:
            now[0] += seconds

        return call

    times = interleave({"short": lasting(0.002), "long": lasting(0.006)}, block_seconds=0.012)
    assert times == {"short": pytest.approx(2), "long": pytest.approx(6)}


def test_the_json_has_what_every_benchmark_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "some.py"), "--quick"])
    arguments = make_parser("A benchmark.").parse_args(["--json", str(tmp_path / "out.json")])
    finish([{"row": "a", "ms": 1.0}], {"ratio": 2.0}, arguments, started=time.monotonic())
    written = json.loads((tmp_path / "out.json").read_text())
    assert {"summary", "rows", "machine", "versions", "seed", "command"} <= set(written)
    assert written["summary"] == {"ratio": 2.0}
    assert written["command"] == "python -m benchmarks.some --quick"
