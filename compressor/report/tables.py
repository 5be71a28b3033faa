"""Heat map and bars of the layers as tables: for those who do not see them, or run no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressor.evidence import LayerBill, Sensed
from compressor.report.words import words_of
from compressor.result import Result
from compressor.units import amount, damage_text, name_of, times

BILL = ("params", "macs", "latency_ms")


@dataclass(frozen=True)
class Table:
    """A table in plain texts.

    Attributes:
        name: of it, with how many rows it has.
        heads: of the columns.
        rows: as many cells each.
    """

    name: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def damage_tables(result: Result) -> list[Table]:
    """A table for each technique whose choices were sensed; a row a choice."""
    taken = {(c.technique, c.site, c.label) for c in result.plan}
    groups: dict[str, list[Sensed]] = {}
    for sensed in result.damages:
        groups.setdefault(sensed.technique, []).append(sensed)
    tables = []
    for technique, choices in groups.items():
        costs = list(dict.fromkeys(cost for each in choices for cost in each.saved))
        rows = [
            [
                each.site or "the whole model",
                each.label or "as set",
                damage_text(each.damage),
                *(amount(cost, each.saved.get(cost)) for cost in costs),
                "yes" if (technique, each.site, each.label) in taken else "",
            ]
            for each in choices
        ]
        heads = ["site", "choice", "damage", *(f"saves {name_of(cost)}" for cost in costs), "taken"]
        name = f"{words_of(technique)} as a table, {times(len(rows), 'choice')}"
        tables.append(Table(name, heads, rows))
    return tables


def layer_table(result: Result) -> Table:
    """What each layer costs, before and after; a latency only where one was measured."""
    bills = [bill for row in result.layers for bill in (row.reference, row.compressed)]
    costs = [cost for cost in BILL if any(getattr(bill, cost) is not None for bill in bills)]
    rows = [
        [
            row.name or "(model)",
            row.type,
            *(_change(row.reference, row.compressed, cost) for cost in costs),
            words_of(row.format) or "float",
        ]
        for row in result.layers
    ]
    heads = ["layer", "type", *map(name_of, costs), "format"]
    return Table(f"All layers as a table, {times(len(rows), 'layer')}", heads, rows)


def _change(before: LayerBill, after: LayerBill, cost: str) -> str:
    first, second = (amount(cost, getattr(bill, cost)) for bill in (before, after))
    return first if first == second else f"{first} → {second}"
