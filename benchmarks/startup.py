"""What `import compressor` and `compressor --help` cost, next to `import torch`.

Every sample is a fresh process; the kinds take turns, so that a busy moment hits all of them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.common import ROOT, finish, make_parser

PROGRAMS = {
    "python, nothing imported": ["-c", "pass"],
    "import compressor": ["-c", "import compressor"],
    "compressor --help": ["-m", "compressor", "--help"],
    "import torch": ["-c", "import torch"],
    "from compressor import Engine": ["-c", "from compressor import Engine"],
}
BASE = "import torch"


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    started = time.monotonic()
    rows = measure(rounds=2 if arguments.quick else 11)
    summary = {f"{row['program']} / {BASE}": row[f"of `{BASE}`"] for row in rows}
    finish(rows, summary, arguments, started)


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each program: the median of `rounds` processes, after one that warms the disk."""
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for number in range(rounds + 1):
        for name, program in PROGRAMS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *program], cwd=ROOT, check=True, capture_output=True)
            if number:
                seconds[name].append(time.perf_counter() - began)
    base = statistics.median(seconds[BASE])
    return [
        {
            "program": name,
            "median s": statistics.median(values),
            "lowest s": min(values),
            "highest s": max(values),
            f"of `{BASE}`": statistics.median(values) / base,
        }
        for name, values in seconds.items()
    ]


if __name__ == "__main__":
    main()
