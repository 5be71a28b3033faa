"""The records that benchmarks wrote with --json, as the report reads and keeps them.

A record holds `summary`, `rows`, `machine`, `versions`, `seed`, `command` and `minutes`. Kept ones
are named after the benchmark, with more words after it where it was run in several ways, and hold
no folder of the machine they were measured on. `notes.json` beside them has a sentence for those
that cannot be understood alone.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT

NOTES = "notes.json"
KEYS = ("summary", "rows", "machine", "versions", "seed", "command", "minutes")
FOLDER_OF_A_MACHINE = re.compile(r"(?<![\w.'\"/])(?:/|\.\./)[^\s'\",:]+")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """What one run of a benchmark measured, and how.

    Attributes:
        name: of its file, without the suffix; the address of its section in the report.
        benchmark: the program, `versus` for `python -m benchmarks.versus`.
        about: the first line of the program's docstring; empty where the program is gone.
        note: what must be known to read it; may be empty.
        document: as the benchmark wrote it.
    """

    name: str
    benchmark: str
    about: str
    note: str
    document: Mapping[str, Any]

    @property
    def rows(self) -> list[Row]:
        return list(self.document["rows"])

    def option(self, name: str) -> str | None:
        """What the command gave to the option `name`; None where it gave nothing.

        >>> command = "python -m benchmarks.prune --model resnet56 --json FILE"
        >>> Record("prune", "prune", "", "", {"command": command}).option("--model")
        'resnet56'
        """
        words = shlex.split(self.document["command"])
        return next((after for word, after in pairwise(words) if word == name), None)


def read_records(folder: Path) -> list[Record]:
    """All records of `folder`, by name. Files without `summary` and `rows` are not records.

    Raises:
        ValueError: if a record lacks one of `KEYS`, or if its benchmark is not in its command.
    """
    notes = json.loads((folder / NOTES).read_text()) if (folder / NOTES).exists() else {}
    records = []
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or not {"summary", "rows"} <= document.keys():
            continue
        missing = [key for key in KEYS if key not in document]
        if missing:
            raise ValueError(
                f"{path.name} has no {missing[0]!r}. Write it with the --json of its benchmark."
            )
        benchmark = benchmark_of(document["command"])
        note = notes.get(path.stem, "")
        records.append(Record(path.stem, benchmark, purpose(benchmark), note, document))
    return records


def keep(source: Path, folder: Path, name: str | None = None) -> Path:
    """Copy a record into `folder` without folders of this machine and what is not in `KEYS`.

    Args:
        source: what a benchmark wrote.
        folder: where it is kept.
        name: of the file, without suffix; default: that of the benchmark.
    """
    document = json.loads(source.read_text())
    kept = {key: without_folders(document[key]) for key in KEYS}
    path = folder / f"{name or benchmark_of(kept['command'])}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")
    return path


def without_folders(value: Any) -> Any:
    """The value with PATH for absolute paths in its strings, and such that leave the repository.

    >>> without_folders("python -m benchmarks.versus --data /data/x --json ../out.json --seeds 0")
    'python -m benchmarks.versus --data PATH --json PATH --seeds 0'
    >>> without_folders([{"why": "there is no /home/me/model.onnx: u8/s8", "ms": 2.0}])
    [{'why': 'there is no PATH: u8/s8', 'ms': 2.0}]
    """
    if isinstance(value, str):
        return FOLDER_OF_A_MACHINE.sub("PATH", value)
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    if isinstance(value, dict):
        return {key: without_folders(each) for key, each in value.items()}
    return value


def benchmark_of(command: str) -> str:
    """The program of a command.

    >>> benchmark_of("OMP_NUM_THREADS=1 python -m benchmarks.versus --quick")
    'versus'
    """
    found = re.search(r"-m benchmarks\.(\w+)", command)
    if found is None:
        raise ValueError(
            f"The command {command!r} runs no program of `benchmarks`. "
            "Start the benchmark as `python -m benchmarks.<name>`."
        )
    return found.group(1)


def purpose(benchmark: str) -> str:
    """The first line of the program's docstring, without importing it."""
    path = ROOT / "benchmarks" / f"{benchmark}.py"
    if not path.exists():
        return ""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
