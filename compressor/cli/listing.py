"""`compressor list`: the techniques, algorithms and targets that there are, from their classes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from compressor.cli.endings import print_json
from compressor.targets import TARGETS
from compressor.techniques import TECHNIQUES
from compressor.training import algorithms
from compressor.training.algorithm import Algorithm

HEADS = {"summary": "what it does"}
Row = dict[str, str]


def list_kinds(kinds: Sequence[str], *, as_json: bool) -> None:
    """Print the kinds that are wanted: "techniques", "algorithms", "targets"."""
    found = {kind: KINDS[kind]() for kind in kinds}
    if as_json:
        print_json(found)
        return
    out = Console()
    for kind, rows in found.items():
        table = Table(title=kind.capitalize())
        for column in rows[0]:
            table.add_column(HEADS.get(column, column), overflow="fold")
        for row in rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in row.values()))
        out.print(table)


def technique_rows() -> list[Row]:
    """In the order in which they are applied."""
    classes = sorted(TECHNIQUES, key=lambda cls: cls.stage)
    return [
        {"name": cls.name, "stage": cls.stage.name.lower(), "summary": _summary(cls)}
        for cls in classes
    ]


def algorithm_rows() -> list[Row]:
    """By name."""
    classes = [
        value
        for _, value in sorted(vars(algorithms).items(), key=lambda item: item[0].lower())
        if inspect.isclass(value) and issubclass(value, Algorithm) and value is not Algorithm
    ]
    return [{"name": cls.__name__, "summary": _summary(cls)} for cls in classes]


def target_rows() -> list[Row]:
    """In the order of preference."""
    return [
        {"name": name, "devices": ", ".join(cls.devices), "summary": _summary(cls)}
        for name, cls in TARGETS.items()
    ]


KINDS = {"techniques": technique_rows, "algorithms": algorithm_rows, "targets": target_rows}


def _summary(cls: Any) -> str:
    """What its card says, or the first line of its docstring."""
    card = getattr(cls, "card", None)
    text: str = card.summary if card is not None else (inspect.getdoc(cls) or "")
    return text.split("\n\n")[0].replace("\n", " ")
