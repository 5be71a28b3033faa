"""`compressor sensitivity`: what each choice of a job would cost and save, without any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compressor.cli.endings import only_json, print_json
from compressor.cli.jobs import read_job
from compressor.evidence import Sensed
from compressor.logs import set_verbosity
from compressor.units import amount, damage_text, name_of


def sense_job(
    named: str, overrides: Mapping[str, Any], run_dir: Path | None, *, most: int, as_json: bool
) -> None:
    """Print the damage map of a job, what does least damage for what it saves first.

    Args:
        named: a YAML file or a factory; see `read_job`.
        overrides: entries of its configuration.
        run_dir: where the map is kept; None: the one that the job names, or one under runs/.
        most: rows of the table; 0 is all.
        as_json: print all of it as JSON.
    """
    set_verbosity("warning")
    with only_json(as_json):
        engine, folder = read_job(named, overrides).open(run_dir)
        rows = ranked(engine.sense())
    if as_json:
        print_json({"run_dir": str(folder), "choices": [row.to_json() for row in rows]})
        return
    shown = rows[:most] if most else rows
    out = Console()
    out.print(_table(shown))
    if len(shown) < len(rows):
        out.print(f"{len(rows) - len(shown)} more choices: --all shows them.")
    out.print(
        "Damage is the divergence of the outputs before any training; 0 is none. Kept in "
        f"{folder}: `compressor run` with the same run_dir reuses it.",
        markup=False,
    )


def ranked(rows: Sequence[Sensed]) -> list[Sensed]:
    """What saves most for its damage first; what saves nothing last."""

    def worth(row: Sensed) -> tuple[bool, float]:
        saved = next(iter(row.saved.values()), 0.0)
        return saved <= 0, row.damage / saved if saved > 0 else row.damage

    return sorted(rows, key=worth)


def _table(rows: Sequence[Sensed]) -> Table:
    resources = list(rows[0].saved) if rows else []
    table = Table(title="What each choice alone would do")
    for name in ("technique", "site", "choice"):
        table.add_column(name, overflow="fold")
    for name in ("damage", *(f"saves {name_of(resource)}" for resource in resources)):
        table.add_column(name, justify="right")
    for row in rows:
        saved = [_dressed(resource, row.saved[resource]) for resource in resources]
        cells = (row.technique, row.site, row.label, damage_text(row.damage), *saved)
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))
    return table


def _dressed(resource: str, value: float) -> str:
    if resource == "latency_ms":
        return f"{1000 * value:.3g} µs"
    return amount(resource, value)
