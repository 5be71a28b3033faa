"""The page docs/distributed/scaling.md, from what `benchmarks.scaling --json` wrote.

python -m benchmarks.scaling_report scaling.json > docs/distributed/scaling.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import markdown_table
from benchmarks.versus_report import record

Row = Mapping[str, Any]

HEAD = """# What scales, and what does not

What `python -m benchmarks.scaling` measured with two processes on one machine, one thread each, on
ResNet-20, and what is reckoned from that for more.

- **Variants by workers of Ray** are independent; what is serial is their timing, which this process
  does alone, one after the other. The shorter a variant is trained, the more that counts.
- **One variant in several processes** exchanges as many bytes in every step as the model has, so
  small models gain least on slow networks. Sensing, evaluation, timing and export are done by rank
  0 alone and do not get faster.
- **A wider round** knows less: it asks for plans before the others of the round have answered. That
  is not in these hours; `python -m benchmarks.search_worlds --width 8` has it.
"""
SEARCH, RECKONED = "search of 256 variants", "DDP, reckoned, "


def page(document: Mapping[str, Any]) -> str:
    """All of it."""
    rows: Sequence[Row] = document["rows"]
    kinds = (SEARCH, "its efficiency", RECKONED)
    measured = [row for row in rows if not row["what"].startswith(kinds)]
    return "\n".join(
        [
            HEAD,
            "## Measured\n",
            markdown_table(measured),
            "\n## Reckoned: a search of 256 variants, times drawn from those measured\n",
            markdown_table(search_rows(rows)),
            "\n## Reckoned: efficiency of DDP, a ring of all-reduces\n",
            markdown_table(network_rows(rows)),
            f"\n```text\n{record(document)}\n```",
        ]
    )


def search_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Hours and efficiency by the number of workers."""
    hours, parts = (
        {r["processes"]: r["value"] for r in of(rows, name)} for name in (SEARCH, "its")
    )
    return [{"workers": n, "hours": hours[n], "efficiency": parts[n]} for n in hours]


def network_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Efficiency by the number of processes, a column for each network and way."""
    reckoned = of(rows, RECKONED)
    names = dict.fromkeys(row["what"] for row in reckoned)
    by_place = {(row["what"], row["processes"]): row["value"] for row in reckoned}
    return [
        {
            "processes": n,
            **{name.removeprefix(RECKONED): by_place.get((name, n), "") for name in names},
        }
        for n in dict.fromkeys(row["processes"] for row in reckoned)
    ]


def of(rows: Sequence[Row], name: str) -> list[Row]:
    """Those that begin so."""
    return [row for row in rows if row["what"].startswith(name)]


if __name__ == "__main__":
    print(page(json.loads(Path(sys.argv[1]).read_text())))
