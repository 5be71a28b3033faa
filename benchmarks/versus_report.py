"""The tables of docs/versus.md, from what `benchmarks.versus --json` wrote.

python -m benchmarks.versus_report versus.json > docs/versus.md
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import markdown_table

DIGEST_LETTERS = 12
NAMES = {
    "float32": "float reference",
    "int8": "ONNX Runtime static int8",
    "int8, dynamic": "ONNX Runtime dynamic int8",
    "expert": "torch-pruning + fine-tune + static int8, bisected",
    "nncf": "NNCF `quantize_with_accuracy_control`",
    "modelopt": "ModelOpt FastNAS + fine-tune + static int8, bisected",
    "ours": "this package",
    "ours, small": "this package, at most a sixth of the bytes",
}
SPREAD = {  # columns of the first table: the median over the seeds, and the range
    "accuracy %": "accuracy %",
    "drop": "drop",
    "latency ratio, batch 1": "latency ratio, batch 1",
    "latency ratio, batch 32": "batch 32",
    "size ratio": "size ratio",
    "peak MiB": "peak MiB",
    "minutes": "minutes",
}
Row = Mapping[str, Any]


def tables(document: Mapping[str, Any]) -> str:
    """Markdown: for each network what each row came to, then every file with its evidence."""
    rows: Sequence[Row] = document["rows"]
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        parts += [
            f"## {model}",
            markdown_table([overview(name, of_model) for name in unique(of_model, "row")]),
            f"### {model}: every file",
            markdown_table([evidence(row) for row in of_model]),
        ]
    return "\n\n".join([*parts, f"```text\n{record(document)}\n```"]) + "\n"


def overview(name: str, rows: Sequence[Row]) -> dict[str, str]:
    """One row over its seeds: medians, and ranges where seeds differ."""
    own = [row for row in rows if row["row"] == name]
    found = [row for row in own if row["sha256"] is not None]
    return {
        "row": NAMES.get(name, name),
        **{title: over_seeds([row[key] for row in found]) for key, title in SPREAD.items()},
        "within delta": f"{sum(row['within delta'] for row in found)} of {len(own)}",
    }


def evidence(row: Row) -> dict[str, str]:
    """One file: what was judged and timed, and how it came about."""
    digest = row["sha256"]
    spread = [row[f"spread %, batch {size}"] for size in (1, 32)]
    return {
        "row": row["row"],
        "seed": str(row["seed"]),
        "sha256": digest[:DIGEST_LETTERS] if digest else "–",
        "right": right_of(row),
        "ms, batch 1": number(row["ms, batch 1"]),
        "ms, batch 32": number(row["ms, batch 32"]),
        "quartiles apart, %": " / ".join(map(number, spread)),
        "how": row["how"].replace("|", "/") or "–",
    }


def right_of(row: Row) -> str:
    if row["judged"] is None:
        return "–"
    return f"{round(row['accuracy %'] * row['judged'] / 100)} of {row['judged']}"


def over_seeds(values: Sequence[float | None]) -> str:
    """The median, and the range in brackets where it is one.

    >>> over_seeds([2.0, 4.0, 2.5])
    '2.5 (2 – 4)'
    >>> over_seeds([1.0]), over_seeds([])
    ('1', '–')
    """
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    middle, low, high = (number(function(known)) for function in (median, min, max))
    return middle if low == high else f"{middle} ({low} – {high})"


def number(value: float | None) -> str:
    """Three significant digits, or two decimals from 10 on."""
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3g}"


def record(document: Mapping[str, Any]) -> str:
    """Summary, machine, versions and command; folders of this machine are left out."""
    machine, versions = document["machine"], document["versions"]
    lines = [f"{name}: {number(value)}" for name, value in document["summary"].items()]
    kinds = ", ".join([machine["cpu"], f"{machine['cores']} cores", *machine["int8_instructions"]])
    lines += [
        f"machine: {kinds}",
        "versions: " + ", ".join(f"{name} {value}" for name, value in versions.items()),
        f"command: {re.sub(r'(?<= )/[^ ]+', 'PATH', document['command'])}",
    ]
    return "\n".join(lines)


def unique(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    write(tables(json.loads(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()
