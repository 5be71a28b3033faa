"""What every benchmark shares: options, the record of a run, a Markdown table, a fair timer."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.hardware import describe_machine

ROOT = Path(__file__).resolve().parents[1]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark: --quick, --data, --json, --seed."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: the numbers mean little"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("COMPRESSOR_DATA"),
        help="folder of the real data and weights; default: $COMPRESSOR_DATA",
    )
    parser.add_argument("--json", type=Path, help="write the numbers and how they came about here")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def finish(
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, float],
    arguments: argparse.Namespace,
    started: float,
) -> None:
    """Print the rows as a table with summary and record below; write all where --json says.

    Args:
        rows: one mapping a row, with the same keys in the same order.
        summary: the few numbers that say how it went.
        arguments: of `make_parser`.
        started: `time.monotonic()` at the beginning.
    """
    record = {
        **describe_machine(),
        "seed": arguments.seed,
        "command": _command(),
        "minutes": round((time.monotonic() - started) / 60, 2),
    }
    print(markdown_table(rows))
    print()
    for name, value in {**summary, **record}.items():
        print(f"{name}: {_dress(value)}")
    if arguments.json:
        document = {"summary": dict(summary), "rows": [dict(row) for row in rows], **record}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; floats with three significant digits or two decimals, whichever is more."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_dress(row[name]) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int = 9, block_seconds: float = 0.25
) -> dict[str, float]:
    """Median milliseconds of one call of each, timed in alternating blocks of calls.

    Blocks, since alternating call by call cools the caches; alternating, since clocks drift. The
    first round warms up and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            milliseconds = _time_block(call, block_seconds)
            if number:
                times[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _time_block(call: Callable[[], object], seconds: float) -> float:
    started = now = time.perf_counter()
    count = 0
    while now - started < seconds:
        call()
        count += 1
        now = time.perf_counter()
    return 1000 * (now - started) / count


def _dress(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3g}"


def _command() -> str:
    script = Path(sys.argv[0]).resolve()
    module = ".".join(script.relative_to(ROOT).with_suffix("").parts)
    return shlex.join(["python", "-m", module, *sys.argv[1:]])
